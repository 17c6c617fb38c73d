"""What follows the GEMM, alone: forward, and forward + backward, against the bytes that have to move."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure.compiled import Compiled, reference_gates
from ..measure.problems import Problem, Runs
from ..measure.rows import Row, Target

ROWS, FEATURES = 4096, 512
DTYPES = (torch.float32, torch.bfloat16)
FORWARD_ELEMENTS = 7  # of D a token: z (4) and c' read, h and c written
BACKWARD_ELEMENTS = 12  # z (4), c', dh and dc read, dz (4) and dc' written
# of one feature of a token, as the formulas are written, an exponential, an error function and a division one each
FORWARD_OPERATIONS = 49  # norm and affine 4 * 7, sigmoids 3 * 4, GELU 5, c and h 4
BACKWARD_OPERATIONS = 115  # all of that again but h, gates and t 15, GELU's derivative 6, c' 1 and g 2 more, sums 4 * 3, dz 4 * 8
SHARE_OF_COPY = {torch.float32: 0.80, torch.bfloat16: 0.60}
SPEEDUPS = (Target("eager", "speedup", 8.0), Target("compile", "speedup", 3.5))

Function = Callable[..., tuple[Tensor, Tensor]]


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def moved_bytes(rows: int, features: int, dtype: torch.dtype, elements: int) -> int:
    """Bytes that ``elements`` * D elements a token make."""
    return rows * features * elements * dtype.itemsize


def operations(rows: int, features: int, backward: bool) -> int:
    """Arithmetic of the forward, or of forward and backward; what a kernel of ours spends on polynomials for exp and erf is more."""
    return rows * features * (FORWARD_OPERATIONS + (BACKWARD_OPERATIONS if backward else 0))


def make_inputs(rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """z (rows, 4D), c (rows, D), weight and bias (4, D), random, the affine near its initial value."""
    z, c = torch.randn(rows, 4 * features, device=device), torch.randn(rows, features, device=device)
    weight, bias = 1 + 0.1 * torch.randn(4, features, device=device), 0.1 * torch.randn(4, features, device=device)
    return [tensor.to(dtype) for tensor in (z, c, weight, bias)]


def forward_and_backward(function: Function, leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """(h, c) and then the gradients of all ``leaves``."""
    outputs = function(*leaves)
    return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))


def copy_forward(z: Tensor, scratch: Tensor) -> Callable[[], object]:
    """A copy of as many bytes as the forward moves, 3.5D read and 3.5D written a token, 2D of them into outputs allocated afresh."""
    size = z.numel() // 4
    source, half = z.view(-1), size // 2

    def run() -> object:
        h, c = torch.empty(size, dtype=z.dtype), torch.empty(size, dtype=z.dtype)
        h.copy_(source[:size])
        c.copy_(source[size : 2 * size])
        scratch[: size + half].copy_(source[2 * size : 3 * size + half])
        return h, c

    return run


def copy_backward(z: Tensor, c: Tensor, dh: Tensor, scratch: Tensor) -> Callable[[], object]:
    """A copy of as many bytes as the backward moves, 6D read and 6D written a token, 5D of them into outputs allocated afresh."""

    def run() -> object:
        dz, dc = torch.empty_like(z), torch.empty_like(c)
        dz.copy_(z)
        dc.copy_(c)
        scratch[: dh.numel()].copy_(dh.view(-1))
        return dz, dc

    return run


def copy_once(source: Tensor, count: int) -> Callable[[], object]:
    """A copy of ``count`` elements of ``source``, in one kernel, into memory allocated afresh."""
    return lambda: torch.empty(count, dtype=source.dtype, device=source.device).copy_(source[:count])


def compile_for(compiled: Compiled, dtype: torch.dtype) -> tuple[Function | None, Function | None]:
    """The compiled reference for the forward alone and for training."""
    inputs = make_inputs(ROWS, FEATURES, dtype)

    def infer(function: Function) -> object:
        with torch.no_grad():
            return function(*inputs)

    def train(function: Function) -> object:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        return forward_and_backward(function, leaves, [torch.randn_like(inputs[1]) for _ in range(2)])

    return compiled.get(reference_gates, infer), compiled.get(reference_gates, train)


def forward(dtype: torch.dtype, compiled: Compiled) -> Problem:
    """The forward without gradients."""
    inputs = make_inputs(ROWS, FEATURES, dtype)
    z, c = inputs[:2]
    infer = compile_for(compiled, dtype)[0]
    runs: Runs = {"eager": lambda: reference_gates(*inputs)}
    if infer is not None:
        runs["compile"] = lambda: infer(*inputs)
    runs |= {"fused": lambda: dl.depth_lstm_gates(*inputs), "against": copy_forward(z, torch.empty(2 * c.numel(), dtype=dtype))}
    targets = [*SPEEDUPS, Target("against", "share", SHARE_OF_COPY[dtype])]
    return problem("gates forward", dtype, FORWARD_ELEMENTS, compiled, runs, targets, seconds=1.2, grad=False)


def training(dtype: torch.dtype, compiled: Compiled) -> Problem:
    """Forward and backward with the gradients of all inputs."""
    inputs = make_inputs(ROWS, FEATURES, dtype)
    z, c = inputs[:2]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    cotangents = [torch.randn_like(c), torch.randn_like(c)]
    scratch = torch.empty(2 * c.numel(), dtype=dtype)
    copies = copy_forward(z, scratch), copy_backward(z, c, cotangents[0], scratch)
    train = compile_for(compiled, dtype)[1]
    runs: Runs = {"eager": lambda: forward_and_backward(reference_gates, leaves, cotangents)}
    if train is not None:
        runs["compile"] = lambda: forward_and_backward(train, leaves, cotangents)
    runs["fused"] = lambda: forward_and_backward(dl.depth_lstm_gates, leaves, cotangents)
    runs["against"] = lambda: [copy() for copy in copies]
    elements = FORWARD_ELEMENTS + BACKWARD_ELEMENTS
    targets = [*SPEEDUPS, Target("against", "share")]
    return problem("gates forward + backward", dtype, elements, compiled, runs, targets, seconds=2.0, grad=True)


def problem(
    name: str, dtype: torch.dtype, elements: int, compiled: Compiled, runs: Runs, targets: list[Target], seconds: float, grad: bool
) -> Problem:
    """A problem about ``elements`` * D elements a token."""
    row = Row("gates", name, name_of(dtype), f"N={ROWS} D={FEATURES}", "ms", against=f"copy of {elements}D", missing=compiled.missing())
    size = moved_bytes(ROWS, FEATURES, dtype, elements)
    row.note = f"{size / 1e6:.1f} MB moved"
    return Problem(row, runs, targets, seconds, grad, moved_bytes=size, flops=operations(ROWS, FEATURES, grad), floor="against")


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {
    f"{label} {name_of(dtype)}": functools.partial(make, dtype)
    for dtype in DTYPES
    for label, make in (("forward", forward), ("training", training))
}
