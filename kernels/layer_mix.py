"""Weighted sums of a list of tensors on a GPU, in Triton.

    u_v = sum_l w_vl x_l        dx_l = sum_v w_vl du_v        dw_vl = <x_l, du_v>

The tensors are a tuple of pointers, one argument of a kernel. A program takes a tile of features of one row, of every
tensor, so that each source is read once for all outputs; dense rows are one long row. A kernel is compiled for a number
of pointers that is a power of two, up to LARGEST, and skips those past the last source. More sources take several
launches: forward keeps the sums between them in fp32.

Backward leaves a partial sum of dw for each program, and these are added in a fixed order. Everything is fp32. Offsets
are int64, row strides are in elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import Launch, as_rows, cdiv, device_of, is_aligned, launch
from .common.tiles import load, store

LARGEST = 32  # pointers of a launch
PAIRS = 128  # of a source and an output in a launch, which are written out in the machine code


@triton.jit
def forward_kernel(
    x, x_stride,  # the sources, some of them stand-ins
    u,  # the outputs, dense, written by the last launch
    weights,  # (V, L)
    sums,  # (V, rows * features) fp32 between launches, or None
    count, first, sources, elements, features, tiles,  # sources of this launch from `first` on; tiles of a row
    COUNT: tl.constexpr, OUTPUTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row, column = tile // tiles, tile % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    totals = ()
    for v in tl.static_range(OUTPUTS):
        if FIRST:
            totals = totals + (tl.zeros((BLOCK,), tl.float32),)
        else:
            totals = totals + (load(sums + v * elements + row * features + column, inside, MASKED),)
    for l in tl.static_range(COUNT):
        source = l + tl.arange(0, 1)  # a tensor, which masks must be
        there = source < count
        value = tl.load(x[l] + row * x_stride[l] + column, mask=inside & there, other=0.0).to(tl.float32)
        added = ()
        for v in tl.static_range(OUTPUTS):
            weight = tl.load(weights + v * sources + first + source, mask=there, other=0.0)
            added = added + (totals[v] + value * weight,)
        totals = added
    for v in tl.static_range(OUTPUTS):
        if LAST:
            store(u[v] + row * features + column, totals[v], inside, MASKED)
        else:
            store(sums + v * elements + row * features + column, totals[v], inside, MASKED)


@triton.jit
def backward_kernel(
    du, du_stride,  # gradients of the outputs
    x, x_stride,  # the sources; None if dw is not wanted
    dx,  # their gradients, dense, written; None if they are not wanted
    weights,  # (V, L)
    partial,  # (programs, V, L) fp32, written: dw
    count, first, sources, features, tiles,  # as in forward
    COUNT: tl.constexpr, OUTPUTS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row, column = tile // tiles, tile % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    given = ()
    for v in tl.static_range(OUTPUTS):
        given = given + (load(du[v] + row * du_stride[v] + column, inside, MASKED),)
    for l in tl.static_range(COUNT):
        source = l + tl.arange(0, 1)  # a tensor, which masks must be
        there = source < count
        if dx is not None:
            gradient = tl.zeros((BLOCK,), tl.float32)
            for v in tl.static_range(OUTPUTS):
                gradient += given[v] * tl.load(weights + v * sources + first + source, mask=there, other=0.0)
            at = dx[l] + row * features + column
            tl.store(at, gradient.to(at.dtype.element_ty), mask=inside & there)
        if x is not None:
            value = tl.load(x[l] + row * x_stride[l] + column, mask=inside & there, other=0.0).to(tl.float32)
            for v in tl.static_range(OUTPUTS):
                at = partial + (tile * OUTPUTS + v) * sources + first + source
                tl.store(at, tl.sum(value * given[v], 0, keep_dims=True), mask=there)


@functools.cache
def plan(outputs: int) -> Launch:
    """Plan a tile: 8 elements a thread for each of few outputs."""
    block = 1024 if outputs <= 4 else 512 if outputs <= 16 else 256
    return Launch(max(1, block // 256), {"BLOCK": block})


def groups(sources: int, outputs: int) -> list[tuple[int, int, int]]:
    """Return (first source, sources, pointers) of each launch."""
    largest = max(1, min(LARGEST, PAIRS // outputs))
    size = 1 << (largest.bit_length() - 1)
    starts = range(0, sources, size)
    counts = [min(size, sources - first) for first in starts]
    return [(first, count, triton.next_power_of_2(count)) for first, count in zip(starts, counts, strict=True)]


class _Rows:
    """Tensors as rows of one shape; where all are dense, as one long row."""

    def __init__(self, tensors: Sequence[Tensor], more: Sequence[Tensor] = ()) -> None:
        self.features = tensors[0].shape[-1]
        self.rows = tensors[0].numel() // self.features
        found = [as_rows(tensor) for tensor in (*tensors, *more)]
        self.tensors: list[Any] = [tensor for tensor, _ in found]
        self.strides = [stride for _, stride in found]
        if all(stride == self.features for stride in self.strides):
            self.features, self.rows = self.features * self.rows, 1

    def is_aligned(self, others: Sequence[Tensor]) -> bool:
        """Return whether every row of the tensors, and of dense outputs, begins where a wide load may."""
        apart = [0 if self.rows == 1 else stride for stride in self.strides]
        dense = [0 if self.rows == 1 else self.features for _ in others]
        return is_aligned((*self.tensors, *others), (*apart, *dense))


def _padded(values: Sequence[Any], size: int) -> tuple[Any, ...]:
    """Return the values with stand-ins, which no load or store reaches."""
    return (*values, *(values[0] for _ in range(size - len(values))))


def layer_mix_forward(sources: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Return the V outputs."""
    dtype = functools.reduce(torch.promote_types, [source.dtype for source in sources])
    outputs, device = weights.shape[0], sources[0].device
    u = [torch.empty(sources[0].shape, dtype=dtype, device=device) for _ in range(outputs)]
    if u == [] or u[0].numel() == 0:
        return u
    rows = _Rows(sources)
    weights = weights.resolve_neg().float().contiguous()
    tile, elements, launches = plan(outputs), u[0].numel(), groups(len(sources), outputs)
    block = tile.constants["BLOCK"]
    tiles = cdiv(rows.features, block)
    sums = torch.empty((outputs, elements), dtype=torch.float32, device=device) if len(launches) > 1 else None
    aligned = rows.is_aligned(u) and is_aligned([weights, sums], [0, elements])
    with device_of(sources[0]):
        for first, count, pointers in launches:
            some = slice(first, first + count)
            arguments = (
                _padded(rows.tensors[some], pointers), _padded(rows.strides[some], pointers), tuple(u), weights, sums,
                count, first, len(sources), elements, rows.features, tiles,
            )  # fmt: skip
            constants: dict[str, Any] = {
                "COUNT": pointers, "OUTPUTS": outputs, "FIRST": first == 0, "LAST": first + count == len(sources),
                "MASKED": rows.features % block != 0,
            }  # fmt: skip
            launch(forward_kernel, (rows.rows * tiles,), arguments, constants, tile, aligned)
    return u


