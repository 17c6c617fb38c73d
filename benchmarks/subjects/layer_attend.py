"""Attention over the outputs of twelve earlier branches, with the output's LayerNorm (attention residuals)."""

from __future__ import annotations

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure.lists import ListOp, subject

SOURCES = 12
PARAMETERS = 4  # query, key_weight, weight, bias


def parameters(features: int) -> list[Tensor]:
    """Return a query that gives scores of the order of one, and norms near their initial values."""
    query, bias = features**-0.5 * torch.randn(features), 0.1 * torch.randn(features)
    return [query, 1 + 0.1 * torch.randn(features), 1 + 0.1 * torch.randn(features), bias]


def fused(*inputs: Tensor) -> tuple[Tensor, ...]:
    return (dl.layer_attend(inputs[:-PARAMETERS], *inputs[-PARAMETERS:]),)


def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    return (dl.reference.layer_attend(inputs[:-PARAMETERS], *inputs[-PARAMETERS:]),)


OP = ListOp(
    subject="layer_attend",
    label=f"layer_attend {SOURCES}",
    sources=SOURCES,
    outputs=1,
    function=fused,
    reference=reference,
    parameters=parameters,
    share={torch.float32: 0.50, torch.bfloat16: 0.50},
    speedup=6.0,
)
SUBJECT = subject("layer_attend", [OP])
