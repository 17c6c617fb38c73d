"""The formulas of csrc/common/activations.h and csrc/depth_lstm/math.h.

Scalars are compared with Python's math, vectors of each instruction set with PyTorch in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_calls import ISAS, internals, run
from test_dropout import SEEDS, philox

from depthlstm_fast.activations import FUNCTIONS
from depthlstm_fast.checks import ACTIVATIONS
from depthlstm_fast.reference import depth_lstm as reference

# 0, the polynomials' knots and bounds (4.4, 4.5), the ends of exp in fp32 (88, 104) and of erfc in fp64 (38), and
# infinity
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
    wanted, slope = reference.activate(tensor, name).item(), FUNCTIONS[name].slope(tensor).item()
    key = f"act {name}"
    for function, rel, absolute in ((internals.formulas_double, 1e-11, 1e-15), (internals.formulas_float, 2e-5, 3e-6)):
        value, again, found = function(a)[key]
        assert value == again == pytest.approx(wanted, rel=rel, abs=absolute)
        assert found == pytest.approx(slope, rel=rel, abs=absolute)


def test_nan_passes() -> None:
    for function in (internals.formulas_double, internals.formulas_float):
        for name, value in function(math.nan).items():
            for number in value if isinstance(value, tuple) else (value,):
                assert math.isnan(number) or (name == "act relu" and number in (0.0, 1.0))  # relu's slope is a choice


@pytest.mark.parametrize("seed", [*(seed % 2**64 for seed in SEEDS), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("row", "block"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 5), (2**32, 7), (2**40 + 3, 2**32 - 1)])
def test_philox(seed: int, row: int, block: int) -> None:
    low = 0xFFFFFFFF
    assert list(internals.philox(seed, row, block)) == philox(
        [block, row & low, row >> 32, 0], [seed & low, seed >> 32]
    )


def test_cell_and_its_gradient() -> None:
    i, f, o, g, c_in, dh, dc = torch.rand(7, dtype=torch.float64).mul(0.8).add(0.1).tolist()
    a_i, a_f, a_o = (torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True) for p in (i, f, o))
    leaves = [a_i, a_f, a_o, *(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (g, c_in))]
    c = a_f.sigmoid() * leaves[4] + a_i.sigmoid() * leaves[3]
    h = a_o.sigmoid() * c
    assert internals.cell_forward(i, f, o, g, c_in) == pytest.approx([c.item(), h.item()], rel=1e-13)
    wanted = torch.autograd.grad(dh * h + dc * c, leaves)
    assert internals.cell_backward(i, f, o, g, c_in, dh, dc) == pytest.approx([x.item() for x in wanted], rel=1e-13)


# A dense grid through the important range, so that no piece of a polynomial is missed, and the tails beyond it.
GRID = np.concatenate(
    [np.linspace(-20, 20, 40001), np.linspace(-120, 120, 4001), np.array(POINTS[:22] + POINTS[23:-1])]
)
DTYPES = {"float": np.float32, "double": np.float64}


def forward(isa: str, z: np.ndarray, c: np.ndarray, activation: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (h, c) of one row with norm none; z (4, D), c (D)."""
    tensors = {"z": torch.from_numpy(z).reshape(1, -1), "c": torch.from_numpy(c)[None]}
    found = run(isa, tensors, {"norm": "none", "activation": ACTIVATIONS[activation]})
    return found["h"][0].numpy(), found["c_out"][0].numpy()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors(dtype: str, isa: str, name: str) -> None:
    """Check i = 1/2 and f c' = 0, which leave act(a) / 2 in c.

    With c' = 1 and g = 0 the sigmoids of f and o stand alone.
    """
    kind = DTYPES[dtype]
    a = GRID.astype(kind)
    exact = torch.from_numpy(a).double()
    zeros = np.zeros_like(a)
    index = ACTIVATIONS.index(name)
    _, c = forward(isa, np.stack([zeros, zeros, zeros, a]), zeros, index)
    eps = np.finfo(kind).eps
    wanted = reference.activate(exact, name).numpy() / 2
    np.testing.assert_allclose(c, wanted, rtol=100 * eps, atol=64 * eps)  # torch's 1 + erf cancels in the tail
    below = np.full_like(a, -np.inf if name not in ("gelu", "gelu_tanh", "silu", "tanh") else 0)  # g = 0
    gate = torch.sigmoid(exact).numpy()
    h, c = forward(isa, np.stack([np.full_like(a, -np.inf), a, zeros, below]), np.ones_like(a), index)
    # rounding a log2(e) alone moves the tail by |a| eps; below -86 (-708) it may stop at the smallest normal numbers
    np.testing.assert_allclose(c, gate, rtol=100 * eps, atol=4 * np.finfo(kind).smallest_normal)
    np.testing.assert_allclose(h, gate / 2, rtol=100 * eps, atol=4 * np.finfo(kind).smallest_normal)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_pass_nan(dtype: str, isa: str) -> None:
    kind = DTYPES[dtype]
    for gate in range(4):
        for index, name in enumerate(ACTIVATIONS):
            z = np.zeros((4, 37), kind)
            z[gate, ::3] = np.nan
            h, c = forward(isa, z, np.ones(37, kind), index)
            assert np.array_equal(np.isnan(h), np.isnan(z[gate])), (gate, name)
            assert np.array_equal(np.isnan(c), np.isnan(z[gate]) & (gate != 2)), (gate, name)


