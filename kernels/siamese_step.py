"""siamese_step on a GPU, in Triton: X' = N_x(X + o / c), Y' = Y + o, u = [N](X' + N_y Y').

forward: one pass over memory, 6C elements a row. A program takes a tile of rows in registers.

backward: 9C elements a row. Programs stay on the GPU and loop over tiles of rows. Each leaves one partial sum of the
parameter gradients, which a last kernel adds in a fixed order.

A tile is (ROWS, BLOCK). An argument that is None is a compile-time constant. Everything is computed in fp32. Row
numbers are int64, row strides are in elements, features are dense.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import NORMALISATIONS
from .common import tune
from .common.launch import ALIGNMENT, Launch, as_rows, cdiv, device_of, is_aligned, key_of, launch, multiprocessors
from .common.norm import (
    SUMS_PLAN,
    WARPS,
    apply_norm,
    load_parameter,
    norm_backward,
    parameters_of,
    store_sum,
    sums_kernel,
    tile_plan,
)
from .common.tiles import load, store


@triton.jit
def forward_kernel(
    x, y, o, weight_x, bias_x, weight_y, bias_y, weight, bias,
    x_out, y_out, u,  # (rows, C), written
    rows, x_stride, y_stride, o_stride, part, eps,  # part: 1 / c
    FEATURES: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < FEATURES)
    branch = load(o + row * o_stride + column, inside, MASKED)
    new_x = load(x + row * x_stride + column, inside, MASKED) + part * branch
    new_x, _, _ = apply_norm(new_x, weight_x, bias_x, column, inside, 1, eps, FEATURES, NORM, MASKED, BLOCK)
    store(x_out + row * FEATURES + column, new_x, inside, MASKED)
    new_y = load(y + row * y_stride + column, inside, MASKED) + branch
    store(y_out + row * FEATURES + column, new_y, inside, MASKED)
    new_y = new_y.to(y_out.dtype.element_ty).to(tl.float32)  # N_y normalises Y' as it is rounded
    joined, _, _ = apply_norm(new_y, weight_y, bias_y, column, inside, 1, eps, FEATURES, NORM, MASKED, BLOCK)
    joined += new_x.to(x_out.dtype.element_ty).to(tl.float32)
    if weight is not None:
        joined, _, _ = apply_norm(joined, weight, bias, column, inside, 1, eps, FEATURES, NORM, MASKED, BLOCK)
    store(u + row * FEATURES + column, joined, inside, MASKED)


@triton.jit
def backward_kernel(
    dx_out, dy_out, du, x, y, o, weight_x, bias_x, weight_y, bias_y, weight, bias,  # a gradient of None: zeros
    dx, dy, do,  # (rows, C), written
    partial,  # (programs, COUNT, C) fp32, written: every parameter, in order
    rows, dx_out_stride, dy_out_stride, du_stride, x_stride, y_stride, o_stride, part, eps,
    FEATURES: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    column = tl.arange(0, BLOCK)[None, :]
    there = column < FEATURES
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_weight_x, sum_bias_x, sum_weight_y, sum_bias_y = nothing, nothing, nothing, nothing
    sum_weight, sum_bias = nothing, nothing
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < FEATURES)
        # A row past the end repeats the last one: for zeros and eps = 0, r would be infinite and the sums NaN.
        from_row = row
        if ROWS > 1:
            from_row = tl.minimum(row, rows - 1)
        branch = load(o + from_row * o_stride + column, there, MASKED)
        new_x = load(x + from_row * x_stride + column, there, MASKED) + part * branch
        new_y = load(y + from_row * y_stride + column, there, MASKED) + branch
        new_y = new_y.to(dy.dtype.element_ty).to(tl.float32)
        new_x, n_x, r_x = apply_norm(new_x, weight_x, bias_x, column, there, rows, eps, FEATURES, NORM, MASKED, BLOCK)
        joined, n_y, r_y = apply_norm(new_y, weight_y, bias_y, column, there, rows, eps, FEATURES, NORM, MASKED, BLOCK)
        gradient = nothing
        if du is not None:
            gradient = load(du + row * du_stride + column, inside, MASKED)
        if weight is not None:
            joined += new_x.to(dx.dtype.element_ty).to(tl.float32)
            _, n, r = apply_norm(joined, weight, bias, column, there, rows, eps, FEATURES, NORM, MASKED, BLOCK)
            if COUNT > 0:
                sum_weight += gradient * n
                if bias is not None:
                    sum_bias += gradient
            q = gradient * load_parameter(weight, column, rows, FEATURES, MASKED, BLOCK)
            gradient = norm_backward(q, n, r, FEATURES, NORM)
        of_x, of_y = gradient, nothing
        if dx_out is not None:
            of_x += load(dx_out + row * dx_out_stride + column, inside, MASKED)
        if dy_out is not None:
            of_y = load(dy_out + row * dy_out_stride + column, inside, MASKED)
        if COUNT > 0:
            sum_weight_x += of_x * n_x
            sum_weight_y += gradient * n_y
            if bias_x is not None:
                sum_bias_x += of_x
            if bias_y is not None:
                sum_bias_y += gradient
        q = of_x * load_parameter(weight_x, column, rows, FEATURES, MASKED, BLOCK)
        of_x = norm_backward(q, n_x, r_x, FEATURES, NORM)
        q = gradient * load_parameter(weight_y, column, rows, FEATURES, MASKED, BLOCK)
        of_y += norm_backward(q, n_y, r_y, FEATURES, NORM)
        store(dx + row * FEATURES + column, of_x, inside, MASKED)
        store(dy + row * FEATURES + column, of_y, inside, MASKED)
        store(do + row * FEATURES + column, part * of_x + of_y, inside, MASKED)
    if COUNT > 0:
        program = tl.program_id(0)
        store_sum(sum_weight_x, partial, program, 0, COUNT, column, FEATURES)
        place = 1
        if bias_x is not None:
            store_sum(sum_bias_x, partial, program, place, COUNT, column, FEATURES)
            place += 1
        store_sum(sum_weight_y, partial, program, place, COUNT, column, FEATURES)
        place += 1
        if bias_y is not None:
            store_sum(sum_bias_y, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if weight is not None:
            store_sum(sum_weight, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if bias is not None:
            store_sum(sum_bias, partial, program, place, COUNT, column, FEATURES)


@functools.cache
def forward_plans(features: int) -> list[Launch]:
    """Return the forward plans; the rule's plan is the first."""
    return [tile_plan(features, elements) for elements in (16, 8, 4) if features <= 4096 or elements > 4]


