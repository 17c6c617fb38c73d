"""Attention over a list of tensors on a GPU, in Triton.

    s_l = q . x_l / rms(x_l)      p = softmax(s)      y = sum_l p_l x_l      u = [N](y)      q = query * key_weight

The sources are a tuple of pointers, one argument of a kernel. A program has a row in registers and takes the sources
one after the other, with an online softmax, so that each is read once. A kernel is compiled for a number of pointers
that is a power of two, up to LARGEST, and skips those past the last source. More sources take several launches, with
largest score, sum and y between them in fp32.

Backward computes y again, and then reads the sources a second time:

    dx_l = p_l dy + k_l q - k_l a_l r_l^2 / C x_l      dq = sum of k_l x_l      k_l = p_l r_l (dy . x_l - dy . y)

with a_l = q . x_l and r_l = 1 / rms(x_l). Programs stay on the GPU and loop over rows. Each leaves one partial sum of
the parameters' gradients, and these are added in a fixed order. Everything is fp32. Row numbers are int64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import NORMALISATIONS
from .common.launch import Launch, as_rows, device_of, is_aligned, launch, multiprocessors

LARGEST = 32  # pointers of a launch
LOWEST = tl.constexpr(-3.4e38)  # below every finite score; minus infinity would make NaN of its own difference
LOG2_E = tl.constexpr(1.4426950408889634)
WARPS = 16  # resident on a multiprocessor in backward


@triton.jit
def _exp(x):
    return tl.math.exp2(x * LOG2_E)


@triton.jit
def _source(x, x_stride, row, column, inside, query, there, eps, FEATURES: tl.constexpr):
    """Return a row of a source in fp32, q . x and 1 / rms(x)."""
    value = tl.load(x + row * x_stride + column, mask=inside & there, other=0.0).to(tl.float32)
    square = tl.sum(value * value, 0, keep_dims=True) * (1.0 / FEATURES)
    return value, tl.sum(value * query, 0, keep_dims=True), tl.math.rsqrt(square + eps)


@triton.jit
def _attend(
    x, x_stride, row, column, inside, query, largest, total, y, count, eps, FEATURES: tl.constexpr, COUNT: tl.constexpr
):
    """Take a launch's sources into the largest score, the sum of e^(s - largest), and that of e^(s - largest) x."""
    for l in tl.static_range(COUNT):
        there = l + tl.arange(0, 1) < count
        value, dot, inverse = _source(x[l], x_stride[l], row, column, inside, query, there, eps, FEATURES)
        score = tl.where(there, dot * inverse, float("-inf"))
        higher = tl.where(score > largest, score, largest)  # a NaN comes in by the share
        fade, share = _exp(largest - higher), _exp(score - higher)
        y = y * fade + value * share
        total = total * fade + share
        largest = higher
    return largest, total, y


@triton.jit
def _centred(y, inside, eps, FEATURES: tl.constexpr, NORM: tl.constexpr):
    """Return y without its mean, which RMSNorm leaves in, and the variance or mean square plus eps."""
    centred = y
    if NORM == "layer":
        centred = tl.where(inside, y - tl.sum(y, 0, keep_dims=True) * (1.0 / FEATURES), 0.0)
        # the rounding error of the mean is most of a nearly constant row's rest
        centred = tl.where(inside, centred - tl.sum(centred, 0, keep_dims=True) * (1.0 / FEATURES), 0.0)
    return centred, tl.sum(centred * centred, 0, keep_dims=True) * (1.0 / FEATURES) + eps


