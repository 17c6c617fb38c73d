"""The engine's operators called directly: spoilt blobs and states, wrong shapes; and compile_decoder."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_helpers import draw, sharpen
from helpers import needs_cpp
from narrow_helpers import round_matrices, rounded, spread_of_rounded_inputs
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.decode.engine import additive_mask, make_plan, operators, pack
from depthlstm_fast.reference.generation import Settings, beam_search, greedy_search

pytestmark = needs_cpp
HERE = Path(__file__).resolve().parent
PLAN_BEGIN = 128  # of csrc/decode/blob.h


def model(**options: Any) -> Any:
    sizes: dict[str, Any] = {"d_model": 24, "nhead": 3, "num_encoder_layers": 1, "num_decoder_layers": 2, "max_len": 16}
    made = dl.DepthLSTMTransformer(30, 33, **{**sizes, **options})
    sharpen(made)
    return made.eval()


def blob(each: Any = None) -> Tensor:
    return pack(*make_plan(each or model())).blob


def source() -> Tensor:
    return torch.randint(3, 30, (2, 5))


def start(packed: Tensor, src: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> Tensor:
    settings = {"beams": 2, "max_length": 5, "length_penalty": 1.0, "scores": True, "threads": 1, **options}
    return operators().decode_start(packed, source() if src is None else src, mask, *settings.values())


def test_encode_is_the_encoder() -> None:
    for seed in range(40):
        case = draw(seed)
        packed = blob(case.model)
        mask = additive_mask(case.mask, case.src, case.model.pad_id)
        kept = torch.ones_like(case.src, dtype=torch.bool) if mask is None else mask > -torch.inf
        with torch.no_grad():
            wanted = case.model.encode(case.src, case.mask)
        found = operators().decode_encode(packed, case.src, mask)
        torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-4)
        assert not found[~kept].any()


def flipped(packed: Tensor, at: int) -> Tensor:
    packed = packed.clone()
    packed[at] ^= 64
    return packed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:100].clone(), "blob must be a packed model; found 100 bytes"),
        (lambda b: b[:-64].clone(), "it was cut"),
        (lambda b: torch.cat((b, b)), "it was cut"),
        (lambda b: flipped(b, 0), "blob must be a packed model; found other bytes"),
        (lambda b: flipped(b, 8), "blob must have format 2"),
        (lambda b: flipped(b, PLAN_BEGIN + 8), "blob is damaged: its head has another checksum"),
        (lambda b: flipped(b, 40), "blob is damaged"),
        (lambda b: flipped(b, 16), "blob is damaged"),
        (lambda b: torch.zeros_like(b), "found other bytes"),
        (lambda b: b.to(torch.int8), "blob must be a contiguous uint8 tensor"),
        (lambda b: b[None], "blob must be a contiguous uint8 tensor"),
        (lambda b: torch.cat((b[:1], b))[1:], "clone"),
        (lambda b: torch.empty(0, dtype=torch.uint8), "blob must be a packed model; found 0 bytes"),
    ],
)
def test_spoilt_blobs_are_refused(spoil: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        start(spoil(blob()))


def test_blob_of_another_instruction_set_is_refused(tmp_path: Path) -> None:
    script = f"import torch, test_operators as t; torch.save(t.blob(), {str(tmp_path / 'blob')!r})"
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(Path(dl.__file__).resolve().parents[1])])
    environment = {**os.environ, "DEPTHLSTM_CPU_ISA": "generic", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    packed, own = torch.load(tmp_path / "blob"), bytes(blob()[16:32].tolist()).rstrip(b"\0").decode()
    if own == "generic":
        assert start(packed).numel()
        return
    with pytest.raises(RuntimeError, match=f"blob must be packed for {own}; found generic: pack the model again"):
        start(packed)


def test_damaged_weights_are_found_by_check() -> None:
    packed = blob()
    operators().decode_check(packed)
    for at in (len(packed) - 1, len(packed) // 2, len(packed) - 64 * 40):
        with pytest.raises(RuntimeError, match="blob is damaged: its weights have another checksum"):
            operators().decode_check(flipped(packed, at))


def test_random_damage_never_crashes() -> None:
    packed, r = blob(), random.Random(0)
    for _ in range(200):
        spoilt = packed.clone()
        for _ in range(r.randint(1, 4)):
            spoilt[r.randrange(2000 if r.random() < 0.8 else len(spoilt))] = r.randrange(256)
        with contextlib.suppress(RuntimeError):  # a spoilt weight is no reason to refuse
            start(spoilt)


def test_plans_of_random_numbers_are_refused() -> None:
    plan, _ = make_plan(model())
    numbers, reals, weights, r = plan.numbers(), torch.tensor(plan.reals(), dtype=torch.float64), plan.weights(), random
    r.seed(0)
    taken = 0
    for _ in range(300):
        spoilt = list(numbers)
        for _ in range(r.randint(1, 3)):
            spoilt[r.randrange(len(spoilt))] = r.choice((-2, -1, 0, 1, 2, 3, 7, 1000, 2**31, 2**62))
        if r.random() < 0.2:
            spoilt = spoilt[: r.randrange(len(spoilt))]
        if spoilt == numbers:
            continue
        with contextlib.suppress(RuntimeError):
            packed = operators().decode_pack(torch.tensor(spoilt, dtype=torch.int64), reals, weights)
            start(packed, torch.zeros(1, 1, dtype=torch.int64), max_length=1)  # another model of the same tensors
            taken += 1
    assert taken < 100


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, r, w: (p.int(), r, w), "plan must be a contiguous tensor"),
        (lambda p, r, w: (p, r.float(), w), "reals must be a contiguous tensor"),
        (lambda p, r, w: (p, r[:-1].clone(), w), "reals must hold"),
        (lambda p, r, w: (p, r, w[:-1]), "weights must hold more than"),
        (lambda p, r, w: (p, r, [*w, w[0]]), "weights must hold"),
        (lambda p, r, w: (p, r, [w[0].double(), *w[1:]]), "contiguous float32 tensors"),
        (lambda p, r, w: (p, r, [w[0].t(), *w[1:]]), "contiguous float32 tensors"),
        (lambda p, r, w: (p, r, [w[0][:-1], *w[1:]]), "weights must hold a tensor of"),
        (lambda p, r, w: (p, r, []), "weights must hold more than 0"),
    ],
)
def test_wrong_weights_are_refused(spoil: Any, message: str) -> None:
    plan, _ = make_plan(model())
    given = spoil(torch.tensor(plan.numbers()), torch.tensor(plan.reals(), dtype=torch.float64), plan.weights())
    with pytest.raises(RuntimeError, match=message):
        operators().decode_pack(*given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"src": torch.tensor([[30]])}, "source must hold ids from 0 to 29; found 30"),
        ({"src": torch.tensor([[-1]])}, "source must hold ids from 0 to 29; found -1"),
        ({"src": torch.ones(1, 17, dtype=torch.int64)}, "source must have at most 16 tokens; found 17"),
        ({"src": torch.ones(2, dtype=torch.int64)}, "source must be a contiguous int64 tensor"),
        ({"src": torch.ones(0, 4, dtype=torch.int64)}, "neither of them 0"),
        ({"src": torch.ones(2, 4)}, "source must be a contiguous int64 tensor"),
        ({"mask": torch.zeros(2, 4)}, "mask must hold a tensor of 10 elements"),
        ({"mask": torch.zeros(2, 5, dtype=torch.bool)}, "mask must hold contiguous float32"),
        ({"beams": 0}, "beams must be from 1 to 4096"),
        ({"beams": 4097}, "beams must be from 1 to 4096"),
        ({"max_length": 17}, "max_length must be from 1 to 16"),
        ({"max_length": 0}, "max_length must be from 1 to 16"),
        ({"length_penalty": float("nan")}, "length_penalty must be finite"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        start(blob(), **options)


def test_states_of_others_are_refused() -> None:
    packed, ops = blob(), operators()
    state = start(packed)
    with pytest.raises(RuntimeError, match="state must belong to this blob"):
        ops.decode_advance(blob(), state, 1)
    for spoilt in (state[:64].clone(), state[:-64].clone(), flipped(state, 3), flipped(state, 16), flipped(state, 130)):
        with pytest.raises(RuntimeError, match="state must be what decode_start returned"):
            ops.decode_advance(packed, spoilt, 1)
    with pytest.raises(RuntimeError, match="steps must be at least 1"):
        ops.decode_advance(packed, state, 0)
    with pytest.raises(RuntimeError, match="state must be that of a search that has ended"):
        ops.decode_finish(packed, state)


def test_a_search_goes_on_from_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # sums depend on how many sources a thread has
    each, src = model(), source()
    packed, ops = blob(each), operators()
    for beams in (1, 3):
        wanted = each.generate(src, 14, beams, return_scores=True)
        for steps in (1, 3, 100):
            state = start(packed, src, beams=beams, max_length=14)
            while ops.decode_advance(packed, state, steps).tolist()[0]:
                state = state.clone()  # it has no address in it
            tokens, scores = ops.decode_finish(packed, state)
            assert torch.equal(tokens, wanted[0])
            assert torch.equal(scores, wanted[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights_are_those_of_a_rounded_model(dtype: str) -> None:
    """Tokens and scores are those of a float32 model whose matrices were rounded in PyTorch.

    int8 also rounds the inputs of products. Its scores may differ as much as roundings of the same size make them.
    """
    for seed in range(25):
        case = draw(seed)
        served = dl.compile_decoder(case.model, dtype)
        round_matrices(case.model, dtype)
        options = {"src_key_padding_mask": case.mask, "return_scores": True}
        found = served.generate(case.src, case.max_length, case.beams, case.penalty, **options)
        wanted = case.generate()
        spread = spread_of_rounded_inputs(case, wanted[1]) if dtype == "int8" else 0.0
        assert torch.equal(found[0], wanted[0]), seed
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4 + 2 * spread)


def test_int8_sums_are_exact() -> None:
    """A source's tokens and scores are the same bits alone and beside others, and one at a time of its positions."""
    for seed in range(10):
        case = draw(seed)
        served = dl.compile_decoder(case.model, "int8")
        tokens, scores = served.generate(case.src, 12, case.beams, return_scores=True)
        for row in range(len(case.src)):
            alone, score = served.generate(case.src[row : row + 1], 12, case.beams, return_scores=True)
            assert torch.equal(tokens[row, : alone.shape[1]], alone[0])
            assert torch.equal(scores[row], score[0])


