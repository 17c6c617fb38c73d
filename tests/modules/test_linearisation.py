"""linearise: the fit against least squares, exact where a layer is linear, padding, what is refused."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from connection_helpers import F64, FORMS, SMALL, C, assert_close, batch, model, normal, randomise
from linearisation_helpers import KEEPING, many, translator
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.connections import Connection

RIDGE = 1e-3


def least_squares(x: Tensor, y: Tensor, ridge: float = RIDGE) -> Tensor:
    """The ridge's solution by an orthogonal factorisation of [X ; sqrt(lam) I], not by normal equations."""
    x = torch.cat((x, torch.ones(len(x), 1, dtype=F64)), 1)
    below = ridge**0.5 * torch.eye(x.shape[1], dtype=F64)
    padded = torch.cat((y, torch.zeros(x.shape[1], y.shape[1], dtype=F64)))
    return torch.linalg.lstsq(torch.cat((x, below)), padded, driver="gelsd").solution


def coefficient(x: Tensor, y: Tensor, weight: Tensor) -> list[float]:
    """R^2 of the two halves of y."""
    fitted = x @ weight[:-1] + weight[-1]
    wrong, mean = (y - fitted).square(), (y - y.mean(0)).square()
    return [float(1 - wrong[:, part].sum() / mean[:, part].sum()) for part in (slice(0, C), slice(C, None))]


@torch.no_grad()
def states_by_hand(found: Any, batches: list[tuple[Tensor, Tensor]], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """[h ; c], the attention's output and [h' ; c'] at an encoder layer, a token a row, without padding."""
    before, attended, after = [], [], []
    for src, _ in batches:
        x, padding = found._embed_source(src, None)
        h, c = x, torch.zeros_like(x)
        for each in found.encoder.layers[: layer + 1]:
            h0, c0 = h, c
            a = each.self_attn(h, ~padding[:, None, None, :])
            h, c = each.cell(a, (h, c))
        rows = ~padding
        before.append(torch.cat((h0, c0), -1)[rows])
        attended.append(a[rows])
        after.append(torch.cat((h, c), -1)[rows])
    return torch.cat(before), torch.cat(attended), torch.cat(after)


@pytest.mark.parametrize("module", [dl, dl.reference])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_fit_is_least_squares(module: Any, layer: int) -> None:
    found, batches = translator(module), many()
    x, a, y = states_by_hand(found, batches, layer)
    whole = dl.linearise(found, batches, layer, ridge=RIDGE)
    wanted = least_squares(x, y)
    assert_close(whole.model.encoder.layers[layer].map.matrix(), wanted, 1e-8)
    assert whole.tokens == len(x)
    assert whole.ridge == RIDGE
    assert whole.r2["layer"] == pytest.approx(coefficient(x, y, wanted))
    part = dl.linearise(found, batches, layer, "cell", ridge=RIDGE)
    wanted = least_squares(torch.cat((x, a), 1), y)
    assert_close(part.model.encoder.layers[layer].cell.map.matrix(), wanted, 1e-8)
    assert part.r2["cell"] == pytest.approx(coefficient(torch.cat((x, a), 1), y, wanted))
    dropped = dl.linearise(found, batches, layer, drop=True)
    same = torch.cat((torch.eye(2 * C, dtype=F64), torch.zeros(1, 2 * C, dtype=F64)))
    assert dropped.r2["layer"] == pytest.approx(coefficient(x, y, same))
    held, fitted = many(1, 1), whole.model.encoder.layers[layer].map.matrix()
    x, _, y = states_by_hand(found, held, layer)
    assert dl.linearise(found, batches, layer, held_out=held).r2["layer"] == pytest.approx(coefficient(x, y, fitted))


def test_the_fit_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="an oracle: pip install scikit-learn")
    found, batches = translator(), many()
    x, _, y = states_by_hand(found, batches, 1)
    x = torch.cat((x, torch.ones(len(x), 1, dtype=F64)), 1)
    oracle = linear_model.Ridge(alpha=RIDGE, fit_intercept=False, solver="svd").fit(x.numpy(), y.numpy())
    whole = dl.linearise(found, batches, 1, ridge=RIDGE)
    assert_close(whole.model.encoder.layers[1].map.matrix(), torch.from_numpy(oracle.coef_.T), 1e-8)


