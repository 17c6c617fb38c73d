"""Language models in the decode engine against the search in PyTorch: options, prompts, samples, freshness, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_helpers import CausalCase, draw_causal
from decode_helpers import compare, differences, sharpen
from helpers import needs_cpp
from test_engine import ISAS
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.decode import engine

pytestmark = needs_cpp
HERE = Path(__file__).resolve().parent
VOCAB = 37


def model(**options: Any) -> Any:
    sizes: dict[str, Any] = {"d_model": 48, "nhead": 4, "num_layers": 2, "max_len": 40, "kv_heads": 2}
    made = dl.LanguageModel(VOCAB, **{**sizes, **options})
    sharpen(made)
    return made.eval()


def llama(**options: Any) -> Any:
    return model(connection="pre-norm", norm="rms", ffn="swiglu", bias=False, **options)


KINDS = pytest.mark.parametrize("kind", [model, llama])


def prompts(batch: int = 4, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def left_padding(batch: int = 4, length: int = 9) -> Tensor:
    """Rows of length, length - 3, length - 6, ... real tokens, of one at least."""
    return torch.arange(length)[None] >= (3 * torch.arange(batch)).clamp(max=length - 1)[:, None]


def by_torch(each: Any, *arguments: Any, **options: Any) -> Any:
    with dl.use_backend("reference"):
        return each.generate(*arguments, **options)


def seeded(seed: int, **options: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "generator": torch.Generator().manual_seed(seed), **options}


def assert_same(each: Any, ids: Tensor, new: int, beams: int = 1, mask: Tensor | None = None) -> Tensor:
    case = CausalCase(each, ids, mask, new, beams, 1.0, {})
    found = case.generate()
    assert dl.last_backend() == "cpp"
    with dl.use_backend("reference"):
        wanted = case.generate()
    assert not differences(case, found, wanted)
    return found[0]


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_random_language_models(first: int) -> None:
    found, said = compare(range(first, first + 50), draw_causal)
    assert found > 100
    assert said > 100  # one token said over and over would test nothing


@pytest.mark.slow
def test_many_random_language_models() -> None:
    compare(range(150, 1000), draw_causal)


@pytest.mark.parametrize("isa", ISAS)
def test_language_models_on_every_instruction_set(isa: str) -> None:
    script = "from decode_helpers import compare; from causal_helpers import draw_causal as draw; "
    script += "compare(range(1000, 1030), draw)"
    path = os.pathsep.join([str(HERE), str(Path(dl.__file__).resolve().parents[1])])
    environment = {**os.environ, "DEPTHLSTM_CPU_ISA": isa, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@KINDS
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_prompts_go_on_as_alone(kind: Any, beams: int) -> None:
    each, ids, mask = kind(), prompts(), left_padding()
    found = assert_same(each, ids, 12, beams, mask)
    other = torch.where(mask, ids, torch.randint_like(ids, VOCAB))  # what is padding means nothing
    assert torch.equal(each.generate(other, 12, beams, attention_mask=mask.long()), found)
    for row in range(4):
        alone = each.generate(ids[row : row + 1, mask[row]], 12, beams)
        assert torch.equal(
            nn.functional.pad(alone, (0, 12 - alone.shape[1])), nn.functional.pad(found, (0, 12))[row, None, :12]
        )


@KINDS
@pytest.mark.parametrize("length", [256, 257, 258, 300])
def test_long_prompts(kind: Any, length: int) -> None:
    """256 rows are read at once: prompts end there, begin there, and take more."""
    each = kind(max_len=330)
    assert_same(each, prompts(1, length), 20)
    assert_same(each, prompts(2, length), 3, 2, left_padding(2, length))
    assert_same(each, prompts(3, length // 2), 20, 1, left_padding(3, length // 2))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_take_prompts_of_their_own(threads: int) -> None:
    each, ids, mask, before = model(), prompts(5), left_padding(5), torch.get_num_threads()
    options = {"attention_mask": mask}
    wanted = [each.generate(ids, 12, **options), each.generate(ids, 12, 4, **options)]
    wanted.append(each.generate(ids, 12, **options, **seeded(3)))
    torch.set_num_threads(threads)
    try:
        found = [each.generate(ids, 12, **options), each.generate(ids, 12, 4, **options)]
        found.append(each.generate(ids, 12, **options, **seeded(3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_batch_may_be_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    each, ids, mask = model(), prompts(5), left_padding(5)
    for options in ({}, {"beam_size": 3}, {"temperature": 1.0}):
        found = []
        for size in (engine.CACHE_BYTES, 1):
            monkeypatch.setattr(engine, "CACHE_BYTES", size)
            torch.manual_seed(7)
            found.append(each.generate(ids, 12, attention_mask=mask, return_scores=True, **options))
            monkeypatch.undo()
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5}])
def test_samples_are_those_of_the_seed(kind: Any, options: dict[str, Any]) -> None:
    each, ids, mask = kind(), prompts(), left_padding()
    for seed in range(5):
        for temperature in (0.4, 1.0, 3.0):
            options |= {"temperature": temperature, "attention_mask": mask, "return_scores": True}
            ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
            found = each.generate(ids, 15, generator=ours, **options)
            assert dl.last_backend() == "cpp"
            wanted = by_torch(each, ids, 15, generator=theirs, **options)
            assert torch.equal(found[0], wanted[0])
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)
            assert torch.equal(ours.get_state(), theirs.get_state())


def test_samples_take_torchs_own_generator() -> None:
    each, ids = model(), prompts()
    torch.manual_seed(5)
    found, state = each.generate(ids, 15, temperature=2.0), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(by_torch(each, ids, 15, temperature=2.0), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(each.generate(ids, 15, temperature=2.0), found)


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"temperature": 1.0}])
def test_rows_end_with_eos_and_are_padded(options: dict[str, Any]) -> None:
    each, ids = model(eos_id=None), prompts()

    def say() -> Tensor:
        torch.manual_seed(4)
        return each.generate(ids, 10, **options)

    whole = say()
    assert whole.shape == (4, 10)  # nothing ends it
    each.pad_id, each.eos_id = 1, int(whole[0, 4])
    ended = say()
    torch.manual_seed(4)
    assert torch.equal(ended, by_torch(each, ids, 10, **options))
    for row in ended.tolist():
        if each.eos_id in row:
            assert set(row[row.index(each.eos_id) + 1 :]) <= {1}
    each.pad_id = each.eos_id  # what fills a finished row may be what ends one
    found = say()
    torch.manual_seed(4)
    assert torch.equal(found, by_torch(each, ids, 10, **options))


@KINDS
def test_prompts_fill_what_max_len_leaves(kind: Any) -> None:
    each = kind()
    for length in (1, 2, 38, 39):
        ids = prompts(2, length)
        assert_same(each, ids, 40 - length)
        assert torch.equal(each.generate(ids), each.generate(ids, 40 - length))
    for each_way in (each, dl.compile_decoder(each)):
        with pytest.raises(ValueError, match="ids must leave room for a token before max_len, 40; found 40"):
            each_way.generate(prompts(1, 40))
        with pytest.raises(ValueError, match="ids must have at most max_len, 40, tokens; found 41"):
            each_way.generate(prompts(1, 41))
        with pytest.raises(ValueError, match="max_new_tokens must be at most 31, what ids leave of max_len; found 32"):
            each_way.generate(prompts(), 32)


def changed_weight(each: Any) -> None:
    each.decoder.layers[0].self_attn.in_proj.weight.data[-1] += 1


def changed_norm(each: Any) -> None:
    each.decoder.connection.final_norm.weight.data.mul_(0.5)


def changed_embedding(each: Any) -> None:
    each.embedding.weight.data[5:].mul_(1.1)


def changed_theta(each: Any) -> None:
    each.rope_theta = 3.0


def changed_positions(each: Any) -> None:
    each.position_kind = "none"


def changed_eps(each: Any) -> None:
    for module in each.decoder.connection.modules():
        if hasattr(module, "eps"):
            module.eps = 0.5


def changed_end(each: Any) -> None:
    each.eos_id = int(each.generate(prompts(1), 1)[0, 0])


@KINDS
@pytest.mark.parametrize(
    "change",
    [
        changed_weight,
        changed_norm,
        changed_embedding,
        changed_theta,
        changed_positions,
        changed_eps,
        changed_end,
    ],
)
def test_models_are_never_stale(kind: Any, change: Callable[[Any], None]) -> None:
    each, ids = kind(), prompts(1)
    served = dl.compile_decoder(each)
    before = each.generate(ids, 12, 2, return_scores=True)
    change(each)
    after = each.generate(ids, 12, 2, return_scores=True)
    assert dl.last_backend() == "cpp"
    if change is not changed_end:
        assert not torch.equal(after[1], before[1])
    wanted = by_torch(each, ids, 12, 2, return_scores=True)
    assert torch.equal(after[0], wanted[0])
    torch.testing.assert_close(after[1], wanted[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(served.generate(ids, 12, 2, return_scores=True)[1], before[1])  # a copy of what was


def test_training_mode_means_nothing() -> None:
    each, ids = model(dropout=0.5), prompts()
    wanted = each.generate(ids, 12)
    assert torch.equal(each.train().generate(ids, 12), wanted)
    assert dl.last_backend() == "cpp"
    assert each.training


SEARCHES = pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"temperature": 1.0}])


@SEARCHES
def test_nan_is_one_clear_error(options: dict[str, Any]) -> None:
    for place in ("decoder.connection.final_norm.weight", "decoder.layers.1.self_attn.in_proj.weight", "output.weight"):
        each = model(tie_output=False)
        each.get_parameter(place).data.view(-1)[3] = torch.nan
        with pytest.raises(ValueError, match="logits must be numbers; found NaN for source 0 at token 1"):
            each.generate(prompts(), 5, **options)
    each, ids = model(tie_output=False), prompts(4, 5).clamp(max=VOCAB - 2)
    with torch.no_grad():
        each.embedding.weight[VOCAB - 1] = torch.nan
        each.output.weight[VOCAB - 1] = 0
    ids[2, 1] = VOCAB - 1  # in the middle of a prompt, whose end sees its key
    for run in (each.generate, dl.compile_decoder(each).generate, lambda *a, **o: by_torch(each, *a, **o)):
        with pytest.raises(ValueError, match="found NaN for source 2 at token 1"):
            run(ids, 5, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.tensor([[3, VOCAB]]),), {}, "ids must hold ids from 0 to 36; found 37"),
        ((torch.tensor([[3, -1]]),), {}, "ids must hold ids from 0 to 36; found -1"),
        ((torch.ones(1, 0, dtype=torch.int64),), {}, "neither of them 0"),
        ((torch.ones(1, 3),), {}, "ids must be int64; found torch.float32"),
        ((prompts(), 0), {}, "max_new_tokens must be"),
        ((prompts(), 3, 0), {}, "beam_size must be"),
        ((prompts(), 3, 2), {"temperature": 1.0}, "beam_size must be 1 with a temperature above 0; found 2"),
        ((prompts(), 3), {"top_k": 3}, "temperature must be above 0 with top_k, top_p or a generator; found 0"),
        ((prompts(), 3), {"attention_mask": torch.ones(4, 8, dtype=torch.bool)}, "attention_mask must have shape"),
        ((prompts(),), {"attention_mask": left_padding().flip(1)}, "attention_mask must be 0 on the left"),
        ((prompts(),), {"attention_mask": left_padding() & False}, "attention_mask must have a real token in each row"),
        ((prompts(),), {"return_scores": 1}, "return_scores must be"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, options: dict[str, Any], message: str) -> None:
    each = model()
    for run in (each.generate, dl.compile_decoder(each).generate):
        with pytest.raises((TypeError, ValueError), match=message):
            run(*arguments, **options)


def ran(each: Any, ids: Tensor) -> str:
    engine._logged.clear()
    each.generate(ids, 2)
    return "engine" if each in engine._packed else "torch"


def hook(each: Any) -> None:
    each.decoder.layers[0].self_attn.register_forward_hook(lambda *given: None)


def own_forward(each: Any) -> None:
    forward = each.decoder.forward
    each.decoder.forward = lambda *given, **options: forward(*given, **options)


def wrapped(each: Any) -> None:
    class Adapter(nn.Linear): ...

    each.decoder.layers[0].self_attn.out_proj.__class__ = Adapter


def renormed(each: Any) -> None:
    each.decoder.connection.final_norm = nn.Identity()


def subclassed(each: Any) -> None:
    each.__class__ = type("Mine", (dl.LanguageModel,), {"__module__": "mine"})


def noisy(each: Any) -> None:
    each.input_dropout = nn.Identity()


def bounded(each: Any) -> None:
    each.embedding.max_norm = 1.0


@KINDS
@pytest.mark.parametrize("change", [hook, own_forward, wrapped, renormed, subclassed, noisy, bounded])
def test_other_models_run_in_pytorch(kind: Any, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    each, ids = kind(), prompts()
    change(each)
    assert ran(each, ids) == "torch"
    each.generate(ids, 2, temperature=1.0)
    lines = [record.message for record in caplog.records if "decode engine" in record.message]
    assert len(lines) == 1
    with pytest.raises(ValueError, match="model must be one that the decode engine runs: "):
        dl.compile_decoder(each)


def test_other_calls_run_in_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    assert ran(model(), prompts()) == "engine"
    assert ran(model().double(), prompts()) == "torch"
    each = model()
    each.generate(prompts(), 2, use_cache=False)
    by_torch(each, prompts(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        each.generate(prompts(), 2)
    assert each not in engine._packed
    assert caplog.records == []
    for name in dl.connections.names():
        taken = name in ("depth-lstm", "pre-norm")
        other = dl.LanguageModel(VOCAB, 32, 2, 2, max_len=40, connection=name).eval()
        assert ran(other, prompts()) == ("engine" if taken else "torch")
        reason = f"decoder.connection is {type(other.decoder.connection).__name__}, and not DepthLSTM or PreNorm"
        wanted = [] if taken else [f"generate() runs in PyTorch, not in the decode engine: {reason}"]
        assert [r.message for r in caplog.records if "decode engine" in r.message] == wanted
        caplog.clear()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"positions": "none", "max_len": (1 << 24) + 1}, "its max_len is 16777217, and not at most 16777216"),
        ({"positions": "rope", "max_len": 1 << 24}, "its rotary positions would take a table of 536870912 bytes"),
    ],
)
def test_lengths_beyond_the_engine_run_in_pytorch(options: dict[str, Any], reason: str) -> None:
    model = dl.LanguageModel(20, 8, 1, 1, **options).eval()
    ids = torch.randint(3, 20, (2, 4))
    assert torch.equal(model.generate(ids, 3), model.generate(ids, 3, use_cache=False))
    with pytest.raises(ValueError, match=f"model must be one that the decode engine runs: {reason}"):
        dl.compile_decoder(model)
