"""Rotary positions (Su et al., arXiv 2104.09864), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

Rotation = tuple[Tensor, Tensor]


def check_rotation(positions: str, size: int, theta: float) -> None:
    """Raise TypeError or ValueError unless heads of ``size`` features can be turned, if ``positions`` says so."""
    checks.check_finite("rope_theta", theta, 0.0)
    if positions == "rope" and size % 2:
        raise ValueError(f'd_model / nhead must be even with positions="rope"; found {size}')
    if theta <= 0:
        raise ValueError(f"rope_theta must be above 0; found {theta}")
    if theta < 1e-6:  # a power of it may overflow float32, and angles would be NaN
        raise ValueError(f"rope_theta must be at least 1e-06; found {theta}")


def count_positions(x: Tensor, padding: Tensor | None) -> Tensor:
    """Positions (rows or 1, length) int64 of the tokens of x (rows, length, D): how many real ones are before each.

    ``padding`` is a key padding mask, bool or added to the scores, (rows, length) or unbatched; -inf is padding.
    """
    if padding is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    real = ~(padding if padding.dtype == torch.bool else padding.isneginf()).view(x.shape[:2])
    return real.long().cumsum(1) - real.long()


def make_rotation(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of the angles p theta ** (-2 j / size), each (rows, 1, length, size / 2).

    Args:
        positions: p, (rows, length) int64.
        size: of a head, an even number; j runs from 0 to size / 2 - 1.
        theta: the base.
        dtype: of the heads; angles are float64 for float64 and float32 otherwise, as are the results.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=exact) / size
    angles = positions[:, None, :, None].to(exact) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn features j and j + size / 2 of each head (rows, heads, length, size) by the angle of its position."""
    cos, sin = rotation
    first, second = heads.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(heads.dtype)
