"""LayerNorm and RMSNorm of tiles (ROWS, BLOCK), and the gradient through them. Everything is fp32.

NORM is "layer" or "rms". A column outside of a row is 0 in the tile, in the weight and in the bias.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .tiles import load


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def row_norm(v, inside, eps, FEATURES: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr):
    """Return (n, r): the normalised tile, with 0 outside, and 1 / deviation of its rows.

    The second pass takes the mean of v - mean too. On a nearly constant row the rounding error of the mean is most of
    v - mean, and r = 1 / sqrt(eps) would blow it up.
    """
    if NORM == "layer":
        mean = tl.sum(v, 1, keep_dims=True) * (1.0 / FEATURES)
        centred = v - mean
        if MASKED:
            centred = tl.where(inside, centred, 0.0)
        rest, square = tl.reduce((centred, centred * centred), 1, _add2, keep_dims=True)
        rest *= 1.0 / FEATURES
        variance = square * (1.0 / FEATURES) - rest * rest
        variance = tl.where(variance < 0, 0.0, variance)  # not a maximum, because NaN must stay
        r = tl.math.rsqrt(variance + eps)
        n = (v - mean) * r - rest * r
    else:
        r = tl.math.rsqrt(tl.sum(v * v, 1, keep_dims=True) * (1.0 / FEATURES) + eps)
        n = v * r
    if MASKED:
        n = tl.where(inside, n, 0.0)
    return n, r


@triton.jit
def norm_backward(q, n, r, FEATURES: tl.constexpr, NORM: tl.constexpr):
    """Return the gradient through a norm, from q = weight * gradient of its output."""
    sum_q, sum_qn = tl.reduce((q, q * n), 1, _add2, keep_dims=True)
    change = n * (sum_qn * (1.0 / FEATURES))
    if NORM == "layer":
        change += sum_q * (1.0 / FEATURES)
    return (q - change) * r


@triton.jit
def load_parameter(parameter, column, rows, FEATURES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile (1, BLOCK) of a parameter; zeros if there is none.

    ``rows`` is never 0. The branch keeps the load out of a loop's pipeline: see load_affine in tiles.py.
    """
    values = tl.zeros((1, BLOCK), tl.float32)
    if parameter is not None:  # noqa: SIM102  None is known at compile time, rows is not
        if rows > 0:
            values = load(parameter + column, column < FEATURES, MASKED)
    return values


@triton.jit
def apply_norm(
    v, weight, bias, column, inside, rows, eps,
    FEATURES: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (n weight + bias, n, r)."""
    n, r = row_norm(v, inside, eps, FEATURES, NORM, MASKED)
    out = n * load_parameter(weight, column, rows, FEATURES, MASKED, BLOCK)
    if bias is not None:
        out += load_parameter(bias, column, rows, FEATURES, MASKED, BLOCK)
    return out, n, r


@triton.jit
def store_sum(sums, partial, program, place, COUNT: tl.constexpr, column, FEATURES: tl.constexpr):
    """Sum a tile over its rows and store it as row ``place`` of this program's COUNT rows of ``partial``."""
    at = partial + (program.to(tl.int64) * COUNT + place) * FEATURES + column
    tl.store(at, tl.sum(sums, 0, keep_dims=True), mask=column < FEATURES)


@triton.jit
def _total(partial, programs, columns, column, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, programs, ROWS):
        program = (tl.cast(first, tl.int64) + tl.arange(0, ROWS))[:, None]
        total += tl.load(partial + program * columns + column, mask=(program < programs) & inside, other=0.0)
    return total


@triton.jit
def _store_if(out, place, wanted, column, total, inside):
    if out is not None:  # noqa: SIM102  as in load_parameter
        if place == wanted:
            tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    partial,  # (programs, COUNT, FEATURES) fp32
    out0, out1, out2, out3, out4, out5, out6,  # (FEATURES,) each, written; None from the number COUNT on
    programs,
    COUNT: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the programs' partial sums of each parameter, in an order that does not depend on time."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    place = tl.program_id(1)
    inside = column < FEATURES
    total = _total(partial + place * FEATURES, programs, COUNT * FEATURES, column, inside, ROWS, BLOCK)
    total = tl.sum(total, 0, keep_dims=True)
    _store_if(out0, place, 0, column, total, inside)
    _store_if(out1, place, 1, column, total, inside)
    _store_if(out2, place, 2, column, total, inside)
    _store_if(out3, place, 3, column, total, inside)
    _store_if(out4, place, 4, column, total, inside)
    _store_if(out5, place, 5, column, total, inside)
    _store_if(out6, place, 6, column, total, inside)


@triton.jit
def single_sum_kernel(partial, out, programs, BLOCK: tl.constexpr):
    """Add one number of each program, in one program."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, programs, BLOCK):
        total += tl.load(partial + first + at, mask=first + at < programs, other=0.0)
    tl.store(out, tl.sum(total, 0).to(out.dtype.element_ty))


def parameters_of(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the parameters dense, as the kernels read them."""
    return [None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors]


SUMS_PLAN = Launch(4, {"ROWS": 16, "BLOCK": 128})
SINGLE_SUM_PLAN = Launch(1, {"BLOCK": 256})
WARPS = 8  # resident on a multiprocessor at 255 registers a thread


def tile_plan(features: int, elements: int, most: int = 32, **more: int) -> Launch:
    """Plan rows of ``features`` at ``elements`` a thread, or more beyond ``most`` warps.

    A warp takes several short rows, and a long row takes several warps.
    """
    block = max(16, triton.next_power_of_2(features))
    warps = min(most, max(1, block // (32 * elements)))
    return Launch(warps, {"ROWS": max(1, 32 * elements // block), "BLOCK": block, **more})
