"""The ops of depth connections: against formulas by hand and torch's own modules, gradients, dtypes, errors."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthlstm_fast as dl

F64 = torch.float64
C = 5


def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """LayerNorm by its formula."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed if bias is None else normed + bias


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm by its formula."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def affines(which: str, norm: str, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """weight1, bias1, ... of the norms whose numbers are in ``which``."""
    found = {}
    for number in which:
        found[f"weight{number}"] = normal(C, dtype=dtype)
        if norm == "layer":
            found[f"bias{number}"] = normal(C, dtype=dtype)
    return found


PLACEMENTS = [  # norms, a, kind of b
    ("2", 1.0, "one"),
    ("1", 1.0, "one"),
    ("23", 1.0, "one"),
    ("1", 1.7, "one"),
    ("12", 6.0, "one"),
    ("2", 1.0, "number"),
    ("2", 1.0, "scalar"),
    ("2", 1.0, "features"),
    ("123", 1.3, "features"),
    ("", 1.0, "one"),
]


def scale(kind: str) -> float | Tensor:
    return {"one": 1.0, "number": 0.3, "scalar": normal(), "features": normal(C)}[kind]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("which", "a", "kind"), PLACEMENTS)
def test_norm_step_is_the_formula(which: str, a: float, kind: str, norm: str) -> None:
    x, y, b, parameters = normal(2, 3, C), normal(2, 3, C), scale(kind), affines(which, norm)
    by_hand = {"layer": layer_norm, "rms": rms_norm}[norm]

    def apply(number: str, value: Tensor) -> Tensor:
        if number not in which:
            return value
        return by_hand(value, parameters[f"weight{number}"], parameters.get(f"bias{number}"))

    wanted_x = apply("1", a * x + b * apply("3", y))
    wanted_u = apply("2", wanted_x)
    new_x, u = dl.norm_step(x, y, a=a, b=b, norm=norm, **parameters)
    torch.testing.assert_close(new_x, wanted_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u, wanted_u, rtol=1e-12, atol=1e-12)
    assert (u is new_x) == ("2" not in which)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("which", "a", "kind"), PLACEMENTS)
def test_norm_step_gradients(which: str, a: float, kind: str, norm: str) -> None:
    b = scale(kind)
    parameters = affines(which, norm)
    leaves = [normal(2, C), normal(2, C), *parameters.values(), *([b] if isinstance(b, Tensor) else [])]

    def step(x: Tensor, y: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, rest, strict=False))
        return dl.norm_step(x, y, a=a, b=rest[-1] if isinstance(b, Tensor) else b, norm=norm, **named)

    assert torch.autograd.gradcheck(step, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_step_keeps_a_wide_stream_wide(dtype: torch.dtype) -> None:
    x, y = normal(4, C, dtype=torch.float32), normal(4, C, dtype=dtype)
    weight = normal(C, dtype=torch.float32)
    new_x, u = dl.norm_step(x, y, weight2=weight)
    assert (new_x.dtype, u.dtype) == (torch.float32, dtype)
    assert torch.equal(new_x, x + y.float())  # not rounded to 16 bits on the way
    exact = layer_norm(new_x.double(), weight.double(), None)
    torch.testing.assert_close(u.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_statistics_of_16_bit_rows_are_fp32() -> None:
    x = (normal(3, 512) + 300).bfloat16()
    weight = torch.ones(512, dtype=torch.bfloat16)
    _, u = dl.norm_step(x, torch.zeros_like(x), weight2=weight)
    exact = layer_norm(x.double(), weight.double(), None)
    torch.testing.assert_close(u.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("last", [True, False])
def test_siamese_step_is_the_formula(norm: str, last: bool) -> None:
    x, y, o = normal(2, 3, C), normal(2, 3, C), normal(2, 3, C)
    by_hand = {"layer": layer_norm, "rms": rms_norm}[norm]
    pairs = [(normal(C), normal(C) if norm == "layer" else None) for _ in range(3)]
    c = 2.5
    wanted_x = by_hand(x + o / c, *pairs[0])
    wanted_y = y + o
    wanted_u = wanted_x + by_hand(wanted_y, *pairs[1])
    if not last:
        wanted_u = by_hand(wanted_u, *pairs[2])
    outputs = dl.siamese_step(x, y, o, *pairs[0], *pairs[1], *((None, None) if last else pairs[2]), c=c, norm=norm)
    for found, wanted in zip(outputs, (wanted_x, wanted_y, wanted_u), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_siamese_step_gradients() -> None:
    leaves = [*(normal(2, C) for _ in range(3)), *(normal(C) for _ in range(6))]

    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        return dl.siamese_step(*arguments, c=1.7)

    assert torch.autograd.gradcheck(step, [leaf.requires_grad_() for leaf in leaves])


def test_gru_gates_are_torchs_gru_cell() -> None:
    cell = nn.GRUCell(3, C, dtype=F64)
    y, h = normal(7, 3), normal(7, C)
    from_y = nn.functional.linear(y, cell.weight_ih, cell.bias_ih)
    from_h = nn.functional.linear(h, cell.weight_hh, cell.bias_hh)
    z = torch.cat((from_y[:, : 2 * C] + from_h[:, : 2 * C], from_y[:, 2 * C :], from_h[:, 2 * C :]), -1)
    torch.testing.assert_close(dl.depth_gru_gates(z, h), cell(y, h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_gru_gates_are_the_formula(before: bool, normed: bool) -> None:
    gates = 3 if before else 4
    z, h = normal(2, 3, gates * C), normal(2, 3, C)
    weight, bias = (normal(gates, C), normal(gates, C)) if normed else (None, None)
    reset_weight = normal(C, C) if before else None
    a = list(z.chunk(gates, -1))
    if weight is not None and bias is not None:
        a = [layer_norm(each, weight[k], bias[k]) for k, each in enumerate(a)]
    r, u = 1 / (1 + torch.exp(-a[0])), 1 / (1 + torch.exp(-a[1]))
    recurrent = r * a[3] if reset_weight is None else (r * h) @ reset_weight.T
    wanted = (1 - u) * torch.tanh(a[2] + recurrent) + u * h
    found = dl.depth_gru_gates(z, h, weight, bias, reset_weight=reset_weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_gru_gates_gradients(before: bool) -> None:
    gates = 3 if before else 4
    leaves = [normal(2, gates * C), normal(2, C), normal(gates, C), normal(gates, C), *([normal(C, C)] * before)]

    def step(z: Tensor, h: Tensor, weight: Tensor, bias: Tensor, *reset: Tensor) -> Tensor:
        return dl.depth_gru_gates(z, h, weight, bias, reset_weight=reset[0] if reset else None)

    assert torch.autograd.gradcheck(step, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("sources", [1, 4])
def test_layer_mix_is_the_formula(sources: int) -> None:
    xs, weights = [normal(2, 3, C) for _ in range(sources)], normal(2, sources)
    wanted = torch.einsum("vl,lbsc->vbsc", weights, torch.stack(xs))
    for found, each in zip(dl.layer_mix(xs, weights), wanted.unbind(0), strict=True):
        torch.testing.assert_close(found, each, rtol=1e-12, atol=1e-12)


def test_layer_mix_of_a_one_hot_row_is_its_source_bit_for_bit() -> None:
    xs = [normal(2, 3, C, dtype=torch.float32) for _ in range(4)]
    for index in range(4):
        (mixed,) = dl.layer_mix(xs, torch.eye(4)[index : index + 1])
        assert torch.equal(mixed, xs[index])


def attend_by_hand(xs: list[Tensor], query: Tensor, key_weight: Tensor) -> Tensor:
    stacked = torch.stack(xs)
    keys = rms_norm(stacked, key_weight)
    return torch.einsum("lbs,lbsc->bsc", torch.einsum("c,lbsc->lbs", query, keys).softmax(0), stacked)


@pytest.mark.parametrize("sources", [1, 4])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_layer_attend_is_the_formula(sources: int, norm: str | None) -> None:
    xs, query, key_weight = [normal(2, 3, C) for _ in range(sources)], 2 * normal(C), normal(C)
    weight, bias = None if norm is None else normal(C), normal(C) if norm == "layer" else None
    wanted = attend_by_hand(xs, query, key_weight)
    if weight is not None:
        wanted = {"layer": layer_norm, "rms": rms_norm}[str(norm)](wanted, weight, bias)
    found = dl.layer_attend(xs, query, key_weight, weight, bias, norm=norm or "layer")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sources", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_zero_query_gives_the_exact_mean(sources: int, dtype: torch.dtype) -> None:
    xs = [normal(2, 3, C, dtype=dtype) for _ in range(sources)]
    wide = [x if dtype == F64 else x.float() for x in xs]
    total = wide[0]
    for x in wide[1:]:
        total = total + x
    assert torch.equal(dl.layer_attend(xs, torch.zeros(C, dtype=dtype)), (total / sources).to(dtype))


def test_layer_attend_survives_large_scores() -> None:
    xs = [normal(2, C, dtype=torch.float32) for _ in range(3)]
    found = dl.layer_attend(xs, torch.full((C,), 1e4))
    assert found.isfinite().all()


def test_gradients_of_the_gathers() -> None:
    xs = [normal(2, C).requires_grad_() for _ in range(3)]
    weights, vectors = normal(2, 3).requires_grad_(), [normal(C).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(lambda w, *x: dl.layer_mix(x, w), [weights, *xs])
    assert torch.autograd.gradcheck(lambda q, k, w, b, *x: dl.layer_attend(x, q, k, w, b), [*vectors, *xs])


def test_mixed_sources_give_the_widest_type() -> None:
    xs = [normal(2, C, dtype=torch.float32), normal(2, C, dtype=torch.bfloat16)]
    assert dl.layer_mix(xs, torch.ones(1, 2))[0].dtype == torch.float32
    assert dl.layer_attend(xs, torch.zeros(C)).dtype == torch.float32


def test_zero_rows() -> None:
    x = torch.empty(0, C)
    assert dl.norm_step(x, x, weight2=torch.ones(C))[1].shape == (0, C)
    assert dl.layer_attend([x, x], torch.ones(C)).shape == (0, C)
    assert dl.depth_gru_gates(torch.empty(0, 4 * C), x).shape == (0, C)


ROW, OTHER = torch.ones(2, C), torch.ones(C)
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("no tensor", lambda: dl.norm_step(ROW, 1.0), TypeError, "y must be a torch.Tensor"),
    ("shapes", lambda: dl.norm_step(torch.ones(3, C), ROW), ValueError, r"x must have shape \(2, 5\); found \(3, 5\)"),
    ("dtypes", lambda: dl.norm_step(ROW.double(), ROW), TypeError, "x must be float32 beside a float32 y"),
    ("scalar", lambda: dl.norm_step(torch.ones(()), torch.ones(())), ValueError, r"y must have shape \(\.\.\., C\)"),
    ("a", lambda: dl.norm_step(ROW, ROW, a=float("nan")), ValueError, "a must be finite"),
    ("b", lambda: dl.norm_step(ROW, ROW, b=torch.ones(3)), ValueError, r"b must have shape \(5,\); found \(3,\)"),
    ("norm", lambda: dl.norm_step(ROW, ROW, norm="batch"), ValueError, "norm must be one of 'layer', 'rms'"),
    ("bias", lambda: dl.norm_step(ROW, ROW, bias2=OTHER), ValueError, "weight2 must be given with bias2"),
    (
        "rms",
        lambda: dl.norm_step(ROW, ROW, weight2=OTHER, bias2=OTHER, norm="rms"),
        ValueError,
        'bias2 must be None with norm="rms"',
    ),
    (
        "c",
        lambda: dl.siamese_step(ROW, ROW, ROW, OTHER, None, OTHER, None, c=0.0),
        ValueError,
        "c must be above 0; found 0.0",
    ),
    ("gates", lambda: dl.depth_gru_gates(ROW, ROW), ValueError, r"z must have shape \(2, 20\); found \(2, 5\)"),
    (
        "half an affine",
        lambda: dl.depth_gru_gates(torch.ones(2, 4 * C), ROW, torch.ones(4, C)),
        ValueError,
        "bias must be given with weight",
    ),
    ("stacked", lambda: dl.layer_mix(torch.ones(3, 2, C), OTHER), TypeError, "sources must be a list or tuple"),
    ("none", lambda: dl.layer_mix([], OTHER), ValueError, "sources must hold at least one tensor"),
    ("odd one", lambda: dl.layer_mix([ROW, OTHER], OTHER), ValueError, r"sources\[1\] must have shape \(2, 5\)"),
    ("weights", lambda: dl.layer_mix([ROW, ROW], OTHER), ValueError, r"weights must have shape \(V, 2\)"),
    ("query", lambda: dl.layer_attend([ROW], ROW), ValueError, r"query must have shape \(5,\); found \(2, 5\)"),
    ("no query", lambda: dl.layer_attend([ROW], None), TypeError, "query must be a torch.Tensor; found NoneType"),
]


@pytest.mark.parametrize(("call", "error", "text"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_arguments(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_inputs_are_left_alone() -> None:
    """A history tensor is read by every later layer: nothing may be added into it."""
    tensors = [normal(2, C) for _ in range(3)]
    before = [tensor.clone() for tensor in tensors]
    weight = normal(C)
    dl.norm_step(tensors[0], tensors[1], weight1=weight, weight2=weight)
    dl.siamese_step(*tensors, weight, None, weight, None, c=2.0)
    dl.layer_mix(tensors, normal(1, 3))
    dl.layer_attend(tensors, normal(C), weight=weight)
    for tensor, original in zip(tensors, before, strict=True):
        assert torch.equal(tensor, original)


def test_public_ops_have_the_signatures_of_their_references() -> None:
    for name in ("norm_step", "siamese_step", "depth_gru_gates", "layer_mix", "layer_attend"):
        public, reference = getattr(dl, name), getattr(dl.reference, name)
        found, wanted = inspect.signature(public).parameters, inspect.signature(reference).parameters
        for a, b in itertools.zip_longest(found.values(), wanted.values()):
            assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default), name