@triton.jit
def forward_kernel(
    x, x_stride,  # the sources, some of them stand-ins
    query, weight, bias,  # (C) fp32; no weight, no N
    numbers, state,  # (rows, 2) and (rows, C) fp32 between launches, or None
    u,  # (rows, C), written by the last launch, or None
    count, eps,
    COUNT: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, one = column < FEATURES, tl.arange(0, 1)
    q = tl.load(query + column, mask=inside, other=0.0)
    if FIRST:
        largest, total = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
        y = tl.zeros((BLOCK,), tl.float32)
    else:
        largest, total = tl.load(numbers + row * 2 + one), tl.load(numbers + row * 2 + 1 + one)
        y = tl.load(state + row * FEATURES + column, mask=inside, other=0.0)
    largest, total, y = _attend(x, x_stride, row, column, inside, q, largest, total, y, count, eps, FEATURES, COUNT)
    if LAST:
        y = y / total
    if numbers is not None:
        tl.store(numbers + row * 2 + one, largest)
        tl.store(numbers + row * 2 + 1 + one, total)
        tl.store(state + row * FEATURES + column, y, mask=inside)
    if u is not None:
        if weight is not None:
            centred, square = _centred(y, inside, eps, FEATURES, NORM)
            y = centred * tl.math.rsqrt(square) * tl.load(weight + column, mask=inside, other=0.0)
            if bias is not None:
                y += tl.load(bias + column, mask=inside, other=0.0)
        tl.store(u + row * FEATURES + column, y.to(u.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    du, x, x_stride, dx,  # dx, dense, is written, or None
    query, weight,
    numbers, state,  # of the last forward launch; None where one launch takes all sources
    partial,  # (programs, 3, C) fp32, written: dq, dweight, dbias
    rows, du_stride, count, eps,
    COUNT: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside, one = column < FEATURES, tl.arange(0, 1)
    q = tl.load(query + column, mask=inside, other=0.0)
    dq, dweight = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for number in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        if state is None:
            largest, total, y = _attend(
                x, x_stride, row, column, inside, q, tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32),
                tl.zeros((BLOCK,), tl.float32), count, eps, FEATURES, COUNT,
            )  # fmt: skip
            y = y / total
        else:
            largest, total = tl.load(numbers + row * 2 + one), tl.load(numbers + row * 2 + 1 + one)
            y = tl.load(state + row * FEATURES + column, mask=inside, other=0.0)
        dy = tl.load(du + row * du_stride + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            centred, square = _centred(y, inside, eps, FEATURES, NORM)
            r = tl.math.rsqrt(square)
            dweight += dy * centred * r
            dbias += dy
            g = dy * tl.load(weight + column, mask=inside, other=0.0)
            slope = tl.sum(g * centred, 0, keep_dims=True) * (1.0 / FEATURES) / square
            if NORM == "layer":
                dy = r * (g - tl.sum(g, 0, keep_dims=True) * (1.0 / FEATURES) - centred * slope)
            else:
                dy = r * (g - centred * slope)
            dy = tl.where(inside, dy, 0.0)
        if INNER:
            mean = tl.sum(dy * y, 0, keep_dims=True)
            for l in tl.static_range(COUNT):
                there = l + one < count
                value, dot, inverse = _source(x[l], x_stride[l], row, column, inside, q, there, eps, FEATURES)
                p = _exp(dot * inverse - largest) / total
                k = tl.where(there, p * inverse * (tl.sum(dy * value, 0, keep_dims=True) - mean), 0.0)
                dq += k * value
                if dx is not None:
                    gradient = p * dy + k * q - k * dot * inverse * inverse * (1.0 / FEATURES) * value
                    at = dx[l] + row * FEATURES + column
                    tl.store(at, gradient.to(at.dtype.element_ty), mask=inside & there)
    at = partial + tl.program_id(0).to(tl.int64) * (3 * FEATURES) + column
    tl.store(at, dq, mask=inside)
    tl.store(at + FEATURES, dweight, mask=inside)
    tl.store(at + 2 * FEATURES, dbias, mask=inside)


@functools.cache
def plan(features: int) -> Launch:
    """Plan a row: 8 elements a thread."""
    block = max(16, triton.next_power_of_2(features))
    return Launch(max(1, min(16, block // 256)), {"BLOCK": block})


@functools.cache
def backward_plan(features: int) -> Launch:
    """Plan a row: at most 8 warps with 2 to 4 elements a thread, since more beside 12 sources' addresses spill."""
    forward = plan(features)
    block = forward.constants["BLOCK"]
    return Launch(max(1, min(8, block // 64)), forward.constants) if features <= 1024 else forward


def groups(sources: int) -> list[tuple[int, int, int]]:
    """Return (first source, sources, pointers) of each launch."""
    counts = [(first, min(LARGEST, sources - first)) for first in range(0, sources, LARGEST)]
    return [(first, count, triton.next_power_of_2(count)) for first, count in counts]


def _padded(values: Sequence[Any], size: int) -> tuple[Any, ...]:
    """Return the values with stand-ins, which no load or store reaches."""
    return (*values, *(values[0] for _ in range(size - len(values))))


class _Call:
    """The inputs of both passes: rows, fp32 parameters and options."""

    def __init__(
        self, sources: list[Tensor], query: Tensor, key_weight: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, norm: int, eps: float,
    ) -> None:  # fmt: skip
        self.features = sources[0].shape[-1]
        self.rows, self.device = sources[0].numel() // self.features, sources[0].device
        found = [as_rows(source) for source in sources]
        self.x, self.strides = [tensor for tensor, _ in found], [stride for _, stride in found]
        wide = [None if t is None else t.resolve_neg().float().contiguous() for t in (query, key_weight, weight, bias)]
        self.query: Any
        self.key_weight: Any
        self.query, self.key_weight, self.weight, self.bias = wide
        self.scaled: Any = self.query if self.key_weight is None else self.query * self.key_weight
        self.options: dict[str, Any] = {"FEATURES": self.features, "NORM": NORMALISATIONS[norm]}
        self.eps, self.plan, self.launches = float(eps), plan(self.features), groups(len(sources))

    def is_aligned(self, more: Sequence[Tensor | None], strides: Sequence[int]) -> bool:
        parameters = (self.scaled, self.weight, self.bias)
        return is_aligned((*self.x, *parameters, *more), (*self.strides, 0, 0, 0, *strides))

    def state(self) -> tuple[Tensor, Tensor]:
        """Return memory for what one launch leaves to the next."""
        numbers = torch.empty((self.rows, 2), dtype=torch.float32, device=self.device)
        return numbers, torch.empty((self.rows, self.features), dtype=torch.float32, device=self.device)

    def attend(self, numbers: Tensor | None, state: Tensor | None, u: Tensor | None) -> None:
        """Launch the forward kernel for all sources."""
        aligned = self.is_aligned((numbers, state, u), (0, self.features, self.features))
        for first, count, pointers in self.launches:
            some, last = slice(first, first + count), first + count == len(self.x)
            arguments = (
                _padded(self.x[some], pointers), _padded(self.strides[some], pointers), self.scaled, self.weight,
                self.bias, numbers, state, u if last else None, count, self.eps,
            )  # fmt: skip
            constants = {"COUNT": pointers, **self.options, "FIRST": first == 0, "LAST": last}
            launch(forward_kernel, (self.rows,), arguments, constants, self.plan, aligned)


def layer_attend_forward(
    sources: list[Tensor], query: Tensor, key_weight: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    norm: int, eps: float,
) -> Tensor:  # fmt: skip
    """Return u."""
    dtype = functools.reduce(torch.promote_types, [source.dtype for source in sources])
    u = torch.empty(sources[0].shape, dtype=dtype, device=sources[0].device)
    if u.numel():
        call = _Call(sources, query, key_weight, weight, bias, norm, eps)
        with device_of(u):
            numbers, state = call.state() if len(call.launches) > 1 else (None, None)
            call.attend(numbers, state, u)
    return u


def layer_attend_backward(
    du: Tensor, sources: list[Tensor], query: Tensor, key_weight: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, norm: int, eps: float, source_gradients: bool, query_gradient: bool, affine_gradient: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dsources, dquery, dkey_weight, dweight, dbias); what is not wanted has no elements."""
    device, total = du.device, du.numel()
    make = torch.empty if total else torch.zeros
    dx = [make(s.shape, dtype=s.dtype, device=device) for s in sources] if source_gradients else []
    parameters = (query, key_weight, weight, bias)
    wanted = (query_gradient, query_gradient, affine_gradient, affine_gradient)

    def sized(parameter: Tensor | None, is_wanted: bool) -> Tensor:
        shape, like = ((0,), query) if parameter is None or not is_wanted else (parameter.shape, parameter)
        return torch.zeros(shape, dtype=like.dtype, device=device)

    if total == 0:
        dquery, dkey_weight, dweight, dbias = map(sized, parameters, wanted)
        return dx, dquery, dkey_weight, dweight, dbias
    call = _Call(sources, query, key_weight, weight, bias, norm, eps)
    given, du_stride = as_rows(du)
    tile = backward_plan(call.features)
    programs = min(call.rows, max(1, multiprocessors(device) * WARPS // tile.warps))
    several = len(call.launches) > 1
    sums = torch.zeros((3, call.features), dtype=torch.float32, device=device)
    with device_of(du):
        numbers, state = call.state() if several else (None, None)
        if several:
            call.attend(numbers, state, None)
        for first, count, pointers in call.launches:
            partial = torch.empty((programs, 3, call.features), dtype=torch.float32, device=device)
            tensors = (given, *dx, numbers, state, partial)
            apart = (du_stride, *(call.features for _ in dx), 0, call.features, call.features)
            some = slice(first, first + count)
            arguments = (
                given, _padded(call.x[some], pointers), _padded(call.strides[some], pointers),
                _padded(dx[some], pointers) if source_gradients else None, call.scaled, call.weight, numbers, state,
                partial, call.rows, du_stride, count, call.eps,
            )  # fmt: skip
            constants = {"COUNT": pointers, **call.options, "INNER": source_gradients or query_gradient}
            launch(backward_kernel, (programs,), arguments, constants, tile, call.is_aligned(tensors, apart))
            found = partial.sum(0)
            sums[0] += found[0]
            sums[1:] = found[1:]  # every launch makes the sums of weight and bias
    dq = sums[0]
    made = (dq if call.key_weight is None else dq * call.key_weight, dq * call.query, sums[1], sums[2])
    dquery, dkey_weight, dweight, dbias = (
        value.to(parameter.dtype, copy=True) if parameter is not None and is_wanted else query.new_empty(0)
        for value, parameter, is_wanted in zip(made, parameters, wanted, strict=True)
    )
    return dx, dquery, dkey_weight, dweight, dbias
