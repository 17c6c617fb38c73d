"""What follows the products of a depth-wise GRU, in plain PyTorch.

    r  = sigmoid(a_r)                       a = z, or each gate of z normalised
    u  = sigmoid(a_u)                       the update gate
    n  = tanh(a_n + r * a_m)                reset after the product: a_m = U_n h
    n  = tanh(a_n + U_n (r * h))            reset before it
    h' = (1 - u) * n + u * h

Source: Wei et al., Multiscale Collaborative Deep Models for Neural Machine Translation, ACL 2020.
Parisotto et al., Stabilizing Transformers for Reinforcement Learning (GTrXL), ICML 2020, has the reset before.
torch.nn.GRUCell has it after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .normalise import accumulation_dtype


def depth_gru_gates(
    z: Tensor,
    h: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    reset_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The twin of :func:`depthlstm_fast.depth_gru_gates` in plain PyTorch; differentiable any number of times."""
    checks.check_depth_gru_gates(z, h, weight, bias, reset_weight, eps)
    wide, features = accumulation_dtype(z, h), h.shape[-1]
    a = z.to(wide).unflatten(-1, (-1, features))
    if weight is not None and bias is not None:
        a = F.layer_norm(a, (features,), None, None, eps) * weight + bias
    state = h.to(wide)
    reset, update = torch.sigmoid(a[..., 0, :]), torch.sigmoid(a[..., 1, :])
    if reset_weight is None:
        recurrent = reset * a[..., 3, :]
    else:
        recurrent = F.linear((reset * state).to(z.dtype), reset_weight.to(z.dtype)).to(wide)
    new = torch.tanh(a[..., 2, :] + recurrent)
    return ((1 - update) * new + update * state).to(h.dtype)