LOG2_E = 1.4426950408889634


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="numpy has no type beyond double here")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "least", "most", "systematic"), [("float", 40, 2.5, 0.85), ("double", 60, 2.0, 0.1)])
def test_exp2_of_vectors(dtype: str, least: int, most: float, systematic: float, isa: str) -> None:
    """Check 1 + 2^x, which is 2^x from ``least`` on, and the forget gate 2^-x.

    They stay within ``most`` eps, and in the mean over 1/64 of x within ``systematic``. The mean of 4096 roundings is
    negligible, so the rest is the polynomial's own error: 7.5e-8 in fp32.
    """
    kind = DTYPES[dtype]
    a = -np.linspace(least, least + 1, 2**18).astype(kind) / kind(LOG2_E)
    x = a * kind(-LOG2_E)  # as the kernel rounds it
    ones = np.full_like(a, np.inf)
    _, c = forward(isa, np.stack([-ones, a, ones, np.zeros_like(a)]), np.ones_like(a), 0)
    wanted = np.exp2(-x.astype(np.longdouble))
    error = ((c - wanted) / wanted / np.finfo(kind).eps).astype(float)
    assert np.abs(error).max() <= most
    part = np.floor(64 * (x - np.floor(x))).astype(int)
    assert np.abs(np.bincount(part, error) / np.bincount(part)).max() <= systematic


def exact_activation(a: np.ndarray, name: str) -> np.ndarray:
    if name == "gelu":
        return np.array([x * cdf(x) for x in a])
    if name == "tanh":
        return np.tanh(a)
    if name == "relu":
        return np.maximum(a, 0)
    inner = {"gelu_tanh": 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3), "silu": a, "sigmoid": a}[name]
    return (1 if name == "sigmoid" else a) / (1 + np.exp(-inner))


# In eps of the type: relative to the value where |a| < 1, relative to max(1, |value|) everywhere, and the slope's,
# absolute. tanh is 2 sigmoid(2 a) - 1, which has no relative accuracy at zero. xsimd's erfc in fp64 is good to some 20
# eps.
ACCURACY = {
    "gelu": (4.5, 4.0, 4.0),
    "gelu_tanh": (3.5, 3.0, 20.0),
    "relu": (0.0, 0.0, 0.0),
    "tanh": (math.inf, 2.5, 4.0),
    "silu": (2.5, 2.5, 8.0),
    "sigmoid": (2.5, 2.0, 2.0),
}
ACCURACY_OF_DOUBLE = {**ACCURACY, "gelu": (25.0, 60.0, 60.0), "gelu_tanh": (3.5, 3.0, 60.0), "silu": (2.5, 2.5, 12.0)}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_activations(dtype: str, isa: str, name: str) -> None:
    """Check i = 1 and f c' = 0, which leave act(a) in c; backward dc = 1 and dh = 0 leave act'(a) in dz."""
    kind = DTYPES[dtype]
    slack = 1.5 if isa.startswith("avx512") else 1.0  # a Newton step replaces the division there
    near, everywhere, steep = (slack * bound for bound in (ACCURACY if dtype == "float" else ACCURACY_OF_DOUBLE)[name])
    a = np.concatenate([np.linspace(-9, 9, 30001), [0.0]]).astype(kind)
    exact = a.astype(np.float64)
    z = torch.from_numpy(np.stack([np.full_like(a, np.inf), np.full_like(a, -np.inf), np.full_like(a, np.inf), a]))
    zeros = torch.zeros(1, len(a), dtype=z.dtype)
    found = run(isa, {"z": z.reshape(1, -1), "c": zeros}, {"norm": "none", "activation": name}, (zeros, zeros + 1))
    wanted, eps = exact_activation(exact, name), float(np.finfo(kind).eps)
    error = np.abs(found["c_out"][0].numpy() - wanted) / eps
    inner = (np.abs(a) < 1) & math.isfinite(near)
    assert (error[inner] <= near * np.abs(wanted[inner])).all()
    assert (error <= everywhere * np.maximum(1, np.abs(wanted))).all()
    slope = FUNCTIONS[name].slope(torch.from_numpy(exact)).numpy()
    assert np.abs(found["dz"][0].view(4, -1)[3].numpy() - slope).max() <= steep * eps