def test_the_layer_of_any_stack_by_hand() -> None:
    found, batches = randomise(model("pre-norm")), many()
    before, between, after = [], [], []
    with torch.no_grad():
        for src, _ in batches:
            state, padding = found._embed_source(src, None)
            options = {"self": {"mask": ~padding[:, None, None, :], "is_causal": False}}
            norms = found.encoder.connection.read_norms
            for index, layer in enumerate(found.encoder.layers):
                first = state
                middle = first + layer.self_attention(norms[2 * index](first), options)
                state = middle + layer.feed_forward(norms[2 * index + 1](middle), options)
            for kept, each in ((before, first), (between, middle), (after, state)):
                kept.append(each[~padding])
    x, middle, y = (torch.cat(each) for each in (before, between, after))
    whole = dl.linearise(found, batches, 1, ridge=RIDGE).model.encoder
    assert_close(whole.connection.map.matrix(), least_squares(x, y), 1e-8)
    part = dl.linearise(found, batches, 1, "cell", ridge=RIDGE).model.encoder
    assert_close(part.connection.map.matrix(), least_squares(middle, y), 1e-8)
    assert hasattr(part.layers[1], "self_attn")
    assert not hasattr(part.layers[1], "linear1")
    assert not list(whole.layers[1].parameters())


class Shear(Connection):
    """A linear recurrence of two states of unlike shapes: all of it is linear but what branches do."""

    absorbs_feed_forward = True

    def __init__(self, d_model: int, num_branches: int) -> None:
        super().__init__(d_model, num_branches)
        self.turn = nn.Parameter(torch.randn(d_model, d_model, dtype=F64) / d_model)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, torch.stack((x, -x, x * 2), -2)

    def read(self, state: tuple[Tensor, ...], i: int) -> Tensor:
        return state[0] + state[1][..., 1, :]

    def write(self, state: tuple[Tensor, ...], y: Tensor, i: int) -> tuple[Tensor, ...]:
        x, streams = state
        return x @ self.turn + y + streams.mean(-2) + 1, streams.flip(-2) - y[..., None, :] / (i + 2)


def test_a_linear_cell_and_a_linear_layer_are_reproduced() -> None:
    found = dl.Transformer(**SMALL, connection=Shear, feed_forward=False)
    src, tgt = batch()
    batches = many(5)
    for stack in ("encoder", "decoder"):
        made = dl.linearise(found, batches, 1, "cell", stack=stack, ridge=1e-9)
        for each in made.r2.values():
            assert each == pytest.approx((1.0, 1.0), abs=1e-10)
        assert_close(made.model(src, tgt), found(src, tgt), 1e-6)
        silent = copy.deepcopy(found)
        for name in ("self_attn", "cross_attn"):
            attention = getattr(silent.get_submodule(stack).layers[1], name, None)
            if attention is not None:
                nn.init.zeros_(attention.out_proj.weight)
        made = dl.linearise(silent, batches, 1, stack=stack, ridge=1e-9)
        assert made.r2["layer"] == pytest.approx((1.0, 1.0), abs=1e-10)
        assert_close(made.model(src, tgt), silent(src, tgt), 1e-6)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_layer_whose_branches_say_nothing(stack: str, layer: int) -> None:
    """With pre-norm it leaves the state as it is: dropping it, or a map of it, changes nothing."""
    found, (src, tgt) = randomise(model("pre-norm")), batch()
    silent = found.get_submodule(stack).layers[layer]
    for scope, names in (("cell", ("linear2",)), ("layer", ("self_attn.out_proj", "cross_attn.out_proj"))):
        for linear in (each for name, each in silent.named_modules() if name in names):
            nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        for options in ({"drop": True}, {"ridge": 1e-9}):
            made = dl.linearise(found, many(), layer, scope, stack=stack, **options)
            assert_close(made.model(src, tgt), found(src, tgt), 1e-7)
            assert [each for (each,) in made.r2.values()] == pytest.approx([1.0])


