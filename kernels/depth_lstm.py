"""The gates of the depth-wise LSTM on a GPU, in Triton: one forward kernel, and two schemes of backward.

forward: one pass over memory, 7D elements a row. A program takes a tile of rows, with all gates of them in registers.

narrow: backward for rows that fit the registers beside the sums of the parameter gradients, 12D elements a row.
Programs stay on the GPU and loop over tiles of rows. Each leaves one partial sum of the parameter gradients.

wide: backward for longer rows, in two kernels, 19D elements a row. `row_sums` takes the statistics and the two
LayerNorm means of every row. `wide_backward` then works on tiles of a few features, so no row is long for it.

sums: adds the partial sums in a fixed order. It uses no atomics and gives the same bits every time.

A tile is (ROWS, BLOCK). Values of the gates i, f, o, g are a tuple of four tiles, or of three if `hidden` gives g. One
reduction takes the sums of all of them, which share its barriers. An argument that is None is a compile-time constant.
Everything is computed in fp32. Row numbers are int64, row strides are in elements, features are dense.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import ACTIVATIONS, NORMS
from .common import tune
from .common.formulas import activate, activate_with_slope, dropout_factors, sigmoid
from .common.launch import ALIGNMENT, Launch, as_rows, cdiv, device_of, is_aligned, key_of, launch, multiprocessors
from .common.tiles import (
    add_tiles,
    apply_affine,
    centre,
    layer_norm_backward,
    load,
    load_affine,
    load_key,
    load_z,
    normalise,
    products,
    row_means,
    row_statistics,
    scale_and_shift,
    store,
    zeros,
)


@triton.jit
def forward_kernel(
    # (rows, GATES D), (GATES D), (rows, D), (rows, D), (GATES, D), (GATES, D), (1,)
    z, z_bias, hidden, c, weight, bias, seed,
    h, c_out,  # (rows, D), written
    rows, z_stride, hidden_stride, c_stride, h_stride,
    eps, threshold, scale,  # dropout keeps an element whose random word is at least `threshold`, times `scale`
    FEATURES: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    GATES: tl.constexpr = 4 if hidden is None else 3
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < FEATURES)
    a = load_z(z, z_bias, z_stride, row, column, inside, 1, FEATURES, GATES, MASKED, BLOCK)
    if BLOCK < 8192:
        c_in = load(c + row * c_stride + column, inside, MASKED)
    if NORM != "none":
        mean, r, shift = row_statistics(a, inside, eps, FEATURES, NORM, GATES, MASKED)
        a = normalise(a, mean, r, shift, inside, GATES, False)
    if BLOCK >= 8192:  # 512 threads have 128 registers each, and the statistics use all of them
        c_in = load(c + row * c_stride + column, inside, MASKED)
    if weight is not None:
        weights, biases = load_affine(weight, bias, column, 1, FEATURES, GATES, MASKED, BLOCK)
        a = apply_affine(a, weights, biases, GATES)
    if hidden is None:
        g = activate(a[3], ACTIVATION, FAST)
    else:
        g = load(hidden + row * hidden_stride + column, inside, MASKED)
    if seed is not None:
        g *= dropout_factors(load_key(seed), row, 0, threshold, scale, ROWS, BLOCK)
    new_c = sigmoid(a[1]) * c_in + sigmoid(a[0]) * g
    store(c_out + row * FEATURES + column, new_c, inside, MASKED)
    store(h + row * h_stride + column, sigmoid(a[2]) * new_c, inside, MASKED)


@triton.jit
def _gradients(
    n, dh, dc, hidden, c, weight, bias, key, rows, row, column, first, inside, dh_stride, dc_stride, hidden_stride,
    c_stride,
    threshold, scale,
    FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (da, u, dhidden, dc'): da and u = weight * da of the gates, dhidden with `hidden` only.

    See cell_backward in csrc/depth_lstm/math.h.
    """
    a = n
    if weight is not None:
        weights, biases = load_affine(weight, bias, column, rows, FEATURES, GATES, MASKED, BLOCK)
        a = apply_affine(n, weights, biases, GATES)
    c_in = load(c + row * c_stride + column, inside, MASKED)
    if hidden is None:
        g, slope = activate_with_slope(a[3], ACTIVATION, FAST)
    else:
        g, slope = load(hidden + row * hidden_stride + column, inside, MASKED), 1.0
    if key is not None:
        factor = dropout_factors(key, row, first, threshold, scale, ROWS, BLOCK)
        g, slope = g * factor, slope * factor
    i, f, o = sigmoid(a[0]), sigmoid(a[1]), sigmoid(a[2])
    t = tl.zeros((ROWS, BLOCK), tl.float32)
    da_o = t
    if dh is not None:
        grad_h = load(dh + row * dh_stride + column, inside, MASKED)
        da_o = grad_h * (f * c_in + i * g) * o * (1.0 - o)
        t = grad_h * o
    if dc is not None:
        t += load(dc + row * dc_stride + column, inside, MASKED)
    da = (t * g * i * (1.0 - i), t * c_in * f * (1.0 - f), da_o)
    dg = t * i * slope
    if GATES == 4:
        da = da + (dg,)
    u = da
    if weight is not None:
        u = products(weights, da, GATES)
    return da, u, dg, t * f


