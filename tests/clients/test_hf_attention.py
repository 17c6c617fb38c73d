"""depthlstm_fast.hf: eager attention, its weights, and hidden states, of both kinds of model.

The tests were run with transformers 5.24.0.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.24")

from hf_helpers import causal, labels, prompts, seq2seq, sources  # noqa: E402

from depthlstm_fast.hf.attention import eager  # noqa: E402

KINDS: list[dict[str, Any]] = [
    {},  # grouped queries
    {"num_key_value_heads": None, "positions": "learned", "connection": "pre-norm"},
]
MASKS = ("none", "causal", "bool", "added")


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("PyTorch's attention was called")


def operands(dtype: torch.dtype, kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, keys and values of two rows, with two heads of keys for four; the last query sees nothing."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((2, 4, 5, 8), (2, 2, 7 if kind != "causal" else 5, 8), (2, 2, 7 if kind != "causal" else 5, 6))
    made = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    allowed = torch.rand(2, 1, 5, 7, generator=generator) < 0.6
    allowed[:, :, -1] = False
    mask: Tensor | None = None
    if kind == "bool":
        mask = allowed
    elif kind == "added":
        mask = torch.randn(2, 1, 5, 7, generator=generator).masked_fill(~allowed, -torch.inf).to(dtype)
    return made, {"attn_mask": mask, "is_causal": kind == "causal", "enable_gqa": True}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_eager_is_attention(dtype: torch.dtype, kind: str) -> None:
    """Values and gradients are PyTorch's, and zeros where a query may attend to nothing."""
    found, options = operands(dtype, kind)
    output, weights = eager(*found, **options)
    wanted, _ = operands(torch.float64, kind)
    if options["attn_mask"] is not None and kind == "added":
        options["attn_mask"] = options["attn_mask"].double()
    exact = F.scaled_dot_product_attention(*(each.to(dtype).double() for each in wanted), **options)
    close = {"rtol": 0.0, "atol": {2: 0.03, 4: 1e-5, 8: 1e-12}[dtype.itemsize]}
    torch.testing.assert_close(output.double(), exact, **close)
    direction = torch.randn(exact.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = torch.autograd.grad(output, found, direction.to(dtype))
    for own, other in zip(gradients, torch.autograd.grad(exact, wanted, direction), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0.0, atol=close["atol"] * 4)
    rows = weights.double().sum(-1)
    is_dead = kind in ("bool", "added")
    torch.testing.assert_close(rows[:, :, :-1], torch.ones_like(rows[:, :, :-1]), rtol=0.0, atol=0.02)
    assert (rows[:, :, -1] == 0).all() == is_dead
    assert (output[:, :, -1] == 0).all() == is_dead


def test_eager_drops_weights() -> None:
    (query, keys, values), options = operands(torch.float64, "none")
    whole = eager(query, keys, values, **options)[1]
    torch.manual_seed(1)
    output, weights = eager(query, keys, values, **options, dropout_p=0.5)
    kept = weights != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(weights, torch.where(kept, 2 * whole, 0.0))
    torch.testing.assert_close(output, weights @ values.repeat_interleave(2, 1))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_eager_gives_what_sdpa_gives(options: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    each, (ids, mask) = causal(**options), prompts()
    real = mask if padded else torch.ones_like(mask)
    wanted = each(ids, attention_mask=real).logits[real == 1]
    gradients = torch.autograd.grad(wanted.square().sum(), list(each.parameters()))
    twin = copy.deepcopy(each)
    twin.set_attn_implementation("eager")
    assert each.config._attn_implementation == "sdpa"  # a copy asks its own configuration
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with pytest.raises(AssertionError, match="PyTorch's attention was called"):
        each(ids)
    found = twin(ids, attention_mask=real).logits[real == 1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for own, other in zip(torch.autograd.grad(found.square().sum(), list(twin.parameters())), gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_attentions_are_the_weights(options: dict[str, Any]) -> None:
    """A row sums to one, sees nothing behind it and no padding, and a cached step gives the whole's last row."""
    each, (ids, mask) = causal(**options), prompts()
    with pytest.raises(ValueError, match=r"output_attentions must .* is \"eager\", .*; found 'sdpa'"):
        each(ids, output_attentions=True)
    each.set_attn_implementation("eager")
    output = each(ids, attention_mask=mask, output_attentions=True)
    assert [tuple(found.shape) for found in output.attentions] == [(3, 4, 6, 6)] * 2
    allowed = torch.ones(6, 6).tril().bool() & mask[:, None, None, :].bool()
    for weights in output.attentions:
        rows = weights.transpose(1, 2)[mask == 1]  # of real queries, (tokens, heads, keys)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
        assert (weights * ~allowed).transpose(1, 2)[mask == 1].abs().max() == 0
        assert rows.std() > 0.01
    cache = transformers.DynamicCache(config=each.config)
    each(ids[:, :5], attention_mask=mask[:, :5], cache=cache)
    step = each(ids[:, 5:], attention_mask=mask, cache=cache, output_attentions=True)
    for found, whole in zip(step.attentions, output.attentions, strict=True):
        torch.testing.assert_close(found, whole[:, :, -1:], rtol=1e-5, atol=1e-6)
    assert each(ids).attentions is None
    assert all(layer.self_attn.product.weights is None for layer in each.model.decoder.layers)
    each.config.output_attentions = True
    assert len(each(ids).attentions) == 2


def test_attentions_and_checkpointing_go_together() -> None:
    each, (ids, mask) = causal(dropout=0.2).train(), prompts()
    each.set_attn_implementation("eager")
    found = []
    for on in (False, True):
        if on:
            each.gradient_checkpointing_enable()
        torch.manual_seed(1)
        output = each(ids, attention_mask=mask, labels=ids, output_attentions=True)
        found.append((*output.attentions, *torch.autograd.grad(output.loss, list(each.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_generate_returns_attentions_and_states() -> None:
    each, (ids, mask) = causal(eos_token_id=None), prompts()
    each.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    found = each.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **asked)
    assert torch.equal(found.sequences, each.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))
    assert [step[1].shape[-2:] for step in found.attentions] == [(6, 6), (1, 7), (1, 8)]
    assert [len(step) for step in found.hidden_states] == [3] * 3


@pytest.mark.parametrize("memory", ["top", "transparent", "multiscale"])
def test_attentions_of_the_encoder_decoder(memory: str) -> None:
    each, (ids, mask) = seq2seq(memory=memory), sources()
    given = {"attention_mask": mask, "labels": labels()}
    plain = each(ids, **given)
    with pytest.raises(ValueError, match=r'output_attentions must be False unless .* is "eager"'):
        each(ids, **given, output_attentions=True)
    each.set_attn_implementation("eager")
    found = each(ids, **given, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-5, atol=1e-5)
    for name, size in (("encoder", (3, 2, 6, 6)), ("decoder", (3, 2, 5, 5)), ("cross", (3, 2, 5, 6))):
        weights = found[f"{name}_attentions"]
        assert [tuple(layer.shape) for layer in weights] == [size] * 2
        for layer in weights:
            torch.testing.assert_close(layer.sum(-1), torch.ones(size[:3]))
            if name == "decoder":
                assert (layer.triu(1) == 0).all()
            else:
                assert (layer * (mask == 0)[:, None, None]).abs().max() == 0
    assert not torch.equal(found.cross_attentions[0], found.cross_attentions[1])
    layers = each.model.encoder.layer_outputs(
        each.model._embed_source(ids, mask == 0)[0], src_key_padding_mask=mask == 0
    )
    for own, wanted in zip(found.encoder_hidden_states, layers, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.encoder_last_hidden_state, found.encoder_hidden_states[-1])
    torch.testing.assert_close(each.model.output(found.decoder_hidden_states[-1]), found.logits)
    assert len(found.decoder_hidden_states) == 3
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    steps = each.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **asked)
    assert [layer.shape[-2:] for layer in steps.encoder_attentions] == [(6, 6)] * 2
    assert [step[1].shape[-2:] for step in steps.cross_attentions] == [(1, 6)] * len(steps.cross_attentions)
    assert [step[0].shape[-1] for step in steps.decoder_attentions] == list(range(1, len(steps.decoder_attentions) + 1))
