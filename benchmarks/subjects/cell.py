"""The cell, forward + backward with every gradient, in units of its three bare GEMMs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import matrix_products
from ..measure.compiled import Compiled, reference_cell
from ..measure.problems import Problem, Runs
from ..measure.rows import Row, Target
from .gates import DTYPES, FEATURES, ROWS, Function, forward_and_backward, name_of

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
    return matrix_products.training_run(matrix_products.cell(rows, features), dtype, device)


def moved_bytes(rows: int, features: int, dtype: torch.dtype) -> int:
    """Bytes of all that enters and leaves forward + backward: x, h', c' and their gradients, h, c and theirs, parameters and theirs."""
    weights = 8 * features * features + 4 * features + 2 * 4 * features
    return dtype.itemsize * (10 * rows * features + 2 * weights)


def lstm_cell(rows: int, features: int, dtype: torch.dtype) -> Callable[[], object]:
    """torch's own cell, forward + backward with every gradient, on as many weights.

    It computes less after the products: no LayerNorm of the gates, a tanh in place of the GELU; but also the tanh of c'.
    """
    module = nn.LSTMCell(features, features, dtype=dtype)
    x, h, c = (torch.randn(rows, features).to(dtype).requires_grad_() for _ in range(3))
    cotangents = [torch.randn(rows, features).to(dtype) for _ in range(2)]

    def run() -> object:
        outputs = module(x, (h, c))
        return (*outputs, *torch.autograd.grad(outputs, [x, h, c, *module.parameters()], cotangents))

    return run


def compile_for(compiled: Compiled, dtype: torch.dtype) -> Function | None:
    """The compiled reference for training."""

    def train(function: Function) -> object:
        leaves = [tensor.requires_grad_() for tensor in make_inputs(ROWS, FEATURES, dtype)]
        return forward_and_backward(function, leaves, [torch.randn(ROWS, FEATURES).to(dtype) for _ in range(2)])

    return compiled.get(reference_cell, train)


def training(dtype: torch.dtype, compiled: Compiled) -> Problem:
    """Forward and backward with the gradients of all inputs and weights."""
    train = compile_for(compiled, dtype)
    leaves = [tensor.requires_grad_() for tensor in make_inputs(ROWS, FEATURES, dtype)]
    cotangents = [torch.randn(ROWS, FEATURES).to(dtype) for _ in range(2)]
    runs: Runs = {"eager": lambda: forward_and_backward(reference_cell, leaves, cotangents)}
    if train is not None:
        runs["compile"] = lambda: forward_and_backward(train, leaves, cotangents)
    runs |= {
        "fused": lambda: forward_and_backward(dl.depth_lstm_cell, leaves, cotangents),
        "against": bare_gemms(ROWS, FEATURES, dtype),
        "lstm_cell": lstm_cell(ROWS, FEATURES, dtype),
    }
    row = Row("cell", "cell forward + backward", name_of(dtype), f"N={ROWS} I=D={FEATURES}", "ms", against="3 bare GEMMs")
    row.others, row.missing = {"lstm_cell": "nn.LSTMCell (no LayerNorm)"}, compiled.missing()
    targets = [Target("eager", "speedup"), Target("compile", "speedup"), Target("against", "ratio", GEMM_UNITS[dtype])]
    flops, size = matrix_products.training_flops(matrix_products.cell(ROWS, FEATURES)), moved_bytes(ROWS, FEATURES, dtype)
    return Problem(row, runs, targets, 5.0, moved_bytes=size, flops=flops, floor="against")


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {name_of(dtype): functools.partial(training, dtype) for dtype in DTYPES}