@triton.jit
def _accumulate_affine(sums, da, n, GATES: tl.constexpr):
    """Add da n and da to the sums over rows for dweight and dbias; later entries of `sums` stay."""
    new = ()
    for k in tl.static_range(GATES):
        new = new + (sums[k] + da[k] * n[k],)
    for k in tl.static_range(GATES):
        new = new + (sums[GATES + k] + da[k],)
    return new + sums[2 * GATES :]


@triton.jit
def _accumulate_z_bias(sums, dz, GATES: tl.constexpr, COUNT: tl.constexpr):
    """Add dz to its sums over rows, the last entries of `sums`."""
    new = sums[: COUNT - GATES]
    for k in tl.static_range(GATES):
        new = new + (sums[COUNT - GATES + k] + dz[k],)
    return new


@triton.jit
def _store_states(
    dhidden_tile, dc_tile, dhidden, dc_in, row, column, inside, FEATURES: tl.constexpr, MASKED: tl.constexpr
):
    store(dc_in + row * FEATURES + column, dc_tile, inside, MASKED)
    if dhidden is not None:
        store(dhidden + row * FEATURES + column, dhidden_tile, inside, MASKED)


@triton.jit
def _store_dz(dz_tiles, dz, row, column, inside, FEATURES: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr):
    for k in tl.static_range(GATES):
        store(dz + row * (GATES * FEATURES) + k * FEATURES + column, dz_tiles[k], inside, MASKED)


@triton.jit
def _store_sums(sums, partial, program, column, COUNT: tl.constexpr, FEATURES: tl.constexpr):
    """Sum tiles over their rows and store them as rows of FEATURES in this program's part of `partial`."""
    if COUNT > 0:
        at = partial + program.to(tl.int64) * (COUNT * FEATURES) + column
        for k in tl.static_range(COUNT):
            tl.store(at + k * FEATURES, tl.sum(sums[k], 0, keep_dims=True), mask=column < FEATURES)


