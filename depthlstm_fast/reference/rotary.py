"""Rotary positions (Su et al., arXiv 2104.09864), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


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
