"""Calls that several subjects make: forward with every gradient, on one backend, several in a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import depthlstm_fast as dl

Runs = dict[str, Callable[[], object]]
Function = Callable[..., tuple[Tensor, ...]]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def name_of(dtype: torch.dtype) -> str:
    return NAMES[dtype]


def forward_and_backward(function: Function, leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Return (h, c) and then the gradients of all ``leaves``."""
    outputs = function(*leaves)
    return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))


def on_backend(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """Return ``run`` with ``backend`` as the default of its calls."""

    def call() -> object:
        with dl.use_backend(backend):
            return run()

    return call


def repeated(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """Return a function that makes ``calls`` calls of ``run`` and returns the last outputs."""
    if calls == 1:
        return run

    def batch() -> object:
        outputs = None
        for _ in range(calls):
            outputs = run()
        return outputs

    return batch
