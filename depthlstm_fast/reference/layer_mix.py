"""Weighted sums of a list of tensors, in plain PyTorch.

    u_v = sum_l w_vl x_l

Sources: Wang et al., Learning Deep Transformer Models for Machine Translation, ACL 2019 (DLCL).
Pagliardini et al., DenseFormer, arXiv 2402.02622. Bapna et al., Training Deeper NMT Models with Transparent Attention,
EMNLP 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from .normalise import accumulation_dtype


def layer_mix(sources: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """The twin of :func:`depthlstm_fast.layer_mix` in plain PyTorch; differentiable any number of times."""
    checks.check_layer_mix(sources, weights)
    wide = accumulation_dtype(*sources)
    dtype = functools.reduce(torch.promote_types, [source.dtype for source in sources])
    widened = [source.to(wide) for source in sources]
    mixed = []
    for row in weights.to(wide).unbind(0):
        total: Tensor | None = None
        for source, weight in zip(widened, row.unbind(0), strict=True):
            total = source * weight if total is None else total + source * weight
        mixed.append(total.to(dtype))  # type: ignore[union-attr]
    return tuple(mixed)
