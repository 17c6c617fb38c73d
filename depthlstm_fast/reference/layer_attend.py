"""Attention over the outputs of earlier layers, in plain PyTorch.

    s_l = query . RMSNorm(x_l)
    u   = [N](sum_l softmax_l(s) x_l)

There is no 1/sqrt(C). Source: Attention Residuals, arXiv 2603.15031.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from .normalise import accumulation_dtype, normalise


def layer_attend(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """The twin of :func:`depthlstm_fast.layer_attend` in plain PyTorch; differentiable any number of times."""
    checks.check_layer_attend(sources, query, key_weight, weight, bias, norm, eps)
    wide = accumulation_dtype(*sources)
    dtype = functools.reduce(torch.promote_types, [source.dtype for source in sources])
    widened = [source.to(wide) for source in sources]
    scaled = query.to(wide) if key_weight is None else query.to(wide) * key_weight.to(wide)
    scores = []
    for source in widened:
        inverse = torch.rsqrt(source.square().mean(-1, keepdim=True) + eps)
        scores.append((source * scaled).sum(-1, keepdim=True) * inverse)
    largest = functools.reduce(torch.maximum, scores).detach()
    # the division comes last, so that equal scores give the mean exactly
    shares = [torch.exp(score - largest) for score in scores]
    total = functools.reduce(torch.add, [share * x for share, x in zip(shares, widened, strict=True)])
    attended = total / functools.reduce(torch.add, shares)
    return normalise(attended, weight, bias, norm, eps).to(dtype)
