"""The step of every norm placement in plain PyTorch.

    x' = [N1](a x + b [N3] y)
    u  = [N2] x'

N is LayerNorm or RMSNorm; brackets mark norms that a placement leaves out.
Pre-norm has N2, post-norm N1, sandwich-norm N2 and N3, DeepNorm N1 with a > 1, Keel N1 and N2 with a > 1.
ReZero and LayerScale are pre-norm with a learned b.
"""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .normalise import accumulation_dtype, normalise


def norm_step(
    x: Tensor,
    y: Tensor,
    *,
    a: float = 1.0,
    b: float | Tensor = 1.0,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The twin of :func:`depthlstm_fast.norm_step` in plain PyTorch; differentiable any number of times."""
    affines = (("1", weight1, bias1), ("2", weight2, bias2), ("3", weight3, bias3))
    checks.check_norm_step(x, y, a, b, affines, norm, eps)
    wide = accumulation_dtype(x, y)
    scaled = x.to(wide) if a == 1 else a * x.to(wide)
    branch = normalise(y.to(wide), weight3, bias3, norm, eps)
    if isinstance(b, Tensor):
        branch = b.to(wide) * branch
    elif b != 1:
        branch = b * branch
    new_x = normalise(scaled + branch, weight1, bias1, norm, eps).to(x.dtype)
    if weight2 is None:
        return new_x, new_x
    # of the rounded x', which is what a backward pass finds again
    return new_x, normalise(new_x.to(wide), weight2, bias2, norm, eps).to(y.dtype)