@triton.jit
def narrow_backward_kernel(
    dh, dc, z, z_bias, hidden, c, weight, bias, seed,  # as in forward; a dh or dc of None stands for zeros
    dz, dhidden, dc_in,  # written
    partial,  # (programs, 2 or 1 or 3 times GATES, D) fp32, written: dweight, dbias, dz_bias
    rows, dh_stride, dc_stride, z_stride, hidden_stride, c_stride,
    eps, threshold, scale,
    FEATURES: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    AFFINE_GRADIENT: tl.constexpr,
    Z_BIAS_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GATES: tl.constexpr = 4 if hidden is None else 3
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    COUNT: tl.constexpr = (2 * AFFINE_GRADIENT + Z_BIAS_GRADIENT) * GATES
    column = tl.arange(0, BLOCK)[None, :]
    key = load_key(seed)
    sums = zeros(COUNT, ROWS, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < FEATURES)
        z_row = row
        # A row past the end repeats the last one: for zeros and eps = 0, r would be infinite and the sums NaN.
        if ROWS > 1:
            z_row = tl.minimum(row, rows - 1)
        n = load_z(z, z_bias, z_stride, z_row, column, column < FEATURES, rows, FEATURES, GATES, MASKED, BLOCK)
        if NORM != "none":
            mean, r, shift = row_statistics(n, column < FEATURES, eps, FEATURES, NORM, GATES, MASKED)
            n = normalise(n, mean, r, shift, inside, GATES, MASKED)
        da, dz_tiles, dg, dc_tile = _gradients(
            n, dh, dc, hidden, c, weight, bias, key, rows, row, column, 0, inside, dh_stride, dc_stride,
            hidden_stride, c_stride,
            threshold, scale, FEATURES, ACTIVATION, FAST, GATES, MASKED, ROWS, BLOCK,
        )  # fmt: skip
        if AFFINE_GRADIENT:  # here, so that da need not live through the reduction
            sums = _accumulate_affine(sums, da, n, GATES)
        # stored before the reduction, which waits anyway and needs registers
        _store_states(dg, dc_tile, dhidden, dc_in, row, column, inside, FEATURES, MASKED)
        if NORM != "none":
            means = row_means(dz_tiles + products(dz_tiles, n, GATES), 2, FEATURES, NORM, GATES)
            dz_tiles = layer_norm_backward(dz_tiles, n, r, means[:GATES], means[GATES:], GATES)
        _store_dz(dz_tiles, dz, row, column, inside, FEATURES, GATES, MASKED)
        if Z_BIAS_GRADIENT:
            sums = _accumulate_z_bias(sums, dz_tiles, GATES, COUNT)
    _store_sums(sums, partial, tl.program_id(0), column, COUNT, FEATURES)


STATISTICS = tl.constexpr(20)  # floats a row: mean, r, shift, mean(u) and mean(u n) of four gates


@triton.jit
def row_sums_kernel(
    dh, dc, z, z_bias, hidden, c, weight, bias, seed,
    statistics,  # (rows, STATISTICS) fp32, written
    dh_stride, dc_stride, z_stride, hidden_stride, c_stride,
    eps, threshold, scale,
    FEATURES: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the sums of a row in blocks, in three passes.

    The row comes from memory once and then from the cache.
    """
    GATES: tl.constexpr = 4 if hidden is None else 3
    row = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[:, None]
    key = load_key(seed)
    sums = zeros(GATES, 1, BLOCK)
    for first in tl.range(0, FEATURES, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        sums = add_tiles(
            sums, load_z(z, z_bias, z_stride, row, column, column < FEATURES, 1, FEATURES, GATES, True, BLOCK), GATES
        )
    mean = row_means(sums, 1, FEATURES, NORM, GATES)
    sums = zeros(2 * GATES, 1, BLOCK)
    for first in tl.range(0, FEATURES, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        inside = column < FEATURES
        centred = centre(
            load_z(z, z_bias, z_stride, row, column, inside, 1, FEATURES, GATES, True, BLOCK), mean, inside, GATES, True
        )
        sums = add_tiles(sums, centred + products(centred, centred, GATES), 2 * GATES)
    r, shift = scale_and_shift(row_means(sums, 2, FEATURES, NORM, GATES), eps, GATES)
    sums = zeros(2 * GATES, 1, BLOCK)
    for first in tl.range(0, FEATURES, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        inside = column < FEATURES
        n = normalise(
            load_z(z, z_bias, z_stride, row, column, inside, 1, FEATURES, GATES, True, BLOCK),
            mean,
            r,
            shift,
            inside,
            GATES,
            True,
        )
        _, u, _, _ = _gradients(
            n, dh, dc, hidden, c, weight, bias, key, 1, row, column, first, inside, dh_stride, dc_stride,
            hidden_stride, c_stride,
            threshold, scale, FEATURES, ACTIVATION, FAST, GATES, True, 1, BLOCK,
        )  # fmt: skip
        sums = add_tiles(sums, u + products(u, n, GATES), 2 * GATES)
    found = mean + r + shift + row_means(sums, 2, FEATURES, NORM, GATES)
    for k in tl.static_range(5 * GATES):
        tl.store(statistics + row * STATISTICS + k, found[k])


@triton.jit
def wide_backward_kernel(
    dh, dc, z, z_bias, hidden, c, weight, bias, seed,
    statistics,  # from row_sums_kernel
    dz, dhidden, dc_in, partial,  # as in narrow_backward_kernel
    rows, dh_stride, dc_stride, z_stride, hidden_stride, c_stride,
    threshold, scale,
    FEATURES: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    AFFINE_GRADIENT: tl.constexpr,
    Z_BIAS_GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GATES: tl.constexpr = 4 if hidden is None else 3
    COUNT: tl.constexpr = (2 * AFFINE_GRADIENT + Z_BIAS_GRADIENT) * GATES
    first = tl.program_id(0) * BLOCK
    column = (first + tl.arange(0, BLOCK))[None, :]
    key = load_key(seed)
    sums = zeros(COUNT, ROWS, BLOCK)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < FEATURES)
        n = load_z(z, z_bias, z_stride, row, column, inside, rows, FEATURES, GATES, True, BLOCK)
        if NORM != "none":
            found = ()
            for k in tl.static_range(5 * GATES):
                found = found + (tl.load(statistics + row * STATISTICS + k, mask=row < rows, other=0.0),)
            n = normalise(
                n, found[:GATES], found[GATES : 2 * GATES], found[2 * GATES : 3 * GATES], inside, GATES, False
            )
        da, dz_tiles, dg, dc_tile = _gradients(
            n, dh, dc, hidden, c, weight, bias, key, rows, row, column, first, inside, dh_stride, dc_stride,
            hidden_stride, c_stride,
            threshold, scale, FEATURES, ACTIVATION, FAST, GATES, True, ROWS, BLOCK,
        )  # fmt: skip
        if AFFINE_GRADIENT:
            sums = _accumulate_affine(sums, da, n, GATES)
        if NORM != "none":
            dz_tiles = layer_norm_backward(
                dz_tiles, n, found[GATES : 2 * GATES], found[3 * GATES : 4 * GATES], found[4 * GATES :], GATES
            )
        _store_states(dg, dc_tile, dhidden, dc_in, row, column, inside, FEATURES, True)
        _store_dz(dz_tiles, dz, row, column, inside, FEATURES, GATES, True)
        if Z_BIAS_GRADIENT:
            sums = _accumulate_z_bias(sums, dz_tiles, GATES, COUNT)
    _store_sums(sums, partial, tl.program_id(1), column, COUNT, FEATURES)


@triton.jit
def sums_kernel(
    partial,  # (programs, columns) fp32
    dweight, dbias, dz_bias,  # written: (width,) each; dweight and dbias are the first columns, dz_bias the last
    programs, columns, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the programs' partial sums, in an order that does not depend on time."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, programs, ROWS):
        program = (tl.cast(first, tl.int64) + tl.arange(0, ROWS))[:, None]
        total += tl.load(
            partial + program * columns + column, mask=(program < programs) & (column < columns), other=0.0
        )
    total = tl.sum(total, 0, keep_dims=True)
    if dweight is not None:
        tl.store(dweight + column, total.to(dweight.dtype.element_ty), mask=column < width)
        tl.store(
            dbias + column - width, total.to(dbias.dtype.element_ty), mask=(column >= width) & (column < 2 * width)
        )
    if dz_bias is not None:
        column -= columns - width
        tl.store(dz_bias + column, total.to(dz_bias.dtype.element_ty), mask=(column >= 0) & (column < width))


def tile_plan(features: int, elements: int, **more: int) -> Launch:
    """Plan rows of ``features`` at ``elements`` a thread.

    A warp takes several short rows, and a long row takes several warps.
    """
    block = max(16, triton.next_power_of_2(features))
    return Launch(max(1, block // (32 * elements)), {"ROWS": max(1, 32 * elements // block), "BLOCK": block, **more})


@functools.cache
def forward_plans(features: int) -> list[Launch]:
    """Return the forward plans; the rule's plan is the first, 16 elements a thread.

    It takes 80 instructions an element of D=512 in bf16 on sm_90. A plan of 8 elements takes 107, a plan of 4 takes
    154.
    """
    return [tile_plan(features, elements) for elements in (16, 8, 4) if features <= 4096 or elements > 4]


@functools.cache
def narrow_plans(features: int, sums: int, itemsize: int) -> list[Launch]:
    """Return the narrow plans; by rule each has the most elements a thread without spills.

    That is 8 beside the sums of dweight and dbias, and 4 for fp32 and beside the sums of dz_bias. Two stages fetch the
    next row while one is computed. Longer rows get no plan and take the wide scheme.
    """
    if features > (2048 if sums <= 2 else 1024):
        return []
    rule = (8 if sums <= 2 and (features > 1024 or (features > 128 and itemsize == 2)) else 4, 2)
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


@functools.cache
def _options(features: int, norm: int, activation: int, fast: bool) -> dict[str, Any]:
    return {"FEATURES": features, "NORM": NORMS[norm], "ACTIVATION": ACTIVATIONS[activation], "FAST": fast}


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    return (int(dropout_p * 2**32), 1 / (1 - dropout_p)) if seed is not None else (0, 1.0)


def gates_forward(
    z: Tensor, z_bias: Tensor | None, hidden: Tensor | None, c: Tensor, weight: Tensor | None, bias: Tensor | None,
    seed: Tensor | None,
    norm: int, activation: int, eps: float, dropout_p: float, h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (h, c_out); a given h, a matrix (rows, D) with any row stride, is written in place."""
    features = c.shape[-1]
    c_out = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    if h is None:
        h = torch.empty(c.shape, dtype=z.dtype, device=c.device)
    rows = c.numel() // features
    if rows == 0:
        return h, c_out
    (z, z_stride), (hidden, hidden_stride), (c, c_stride) = as_rows(z), as_rows(hidden), as_rows(c)
    _, h_stride = as_rows(h)
    z_bias, weight, bias = _parameters(z_bias, weight, bias)
    tensors = (z, z_bias, hidden, c, weight, bias, h, c_out)
    aligned = is_aligned(tensors, (z_stride, features, hidden_stride, c_stride, features, features, h_stride, features))
    arguments = (
        z, z_bias, hidden, c, weight, bias, seed, h, c_out, rows, z_stride, hidden_stride, c_stride, h_stride,
        float(eps), *_dropout(seed, dropout_p),
    )  # fmt: skip
    options = _options(features, norm, activation, all(x is None or x.itemsize == 2 for x in (z, c, weight)))

    def run(plan: Launch) -> None:
        launch(forward_kernel, (cdiv(rows, plan.constants["ROWS"]),), arguments, options, plan, aligned)

    with device_of(z):
        plans = forward_plans(features)
        run(tune.fastest("forward", key_of(arguments, options, aligned), plans, run) if tune.ENABLED else plans[0])
    return h, c_out


def gates_backward(
    dh: Tensor | None, dc: Tensor | None, z: Tensor, z_bias: Tensor | None, hidden: Tensor | None, c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, norm: int, activation: int, eps: float, dropout_p: float,
    affine_gradient: bool,
    z_bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dz, dhidden, dc', dweight, dbias, dz_bias); gradients that are not wanted have no elements."""
    features, device = c.shape[-1], z.device
    rows = c.numel() // features
    affine_gradient, z_bias_gradient = affine_gradient and weight is not None, z_bias_gradient and z_bias is not None

    def result(like: Tensor | None, wanted: bool = True) -> Tensor:
        shape = like.shape if like is not None and wanted else (0,)
        make = torch.empty if rows else torch.zeros
        return make(shape, dtype=z.dtype if like is None else like.dtype, device=device)

    dz, dhidden, dc_in = result(z), result(hidden), result(c)
    dweight, dbias, dz_bias = (
        result(weight, affine_gradient),
        result(bias, affine_gradient),
        result(z_bias, z_bias_gradient),
    )
    if rows == 0:
        return dz, dhidden, dc_in, dweight, dbias, dz_bias
    (dh, dh_stride), (dc, dc_stride), (z, z_stride) = as_rows(dh), as_rows(dc), as_rows(z)
    (hidden, hidden_stride), (c, c_stride) = as_rows(hidden), as_rows(c)
    z_bias, weight, bias = _parameters(z_bias, weight, bias)
    inputs = (dh, dc, z, z_bias, hidden, c, weight, bias)
    strides = (dh_stride, dc_stride, z_stride, features, hidden_stride, c_stride, features, features)
    aligned = is_aligned(inputs, strides) and features * min(z.itemsize, c.itemsize) % ALIGNMENT == 0
    outputs = (dz, dhidden if hidden is not None else None, dc_in)
    steps = (dh_stride, dc_stride, z_stride, hidden_stride, c_stride)
    threshold, scale = _dropout(seed, dropout_p)
    options = _options(features, norm, activation, all(x is None or x.itemsize == 2 for x in (z, c, weight)))
    sums = {"AFFINE_GRADIENT": affine_gradient, "Z_BIAS_GRADIENT": z_bias_gradient}
    count = 2 * affine_gradient + z_bias_gradient
    width = (4 if hidden is None else 3) * features
    narrow = narrow_plans(features, count, z.itemsize)
    statistics = None
    if not narrow and NORMS[norm] != "none":
        statistics = torch.empty((rows, STATISTICS.value), dtype=torch.float32, device=device)

    def run(plan: Launch) -> None:
        blocks = 1 if narrow else cdiv(features, plan.constants["BLOCK"])
        programs = min(
            cdiv(rows, plan.constants["ROWS"]), max(1, multiprocessors(device) * WARPS // (plan.warps * blocks))
        )
        partial = torch.empty((programs, count * width), dtype=torch.float32, device=device) if count else None
        if narrow:
            arguments = (*inputs, seed, *outputs, partial, rows, *steps, float(eps), threshold, scale)
            launch(narrow_backward_kernel, (programs,), arguments, {**options, **sums}, plan, aligned)
        else:
            arguments = (*inputs, seed, statistics, *outputs, partial, rows, *steps, threshold, scale)
            launch(wide_backward_kernel, (blocks, programs), arguments, {**options, **sums}, plan, aligned)
        if partial is not None:
            written = (dweight, dbias) if affine_gradient else (None, None)
            arguments = (partial, *written, dz_bias if z_bias_gradient else None, programs, count * width, width)
            launch(sums_kernel, (cdiv(count * width, SUMS_PLAN.constants["BLOCK"]),), arguments, {}, SUMS_PLAN, aligned)

    with device_of(z):
        if statistics is not None:
            arguments = (*inputs, seed, statistics, *steps, float(eps), threshold, scale)
            launch(row_sums_kernel, (rows,), arguments, options, ROW_SUMS_PLAN, aligned)
        plans = narrow or WIDE_PLANS
        key = (*key_of((*inputs, seed), options, aligned), count)
        run(tune.fastest("backward", key, plans, run) if tune.ENABLED else plans[0])
    return dz, dhidden, dc_in, dweight, dbias, dz_bias
