"""What follows the products of a depth-wise GRU on a GPU, in Triton: one forward kernel, and two schemes of backward.

    h' = (1 - u) n + u h        r, u = sigmoid(a_r), sigmoid(a_u)        n = tanh(a_n + r a_m)

a is z, or with an affine each gate of z normalised. The gates r, u, n, m are a tuple of four tiles (ROWS, BLOCK).

forward: one pass over memory, 6C elements a row. A program takes a tile of rows.

narrow: backward for rows that fit the registers beside the sums of the parameter gradients, 11C elements a row.
Programs stay on the GPU and loop over tiles of rows. Each leaves one partial sum of the parameter gradients.

wide: backward for longer rows. `row_sums` takes the statistics and the two LayerNorm means of every row, and
`wide_backward` works on tiles of a few features. Without a LayerNorm there is nothing to take, and the second kernel
alone serves every C.

sums: adds the partial sums in a fixed order, without atomics.

An argument that is None is a compile-time constant. Everything is computed in fp32. Row numbers are int64, row strides
are in elements, features are dense.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import tune
from .common.formulas import MINUS_LOG2_E, reciprocal
from .common.launch import ALIGNMENT, Launch, as_rows, cdiv, device_of, is_aligned, key_of, launch, multiprocessors
from .common.tiles import (
    add_tiles,
    apply_affine,
    centre,
    layer_norm_backward,
    load,
    load_affine,
    load_gates,
    normalise,
    products,
    row_means,
    row_statistics,
    scale_and_shift,
    store,
    zeros,
)


@triton.jit
def _sigmoid(a, FAST: tl.constexpr):
    """Compute 1 / (1 + e^-a).

    fp32 results take a step of Newton's method: without it, a LayerNorm's gradient through tanh had 13 units of error
    in the last place where eager had 7.
    """
    exponent = a * MINUS_LOG2_E
    if FAST:
        return reciprocal(1.0 + tl.math.exp2(exponent))
    else:
        # the step is NaN at infinity; the comparison keeps NaN
        x = 1.0 + tl.math.exp2(tl.where(exponent > 126.0, 126.0, exponent))
        y = reciprocal(x)
        return y + y * (1.0 - x * y)


@triton.jit
def forward_kernel(
    z, h, weight, bias,  # (rows, 4 C), (rows, C), (4, C), (4, C)
    h_out,  # (rows, C), written
    rows, z_stride, h_stride,
    eps,
    FEATURES: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < FEATURES)
    a = load_gates(z + row * z_stride + column, inside, FEATURES, 4, MASKED)
    state = load(h + row * h_stride + column, inside, MASKED)
    if weight is not None:
        mean, r, shift = row_statistics(a, inside, eps, FEATURES, "gate", 4, MASKED)
        a = normalise(a, mean, r, shift, inside, 4, False)
        weights, biases = load_affine(weight, bias, column, 1, FEATURES, 4, MASKED, BLOCK)
        a = apply_affine(a, weights, biases, 4)
    update = _sigmoid(a[1], FAST)
    new = 2.0 * _sigmoid(2.0 * (a[2] + _sigmoid(a[0], FAST) * a[3]), FAST) - 1.0
    store(h_out + row * FEATURES + column, (1.0 - update) * new + update * state, inside, MASKED)


@triton.jit
def _gradients(
    n, dh_out, h, weight, bias, rows, row, column, inside, dh_out_stride, h_stride,
    FEATURES: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (da, u, dh): da and u = weight * da of the gates.

    See gru_backward in csrc/depth_gru_gates/math.h.
    """
    a = n
    if weight is not None:
        weights, biases = load_affine(weight, bias, column, rows, FEATURES, 4, MASKED, BLOCK)
        a = apply_affine(n, weights, biases, 4)
    state = load(h + row * h_stride + column, inside, MASKED)
    grad = load(dh_out + row * dh_out_stride + column, inside, MASKED)
    reset, update = _sigmoid(a[0], FAST), _sigmoid(a[1], FAST)
    half = _sigmoid(2.0 * (a[2] + reset * a[3]), FAST)
    new, slope = 2.0 * half - 1.0, 4.0 * half * (1.0 - half)
    direct = grad * update
    da_n = grad * (1.0 - update) * slope
    da_m = da_n * reset
    da = (da_m * a[3] * (1.0 - reset), direct * (1.0 - update) * (state - new), da_n, da_m)
    u = da
    if weight is not None:
        u = products(weights, da, 4)
    return da, u, direct