@pytest.mark.parametrize("inner", [516, 517, 4096, 20001])
def test_int8_sums_do_not_overflow(inner: int) -> None:
    """Every product is as large as it can be; 516 inputs are the most beside the largest int16."""
    each = dl.Transformer(9, 9, 8, 2, 1, 1, inner, activation="relu", connection="pre-norm").eval()
    with torch.no_grad():
        layer = each.encoder.layers[0]
        layer.linear1.weight.zero_()
        layer.linear1.bias.fill_(1)
        layer.linear2.weight.fill_(2 / inner)
        layer.linear2.weight[::2] /= -2
        src = source() % 8 + 1  # 0 pads
        round_matrices(each, "int8")
        wanted = each.encode(src)
    found = operators().decode_encode(pack(*make_plan(each, "int8")).blob, src, None)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_int8_rows_without_a_largest_number(value: float) -> None:
    each = model(num_encoder_layers=1)
    with torch.no_grad():
        each.src_embedding.weight[5, 3] = value
    served = dl.compile_decoder(each, "int8")
    with pytest.raises(ValueError, match="found NaN for source 1 at token 1"):
        served.generate(torch.tensor([[7, 8], [5, 6]]), 6)


@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_weights_that_are_no_numbers_are_seen(value: float, place: int) -> None:
    each = model()
    with torch.no_grad():
        each.decoder.layers[0].cell.gates.weight[5, place] = value
    served = dl.compile_decoder(each, "int8")
    with pytest.raises(ValueError, match="found NaN for source 0 at token 1"):
        served.generate(source(), 5)


