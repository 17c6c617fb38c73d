"""Conversions to and from 16 bits in each instruction set's kernels, bit for bit.

The tests also check which results keep the accuracy of fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, KINDS, Types, arguments, cotangents, double, results
from kernel_calls import ISAS, run
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.checks import ACTIVATIONS


def near_every_rounding(half: torch.dtype) -> Tensor:
    """Return fp32 numbers on and beside every point of rounding to ``half``.

    They are every number of ``half``, infinity and NaN, and every midpoint between neighbours with its own neighbours.
    """
    grid = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(half).float()
    grid = grid[grid.isfinite()]
    middle = grid[:-1] + (grid[1:] - grid[:-1]) / 2
    last = grid[-1] + (grid[-1] - grid[-2]) / 2  # numbers from here on round to infinity
    points = torch.cat((middle, last[None]))
    ends = torch.tensor([2.0**127, torch.finfo(F32).max, torch.inf])
    # rounding as for numbers would turn one of them into -0
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(F32)
    values = [grid, points, *(torch.nextafter(points, torch.tensor(way)) for way in (0.0, torch.inf)), ends, nan]
    every = torch.cat(values)
    return torch.cat((every, -every))


def converted(isa: str, values: Tensor, half: torch.dtype, **options: Any) -> Tensor:
    """Return ``values`` (rows, D) in fp32 as a kernel writes them in 16 bits.

    f = o = 1 and i g = -0 leave h = c = c'.
    """
    z = torch.full((values.shape[0], 3, values.shape[1]), torch.inf, dtype=half)
    z[:, 0] = -torch.inf
    found = run(
        isa,
        {"z": z.flatten(1), "c": values, "hidden": torch.full(values.shape, -0.0, dtype=half)},
        {"norm": "none"},
        **options,
    )
    assert torch.equal(found["c_out"].nan_to_num(7e37), values.nan_to_num(7e37))
    return found["h"]


def bits(x: Tensor) -> Tensor:
    """Return the bits, the same for every NaN."""
    return torch.where(x.isnan(), 0x7FFF, x.view(torch.int16))


# whole vectors, the same streamed, and rows that end in a part of a vector
@pytest.mark.parametrize(("width", "stream"), [(64, False), (64, True), (13, False)])
@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_rounding_to_nearest_even(isa: str, half: torch.dtype, width: int, stream: bool) -> None:
    values = near_every_rounding(half)
    if isa == "avx512_bf16" and half == BF16:  # the CPU's own conversion takes subnormals for zeros
        values = values[~(values.abs() < torch.finfo(F32).smallest_normal)]
    values = torch.nn.functional.pad(values, (0, -len(values) % width)).view(-1, width)
    found = converted(isa, values, half, stream=stream)
    assert torch.equal(bits(found), bits(values.to(half)))
    by_hand = {BF16: (1.00390625, 1.01171875, 1.0, 1.015625), F16: (1.00048828125, 1.00146484375, 1.0, 1.001953125)}[
        half
    ]
    assert converted(isa, torch.tensor([by_hand[:2]]), half).tolist() == [
        list(by_hand[2:])
    ]  # ties go to the even neighbour


@pytest.mark.parametrize("width", [64, 13])
@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_16_bit_number_is_read_exactly(isa: str, half: torch.dtype, width: int) -> None:
    """Check that i = 1 and c' = 0 leave c = hidden."""
    hidden = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(half)
    hidden = torch.nn.functional.pad(hidden, (0, -len(hidden) % width)).view(-1, width)
    tensors = {
        "z": torch.full((len(hidden), 3 * width), torch.inf, dtype=half),
        "c": torch.zeros(hidden.shape),
        "hidden": hidden,
    }
    found = run(isa, tensors, {"norm": "none"})["c_out"]
    assert torch.equal(found.nan_to_num(7e37), hidden.float().nan_to_num(7e37))


WIDE = {"c": {"c_out", "dc"}, "affine": {"dweight", "dbias"}, "z_bias": {"dz_bias"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("isa", ISAS)
def test_fp32_beside_16_bits_is_computed_as_such(isa: str, wide: str, half: torch.dtype, kind: str) -> None:
    """Check that one fp32 operand gets the exact formulas, whose results are far better than the fast ones' 5e-5."""
    types = Types(half, F32 if wide == "c" else half, F32 if wide == "affine" else half)
    tensors, options = arguments(17, 33, types, kind=kind)
    tensors["z_bias"] = torch.randn(tensors["z"].shape[1]).to(F32 if wide == "z_bias" else half)
    grads = cotangents(tensors)
    found = run(isa, tensors, options, grads)
    given = double(tensors)
    z_bias = given.pop("z_bias")
    given["z"] += z_bias
    exact = results(dl.reference.depth_lstm_gates, given, (grads[0].double(), grads[1].double()), **options)
    exact["dz_bias"] = exact["dz"].sum(0)
    assert {name for name, value in found.items() if value.dtype == F32} == WIDE[wide]
    for name in WIDE[wide]:
        assert (found[name] - exact[name]).abs().max() <= 4e-6 * exact[name].abs().max(), name


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_fast_formulas(isa: str, half: torch.dtype, kind: str) -> None:
    """Check every a between -20 and 20 in ``half``.

    Sigmoid and activation stay within a rounding and the formulas' own errors.
    """
    fast = 2e-4 if isa.startswith("avx512") else 6e-5  # the approximate reciprocal of AVX-512 adds an error
    a = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(half)
    a = a[a.abs() <= 20][None]
    exact = a.double()
    zeros, ones = torch.zeros_like(a), torch.full_like(a, torch.inf)
    below = ones if kind == "relu" else zeros
    for name, z, c, wanted in (
        ("activation", (ones, zeros, ones, a), zeros, dl.reference.depth_lstm.activate(exact, kind)),
        ("sigmoid", (-ones, a, ones, -below), torch.ones_like(a), exact.sigmoid()),
    ):
        h = run(isa, {"z": torch.cat(z, 1), "c": c}, {"norm": "none", "activation": kind})["h"]
        rounding = torch.finfo(half).eps / 2 * wanted.abs() + torch.finfo(half).smallest_normal
        excess = (h - wanted).abs() - rounding
        assert (excess <= fast * (wanted.abs() if name == "sigmoid" else a.abs().clamp(min=1.0))).all(), name