@triton.jit
def _store_dz(tiles, dz, row, column, inside, FEATURES: tl.constexpr, MASKED: tl.constexpr):
    for k in tl.static_range(4):
        store(dz + row * (4 * FEATURES) + k * FEATURES + column, tiles[k], inside, MASKED)


@triton.jit
def _store_sums(sums, partial, program, column, COUNT: tl.constexpr, FEATURES: tl.constexpr):
    """Sum tiles over their rows and store them as rows of FEATURES in this program's part of `partial`."""
    if COUNT > 0:
        at = partial + program.to(tl.int64) * (COUNT * FEATURES) + column
        for k in tl.static_range(COUNT):
            tl.store(at + k * FEATURES, tl.sum(sums[k], 0, keep_dims=True), mask=column < FEATURES)


@triton.jit
def narrow_backward_kernel(
    dh_out, z, h, weight, bias,
    dz, dh,  # written
    partial,  # (programs, 8, C) fp32, written: dweight and dbias
    rows, dh_out_stride, z_stride, h_stride,
    eps,
    FEATURES: tl.constexpr, FAST: tl.constexpr, AFFINE_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Backward with a LayerNorm on each gate."""
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    COUNT: tl.constexpr = 8 * AFFINE_GRADIENT
    column = tl.arange(0, BLOCK)[None, :]
    sums = zeros(COUNT, ROWS, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < FEATURES)
        z_row = row
        # A row past the end repeats the last one: for zeros and eps = 0, r would be infinite and the sums NaN.
        if ROWS > 1:
            z_row = tl.minimum(row, rows - 1)
        n = load_gates(z + z_row * z_stride + column, column < FEATURES, FEATURES, 4, MASKED)
        mean, r, shift = row_statistics(n, column < FEATURES, eps, FEATURES, "gate", 4, MASKED)
        n = normalise(n, mean, r, shift, inside, 4, MASKED)
        da, u, direct = _gradients(
            n,
            dh_out,
            h,
            weight,
            bias,
            rows,
            row,
            column,
            inside,
            dh_out_stride,
            h_stride,
            FEATURES,
            FAST,
            MASKED,
            BLOCK,
        )
        if AFFINE_GRADIENT:  # here, so that da need not live through the reduction
            sums = add_tiles(sums, products(da, n, 4) + da, 8)
        store(dh + row * FEATURES + column, direct, inside, MASKED)
        means = row_means(u + products(u, n, 4), 2, FEATURES, "gate", 4)
        u = layer_norm_backward(u, n, r, means[:4], means[4:], 4)
        _store_dz(u, dz, row, column, inside, FEATURES, MASKED)
    _store_sums(sums, partial, tl.program_id(0), column, COUNT, FEATURES)


STATISTICS = tl.constexpr(20)  # floats a row: mean, r, shift, mean(u) and mean(u n) of four gates


@triton.jit
def row_sums_kernel(
    dh_out, z, h, weight, bias,
    statistics,  # (rows, STATISTICS) fp32, written
    dh_out_stride, z_stride, h_stride,
    eps,
    FEATURES: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the sums of a row in blocks, in three passes; the row comes from memory once and then from the cache."""
    row = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[:, None]
    at = z + row * z_stride
    sums = zeros(4, 1, BLOCK)
    for first in tl.range(0, FEATURES, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        sums = add_tiles(sums, load_gates(at + column, column < FEATURES, FEATURES, 4, True), 4)
    mean = row_means(sums, 1, FEATURES, "gate", 4)
    sums = zeros(8, 1, BLOCK)
    for first in tl.range(0, FEATURES, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        inside = column < FEATURES
        centred = centre(load_gates(at + column, inside, FEATURES, 4, True), mean, inside, 4, True)
        sums = add_tiles(sums, centred + products(centred, centred, 4), 8)
    r, shift = scale_and_shift(row_means(sums, 2, FEATURES, "gate", 4), eps, 4)
    sums = zeros(8, 1, BLOCK)
    for first in tl.range(0, FEATURES, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        inside = column < FEATURES
        n = normalise(load_gates(at + column, inside, FEATURES, 4, True), mean, r, shift, inside, 4, True)
        _, u, _ = _gradients(
            n,
            dh_out,
            h,
            weight,
            bias,
            1,
            row,
            column,
            inside,
            dh_out_stride,
            h_stride,
            FEATURES,
            FAST,
            True,
            BLOCK,
        )
        sums = add_tiles(sums, u + products(u, n, 4), 8)
    found = mean + r + shift + row_means(sums, 2, FEATURES, "gate", 4)
    for k in tl.static_range(20):
        tl.store(statistics + row * STATISTICS + k, found[k])


@triton.jit
def wide_backward_kernel(
    dh_out, z, h, weight, bias,
    statistics,  # from row_sums_kernel
    dz, dh, partial,  # as in narrow_backward_kernel
    rows, dh_out_stride, z_stride, h_stride,
    FEATURES: tl.constexpr, FAST: tl.constexpr, AFFINE_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = 8 * AFFINE_GRADIENT
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    sums = zeros(COUNT, ROWS, BLOCK)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < FEATURES)
        n = load_gates(z + row * z_stride + column, inside, FEATURES, 4, True)
        if weight is not None:
            found = ()
            for k in tl.static_range(20):
                found = found + (tl.load(statistics + row * STATISTICS + k, mask=row < rows, other=0.0),)
            n = normalise(n, found[:4], found[4:8], found[8:12], inside, 4, False)
        da, u, direct = _gradients(
            n,
            dh_out,
            h,
            weight,
            bias,
            rows,
            row,
            column,
            inside,
            dh_out_stride,
            h_stride,
            FEATURES,
            FAST,
            True,
            BLOCK,
        )
        if AFFINE_GRADIENT:
            sums = add_tiles(sums, products(da, n, 4) + da, 8)
        if weight is not None:
            u = layer_norm_backward(u, n, found[4:8], found[12:16], found[16:], 4)
        store(dh + row * FEATURES + column, direct, inside, True)
        _store_dz(u, dz, row, column, inside, FEATURES, True)
    _store_sums(sums, partial, tl.program_id(1), column, COUNT, FEATURES)


@triton.jit
def sums_kernel(
    partial,  # (programs, 2 * width) fp32
    dweight, dbias,  # written: (width,) each, the first and the last columns
    programs, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the programs' partial sums, in an order that does not depend on time."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, programs, ROWS):
        program = (tl.cast(first, tl.int64) + tl.arange(0, ROWS))[:, None]
        at = partial + program * (2 * width) + column
        total += tl.load(at, mask=(program < programs) & (column < 2 * width), other=0.0)
    total = tl.sum(total, 0, keep_dims=True)
    tl.store(dweight + column, total.to(dweight.dtype.element_ty), mask=column < width)
    tl.store(dbias + column - width, total.to(dbias.dtype.element_ty), mask=(column >= width) & (column < 2 * width))


def tile_plan(features: int, elements: int, **more: int) -> Launch:
    """Plan rows of ``features`` at ``elements`` a thread.

    A warp takes several short rows, and a long row takes several warps.
    """
    block = max(16, triton.next_power_of_2(features))
    return Launch(max(1, block // (32 * elements)), {"ROWS": max(1, 32 * elements // block), "BLOCK": block, **more})


@functools.cache
def forward_plans(features: int) -> list[Launch]:
    """Return the forward plans, the rule's plan first; the rules are those of kernels/depth_lstm.py."""
    return [tile_plan(features, elements) for elements in (16, 8, 4) if features <= 4096 or elements > 4]


@functools.cache
def narrow_plans(features: int, itemsize: int) -> list[Launch]:
    """Return the narrow plans, the rule's plan first; longer rows get none and take the wide scheme.

    ``itemsize`` is the larger one of z and h: with 8 elements a thread and a wide h Triton 3.6 spills.
    """
    if features > 2048:
        return []
    rule = (8 if features > 1024 or (features > 128 and itemsize == 2) else 4, 2)
    pairs = [rule, *(pair for pair in itertools.product((8, 4), (1, 2, 3)) if pair != rule)]
    return [tile_plan(features, elements, STAGES=stages) for elements, stages in pairs]


ROW_SUMS_PLAN = Launch(8, {"BLOCK": 1024})
WIDE_PLANS = [
    Launch(warps, {"ROWS": 1, "BLOCK": 128 * warps, "STAGES": stages})
    for warps, stages in ((4, 2), (4, 1), (2, 2), (8, 2))
]
SUMS_PLAN = Launch(4, {"ROWS": 16, "BLOCK": 128})
WARPS = 8  # resident on a multiprocessor at 255 registers a thread


def _parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors]


def _options(features: int, *tensors: Tensor | None) -> dict[str, Any]:
    return {"FEATURES": features, "FAST": all(tensor is None or tensor.itemsize == 2 for tensor in tensors)}


def depth_gru_gates_forward(z: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return h'."""
    features = h.shape[-1]
    h_out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    rows = h.numel() // features
    if rows == 0:
        return h_out
    (z, z_stride), (h, h_stride) = as_rows(z), as_rows(h)
    weight, bias = _parameters(weight, bias)
    aligned = is_aligned((z, h, weight, bias, h_out), (z_stride, h_stride, features, features, features))
    arguments = (z, h, weight, bias, h_out, rows, z_stride, h_stride, float(eps))
    options = _options(features, z, h, weight, bias)

    def run(plan: Launch) -> None:
        launch(forward_kernel, (cdiv(rows, plan.constants["ROWS"]),), arguments, options, plan, aligned)

    with device_of(z):
        plans = forward_plans(features)
        key = key_of(arguments, options, aligned)
        run(tune.fastest("depth_gru_gates forward", key, plans, run) if tune.ENABLED else plans[0])
    return h_out


def depth_gru_gates_backward(
    dh_out: Tensor,
    z: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    affine_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dz, dh, dweight, dbias); gradients that are not wanted have no elements."""
    features, device = h.shape[-1], z.device
    rows = h.numel() // features
    affine_gradient = affine_gradient and weight is not None

    def result(like: Tensor | None, wanted: bool = True) -> Tensor:
        shape = like.shape if like is not None and wanted else (0,)
        make = torch.empty if rows else torch.zeros
        return make(shape, dtype=z.dtype if like is None else like.dtype, device=device)

    dz, dh, dweight, dbias = result(z), result(h), result(weight, affine_gradient), result(bias, affine_gradient)
    if rows == 0:
        return dz, dh, dweight, dbias
    (dh_out, dh_out_stride), (z, z_stride), (h, h_stride) = as_rows(dh_out), as_rows(z), as_rows(h)
    weight, bias = _parameters(weight, bias)
    inputs = (dh_out, z, h, weight, bias)
    strides = (dh_out_stride, z_stride, h_stride)
    aligned = is_aligned(inputs, (*strides, features, features))
    aligned = aligned and features * min(z.itemsize, h.itemsize) % ALIGNMENT == 0
    options, sums = _options(features, z, h, weight, bias), {"AFFINE_GRADIENT": affine_gradient}
    narrow = [] if weight is None else narrow_plans(features, max(z.itemsize, h.itemsize))
    statistics = None
    if weight is not None and not narrow:
        statistics = torch.empty((rows, STATISTICS.value), dtype=torch.float32, device=device)

    def run(plan: Launch) -> None:
        blocks = 1 if narrow else cdiv(features, plan.constants["BLOCK"])
        programs = min(
            cdiv(rows, plan.constants["ROWS"]), max(1, multiprocessors(device) * WARPS // (plan.warps * blocks))
        )
        partial = None
        if affine_gradient:
            partial = torch.empty((programs, 8 * features), dtype=torch.float32, device=device)
        if narrow:
            arguments = (*inputs, dz, dh, partial, rows, *strides, float(eps))
            launch(narrow_backward_kernel, (programs,), arguments, {**options, **sums}, plan, aligned)
        else:
            arguments = (*inputs, statistics, dz, dh, partial, rows, *strides)
            launch(wide_backward_kernel, (blocks, programs), arguments, {**options, **sums}, plan, aligned)
        if partial is not None:
            arguments = (partial, dweight, dbias, programs, 4 * features)
            launch(sums_kernel, (cdiv(8 * features, SUMS_PLAN.constants["BLOCK"]),), arguments, {}, SUMS_PLAN, aligned)

    with device_of(z):
        if statistics is not None:
            arguments = (*inputs, statistics, *strides, float(eps))
            launch(row_sums_kernel, (rows,), arguments, options, ROW_SUMS_PLAN, aligned)
        plans = narrow or WIDE_PLANS
        key = (*key_of(inputs, options, aligned), affine_gradient)
        run(tune.fastest("depth_gru_gates backward", key, plans, run) if tune.ENABLED else plans[0])
    return dz, dh, dweight, dbias
