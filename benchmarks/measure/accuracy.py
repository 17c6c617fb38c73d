"""Checks of a result against the fp64 reference, before any timing.

A fused result may be twice as far from fp64 as PyTorch's own eager result of the same dtype, and one rounding more.
Cotangents are random. A sum's constant ones would make a LayerNorm's input gradient zero and test nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import depthlstm_fast as dl

from .calls import Function, forward_and_backward, name_of

# roundings of the largest value in a GPU's bound; in fp32 eager's own error can be luckily small
GPU_ROUNDINGS = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}


@dataclass(frozen=True)
class Check:
    """One comparison: the tensor closest to its bound, or past it.

    Attributes:
        used: its error over its bound; at most 1 if the check is green.
        size: the checked sizes, where they matter.
    """

    subject: str
    dtype: str
    passed: bool
    tensor: str
    error: float
    eager_error: float
    used: float
    backend: str
    size: str = ""

    @property
    def summary(self) -> str:
        verdict = "green" if self.passed else "RED"
        return (
            f"{verdict}: {self.tensor} error {self.error:.1e} (eager "
            f"{self.eager_error:.1e}), {self.used:.0%} of the bound"
        )


def compare(
    subject: str,
    dtype: torch.dtype,
    names: Sequence[str],
    exact: Sequence[Tensor],
    eager: Sequence[Tensor],
    fused: Sequence[Tensor],
    roundings: float = 1,
) -> Check:
    """Compare ``fused`` with ``exact`` (fp64), tensor by tensor.

    The bound is 2 * (error of ``eager``) + ``roundings`` of the largest value.
    """
    worst: tuple[float, str, float, float] = (-1.0, "", 0.0, 0.0)
    for name, wanted, plain, found in zip(names, exact, eager, fused, strict=True):
        wanted, plain, found = wanted.detach(), plain.detach().double(), found.detach().double()
        tiny = roundings * torch.finfo(dtype).eps * float(wanted.abs().max())
        error = float((found - wanted).abs().max())
        plain_error = float((plain - wanted).abs().max())
        # a NaN or an infinity compares false with everything, and must count as past the bound
        used = error / (2 * plain_error + tiny) if 0 < error < float("inf") else 0.0 if error == 0 else float("inf")
        if used > worst[0]:
            worst = (used, name, error, plain_error)
    used, name, error, plain_error = worst
    return Check(subject, name_of(dtype), used <= 1, name, error, plain_error, used, dl.last_backend() or "none")


def function_check(
    subject: str,
    reference: Function,
    fused: Function,
    inputs: list[Tensor],
    names: Sequence[str],
    dtype: torch.dtype,
    roundings: float = 1,
) -> Check:
    """Check h, c and the gradient of each of ``inputs``, named ``names``, under random cotangents."""
    cotangents = [torch.randn_like(inputs[1]) for _ in range(2)]

    def run(function: Function, to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(to).requires_grad_() for tensor in inputs]
        return forward_and_backward(function, leaves, [tensor.to(to) for tensor in cotangents])

    labels = ["h", "c", *(f"gradient of {name}" for name in names)]
    exact, eager = run(reference, torch.float64), run(reference, dtype)
    return compare(subject, dtype, labels, exact, eager, run(fused, dtype), roundings)