@functools.cache
def backward_plans(features: int) -> list[Launch]:
    """Return the backward plans; the rule's plan is the first."""
    pairs = [(8, 2), (8, 1), (4, 2), (4, 1), (16, 2), (16, 1)]
    return [
        tile_plan(features, elements, STAGES=stages) for elements, stages in pairs if features <= 4096 or elements > 4
    ]


def siamese_step_forward(
    x: Tensor, y: Tensor, o: Tensor, weight_x: Tensor, bias_x: Tensor | None, weight_y: Tensor,
    bias_y: Tensor | None, weight: Tensor | None, bias: Tensor | None, c: float, norm: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (X', Y', u)."""
    features = o.shape[-1]
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    u = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    rows = o.numel() // features
    if rows == 0:
        return x_out, y_out, u
    (x, x_stride), (y, y_stride), (o, o_stride) = as_rows(x), as_rows(y), as_rows(o)
    parameters = parameters_of(weight_x, bias_x, weight_y, bias_y, weight, bias)
    dense = (*parameters, x_out, y_out, u)
    aligned = is_aligned((x, y, o, *dense), (x_stride, y_stride, o_stride, *[features] * len(dense)))
    options: dict[str, Any] = {"FEATURES": features, "NORM": NORMALISATIONS[norm]}
    arguments = (
        x, y, o, *parameters, x_out, y_out, u, rows, x_stride, y_stride, o_stride, 1 / float(c), float(eps),
    )  # fmt: skip

    def run(plan: Launch) -> None:
        launch(forward_kernel, (cdiv(rows, plan.constants["ROWS"]),), arguments, options, plan, aligned)

    with device_of(o):
        plans = forward_plans(features)
        key = key_of(arguments, options, aligned)
        run(tune.fastest("siamese_step_forward", key, plans, run) if tune.ENABLED else plans[0])
    return x_out, y_out, u


def siamese_step_backward(
    dx_out: Tensor | None, dy_out: Tensor | None, du: Tensor | None, x: Tensor, y: Tensor, o: Tensor,
    weight_x: Tensor, bias_x: Tensor | None, weight_y: Tensor, bias_y: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, c: float, norm: int, eps: float, parameter_gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (dX, dY, do, dweight_x, dbias_x, ..., dbias); gradients that are not wanted have no elements."""
    features, device = o.shape[-1], o.device
    rows = o.numel() // features
    make = torch.empty if rows else torch.zeros

    def result(tensor: Tensor | None, wanted: bool = True) -> Tensor:
        shape = tensor.shape if tensor is not None and wanted else (0,)
        return make(shape, dtype=o.dtype if tensor is None else tensor.dtype, device=device)

    dx, dy, do = result(x), result(y), result(o)
    given = (weight_x, bias_x, weight_y, bias_y, weight, bias)
    sums = [result(parameter, parameter_gradients) for parameter in given]
    if rows == 0:
        return dx, dy, do, *sums
    views = [as_rows(tensor) for tensor in (dx_out, dy_out, du, x, y, o)]
    tensors, strides = [view[0] for view in views], [view[1] for view in views]
    parameters = parameters_of(*given)
    aligned = is_aligned((*tensors, *parameters), (*strides, *[features] * len(parameters)))
    aligned = aligned and features * min(x.itemsize, o.itemsize) % ALIGNMENT == 0
    wanted = [
        made for made, parameter in zip(sums, given, strict=True) if parameter_gradients and parameter is not None
    ]
    options: dict[str, Any] = {"FEATURES": features, "NORM": NORMALISATIONS[norm], "COUNT": len(wanted)}

    def run(plan: Launch) -> None:
        programs = min(cdiv(rows, plan.constants["ROWS"]), max(1, multiprocessors(device) * WARPS // plan.warps))
        partial = None
        if wanted:
            partial = torch.empty((programs, len(wanted) * features), dtype=torch.float32, device=device)
        arguments = (
            *tensors, *parameters, dx, dy, do, partial, rows, *strides, 1 / float(c), float(eps),
        )  # fmt: skip
        launch(backward_kernel, (programs,), arguments, options, plan, aligned)
        if partial is not None:
            outs = [*wanted, *[None] * (7 - len(wanted))]
            grid = (cdiv(features, SUMS_PLAN.constants["BLOCK"]), len(wanted))
            constants: dict[str, Any] = {"COUNT": len(wanted), "FEATURES": features}
            launch(sums_kernel, grid, (partial, *outs, programs), constants, SUMS_PLAN, False)

    with device_of(o):
        plans = backward_plans(features)
        key = key_of((*tensors, *parameters), options, aligned)
        run(tune.fastest("siamese_step_backward", key, plans, run) if tune.ENABLED else plans[0])
    return dx, dy, do, *sums
