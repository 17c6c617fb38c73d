"""Packed language models: steps by hand, spoilt blobs and states, narrow weights, compile_decoder."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from causal_helpers import draw_causal
from helpers import needs_cpp
from narrow_helpers import round_matrices, rounded, spread_of_rounded_inputs
from test_causal_engine import KINDS, VOCAB, left_padding, llama, model, prompts
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.decode.engine import additive_mask, make_plan, operators, pack

pytestmark = needs_cpp
PLAN_BEGIN = 128  # of csrc/decode/blob.h


def blob(each: Any) -> Tensor:
    return pack(*make_plan(each)).blob


def start(packed: Tensor, ids: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> Tensor:
    settings = {"beams": 1, "max_length": 5, "length_penalty": 1.0, "scores": True, "threads": 1, **options}
    return operators().decode_start(packed, prompts() if ids is None else ids, mask, *settings.values())


def flipped(packed: Tensor, at: int) -> Tensor:
    packed = packed.clone()
    packed[at] ^= 64
    return packed


@KINDS
@pytest.mark.parametrize("threads", [1, 3])
def test_steps_by_hand_give_the_models_logits(kind: Any, threads: int) -> None:
    each, ids, real, ops = kind(eos_id=2), prompts(), left_padding(), operators()
    packed = blob(each)
    state = start(packed, ids, additive_mask(~real, ids, 0), max_length=6, threads=threads)
    said: Tensor | None = None
    text, ended = ids, torch.zeros(4, dtype=torch.bool)
    for step in range(6):
        logits = ops.decode_step(packed, state, said)
        state = state.clone()  # it has no address in it
        if said is not None:
            text, ended = torch.cat((text, said[:, None]), 1), ended | (said == 2)
        seen = torch.cat((real, torch.ones(4, step, dtype=torch.bool)), 1)
        with torch.no_grad(), dl.use_backend("reference"):
            wanted = each(text, seen)[:, -1]
        torch.testing.assert_close(logits[~ended], wanted[~ended], rtol=1e-4, atol=1e-4)
        assert not logits[ended].any()
        said = torch.randint(3, VOCAB, (4,))
        said[1] = 2 if step == 2 else said[1]
    assert ended.tolist() == [False, True, False, False]
    with pytest.raises(RuntimeError, match="state must have room for a token; found all 6"):
        ops.decode_step(packed, state, said)
    before = state.clone()
    assert ops.decode_advance(packed, state, 3).tolist() == [3, -1, -1]
    assert torch.equal(state, before)  # no room, no step


def test_steps_by_hand_serve_translation_too() -> None:
    each = dl.DepthLSTMTransformer(30, 33, d_model=24, nhead=3, num_encoder_layers=1, num_decoder_layers=2, max_len=16)
    src, ops, packed = torch.randint(3, 30, (2, 5)), operators(), blob(each.eval())
    state, said = start(packed, src), torch.full((2, 1), each.bos_id)
    for step in range(5):
        logits = ops.decode_step(packed, state, None if step == 0 else said[:, -1].contiguous())
        with torch.no_grad():
            torch.testing.assert_close(logits, each(src, said)[:, -1], rtol=1e-4, atol=1e-4)
        said = torch.cat((said, torch.randint(3, 33, (2, 1))), 1)


@pytest.mark.parametrize(
    ("tokens", "beams", "message"),
    [
        (torch.tensor([3, 4, 5, 6]), 1, "tokens must be None at the first step and given at the others"),
        (torch.tensor([3, 4, 5]), 1, r"tokens must be a contiguous int64 tensor \(4\)"),
        (torch.tensor([[3, 4, 5, 6]]), 1, r"tokens must be a contiguous int64 tensor \(4\)"),
        (torch.tensor([3, 4, 5, 6]).int(), 1, r"tokens must be a contiguous int64 tensor \(4\)"),
        (torch.tensor([3, 4, 5, VOCAB]), 1, "tokens must hold ids from 0 to 36; found 37"),
        (torch.tensor([3, -1, 5, 6]), 1, "tokens must hold ids from 0 to 36; found -1"),
        (None, 2, "state must have one beam; found 2"),
    ],
)
def test_wrong_steps_are_refused(tokens: Tensor | None, beams: int, message: str) -> None:
    packed = blob(model())
    with pytest.raises(RuntimeError, match=message):
        operators().decode_step(packed, start(packed, beams=beams), tokens)


def test_a_second_step_needs_tokens() -> None:
    packed = blob(model())
    state = start(packed)
    operators().decode_step(packed, state, None)
    with pytest.raises(RuntimeError, match="tokens must be None at the first step and given at the others"):
        operators().decode_step(packed, state, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": torch.tensor([[VOCAB]])}, "source must hold ids from 0 to 36; found 37"),
        ({"ids": torch.tensor([[-1]])}, "source must hold ids from 0 to 36; found -1"),
        ({"ids": torch.ones(1, 41, dtype=torch.int64)}, "source must have at most 40 tokens; found 41"),
        ({"max_length": 32}, "max_length must leave prompts room among 40 tokens; found 32 beside a prompt of 9"),
        ({"mask": torch.full((4, 9), -torch.inf)}, "mask of prompts must hold 0 and -inf alone, and 0 in each row"),
        ({"mask": torch.full((4, 9), -1.0)}, "mask of prompts must hold 0 and -inf alone, and 0 in each row"),
        ({"mask": torch.zeros(4, 8)}, "mask must hold a tensor of 36 elements"),
    ],
)
def test_wrong_prompts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        start(blob(model()), **options)


def test_a_language_model_has_no_encoder() -> None:
    with pytest.raises(RuntimeError, match="blob must have an encoder; found that of a language model"):
        operators().decode_encode(blob(model()), prompts(), None)


@KINDS
def test_spoilt_blobs_are_refused(kind: Any) -> None:
    packed = blob(kind())
    for spoilt, message in (
        (packed[:100].clone(), "blob must be a packed model; found 100 bytes"),
        (packed[:-64].clone(), "it was cut"),
        (flipped(packed, PLAN_BEGIN + 8), "blob is damaged: its head has another checksum"),
        (flipped(packed, 16), "blob is damaged"),
    ):
        with pytest.raises(RuntimeError, match=message):
            start(spoilt)
    operators().decode_check(packed)
    for at in (len(packed) - 1, len(packed) // 2):
        with pytest.raises(RuntimeError, match="blob is damaged: its weights have another checksum"):
            operators().decode_check(flipped(packed, at))


def test_states_of_others_are_refused() -> None:
    packed, ops = blob(model()), operators()
    state = start(packed)
    with pytest.raises(RuntimeError, match="state must belong to this blob"):
        ops.decode_step(blob(model()), state, None)
    for spoilt in (state[:64].clone(), state[:-64].clone(), flipped(state, 3), flipped(state, 16), flipped(state, 130)):
        with pytest.raises(RuntimeError, match="state must be what decode_start returned"):
            ops.decode_step(packed, spoilt, None)


@KINDS
def test_plans_of_random_numbers_are_refused(kind: Any) -> None:
    plan, _ = make_plan(kind())
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
            start(packed, torch.zeros(1, 3, dtype=torch.int64), max_length=1)  # another model of the same tensors
            taken += 1
    assert taken < 100


@pytest.mark.parametrize(
    ("place", "found", "message"),
    [
        (0, 1, "plan must have a version from 2 to 2; found 1"),
        (4, 3, "plan must have heads of keys that divide the 4 heads"),
        (4, 5, "plan must have a number of heads of keys from 1 to 4; found 5"),
        (4, 4, r"plan must have a matrix 1 of shape \(192, 48\); found \(128, 48\)"),
        (5, 30, "plan must have a flag of rotary positions from 0 to 0; found 1"),
        (10, -2, "plan must have a eos id from -1 to 36; found -2"),
        (11, 1, "plan must have a flag of shared embeddings from 0 to 0; found 1"),
        (12, 0, "reals must hold"),
        (16, 1, "plan must have a number of encoder branches from 0 to 0; found 1"),
    ],
)
def test_plans_of_wrong_numbers_are_named(place: int, found: int, message: str) -> None:
    plan, _ = make_plan(model())
    numbers, reals = plan.numbers(), torch.tensor(plan.reals(), dtype=torch.float64)
    numbers[place] = found
    with pytest.raises(RuntimeError, match=message):
        operators().decode_pack(torch.tensor(numbers), reals, plan.weights())


def searches(seeds: range) -> Any:
    drawn = [draw_causal(seed, samples=False) for seed in seeds]
    return [case._replace(max_new_tokens=min(7, case.max_new_tokens)) for case in drawn]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights_of_language_models(dtype: str) -> None:
    """Tokens and scores are those of a float32 model whose matrices were rounded in PyTorch.

    int8 also rounds the inputs of products. Its scores may differ as much as roundings of the same size make them.
    """
    for case in searches(range(20)):
        served = dl.compile_decoder(case.model, dtype)
        round_matrices(case.model, dtype)
        found, wanted = case.generate(served), case.generate()
        spread = spread_of_rounded_inputs(case, wanted[1]) if dtype == "int8" else 0.0
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4 + 2 * spread)


@pytest.mark.parametrize("output", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_output_layer_has_a_dtype_of_its_own(dtype: str, output: str) -> None:
    for case in searches(range(4)):
        served = dl.compile_decoder(case.model, dtype, output)
        assert (served.dtype, served.output_dtype) == (dtype, output)
        with torch.no_grad():
            for module in case.model.modules():
                if isinstance(module, nn.Linear):
                    kind = output if module is case.model.output else dtype
                    weight = module.weight if kind == "float32" else rounded(module.weight, kind)
                    module.weight = nn.Parameter(weight)  # a tied embedding stays as it was
        found, wanted = case.generate(served), case.generate()
        spread = spread_of_rounded_inputs(case, wanted[1]) if "int8" in (dtype, output) else 0.0
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4 + 2 * spread)


def test_int8_sums_are_exact() -> None:
    """A prompt's tokens and scores are the same bits alone and beside others, however it is padded."""
    for case in searches(range(10)):
        served = dl.compile_decoder(case.model, "int8")
        tokens, scores = case.generate(served)
        for row in range(len(case.ids)):
            kept = slice(None) if case.mask is None else case.mask[row].bool()
            options = {"return_scores": True}
            alone, score = served.generate(
                case.ids[row, kept][None], case.max_new_tokens, case.beams, case.penalty, **options
            )
            assert torch.equal(tokens[row, : alone.shape[1]], alone[0])
            assert torch.equal(scores[row], score[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_weights_that_are_no_numbers_are_seen(value: float) -> None:
    for kind, name in ((model, "decoder.connection.cells.0.gates"), (llama, "decoder.layers.0.linear1")):
        each = kind()
        each.get_submodule(name).weight.data[5, 7] = value
        with pytest.raises(ValueError, match="found NaN for source 0 at token 1"):
            dl.compile_decoder(each, "int8").generate(prompts(), 5)


@KINDS
def test_compile_decoder(kind: Any) -> None:
    each, ids = kind(), prompts()
    served = dl.compile_decoder(each)
    options = {"attention_mask": left_padding(), "return_scores": True}
    for search in ({}, {"beam_size": 3}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}):
        found = []
        for one in (served, each):
            generator = {"generator": torch.Generator().manual_seed(3)} if "temperature" in search else {}
            found.append(one.generate(ids, 9, length_penalty=0.5, **options, **search, **generator))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    served.check()
    sizes = {dtype: dl.compile_decoder(each, dtype).nbytes for dtype in ("float32", "bfloat16", "int8")}
    assert sizes["float32"] > sizes["bfloat16"] > sizes["int8"]
    assert repr(served) == f"CompiledLanguageModel(dtype='float32', nbytes={served.nbytes})"
    assert isinstance(served, dl.CompiledLanguageModel)
    assert served.max_len == 40
    with pytest.raises(ValueError, match="ids must be on the CPU; found meta"):
        served.generate(ids.to("meta"), 3)
    with pytest.raises(ValueError, match="beam_size must be at most 4096; found 5000"):
        served.generate(ids, 3, 5000)
    with pytest.raises(ValueError, match="a parameter is Tensor of float64 on cpu, and not float32"):
        dl.compile_decoder(kind().double())
    with pytest.raises(ValueError, match="dtype must be one of"):
        dl.compile_decoder(each, "float16")
    del each  # the copy needs no model
    assert served.generate(ids, 9).shape == (4, 9)


@pytest.mark.parametrize("connection", ["depth-lstm", "pre-norm"])
@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
def test_reference_models_are_packed_on_purpose(connection: str, ffn: str) -> None:
    options: dict[str, Any] = {"connection": connection, "ffn": ffn, "feed_forward": True, "kv_heads": 1}
    each = dl.reference.LanguageModel(VOCAB, 24, 3, 2, max_len=40, **options).eval()
    served = dl.compile_decoder(each)
    ids = prompts()
    for beams in (1, 2):
        assert torch.equal(served.generate(ids, 9, beams), each.generate(ids, 9, beams))
