"""Positions of tokens: a table of sines, or a learned one.

This file also draws embeddings and learned positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import sharding
from ..modes import is_direct, is_traced
from ..torch_private import is_transformed
from .attention import draw_uniform

POSITIONS = ("sinusoidal", "learned")


def sinusoidal_positions(max_len: int, d_model: int) -> Tensor:
    """Return the position table of Vaswani et al. (2017), (max_len, d_model) float32 on the CPU.

    Even columns hold sines, odd columns cosines.
    """
    place: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    position = torch.arange(max_len, **place).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, d_model, 2, **place) * (-math.log(10000.0) / d_model))
    table = torch.empty(max_len, d_model, **place)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: d_model // 2])
    return table.float()


class Positions(nn.Module):
    """Adds a position's vector to each token's: a ``table`` of sines, or a learned ``weight`` (max_len, D).

    The table is not a buffer. It is computed from its sizes and kept while its device and dtype fit. Refilling a model
    (``to_empty``, ``skip_init``, a checkpoint without the table) therefore cannot leave it wrong.
    """

    table: Tensor | None = None

    def __init__(
        self,
        kind: str,
        max_len: int,
        d_model: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.max_len, self.d_model = kind, max_len, d_model
        if kind == "learned":
            self.weight = nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        else:
            self.fill(torch.empty(0, device=device, dtype=dtype))

    def reset_parameters(self, init: str) -> None:
        if self.kind == "learned":
            initialise_embedding(self.weight, init)

    @torch.inference_mode(False)
    def fill(self, like: Tensor) -> None:
        """Make the table of sines for the dtype and device of ``like``.

        The meta device gets none, because it has nothing to keep.
        """
        if self.kind != "learned":
            self.table = (
                None if like.is_meta else sinusoidal_positions(self.max_len, self.d_model).to(like.device, like.dtype)
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.table is not None:
            moved = fn(torch.empty(0, device=self.table.device, dtype=self.table.dtype))
            if not _fits(self.table, moved):
                self.fill(moved)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, max_len={self.max_len}, d_model={self.d_model}"

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Add the positions to x (batch, L, D).

        Its first token is at position ``start``, or its tokens are where an int64 tensor (batch or 1, L) says.
        """
        table = self.weight if self.kind == "learned" else self._table_for(x)
        chosen = table[start] if isinstance(start, Tensor) else table[start : start + x.shape[1]]
        return x + sharding.replicated(chosen, x)

    def _table_for(self, x: Tensor) -> Tensor:
        if self.table is not None and _fits(self.table, x):
            return self.table
        if x.is_meta:
            return torch.empty(self.max_len, self.d_model, device=x.device, dtype=x.dtype)
        if not is_traced() and is_direct(x) and not is_transformed():
            self.fill(x)
            return self.table  # type: ignore[return-value]
        return sinusoidal_positions(self.max_len, self.d_model).to(x.device, x.dtype)


def _fits(table: Tensor, like: Tensor) -> bool:
    return table.device == like.device and table.dtype == like.dtype


def initialise_embedding(weight: Tensor, init: str) -> None:
    bound = math.sqrt((2 if init == "lipschitz" else 6) / sum(weight.shape))
    draw_uniform(weight, bound)