def test_int8_rows_of_tiny_numbers_are_zero() -> None:
    found = []
    for value in (0.0, 1e-38):
        torch.manual_seed(3)
        each = model(num_encoder_layers=1)
        with torch.no_grad():
            each.src_embedding.weight[5] = value
            each.src_positions.table[0] = 0
        found.append(dl.compile_decoder(each, "int8").generate(torch.tensor([[5, 6]]), 6, return_scores=True))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("output", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_output_layer_has_a_dtype_of_its_own(dtype: str, output: str) -> None:
    for seed in range(8):
        case = draw(seed)
        served = dl.compile_decoder(case.model, dtype, output)
        assert (served.dtype, served.output_dtype) == (dtype, output)
        with torch.no_grad():
            for module in case.model.modules():
                if isinstance(module, torch.nn.Linear):
                    kind = output if module is case.model.output else dtype
                    weight = module.weight if kind == "float32" else rounded(module.weight, kind)
                    module.weight = torch.nn.Parameter(weight)  # a tied embedding stays as it was
        found, wanted = case.generate(served), case.generate()
        spread = spread_of_rounded_inputs(case, wanted[1]) if "int8" in (dtype, output) else 0.0
        assert torch.equal(found[0], wanted[0]), seed
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4 + 2 * spread)


