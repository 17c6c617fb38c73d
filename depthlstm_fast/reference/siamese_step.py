"""The step of SiameseNorm's two streams in plain PyTorch.

    X' = N_x(X + o / c)
    Y' = Y + o
    u  = [N](X' + N_y Y')

Source: SiameseNorm, arXiv 2602.08064.
"""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .normalise import accumulation_dtype, normalise


def siamese_step(
    x: Tensor,
    y: Tensor,
    o: Tensor,
    weight_x: Tensor,
    bias_x: Tensor | None,
    weight_y: Tensor,
    bias_y: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    c: float,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of :func:`depthlstm_fast.siamese_step` in plain PyTorch; differentiable any number of times."""
    affines = (("_x", weight_x, bias_x), ("_y", weight_y, bias_y), ("", weight, bias))
    checks.check_siamese_step(x, y, o, c, affines, norm, eps)
    wide = accumulation_dtype(x, y, o)
    branch = o.to(wide)
    new_x = normalise(x.to(wide) + branch / c, weight_x, bias_x, norm, eps).to(x.dtype)
    new_y = (y.to(wide) + branch).to(y.dtype)
    joined = new_x.to(wide) + normalise(new_y.to(wide), weight_y, bias_y, norm, eps)
    return new_x, new_y, normalise(joined, weight, bias, norm, eps).to(o.dtype)
