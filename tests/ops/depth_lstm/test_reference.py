"""The reference functions: against the formulas in plain Python, finite differences and a hand-written backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    KINDS,
    MAIN_TYPES,
    NORMS,
    TYPES,
    Types,
    arguments,
    assert_bound,
    cotangents,
    double,
    normal,
    results,
)
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.activations import FUNCTIONS
from depthlstm_fast.reference import depth_lstm as reference


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


ACTIVATE: dict[str, Callable[[float], float]] = {
    "gelu": lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))),
    "gelu_tanh": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "relu": lambda a: max(a, 0.0),
    "tanh": math.tanh,
    "silu": lambda a: a * sigmoid(a),
    "sigmoid": sigmoid,
}


def gates_in_plain_python(
    z: list[float],
    c: list[float],
    weight: Any,
    bias: Any,
    hidden: list[float] | None,
    norm: str,
    activation: str,
    eps: float,
) -> tuple[list[float], list[float]]:
    """Compute one row, scalar by scalar, from the formulas of the paper, independently of the package."""
    size = len(c)
    gates = [z[k * size : (k + 1) * size] for k in range(len(z) // size)]

    def moments(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        return mean, sum((value - mean) ** 2 for value in values) / len(values)

    a = []
    for k, values in enumerate(gates):
        if norm == "none":
            a.append(values)
            continue
        mean, variance = moments(values if norm == "gate" else z)
        n = [(value - mean) / math.sqrt(variance + eps) for value in values]
        a.append([value * weight[k][d] + bias[k][d] for d, value in enumerate(n)] if weight is not None else n)
    h, new_c = [], []
    for d in range(size):
        g = ACTIVATE[activation](a[3][d]) if hidden is None else hidden[d]
        new_c.append(sigmoid(a[1][d]) * c[d] + sigmoid(a[0][d]) * g)
        h.append(sigmoid(a[2][d]) * new_c[-1])
    return h, new_c


@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind: str, norm: str, affine: bool) -> None:
    tensors, options = arguments(3, 7, MAIN_TYPES[1], norm, affine, kind)
    h, c = reference.depth_lstm_gates(**tensors, **options, eps=1e-3)
    weight, bias = (tensors[name].tolist() if affine else None for name in ("weight", "bias"))
    for row in range(3):
        hidden = tensors["hidden"][row].tolist() if kind == "given" else None
        wanted = gates_in_plain_python(
            tensors["z"][row].tolist(),
            tensors["c"][row].tolist(),
            weight,
            bias,
            hidden,
            norm,
            options["activation"],
            1e-3,
        )
        torch.testing.assert_close(h[row], torch.tensor(wanted[0], dtype=F64), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(c[row], torch.tensor(wanted[1], dtype=F64), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, norm: str, affine: bool) -> None:
    tensors, options = arguments((2, 2), 3, MAIN_TYPES[1], norm, affine, kind)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return reference.depth_lstm_gates(**dict(zip(names, values, strict=True)), **options, eps=1e-2)

    inputs = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs)
    if kind in (
        "gelu",
        "given",
    ):  # the second derivative comes from autograd: one activation and the path without one suffice
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("features", [1, 2, 33])
@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [False, True])
def test_written_backward_equals_autograd(dropout: bool, kind: str, norm: str, affine: bool, features: int) -> None:
    tensors, options = arguments((2, 3), features, MAIN_TYPES[1], norm, affine, kind)
    grads = cotangents(tensors)
    drop: dict[str, Any] = {"dropout_p": 0.3, "seed": torch.tensor([5])} if dropout else {}
    wanted = results(reference.depth_lstm_gates, tensors, grads, **options, **drop, training=dropout)
    found = reference.depth_lstm_gates_backward(*grads, **tensors, **options, **drop)
    for name, value in zip(("dz", "dhidden", "dc", "dweight", "dbias"), found, strict=True):
        if name in wanted:
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-11)
        else:
            assert value is None, name


# 16-bit types in every mixture: h takes z's type, c keeps its own
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_types(types: Types, norm: str, affine: bool, kind: str) -> None:
    tensors, options = arguments((2, 3), 9, types, norm, affine, kind)
    grads = cotangents(tensors)
    found = results(reference.depth_lstm_gates, tensors, grads, **options)
    exact = results(reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    assert (found["h"].dtype, found["c_out"].dtype) == (types.z, types.c)
    tolerance = {F64: 1e-13, F32: 1e-5, F16: 2e-2, BF16: 1e-1}[types.z]
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=tolerance, atol=tolerance)


def test_cell_is_the_product_and_the_gates() -> None:
    x, y, h, c = normal(2, 3, 4), normal(2, 3, 2), normal(2, 3, 5), normal(2, 3, 5)
    w, b, weight, bias = normal(20, 11), normal(20), normal(4, 5), normal(4, 5)
    z = torch.cat((x, y, h), -1) @ w.T + b
    wanted = reference.depth_lstm_gates(z, c, weight, bias)
    for given in ((x, y), torch.cat((x, y), -1)):
        for a, e in zip(reference.depth_lstm_cell(given, h, c, w, b, weight, bias), wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_cell_gradcheck(norm: str) -> None:
    tensors = [normal(3, 2), normal(3, 4), normal(3, 4), normal(16, 6), normal(16), normal(4, 4), normal(4, 4)]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return reference.depth_lstm_cell(*values, norm=norm, eps=1e-2)

    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# Tests of the error bound: each mutant is the hand-written arithmetic in fp32 with one fault that a kernel could have.
def mutant(fault: str, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    z, c, weight, bias = (tensors[name] for name in ("z", "c", "weight", "bias"))
    a = z.unflatten(-1, (4, -1))
    mean = a.mean(-1, keepdim=True)
    variance = (
        (a * a).mean(-1, keepdim=True) - mean**2
        if fault == "one-pass variance"
        else (a - mean).square().mean(-1, keepdim=True)
    )
    if fault == "unbiased variance":
        variance = variance * a.shape[-1] / (a.shape[-1] - 1)
    r = torch.rsqrt(variance + (1e-5 if fault == "wrong eps" else 1e-6))
    n = (a - mean) * r
    a = n * weight + bias
    i, f, o = torch.sigmoid(a[..., :3, :]).unbind(-2)
    if fault == "gates swapped":
        i, f = f, i
    if fault == "sigmoid to 16 bits":
        i, f, o = (x.to(F16).to(F32) for x in (i, f, o))
    name = "gelu_tanh" if fault == "another gelu" else "gelu"
    g = reference.activate(a[..., 3, :], name)
    new_c = f * c + i * g
    h = o * new_c
    dh, dc = grads
    t = dc if fault == "dh forgotten in t" else dc + dh * o
    slope = FUNCTIONS[name].slope(a[..., 3, :])
    da = torch.stack((t * g * i * (1 - i), t * c * f * (1 - f), dh * new_c * o * (1 - o), t * i * slope), -2)
    u = da * weight
    mean_u = 0 if fault == "mean of u forgotten" else u.mean(-1, keepdim=True)
    mean_un = 0 if fault == "mean of u n forgotten" else (u * n).mean(-1, keepdim=True)
    dz = (r * (u - mean_u - n * mean_un)).flatten(-2)
    dweight, dbias = (da * n).sum(0), da.sum(0)
    if fault == "one row not summed":
        dbias = da[:-1].sum(0)
    if fault == "one element not written":
        h[-1, -1] = torch.nan
    return {"h": h, "c_out": new_c, "dz": dz, "dc": t * f, "dweight": dweight, "dbias": dbias}


FAULTS = ["gates swapped", "unbiased variance", "wrong eps", "sigmoid to 16 bits", "another gelu", "dh forgotten in t"]
FAULTS += [
    "mean of u forgotten",
    "mean of u n forgotten",
    "one row not summed",
    "one element not written",
    "one-pass variance",
]


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_error_bound_finds_faults(fault: str) -> None:
    tensors, options = arguments(17, 33, MAIN_TYPES[0])
    if fault == "wrong eps":
        tensors["z"] *= 1e-2  # eps is visible only near its size
    ratio = 100.0 if fault == "one-pass variance" else 0.0  # as in test_mean_far_beyond_deviation
    tensors["z"] += ratio
    grads = cotangents(tensors)
    eager = results(dl.reference.depth_lstm_gates, tensors, grads, **options)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    found = mutant(fault, tensors, grads)
    if fault:
        with pytest.raises(AssertionError, match="allowed"):
            assert_bound(found, eager, exact, ratio)
    else:
        assert_bound(found, eager, exact, ratio)