@pytest.mark.parametrize("module", [dl, dl.reference])
@pytest.mark.parametrize("merge", ["add", "concat", "cells"])
def test_a_depth_lstm_that_is_linear_is_reproduced(module: Any, merge: str) -> None:
    found = translator(module, norm="none", activation="relu", merge=merge)
    with torch.no_grad():
        for cell in (each for each in found.modules() if isinstance(each, dl.reference.DepthLSTMCell)):
            for part, bias in zip(range(4), (800.0, 800.0, 800.0, 30.0), strict=True):
                cell.gates.bias[part * C : (part + 1) * C] = bias  # open gates, and g where relu is linear
    src, tgt = batch()
    batches = many(5)
    for stack in ("encoder", "decoder"):
        made = dl.linearise(found, batches, 1, "cell", stack=stack, ridge=1e-6)
        assert len(made.r2) == (2 if merge == "cells" and stack == "decoder" else 1)
        for each in made.r2.values():
            assert each == pytest.approx((1.0, 1.0), abs=1e-7)
        assert_close(made.model(src, tgt), found(src, tgt), 1e-4)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["depth-lstm layers", "depth-lstm", "pre-norm"])
def test_padding_is_left_out(kind: str, stack: str) -> None:
    found = translator() if kind == "depth-lstm layers" else randomise(model(kind))
    narrow = many()
    wide = [tuple(nn.functional.pad(each, (0, 3)) for each in pair) for pair in narrow]
    for scope in ("layer", "cell"):
        one, other = (dl.linearise(found, batches, 1, scope, stack=stack) for batches in (narrow, wide))
        assert one.tokens == other.tokens
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert_close(a, b, 1e-7)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["depth-lstm layers", "depth-lstm", "pre-norm"])
def test_stacks_alone(kind: str, batch_first: bool) -> None:
    """A stack is a model, too, in either layout, and its mask says what is padding."""
    sizes: dict[str, Any] = {"dropout": 0.0, "batch_first": batch_first, "dtype": F64}
    if kind == "depth-lstm layers":
        encoder: Any = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(C, 2, **sizes), 2)
        decoder: Any = dl.DepthLSTMDecoder(dl.DepthLSTMDecoderLayer(C, 2, **sizes), 2)
    else:
        encoder, decoder = (
            dl.Encoder(C, 2, 2, **sizes, connection=kind),
            dl.Decoder(C, 2, 2, **sizes, connection=kind),
        )
    randomise(encoder), randomise(decoder)
    x, memory = normal(50, 7, C), normal(50, 4, C)
    padding = torch.zeros(50, 7, dtype=torch.bool)
    padding[::3, 4:] = True
    outside = (lambda each: each) if batch_first else (lambda each: each.transpose(0, 1))
    for scope in ("layer", "cell"):
        masked = [(outside(x), None, padding)]
        one = dl.linearise(encoder, masked, 1, scope)
        assert one.tokens == int((~padding).sum())
        added = torch.zeros(padding.shape, dtype=F64).masked_fill(padding, -torch.inf)
        other = dl.linearise(encoder, [(outside(x), None, added)], 1, scope)
        # the whole sentences, and the others without their padding
        apart = [(outside(x[~padding.any(1)]),), (outside(x[padding.any(1)][:, :4]),)]
        third = dl.linearise(encoder, apart, 1, scope)
        # a sentence a call
        single = [(each[~skipped],) for each, skipped in zip(x, padding, strict=True)]
        fourth = dl.linearise(encoder, single, 1, scope)
        for made in (other, third, fourth):
            assert made.tokens == one.tokens
            for a, b in zip(one.model.parameters(), made.model.parameters(), strict=True):
                assert_close(a, b, 1e-7)
        one = dl.linearise(decoder, [(outside(x), outside(memory), None, None, padding)], 0, scope)
        assert one.tokens == int((~padding).sum())
        assert one.model(outside(x), outside(memory)).shape == outside(x).shape


class Growing(Connection):
    """It does not say that it keeps earlier outputs."""

    def read(self, state: tuple[Tensor, ...], i: int) -> Tensor:
        return state[0]

    def write(self, state: tuple[Tensor, ...], y: Tensor, i: int) -> tuple[Tensor, ...]:
        return y, *state