def layer_mix_backward(
    du: list[Tensor | None], sources: list[Tensor], weights: Tensor, source_gradients: bool, weight_gradient: bool
) -> tuple[list[Tensor], Tensor]:
    """Return (dsources, dweights); a du of None stands for zeros, and without weight_gradient no source is read."""
    device, total = sources[0].device, sources[0].numel()
    given = [gradient for gradient in du if gradient is not None]
    present = [v for v, gradient in enumerate(du) if gradient is not None]
    nothing = not given or total == 0
    make = torch.zeros if nothing else torch.empty
    dx = [make(s.shape, dtype=s.dtype, device=device) for s in sources] if source_gradients else []
    dweights = torch.zeros(weights.shape if weight_gradient else (0,), dtype=weights.dtype, device=device)
    if nothing or not (source_gradients or weight_gradient):
        return dx, dweights
    rows = _Rows(given, sources if weight_gradient else ())
    given, strides = rows.tensors[: len(given)], rows.strides[: len(given)]
    x, x_strides = rows.tensors[len(given) :], rows.strides[len(given) :]
    chosen = weights.resolve_neg().float()[present].contiguous()
    tile = plan(len(given))
    block = tile.constants["BLOCK"]
    tiles = cdiv(rows.features, block)
    programs = rows.rows * tiles
    partial = None
    if weight_gradient:
        partial = torch.empty((programs, len(given), len(sources)), dtype=torch.float32, device=device)
    aligned = rows.is_aligned(dx) and is_aligned([chosen, partial], [0, 0])
    with device_of(sources[0]):
        for first, count, pointers in groups(len(sources), len(given)):
            some = slice(first, first + count)
            arguments = (
                tuple(given), tuple(strides),
                _padded(x[some], pointers) if weight_gradient else None,
                _padded(x_strides[some], pointers) if weight_gradient else None,
                _padded(dx[some], pointers) if source_gradients else None,
                chosen, partial, count, first, len(sources), rows.features, tiles,
            )  # fmt: skip
            constants: dict[str, Any] = {"COUNT": pointers, "OUTPUTS": len(given), "MASKED": rows.features % block != 0}
            launch(backward_kernel, (programs,), arguments, constants, tile, aligned)
        if partial is not None:
            dweights[present] = partial.sum(0).to(weights.dtype)
    return dx, dweights
