"""The formulas of csrc/gate_math.h: scalar against Python's math, and as vectors of each instruction set against PyTorch in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import KINDS
from test_dropout import SEEDS, philox

from depthlstm_fast.reference import gates as reference

internals = pytest.importorskip("_internals", reason="tests/_internals is not built (make internals)")

ACTIVATIONS = KINDS[:-1]
# 0, the polynomials' knots and bounds (4.4, 4.5), where exp leaves fp32 (88, 104), where erfc leaves fp64 (38), and infinity
POINTS = [
    0.0,
    1e-30,
    1e-7,
    1e-3,
    0.1,
    0.5,
    1.0,
    2.0,
    3.0,
    4.4,
    4.5,
    5.5,
    8.0,
    13.0,
    17.0,
    26.0,
    38.0,
    88.0,
    89.0,
    104.0,
    710.0,
    1e4,
    math.inf,
]
POINTS += [-point for point in POINTS[1:]]


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a)) if a > -700 else 0.0


def cdf(a: float) -> float:
    return 0.5 * math.erfc(-a / math.sqrt(2))


def pdf(a: float) -> float:
    return math.exp(-0.5 * min(a * a, 1500)) / math.sqrt(2 * math.pi)


FORMULAS: dict[str, Callable[[float], float]] = {"sigmoid": sigmoid, "cdf": cdf, "pdf": pdf, "normal_cdf": cdf}


@pytest.mark.parametrize("a", POINTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_scalars(name: str, a: float) -> None:
    wanted = FORMULAS[name](a)
    assert internals.formulas_double(a)[name] == pytest.approx(wanted, rel=1e-12, abs=1e-300)
    single = np.float32(a).item()
    assert internals.formulas_float(single)[name] == pytest.approx(FORMULAS[name](single), rel=5e-6, abs=1e-7)
    if name != "sigmoid":
        assert internals.fast_formulas(single)[name] == pytest.approx(FORMULAS[name](single), abs=6e-5)


@pytest.mark.parametrize("a", [point for point in POINTS if math.isfinite(point)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, a: float) -> None:
    tensor = torch.tensor(a, dtype=torch.float64)
    wanted, slope = reference.activate(tensor, name).item(), reference.activate_backward(tensor, name).item()
    key = "sigmoid_activation" if name == "sigmoid" else name
    for function, rel, absolute in ((internals.formulas_double, 1e-11, 1e-15), (internals.formulas_float, 2e-5, 3e-6)):
        value, again, found = function(a)[key]
        assert value == again == pytest.approx(wanted, rel=rel, abs=absolute)
        assert found == pytest.approx(slope, rel=rel, abs=absolute)


def test_nan_passes() -> None:
    for function in (internals.formulas_double, internals.formulas_float):
        for name, value in function(math.nan).items():
            for number in value if isinstance(value, tuple) else (value,):
                assert math.isnan(number) or (name == "relu" and number in (0.0, 1.0))  # relu's slope is a choice


@pytest.mark.parametrize("seed", [*(seed % 2**64 for seed in SEEDS), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("row", "block"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 5), (2**32, 7), (2**40 + 3, 2**32 - 1)])
def test_philox(seed: int, row: int, block: int) -> None:
    low = 0xFFFFFFFF
    assert list(internals.philox(seed, row, block)) == philox([block, row & low, row >> 32, 0], [seed & low, seed >> 32])


def test_cell_and_its_gradient() -> None:
    i, f, o, g, c_in, dh, dc = torch.rand(7, dtype=torch.float64).mul(0.8).add(0.1).tolist()
    a_i, a_f, a_o = (torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True) for p in (i, f, o))
    leaves = [a_i, a_f, a_o, *(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (g, c_in))]
    c = a_f.sigmoid() * leaves[4] + a_i.sigmoid() * leaves[3]
    h = a_o.sigmoid() * c
    assert internals.cell_forward(i, f, o, g, c_in) == pytest.approx([c.item(), h.item()], rel=1e-13)
    wanted = torch.autograd.grad(dh * h + dc * c, leaves)
    assert internals.cell_backward(i, f, o, g, c_in, dh, dc) == pytest.approx([x.item() for x in wanted], rel=1e-13)


# A dense grid through the range that matters, so that no piece of a polynomial is missed, and the tails beyond it
GRID = np.concatenate([np.linspace(-20, 20, 40001), np.linspace(-120, 120, 4001), np.array(POINTS[:22] + POINTS[23:-1])])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_vectors(dtype: str, isa: str, name: str) -> None:
    """i = 1/2 and f c' = 0 leave act(a) / 2 in c; with c' = 1 and g = 0 the sigmoids of f and o stand alone."""
    kind = np.float32 if dtype == "float" else np.float64
    forward = internals.forward_float if dtype == "float" else internals.forward_double
    a = GRID.astype(kind)
    exact = torch.from_numpy(a).double()
    zeros = np.zeros_like(a)
    index = reference.checks.ACTIVATIONS.index(name)
    try:
        _, c = forward(isa, np.stack([zeros, zeros, zeros, a]), zeros, index)
    except ValueError as error:
        pytest.skip(str(error))
    eps = np.finfo(kind).eps
    wanted = reference.activate(exact, name).numpy() / 2
    np.testing.assert_allclose(c, wanted, rtol=100 * eps, atol=64 * eps)  # torch's 1 + erf cancels in the tail
    below = np.full_like(a, -np.inf if name not in ("gelu", "gelu_tanh", "silu", "tanh") else 0)  # g = 0
    gate = torch.sigmoid(exact).numpy()
    h, c = forward(isa, np.stack([np.full_like(a, -np.inf), a, zeros, below]), np.ones_like(a), index)
    # rounding a log2(e) alone moves the tail by |a| eps; below -86 (-708) it may stop at the smallest normal numbers
    np.testing.assert_allclose(c, gate, rtol=100 * eps, atol=4 * np.finfo(kind).smallest_normal)
    np.testing.assert_allclose(h, gate / 2, rtol=100 * eps, atol=4 * np.finfo(kind).smallest_normal)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_vectors_pass_nan(dtype: str, isa: str) -> None:
    kind = np.float32 if dtype == "float" else np.float64
    forward = internals.forward_float if dtype == "float" else internals.forward_double
    for gate in range(4):
        for index, name in enumerate(ACTIVATIONS):
            z = np.zeros((4, 37), kind)
            z[gate, ::3] = np.nan
            try:
                h, c = forward(isa, z, np.ones(37, kind), index)
            except ValueError as error:
                pytest.skip(str(error))
            assert np.array_equal(np.isnan(h), np.isnan(z[gate])), (gate, name)
            assert np.array_equal(np.isnan(c), np.isnan(z[gate]) & (gate != 2)), (gate, name)