def test_what_cannot_be_linearised() -> None:
    found, batches = model("pre-norm"), many()
    shear = dl.Transformer(**SMALL, connection=Shear, feed_forward=False)  # its streams are multiples of one another
    broken = model("pre-norm")
    nn.init.constant_(broken.encoder.layers[0].linear2.bias, torch.nan)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "model must be a torch.nn.Module; found int", (3, batches, 0), {}),
        (
            ValueError,
            "model must hold an Encoder or a Decoder of this package; found none",
            (nn.Linear(2, 2), [], 0),
            {},
        ),
        (ValueError, "stack must be one of 'encoder', 'decoder'; found 'top'", (found, batches, 0), {"stack": "top"}),
        (ValueError, "stack must be one of ''; found 'encoder'", (found.encoder, [], 0), {"stack": "encoder"}),
        (ValueError, "layer must be below the stack's 2 layers; found 2", (found, batches, 2), {}),
        (ValueError, "layer must be at least 0; found -1", (found, batches, -1), {}),
        (TypeError, "layer must be an int; found str", (found, batches, "0"), {}),
        (ValueError, "scope must be one of 'layer', 'cell'; found 'branch'", (found, batches, 0, "branch"), {}),
        (ValueError, "batches must hold at least 160 tokens, 20 for each feature; found 96", (found, many(1), 0), {}),
        (ValueError, "batches must hold at least 160 tokens, 20 for each feature; found 0", (found, [], 0), {}),
        (TypeError, "batches must hold tuples of the model's arguments; found list", (found, [[1]], 0), {}),
        (ValueError, "batches must hold pairs (src, tgt) for a translation model; found 1", (found, [(1,)], 0), {}),
        (TypeError, "held_out must hold tuples", (found, batches, 0), {"held_out": [batches[0][0]]}),
        (ValueError, "ridge must be above 0; found 0", (found, batches, 0), {"ridge": 0}),
        (TypeError, "ridge must be a float; found str", (found, batches, 0), {"ridge": "1"}),
        (ValueError, "ridge must be large enough", (shear, batches, 0), {"ridge": 1e-30}),
        (ValueError, "batches must give states that are finite; found NaN", (broken, batches, 0), {}),
        (ValueError, "tune must be at least 0; found -1", (found, batches, 0), {"tune": -1}),
        (ValueError, "tune must be 0 with drop=True", (found, batches, 0), {"tune": 1, "drop": True}),
        (
            TypeError,
            "model must be a translation model to be tuned; found Encoder",
            (found.encoder, [], 0),
            {"tune": 1},
        ),
        (ValueError, "learning_rate must be finite and not negative", (found, [], 0), {"learning_rate": -1.0}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=re.escape(message)):
            dl.linearise(*arguments, **options)


@pytest.mark.parametrize("scope", ["layer", "cell"])
def test_connections_and_layers_that_cannot_be_linearised(scope: str) -> None:
    batches = many()
    for form in set(FORMS) - set(KEEPING):
        with pytest.raises(ValueError, match=r"connection must keep as many tensors at every depth .* earlier outputs"):
            dl.linearise(model(form), batches, 1, scope)
    growing = model(connection=Growing)
    with pytest.raises(ValueError, match="connection must keep tensors of one shape at every depth"):
        dl.linearise(growing, batches, 1, scope)
    for found in (translator(), model("pre-norm"), model("depth-lstm")):
        made = dl.linearise(found, batches, 0, scope).model
        with pytest.raises(ValueError, match="layer must be one that is not linear yet; found 0"):
            dl.linearise(made, batches, 0, "layer")
    bare = model(connection=functools.partial(dl.connections.PreNorm), feed_forward=False)
    if scope == "cell":
        with pytest.raises(ValueError, match='scope must be "layer" where layers have neither'):
            dl.linearise(bare, batches, 0, scope)
    else:
        assert dl.linearise(bare, batches, 0, scope).r2.keys() == {"layer"}


def test_a_single_precision_model_and_a_constant_state() -> None:
    found = dl.DepthLSTMTransformer(**{**SMALL, "dtype": torch.float32})
    for scope in ("layer", "cell"):
        made = dl.linearise(found, many(), 0, scope)
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        assert all(0 < each <= 1 for part in made.r2.values() for each in part)
    still = dl.Encoder(C, 2, 1, connection=Still, feed_forward=False, dtype=F64, batch_first=True)
    (first, second) = dl.linearise(still, [(normal(20, 9, C),)], 0).r2["layer"]
    assert first == pytest.approx(1.0)
    assert second != second  # NaN: nothing varies that could be explained


class Still(Connection):
    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, torch.zeros_like(x)

    def read(self, state: tuple[Tensor, ...], i: int) -> Tensor:
        return state[0]

    def write(self, state: tuple[Tensor, ...], y: Tensor, i: int) -> tuple[Tensor, ...]:
        return state