def test_compile_decoder() -> None:
    each, src = model(), source()
    served = dl.compile_decoder(each)
    for beams in (1, 3):
        wanted = each.generate(src, 9, beams, 0.5, return_scores=True)
        found = served.generate(src, 9, beams, 0.5, return_scores=True)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    served.check()
    sizes = {dtype: dl.compile_decoder(each, dtype).nbytes for dtype in ("float32", "bfloat16", "int8")}
    assert sizes["float32"] > sizes["bfloat16"] > sizes["int8"]
    assert repr(served) == f"CompiledDecoder(dtype='float32', nbytes={served.nbytes})"
    wider = dl.compile_decoder(each, "int8", "float32")
    assert sizes["int8"] < wider.nbytes < sizes["float32"]
    assert repr(wider) == f"CompiledDecoder(dtype='int8', output_dtype='float32', nbytes={wider.nbytes})"
    assert dl.compile_decoder(each, "int8", output_dtype="int8").nbytes == sizes["int8"]
    with pytest.raises(ValueError, match="output_dtype must be one of"):
        dl.compile_decoder(each, "int8", "float64")
    with pytest.raises(ValueError, match="dtype must be one of"):
        dl.compile_decoder(each, "float16")
    with pytest.raises(
        TypeError, match="model must be a DepthLSTMTransformer, a Transformer or a LanguageModel; found Linear"
    ):
        dl.compile_decoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a parameter is Tensor of float64 on cpu, and not float32"):
        dl.compile_decoder(model().double())
    with pytest.raises(ValueError, match="src must be on the CPU; found meta"):
        served.generate(src.to("meta"), 3)
    with pytest.raises(ValueError, match="src_key_padding_mask must be on the CPU; found meta"):
        served.generate(src, 3, src_key_padding_mask=torch.zeros(src.shape, device="meta"))
    with pytest.raises(ValueError, match="beam_size must be at most 4096; found 5000"):
        served.generate(src, 3, 5000)
    with pytest.raises(ValueError, match="src must hold ids from 0 to 29; found 30"):
        served.generate(torch.tensor([[30]]))
    with pytest.raises(TypeError, match="src_key_padding_mask must be a bool or float32 tensor; found"):
        served.generate(src, src_key_padding_mask=src)
    with pytest.raises(ValueError, match="src_key_padding_mask must have shape"):
        served.generate(src, src_key_padding_mask=src[:1] == 3)


def test_reference_models_are_packed_on_purpose() -> None:
    each = dl.reference.DepthLSTMTransformer(30, 33, d_model=24, nhead=3, num_encoder_layers=1, max_len=16).eval()
    src = source()
    assert torch.equal(dl.compile_decoder(each).generate(src, 9), each.generate(src, 9))


def test_the_loop_serves_a_decoder_without_an_encoder() -> None:
    """A stack of self-attentions and cells alone, planned as a decoder, is a causal language model."""
    for hidden, beams in (("linear", 1), ("ffn", 1), ("linear", 3)):
        each = model(num_encoder_layers=3, hidden=hidden, sublayer=beams == 3, share_embeddings=False, forget_bias=0.0)
        plan, _ = make_plan(each)
        plan.branches = {"encoder": [], "decoder": plan.branches["encoder"]}
        plan.stack_ends.reverse()
        packed = pack(plan, plan.sources()).blob

        def next_logits(ids: Tensor, each: Any = each) -> Tensor:
            hidden = each._embed(ids, each.tgt_embedding, each.tgt_positions)
            return each.output(each.encoder(hidden, is_causal=True)[:, -1])

        settings = Settings(2, beams, 14, 1.0, each.bos_id, each.eos_id, each.pad_id, torch.device("cpu"))
        with torch.no_grad(), dl.use_backend("reference"):
            wanted = (beam_search if beams > 1 else greedy_search)(next_logits, lambda rows: None, settings)
        state = start(packed, beams=beams, max_length=14)
        while operators().decode_advance(packed, state, 5).tolist()[0]:
            pass
        tokens, scores = operators().decode_finish(packed, state)
        assert torch.equal(tokens, wanted[0])
        assert len(tokens.unique()) > 2
        torch.testing.assert_close(scores, wanted[1], rtol=1e-5, atol=1e-5)
