"""norm_step on a GPU, in Triton: x' = [N1](a x + b [N3] y), u = [N2] x'.

forward: one pass over memory, 4C elements a row with N2. A program takes a tile of rows in registers.

backward: programs stay on the GPU and loop over tiles of rows. Each leaves one partial sum of the parameter gradients,
which a last kernel adds in a fixed order. It reads what depthlstm_fast/ops/norm_step.py keeps: with N2 alone x' and the
two gradients, 4C elements a row, and with N1 x, y and the gradients, 6C.

A tile is (ROWS, BLOCK). An argument that is None is a compile-time constant. Everything is computed in fp32. Row
numbers are int64, row strides are in elements, features are dense.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import NORMALISATIONS
from .common import tune
from .common.launch import ALIGNMENT, Launch, as_rows, cdiv, device_of, is_aligned, key_of, launch, multiprocessors
from .common.norm import (
    SINGLE_SUM_PLAN,
    SUMS_PLAN,
    WARPS,
    apply_norm,
    load_parameter,
    norm_backward,
    parameters_of,
    single_sum_kernel,
    store_sum,
    sums_kernel,
    tile_plan,
)
from .common.tiles import load, store


@triton.jit
def _scale_tile(scale, b, column, rows, FEATURES: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Return b as a number, or as a tile (1, BLOCK)."""
    if SCALE == "number":
        return b
    elif SCALE == "one":
        return tl.load(scale).to(tl.float32)
    else:
        return load_parameter(scale, column, rows, FEATURES, MASKED, BLOCK)


@triton.jit
def forward_kernel(
    x, y, scale, weight1, bias1, weight2, bias2, weight3, bias3,
    x_out, u,  # (rows, C), written
    rows, x_stride, y_stride, a, b, eps,
    FEATURES: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < FEATURES)
    v = load(y + row * y_stride + column, inside, MASKED)
    stream = a * load(x + row * x_stride + column, inside, MASKED)
    if weight3 is not None:
        v, _, _ = apply_norm(v, weight3, bias3, column, inside, 1, eps, FEATURES, NORM, MASKED, BLOCK)
    v = stream + _scale_tile(scale, b, column, 1, FEATURES, SCALE, MASKED, BLOCK) * v
    if weight1 is not None:
        v, _, _ = apply_norm(v, weight1, bias1, column, inside, 1, eps, FEATURES, NORM, MASKED, BLOCK)
    store(x_out + row * FEATURES + column, v, inside, MASKED)
    if weight2 is not None:
        v = v.to(x_out.dtype.element_ty).to(tl.float32)  # N2 normalises x' as it is rounded
        v, _, _ = apply_norm(v, weight2, bias2, column, inside, 1, eps, FEATURES, NORM, MASKED, BLOCK)
        store(u + row * FEATURES + column, v, inside, MASKED)


