"""The decode engine against the search in PyTorch: every variant, instruction sets, threads, freshness, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_helpers import Case, compare, differences, sharpen
from helpers import needs_cpp
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.decode import engine

pytestmark = needs_cpp
HERE = Path(__file__).resolve().parent
SIZES: dict[str, Any] = {
    "src_vocab": 40,
    "tgt_vocab": 37,
    "d_model": 24,
    "nhead": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "max_len": 24,
}


def model(**options: Any) -> Any:
    made = dl.DepthLSTMTransformer(**{**SIZES, **options})
    sharpen(made)
    return made.eval()


def sources(batch: int = 4, length: int = 9) -> Tensor:
    src = torch.randint(3, 40, (batch, length))
    for row in range(1, batch):
        src[row, 1 + row % length :] = 0
    return src


def by_torch(each: Any, *arguments: Any, **options: Any) -> Any:
    with dl.use_backend("reference"):
        return each.generate(*arguments, **options)


def same(each: Any, src: Tensor, beams: int = 1, **options: Any) -> bool:
    return torch.equal(each.generate(src, 12, beams, **options), by_torch(each, src, 12, beams, **options))


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_random_models(first: int) -> None:
    found, said = compare(range(first, first + 50))
    assert found > 100
    assert said > 100  # one token said over and over would test nothing


@pytest.mark.slow
def test_many_random_models() -> None:
    compare(range(150, 1000))


ISAS = [
    isa
    for isa, flag in (("generic", ""), ("avx2", "avx2"), ("avx512", "avx512vl"), ("avx512_bf16", "avx512_bf16"))
    if not flag or (Path("/proc/cpuinfo").exists() and f" {flag}" in Path("/proc/cpuinfo").read_text())
]


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa: str) -> None:
    script = "import decode_helpers; decode_helpers.compare(range(1000, 1030))"
    path = os.pathsep.join([str(HERE), str(Path(dl.__file__).resolve().parents[1])])
    environment = {**os.environ, "DEPTHLSTM_CPU_ISA": isa, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("beams", [1, 4])
def test_threads_take_sources_of_their_own(threads: int, beams: int) -> None:
    each, src, before = model(), sources(5), torch.get_num_threads()
    alone = torch.cat([nn.functional.pad(each.generate(row[None], 12, beams), (0, 12))[:, :12] for row in src])
    torch.set_num_threads(threads)
    try:
        found = each.generate(src, 12, beams)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(nn.functional.pad(found, (0, 12 - found.shape[1])), alone)


def test_a_batch_may_be_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    each, src = model(), sources(5)
    for beams in (1, 3):
        wanted = each.generate(src, 12, beams, return_scores=True)
        monkeypatch.setattr(engine, "CACHE_BYTES", 1)
        found = each.generate(src, 12, beams, return_scores=True)
        monkeypatch.undo()
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_long_searches_and_sources(beams: int) -> None:
    """More positions than a block of keys, and more calls than one."""
    each = model(max_len=150)
    src = torch.randint(3, 40, (9, 150))
    src[1, 40:] = 0
    case = Case(each, src, None, 150, beams, 1.0)
    found, wanted = case.generate(), by_torch(each, src, 150, beams, return_scores=True)
    assert not differences(case, found, wanted)


def test_wide_layers() -> None:
    """Widths that fill every kind of strip, and rows in whole and partial groups."""
    each = model(d_model=160, nhead=2, tgt_vocab=100)
    for batch in (1, 2, 3, 7, 8, 9, 17):
        src = torch.randint(3, 40, (batch, 5))
        case = Case(each, src, None, 9, 1, 1.0)
        assert not differences(case, case.generate(), by_torch(each, src, 9, return_scores=True))


def test_ties_go_to_the_smaller_id() -> None:
    each = model(tie_output=False)
    with torch.no_grad():
        each.output.weight[:] = each.output.weight[5:6]
    for beams in (1, 2, 4):
        assert same(each, sources(), beams)
        assert each.generate(sources(), 3, 1).unique().tolist() == [0]


@pytest.mark.parametrize("beams", [1, 2, 3, 5, 8])
def test_ties_beside_other_logits_go_to_the_smaller_id(beams: int) -> None:
    """Nine different logits for 99 words. Two steps: the second tells by its scores which of equal words went on."""
    for seed in range(12):
        torch.manual_seed(seed)
        each, kinds = model(tie_output=False, tgt_vocab=99), torch.randint(0, 9, (99,))
        with torch.no_grad():  # one product a logit: equal rows make equal sums, in PyTorch as here
            each.output.weight.zero_()
            each.output.weight[torch.arange(99), torch.randint(0, 24, (9,))[kinds]] = torch.randn(9)[kinds]
        src = sources(5)
        case = Case(each, src, None, 2, beams, 1.0)
        assert not differences(case, case.generate(), by_torch(each, src, 2, beams, return_scores=True))
        if beams == 1:
            first = {int((kinds == kind).nonzero()[0]) for kind in kinds.unique()}
            assert set(each.generate(src, 12).unique().tolist()) <= first | {each.pad_id}


def test_a_source_of_padding_alone() -> None:
    each, src = model(), sources()
    src[2] = 0
    assert same(each, src)
    assert same(each, src, 3)
    assert same(each, src, src_key_padding_mask=torch.ones(src.shape, dtype=torch.bool))
    assert same(each, src, src_key_padding_mask=torch.full(src.shape, -torch.inf))


def test_training_mode_means_nothing() -> None:
    each, src = model(), sources()
    wanted = each.generate(src, 12)
    assert torch.equal(each.train().generate(src, 12), wanted)
    assert dl.last_backend() == "cpp"
    assert each.training


def changed_in_place(each: Any) -> None:
    with torch.no_grad():
        each.decoder.layers[0].cell.gates.weight.neg_()


def changed_by_data(each: Any) -> None:
    each.decoder.layers[1].self_attn.out_proj.bias.data.add_(1)


def changed_by_one_number(each: Any) -> None:
    each.output.weight.data.view(-1)[-1] += 1000


def changed_by_optimiser(each: Any) -> None:
    for parameter in each.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(each.parameters(), 0.1, fused=True).step()


def changed_by_loading(each: Any) -> None:
    each.load_state_dict(model().state_dict())


def changed_by_assignment(each: Any) -> None:
    each.encoder.norm = nn.LayerNorm(24, elementwise_affine=False)


def changed_option(each: Any) -> None:
    each.decoder.layers[0].cell.eps = 0.5


def changed_token(each: Any) -> None:
    each.eos_id = int(each.generate(sources(1), 1)[0, 0])


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        changed_by_data,
        changed_by_one_number,
        changed_by_optimiser,
        changed_by_loading,
        changed_by_assignment,
        changed_option,
        changed_token,
    ],
)
def test_weights_are_never_stale(change: Any) -> None:
    each, src = model(), sources()
    served = dl.compile_decoder(each)
    before = each.generate(src, 12, 2, return_scores=True)
    change(each)
    after = each.generate(src, 12, 2, return_scores=True)
    assert not torch.equal(after[1], before[1])
    torch.testing.assert_close(after[1], by_torch(each, src, 12, 2, return_scores=True)[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(served.generate(src, 12, 2, return_scores=True)[1], before[1])  # a copy of what was


def test_a_model_is_packed_once() -> None:
    each = model()
    each.generate(sources(), 3)
    first = engine._packed[each].blob.data_ptr()
    each.generate(sources(), 3)
    assert engine._packed[each].blob.data_ptr() == first


def test_the_copy_dies_with_its_model() -> None:
    each = model()
    each.generate(sources(), 3)
    number = len(engine._packed)
    del each
    assert len(engine._packed) == number - 1


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_is_one_clear_error(beams: int) -> None:
    each, src = model(), sources()
    with torch.no_grad():
        each.decoder.layers[1].cell.norm.bias[2, 3] = torch.nan
    with pytest.raises(ValueError, match="logits must be numbers; found NaN for source 0 at token 1"):
        each.generate(src, 12, beams)
    each = model()
    with torch.no_grad():
        each.src_embedding.weight[39] = torch.nan
    src.clamp_(max=38)[2, 1] = 39
    with pytest.raises(ValueError, match="found NaN for source 2 at token 1"):
        each.generate(src, 12, beams)
    with pytest.raises(ValueError, match="found NaN for source 2 at token 1"):
        by_torch(each, src, 12, beams)


@pytest.mark.parametrize("beams", [1, 3])
def test_one_logit_that_is_nan_is_seen(beams: int) -> None:
    each = model(tie_output=False)
    with torch.no_grad():
        each.output.weight[7] = torch.nan
    with pytest.raises(ValueError, match="found NaN for source 0 at token 1"):
        each.generate(sources(), 5, beams)


def test_infinite_logits_are_no_numbers() -> None:
    each = model(tie_output=False)
    with torch.no_grad():
        each.output.weight[7] = 3e38
        each.decoder.norm.bias.fill_(9)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="logits must be numbers"):
            each.generate(sources(), 5, beams)
        with pytest.raises(ValueError, match="logits must be numbers"):
            by_torch(each, sources(), 5, beams)


def test_bad_arguments_are_named_as_ever() -> None:
    each = model()
    with pytest.raises(ValueError, match="src must hold ids from 0 to 39; found 40"):
        each.generate(torch.tensor([[3, 40]]))
    with pytest.raises(ValueError, match="src must have at most max_len, 24, tokens; found 25"):
        each.generate(torch.ones(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match="neither of them 0"):
        each.generate(torch.ones(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="src_key_padding_mask must have shape"):
        each.generate(sources(), src_key_padding_mask=torch.zeros(4, 8, dtype=torch.bool))


def ran(each: Any, src: Tensor) -> str:
    engine._logged.clear()
    each.generate(src, 2)
    return "engine" if each in engine._packed else "torch"


def hook(each: Any) -> None:
    each.decoder.layers[0].cross_attn.register_forward_hook(lambda *given: None)


def own_step(each: Any) -> None:
    step = each.decoder.step
    each.decoder.step = lambda *given: step(*given)


def wrapped(each: Any) -> None:
    each.decoder.layers[0].self_attn.out_proj = nn.Sequential(each.decoder.layers[0].self_attn.out_proj)


def renormed(each: Any) -> None:
    each.decoder.norm = nn.Identity()


def subclassed(each: Any) -> None:
    each.__class__ = type("Mine", (dl.DepthLSTMTransformer,), {"__module__": "mine"})


def noisy(each: Any) -> None:
    each.input_dropout = nn.Identity()


@pytest.mark.parametrize("change", [hook, own_step, wrapped, renormed, subclassed, noisy])
def test_other_models_run_in_pytorch(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    each, src = model(), sources()
    change(each)
    assert ran(each, src) == "torch"
    each.generate(src, 2)
    lines = [record.message for record in caplog.records if "decode engine" in record.message]
    assert len(lines) == 1
    with pytest.raises(ValueError, match="model must be one that the decode engine runs: "):
        dl.compile_decoder(each)


def test_other_calls_run_in_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    assert ran(model(), sources()) == "engine"
    assert ran(model().double(), sources()) == "torch"
    each = model()
    each.generate(sources(), 2, use_cache=False)
    with dl.use_backend("reference"):
        each.generate(sources(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        each.generate(sources(), 2)
    assert each not in engine._packed
    other = dl.Transformer(**SIZES, connection="denseformer").eval()
    assert ran(other, sources()) == "torch"
    assert [r.message for r in caplog.records if "decode engine" in r.message] == [
        "generate() runs in PyTorch, not in the decode engine: "
        "encoder.connection is DenseFormer, and not DepthLSTM or PreNorm"
    ]
