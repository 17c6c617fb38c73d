"""Small layers with random parameters, shared by the tests of layers and stacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

D, HEADS, BATCH, LENGTH, SOURCE = 12, 3, 2, 5, 4
MERGES = ("add", "concat", "cells")


def build(module: Any, kind: str, **options: Any) -> nn.Module:
    defaults = {"d_model": D, "nhead": HEADS, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    return getattr(module, f"DepthLSTM{kind}Layer")(**{**defaults, **options})


def pair(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A reference layer with every parameter random and a fused one with the same parameters."""
    reference, fused = build(dl.reference, kind, **options), build(dl, kind, **options)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    fused.load_state_dict(reference.state_dict())
    return reference, fused


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
