"""The cell, forward + backward with every gradient, in units of its three bare GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.bench.compiled import Compiled, reference_cell
from depthlstm_fast.bench.gates import DTYPES, FEATURES, ROWS, Function, forward_and_backward, name_of
from depthlstm_fast.bench.rows import Row, Settings, Target, timed_row

GEMM_UNITS = {torch.float32: 1.06, torch.bfloat16: 1.12}


def make_inputs(rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu", beside: bool = False) -> list[Tensor]:
    """x, h, c (rows, D), w (4D, 2D), b (4D), weight and bias (4, D), random, of the scale that initialisation gives.

    With ``beside`` x and h are the halves of one matrix, as between the layers of a stack.
    """
    bound = (2 * features) ** -0.5
    tensors = [torch.randn(rows, features, device=device) for _ in range(3)]
    tensors += [torch.empty(4 * features, 2 * features, device=device).uniform_(-bound, bound)]
    tensors += [0.1 * torch.randn(4 * features, device=device)]
    tensors += [1 + 0.1 * torch.randn(4, features, device=device), 0.1 * torch.randn(4, features, device=device)]
    if beside:
        tensors[:2] = torch.cat(tensors[:2], dim=1).to(dtype).split(features, dim=1)
    return [tensor.to(dtype).detach() for tensor in tensors]


def bare_gemms(rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Callable[[], object]:
    """The products that no cell can do without: z = xh W^T, dxh = dz W, dW = dz^T xh; contiguous inputs, outputs allocated afresh."""
    shapes = (rows, 2 * features), (4 * features, 2 * features), (rows, 4 * features)
    xh, w, dz = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
    return lambda: (torch.mm(xh, w.t()), torch.mm(dz, w), torch.mm(dz.t(), xh))


def compile_for(compiled: Compiled, dtype: torch.dtype) -> Function | None:
    """The compiled reference for training."""

    def train(function: Function) -> object:
        leaves = [tensor.requires_grad_() for tensor in make_inputs(ROWS, FEATURES, dtype)]
        return forward_and_backward(function, leaves, [torch.randn(ROWS, FEATURES).to(dtype) for _ in range(2)])

    return compiled.get(reference_cell, train)


def measure(settings: Settings, compiled: Compiled, tick: Callable[[], None]) -> Iterator[Row]:
    """One row for each dtype."""
    for dtype in DTYPES:
        train = compile_for(compiled, dtype)
        leaves = [tensor.requires_grad_() for tensor in make_inputs(ROWS, FEATURES, dtype)]
        cotangents = [torch.randn(ROWS, FEATURES).to(dtype) for _ in range(2)]
        contestants: dict[str, Function] = {"eager": reference_cell, "fused": dl.depth_lstm_cell}
        if train is not None:
            contestants["compile"] = train

        runs: dict[str, Callable[[], object]] = {
            name: lambda f=function, v=leaves, g=cotangents: forward_and_backward(f, v, g)  # type: ignore[misc]
            for name, function in contestants.items()
        }
        runs["against"] = bare_gemms(ROWS, FEATURES, dtype)
        row = Row("cell", "cell forward + backward", name_of(dtype), f"N={ROWS} I=D={FEATURES}", "ms", against="3 bare GEMMs")
        if compiled.reason is not None:
            row.missing["compile"] = compiled.reason
        targets = [Target("eager", "speedup"), Target("compile", "speedup"), Target("against", "ratio", GEMM_UNITS[dtype])]
        yield timed_row(row, runs, targets, settings, 5.0, tick)
