"""dl.Encoder with rotary positions and grouped queries: written out, beside the language model, its twin, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from connection_helpers import F64, FORMS, NAMES, assert_close, normal, randomise
from torch import Tensor

import depthlstm_fast as dl

C, HEADS, LAYERS = 16, 4, 2
ROPE: dict[str, Any] = {"positions": "rope", "rope_theta": 100.0}
TWINS = [
    {"positions": "rope"},
    {"kv_heads": 2, **ROPE},
    {"kv_heads": 1, "activation": "relu", "feed_forward": True},
    {"connection": "pre-norm", "kv_heads": 1, **ROPE},
    {"connection": "pre-norm", "activation": "tanh", "bias": False, "batch_first": False},
    {"connection": "pre-norm", "feed_forward": False, "positions": "rope"},
]


def encoder(**options: Any) -> Any:
    sizes: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "dtype": F64, **options}
    return randomise(dl.Encoder(C, HEADS, LAYERS, **sizes))


def padded(kind: str = "right") -> Tensor:
    """A key padding mask (3, 6), True for padding, where the lengths are 6, 4 and 2."""
    first = {"left": (0, 2, 4), "right": (0, 0, 0), "both": (0, 1, 2)}[kind]
    mask = torch.ones(3, 6, dtype=torch.bool)
    for row, (start, length) in enumerate(zip(first, (6, 4, 2), strict=True)):
        mask[row, start : start + length] = False
    return mask


def written_out(model: Any, x: Tensor, real: Tensor) -> Tensor:
    """Pre-norm layers without networks on x (length, C), token after token; heads are turned as complex numbers."""
    size, weights, norms = C // HEADS, dict(model.named_parameters()), model.connection
    per_group = HEADS // model.layers[0].self_attn.kv_heads
    places = [int(real[:i].sum()) for i in range(len(x))]

    def turned(head: Tensor, place: int) -> Tensor:
        pairs = torch.complex(head[: size // 2], head[size // 2 :])
        angles = [place * model.rope_theta ** (-2 * j / size) for j in range(size // 2)]
        pairs = pairs * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
        return torch.cat((pairs.real, pairs.imag))

    states = list(x)
    for layer in range(LAYERS):
        name = f"layers.{layer}.self_attn."
        heads = [weights[name + "in_proj.weight"] @ norms.read_norms[layer](each) for each in states]
        heads = [(each + weights[name + "in_proj.bias"]).view(-1, size) for each in heads]
        new = []
        for i, state in enumerate(states):
            parts = []
            for h in range(HEADS):
                keys = HEADS + h // per_group
                values = keys + HEADS // per_group
                query = turned(heads[i][h], places[i])
                scores = [query @ turned(each[keys], places[j]) / size**0.5 for j, each in enumerate(heads) if real[j]]
                shares = torch.stack(scores).softmax(0)
                kept = [each[values] for j, each in enumerate(heads) if real[j]]
                parts.append(sum(share * value for share, value in zip(shares, kept, strict=True)))
            out = weights[name + "out_proj.weight"] @ torch.cat(parts) + weights[name + "out_proj.bias"]
            new.append(state + out)
        states = new
    return torch.stack([norms.final_norm(state) for state in states])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_are_those_of_an_encoder_written_out(kv_heads: int) -> None:
    model, x = encoder(connection="pre-norm", feed_forward=False, kv_heads=kv_heads, **ROPE), normal(2, 5, C)
    holes = torch.tensor([[False, True, False, False, True], [False] * 5])  # positions count what is real
    found = model(x, src_key_padding_mask=holes)
    assert model.layers[1].self_attn.kv_heads == kv_heads
    for row in range(2):
        assert_close(found[row], written_out(model, x[row], ~holes[row]))
    added = torch.zeros(2, 5, dtype=F64).masked_fill(holes, -math.inf)
    assert_close(model(x, src_key_padding_mask=added), found)
    biased = added.masked_fill(~holes, 0.5)  # a number added to the scores makes no token padding
    assert_close(model(x, src_key_padding_mask=biased), found)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_causal_hint_it_is_the_language_model_s_decoder(name: str) -> None:
    sizes: dict[str, Any] = {"kv_heads": 2, "connection": name, "dropout": 0.0, "dtype": F64}
    model = randomise(dl.LanguageModel(11, C, HEADS, LAYERS, rope_theta=100.0, max_len=16, **sizes))
    other = dl.Encoder(C, HEADS, LAYERS, batch_first=True, **ROPE, **sizes)
    other.load_state_dict(model.decoder.state_dict())
    ids, mask = torch.randint(3, 11, (3, 6)), ~padded("left")
    wanted = model(ids, mask, return_hidden=True)
    found = other(model.embedding(ids) * C**0.5, src_key_padding_mask=~mask, is_causal=True)
    assert_close(found[mask], wanted[mask])


@pytest.mark.parametrize("options", TWINS, ids=str)
def test_twin_has_one_state_dict_and_the_same_values_and_gradients(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "dtype": F64, **options}
    fused, twin = (module.Encoder(C, HEADS, LAYERS, **sizes) for module in (dl, dl.reference))
    randomise(fused)
    assert list(fused.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(fused.state_dict())
    x = normal(3, 6, C) if fused.batch_first else normal(6, 3, C)
    cotangent, results = torch.randn_like(x), []
    for each in (fused, twin):
        src = x.clone().requires_grad_()
        for padding in (None, padded()):
            output = each(src, src_key_padding_mask=padding)
            results.append([output, *torch.autograd.grad(output, [src, *each.parameters()], cotangent)])
    for found, wanted in zip(results[:2], results[2:], strict=True):
        for pair in zip(found, wanted, strict=True):
            assert_close(*pair)
    for found, wanted in zip(fused.layer_outputs(x), twin.layer_outputs(x), strict=True):
        assert_close(found, wanted)
    assert torch.equal(twin.layer_outputs(x)[-1], twin(x))
    back = dl.Encoder(C, HEADS, LAYERS, **sizes)
    back.load_state_dict(twin.state_dict())
    assert torch.equal(back(x), fused(x))


def test_gradients_of_the_twin_are_those_of_differences() -> None:
    for connection in ("depth-lstm", "pre-norm"):
        twin = dl.reference.Encoder(
            4, 2, 1, kv_heads=1, positions="rope", dropout=0.0, batch_first=True, dtype=F64, connection=connection
        )
        randomise(twin)
        src, padding = normal(2, 3, 4).requires_grad_(), torch.tensor([[True, False, False], [False] * 3])
        assert torch.autograd.gradcheck(lambda src, twin=twin, padding=padding: twin(src, None, padding), (src,))


@pytest.mark.parametrize("options", [{}, ROPE, {"kv_heads": 2, **ROPE}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_no_real_token(form: str, options: dict[str, Any]) -> None:
    model = encoder(connection=FORMS[form], **options)
    rows = [normal(1, length, C) for length in (6, 4, 2)]
    wanted = [model(row)[0] for row in rows]
    assert_close(model(rows[1][0]), wanted[1])  # unbatched
    for kind in ("left", "right", "both"):
        mask, src = padded(kind), normal(3, 6, C)
        for index, row in enumerate(rows):
            src[index, ~mask[index]] = row[0]
        found = model(src, src_key_padding_mask=mask)
        for index in range(3):
            assert_close(found[index, ~mask[index]], wanted[index])
            alone = model(src[index], src_key_padding_mask=mask[index])
            assert_close(alone[~mask[index]], wanted[index])


def test_order_matters_with_positions_alone() -> None:
    x, order = normal(1, 5, C), [3, 0, 4, 1, 2]
    for options in ({}, ROPE):
        model = encoder(**options)
        same = torch.allclose(model(x[:, order]), model(x)[:, order], atol=1e-12)
        assert same == (not options)


def test_layouts_and_stacks_of_its_kind() -> None:
    first = encoder(kv_heads=2, **ROPE)
    second = dl.Encoder(C, HEADS, LAYERS, dropout=0.0, dtype=F64, kv_heads=2, **ROPE)
    second.load_state_dict(first.state_dict())
    x, mask = normal(3, 6, C), padded("left")
    assert_close(second(x.transpose(0, 1), src_key_padding_mask=mask).transpose(0, 1), first(x, None, mask))
    longer = first.like(3)
    assert (longer.positions, longer.rope_theta, longer.layers[2].self_attn.kv_heads) == ("rope", 100.0, 2)
    assert longer(x).shape == x.shape
    grown = dl.grow(first, 1)
    assert grown.second.positions == "rope"
    assert grown(x).shape == x.shape


@pytest.mark.parametrize("name", ["depth-lstm", "pre-norm"])
def test_the_decode_engine_does_not_take_it_for_another_encoder(name: str) -> None:
    sizes: dict[str, Any] = {"dropout": 0.0, "connection": name}
    model = dl.Transformer(11, 13, C, HEADS, LAYERS, LAYERS, **sizes).eval()
    model.encoder = dl.Encoder(C, HEADS, LAYERS, batch_first=True, positions="rope", **sizes).eval()
    randomise(model)
    src = torch.randint(3, 11, (3, 6))
    found, scores = model.generate(src, 8, return_scores=True)
    wanted, wanted_scores = model.generate(src, 8, use_cache=False, return_scores=True)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-4, atol=1e-4)
    if dl.backends()["cpp"].available:
        with pytest.raises(ValueError, match=r"model must be one that the decode engine runs: .*RotaryLayer"):
            dl.compile_decoder(model)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    classes = [dl.Encoder, *([dl.reference.Encoder] if name in ("depth-lstm", "pre-norm") else [])]
    for cls in classes:
        model = cls(C, HEADS, LAYERS, dropout=0.2, dtype=F64, connection=name, kv_heads=2, positions="rope")
        src, found = normal(4, 2, C), []
        for on in (False, True):
            model.gradient_checkpointing = on
            torch.manual_seed(1)
            output = model(src)
            found.append(torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_and_exported_without_a_break() -> None:
    torch.compiler.reset()
    model = encoder(kv_heads=2, **ROPE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 6):
        x = normal(3, length, C)
        assert_close(
            compiled(x, src_key_padding_mask=padded("left")[:, :length]), model(x, None, padded("left")[:, :length])
        )
        assert_close(compiled(x), model(x))
    rows, tokens = torch.export.Dim("rows", max=64), torch.export.Dim("tokens", max=64)
    shapes = ({0: rows, 1: tokens}, None, {0: rows, 1: tokens})
    exported = torch.export.export(model, (normal(3, 6, C), None, padded()), dynamic_shapes=shapes)
    x = normal(2, 4, C)
    assert_close(exported.module()(x, None, padded("left")[:2, :4]), model(x, None, padded("left")[:2, :4]))
    torch.compiler.reset()


def test_16_bit_and_the_meta_device() -> None:
    x = torch.randn(3, 6, C)
    for cls in (dl.Encoder, dl.reference.Encoder):
        model = cls(C, HEADS, LAYERS, dropout=0.0, batch_first=True, kv_heads=2, positions="rope", device="meta")
        assert all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu").reset_parameters()
        wanted = model(x, None, padded())
        assert wanted.isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x, None, padded()).float() - wanted).abs().max() < 0.1 * wanted.abs().max()
        half = model.to(torch.bfloat16)(x.bfloat16(), None, padded())
        assert half.dtype == torch.bfloat16
        assert (half.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_heads": 3}, ValueError, "kv_heads must divide nhead, 4; found 3"),
    ({"kv_heads": 0}, ValueError, "kv_heads must be at least 1; found 0"),
    ({"kv_heads": 2.0}, TypeError, "kv_heads must be an int; found float"),
    ({"positions": "learned"}, ValueError, "positions must be one of 'none', 'rope'; found 'learned'"),
    ({"positions": None}, ValueError, "positions must be one of 'none', 'rope'; found None"),
    ({"d_model": 12, "positions": "rope"}, ValueError, 'd_model / nhead must be even with positions="rope"; found 3'),
    ({"rope_theta": 0.0}, ValueError, "rope_theta must be above 0; found 0.0"),
    ({"rope_theta": 1e-80}, ValueError, "rope_theta must be at least 1e-06; found 1e-80"),
    ({"rope_theta": float("inf")}, ValueError, "rope_theta must be finite"),
    ({"rope_theta": "long"}, TypeError, "rope_theta must be a float; found str"),
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1; found 0"),
    ({"d_model": 6}, ValueError, "nhead must divide d_model, 6; found 4"),
    ({"activation": "swish"}, ValueError, "activation must be one of"),
    ({"batch_first": 1}, TypeError, "batch_first must be a bool; found int"),
    ({"dim_feedforward": 0}, ValueError, "dim_feedforward must be at least 1; found 0"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\); found 1.0"),
    ({"layer_norm_eps": -1.0}, ValueError, "layer_norm_eps must be finite and not negative"),
    ({"feed_forward": "yes"}, TypeError, "feed_forward must be a bool; found str"),
    ({"connection": "residual"}, ValueError, "connection must be one of"),
    ({"init": "he"}, ValueError, "init must be one of"),
    ({"dtype": torch.int64}, TypeError, "dtype must be float32"),
    ({"device": "nowhere"}, ValueError, "device must be one that torch can use here"),
]


@pytest.mark.parametrize("cls", [dl.Encoder, dl.reference.Encoder], ids=["fused", "reference"])
@pytest.mark.parametrize(("wrong", "error", "text"), WRONG, ids=lambda each: str(each)[:40])
def test_building(cls: Any, wrong: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        cls(**{"d_model": C, "nhead": HEADS, "num_layers": LAYERS, **wrong})


@pytest.mark.parametrize("cls", [dl.Encoder, dl.reference.Encoder], ids=["fused", "reference"])
def test_calling(cls: Any) -> None:
    model, x = cls(C, HEADS, LAYERS, batch_first=True, positions="rope"), torch.randn(3, 6, C)
    for arguments, error, text in (
        ((x[..., :4],), ValueError, r"src must have shape \(batch, length, 16\)"),
        (([1.0],), TypeError, r"src must be a torch.Tensor; found list"),
        ((x.double(),), TypeError, "src must be float32 beside"),
        ((x, None, padded()[:2]), ValueError, r"src_key_padding_mask must have shape \(3, 6\); found \(2, 6\)"),
        ((x, None, padded().long()), TypeError, "src_key_padding_mask must be bool or floating point"),
        ((x, torch.ones(3), None), ValueError, r"mask must have shape \(6, 6\)"),
        ((x, None, None, 1), TypeError, "is_causal must be a bool; found int"),
    ):
        with pytest.raises(error, match=text):
            model(*arguments)
