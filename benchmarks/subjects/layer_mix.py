"""Weighted sums of twelve tensors: one output (DLCL, DenseFormer) and six (transparent attention)."""

from __future__ import annotations

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure.lists import ListOp, subject

SOURCES = 12
SHARE = {torch.float32: 0.80, torch.bfloat16: 0.60}


def fused(*inputs: Tensor) -> tuple[Tensor, ...]:
    return dl.layer_mix(inputs[:-1], inputs[-1])


def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Call the chain of additions, which compiles better than stack and einsum."""
    return dl.reference.layer_mix(inputs[:-1], inputs[-1])


def op(outputs: int) -> ListOp:
    return ListOp(
        subject="layer_mix",
        label=f"layer_mix {SOURCES} to {outputs}",
        sources=SOURCES,
        outputs=outputs,
        function=fused,
        reference=reference,
        parameters=lambda features: [torch.randn(outputs, SOURCES)],
        share=SHARE,
        speedup=1.5,
    )


SUBJECT = subject("layer_mix", [op(1), op(6)])