@triton.jit
def backward_kernel(
    dx_out, du, x, y, x_out, scale, weight1, bias1, weight2, bias2, weight3, bias3,  # a dx_out of None: zeros
    dx, dy,  # (rows, C), written; dy is None where it equals dx
    # fp32, written: (programs,) of a single b, and (programs, COUNT, C) of every parameter by features, in order
    single, partial,
    rows, dx_out_stride, du_stride, x_stride, y_stride, x_out_stride, a, b, eps,
    FEATURES: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = BLOCK != FEATURES or ROWS > 1
    column = tl.arange(0, BLOCK)[None, :]
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b, sum_weight1, sum_bias1, sum_weight2 = nothing, nothing, nothing, nothing
    sum_bias2, sum_weight3, sum_bias3 = nothing, nothing, nothing
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < FEATURES)
        # A row past the end repeats the last one: for zeros and eps = 0, r would be infinite and the sums NaN.
        from_row = row
        if ROWS > 1:
            from_row = tl.minimum(row, rows - 1)
        there = column < FEATURES
        factor = _scale_tile(scale, b, column, rows, FEATURES, SCALE, MASKED, BLOCK)
        v = nothing
        if y is not None:
            v = load(y + from_row * y_stride + column, there, MASKED)
        if weight3 is not None:
            v, n3, r3 = apply_norm(v, weight3, bias3, column, there, rows, eps, FEATURES, NORM, MASKED, BLOCK)
        if weight1 is not None:
            joined = a * load(x + from_row * x_stride + column, there, MASKED) + factor * v
            new_x, n1, r1 = apply_norm(joined, weight1, bias1, column, there, rows, eps, FEATURES, NORM, MASKED, BLOCK)
            new_x = new_x.to(dx.dtype.element_ty).to(tl.float32)
        elif weight2 is not None:
            new_x = load(x_out + from_row * x_out_stride + column, there, MASKED)
        gradient = nothing
        if dx_out is not None:
            gradient = load(dx_out + row * dx_out_stride + column, inside, MASKED)
        if weight2 is not None:
            _, n2, r2 = apply_norm(new_x, weight2, bias2, column, there, rows, eps, FEATURES, NORM, MASKED, BLOCK)
            of_u = load(du + row * du_stride + column, inside, MASKED)
            if COUNT > 0:
                sum_weight2 += of_u * n2
                if bias2 is not None:
                    sum_bias2 += of_u
            q = of_u * load_parameter(weight2, column, rows, FEATURES, MASKED, BLOCK)
            gradient += norm_backward(q, n2, r2, FEATURES, NORM)
        if weight1 is not None:
            if COUNT > 0:
                sum_weight1 += gradient * n1
                if bias1 is not None:
                    sum_bias1 += gradient
            q = gradient * load_parameter(weight1, column, rows, FEATURES, MASKED, BLOCK)
            gradient = norm_backward(q, n1, r1, FEATURES, NORM)
        store(dx + row * FEATURES + column, a * gradient, inside, MASKED)
        if COUNT > 0 and SCALE != "number":
            product = gradient * v
            if MASKED:
                product = tl.where(inside, product, 0.0)
            sum_b += product
        gradient = factor * gradient
        if weight3 is not None:
            if COUNT > 0:
                sum_weight3 += gradient * n3
                if bias3 is not None:
                    sum_bias3 += gradient
            q = gradient * load_parameter(weight3, column, rows, FEATURES, MASKED, BLOCK)
            gradient = norm_backward(q, n3, r3, FEATURES, NORM)
        if dy is not None:
            store(dy + row * FEATURES + column, gradient, inside, MASKED)
    if COUNT > 0:
        program = tl.program_id(0)
        place = 0
        if SCALE == "one":
            tl.store(single + program, tl.sum(tl.sum(sum_b, 1), 0))
        elif SCALE == "features":
            store_sum(sum_b, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if weight1 is not None:
            store_sum(sum_weight1, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if bias1 is not None:
            store_sum(sum_bias1, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if weight2 is not None:
            store_sum(sum_weight2, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if bias2 is not None:
            store_sum(sum_bias2, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if weight3 is not None:
            store_sum(sum_weight3, partial, program, place, COUNT, column, FEATURES)
            place += 1
        if bias3 is not None:
            store_sum(sum_bias3, partial, program, place, COUNT, column, FEATURES)


@functools.cache
def forward_plans(features: int) -> list[Launch]:
    """Return the forward plans; the rule's plan is the first."""
    return [tile_plan(features, elements) for elements in (16, 8, 4) if features <= 4096 or elements > 4]


@functools.cache
def backward_plans(features: int) -> list[Launch]:
    """Return the backward plans; the rule's plan is the first."""
    pairs = [(8, 2), (8, 1), (4, 2), (4, 1), (16, 2), (16, 1)]
    if features == 512:  # with 8 elements ptxas 12.8 (Triton 3.6) or 12.9 (3.9) spills 8 bytes a thread of some kind
        pairs.insert(0, pairs.pop(2))
    return [
        tile_plan(features, elements, STAGES=stages) for elements, stages in pairs if features <= 4096 or elements > 4
    ]


def _options(features: int, norm: int, scale: Tensor | None) -> dict[str, Any]:
    kind = "number" if scale is None else "one" if scale.dim() == 0 else "features"
    return {"FEATURES": features, "NORM": NORMALISATIONS[norm], "SCALE": kind}


def norm_step_forward(
    x: Tensor, y: Tensor, scale: Tensor | None, weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None,
    bias2: Tensor | None, weight3: Tensor | None, bias3: Tensor | None, a: float, b: float, norm: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (x', u); u has no elements without N2."""
    features = y.shape[-1]
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    u = torch.empty(y.shape if weight2 is not None else (0,), dtype=y.dtype, device=y.device)
    rows = y.numel() // features
    if rows == 0:
        return x_out, u
    (x, x_stride), (y, y_stride) = as_rows(x), as_rows(y)
    parameters = parameters_of(scale, weight1, bias1, weight2, bias2, weight3, bias3)
    options = _options(features, norm, scale)
    dense = [*parameters[1:], x_out, u, *([parameters[0]] if options["SCALE"] == "features" else [])]
    aligned = is_aligned((x, y, *dense), (x_stride, y_stride, *[features] * len(dense)))
    aligned = aligned and options["SCALE"] != "one"  # a single number need not lie at a multiple of 16 bytes
    arguments = (
        x, y, *parameters, x_out, u if weight2 is not None else None, rows, x_stride, y_stride, float(a), float(b),
        float(eps),
    )  # fmt: skip

    def run(plan: Launch) -> None:
        launch(forward_kernel, (cdiv(rows, plan.constants["ROWS"]),), arguments, options, plan, aligned)

    with device_of(y):
        plans = forward_plans(features)
        key = key_of(arguments, options, aligned)
        run(tune.fastest("norm_step_forward", key, plans, run) if tune.ENABLED else plans[0])
    return x_out, u


def norm_step_backward(
    dx_out: Tensor | None, du: Tensor | None, x: Tensor | None, y: Tensor | None, x_out: Tensor | None,
    scale: Tensor | None, weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
    weight3: Tensor | None, bias3: Tensor | None, a: float, b: float, norm: int, eps: float,
    parameter_gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (dx, dy, dscale, dweight1, dbias1, ..., dbias3); see Gradients in depthlstm_fast/ops/norm_step.py."""
    like = cast(Tensor, du if y is None else y)  # y is left out only beside a du
    x_like = next(tensor for tensor in (x, x_out, dx_out) if tensor is not None)
    features, device = like.shape[-1], like.device
    rows = like.numel() // features
    shared = a == b == 1 and scale is None and weight3 is None and x_like.dtype == like.dtype
    make = torch.empty if rows else torch.zeros

    def result(tensor: Tensor | None, wanted: bool = True) -> Tensor:
        shape = tensor.shape if tensor is not None and wanted else (0,)
        return make(shape, dtype=like.dtype if tensor is None else tensor.dtype, device=device)

    dx, dy = result(x_like), result(like, not shared)
    given = (scale, weight1, bias1, weight2, bias2, weight3, bias3)
    sums = [result(parameter, parameter_gradients) for parameter in given]
    if rows == 0:
        return dx, dy, *sums
    options = _options(features, norm, scale)
    single_wanted = parameter_gradients and options["SCALE"] == "one"
    by_features = [
        made
        for made, parameter in zip(sums, given, strict=True)
        if parameter_gradients and parameter is not None and parameter.dim() == 1
    ]
    # rows that the kernel does not read are given as None, so that it is compiled for what it reads
    reads_x_out = weight2 is not None and weight1 is None
    inputs = (dx_out, du, x if weight1 is not None else None, y, x_out if reads_x_out else None)
    views = [as_rows(tensor) for tensor in inputs]
    tensors, strides = [view[0] for view in views], [view[1] for view in views]
    parameters = parameters_of(*given)
    dense = [*parameters[1:], *([parameters[0]] if options["SCALE"] == "features" else [])]
    aligned = is_aligned((*tensors, *dense), (*strides, *[features] * len(dense)))
    aligned = aligned and features * min(x_like.itemsize, like.itemsize) % ALIGNMENT == 0
    aligned = aligned and options["SCALE"] != "one"
    # 1 stands for the sum of a single b alone, which needs no row of `partial`
    options["COUNT"] = max(len(by_features), int(single_wanted))

    def run(plan: Launch) -> None:
        programs = min(cdiv(rows, plan.constants["ROWS"]), max(1, multiprocessors(device) * WARPS // plan.warps))
        partial = single = None
        if by_features:
            partial = torch.empty((programs, len(by_features) * features), dtype=torch.float32, device=device)
        if single_wanted:
            single = torch.empty((programs,), dtype=torch.float32, device=device)
        arguments = (
            *tensors, *parameters, dx, None if shared else dy, single, partial, rows, *strides, float(a), float(b),
            float(eps),
        )  # fmt: skip
        launch(backward_kernel, (programs,), arguments, options, plan, aligned)
        if partial is not None:
            outs = [*by_features, *[None] * (7 - len(by_features))]
            grid = (cdiv(features, SUMS_PLAN.constants["BLOCK"]), len(by_features))
            constants: dict[str, Any] = {"COUNT": len(by_features), "FEATURES": features}
            launch(sums_kernel, grid, (partial, *outs, programs), constants, SUMS_PLAN, False)
        if single is not None:
            launch(single_sum_kernel, (1,), (single, sums[0], programs), {}, SINGLE_SUM_PLAN, False)

    with device_of(like):
        plans = backward_plans(features)
        key = (*key_of((*tensors, *parameters), options, aligned), shared)
        run(tune.fastest("norm_step_backward", key, plans, run) if tune.ENABLED else plans[0])
    return dx, dy, *sums
