"""LayerNorm and RMSNorm as the ops of depth connections take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_CLASSES: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32: what an op computes in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """N(x) over the last dimension, in the dtype of x, which the caller has widened; x itself where weight is None."""
    if weight is None:
        return x
    weight = weight.to(x.dtype)
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.to(x.dtype), eps)
