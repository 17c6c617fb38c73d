"""What attentions keep between the steps of incremental decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks


@dataclass
class DecoderCache:
    """The state of one decoder layer between the steps of incremental decoding.

    ``memory`` is the encoder's output, (batch, S, D). The cross-attention makes its keys and values, (batch, nhead, S,
    D / nhead), at the first step. The self-attention appends to its own, (rows, nhead, capacity, D / nhead); the first
    ``length`` positions are in use. ``rows`` is ``batch`` times the number of beams. The cache has no cell state: the
    depth-wise LSTM's state runs over the layers of one token and starts afresh with the next.
    """

    memory: Tensor
    memory_mask: Tensor | None = None
    memory_keys_values: tuple[Tensor, Tensor] | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0
    mask: Tensor | None = None  # True where the next position may attend to one of the cache; None for all in use
    attention: ClassVar[str] = "separate"  # the kind that the cache is for

    @property
    def rows(self) -> int | None:
        """The rows that the first step began with; None before it."""
        return None if self.keys is None else self.keys.shape[0]

    def options(self) -> dict[str, Any]:
        """The arguments of a self-attention besides its input; a user's own need not take a mask."""
        return {"cache": self} if self.mask is None else {"cache": self, "mask": self.mask}

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the key and value of one position, (rows, nhead, 1, D / nhead); return those of all positions so far."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            if self.length == self.keys.shape[2]:  # doubling: appending costs one copy per position, amortised
                self.keys, self.values = (torch.cat((t, torch.zeros_like(t)), 2) for t in (self.keys, self.values))
            # narrow, not an index: torch.compile would take the index for a constant and compile every position anew
            self.keys.narrow(2, self.length, 1).copy_(keys)
            self.values.narrow(2, self.length, 1).copy_(values)
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue from the tokens of row ``rows[i]``; rows is int64.

        Rows only move within the beams of one source.

        Raises:
            TypeError, ValueError: rows is no int64 tensor (rows,), or names a row that the cache does not have.
        """
        if self.keys is not None and self.values is not None:
            self.keys, self.values = select_rows((self.keys, self.values), rows)


def check_rows(rows: Tensor) -> None:
    """Raise TypeError or ValueError unless rows is an int64 tensor (rows,)."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be an int64 tensor; found {found}")
    checks.check_shape("rows", rows, (rows.numel(),))


def select_rows(kept: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Rows ``rows`` of each tensor; raises TypeError or ValueError as :meth:`DecoderCache.reorder`."""
    check_rows(rows)
    if rows.device != kept[0].device:
        raise ValueError(f"rows must be on the device of the cache, {kept[0].device}; found {rows.device}")
    try:
        return tuple(each.index_select(0, rows) for each in kept)
    except IndexError as error:  # looking at the numbers first would wait for a GPU
        raise ValueError(f"rows must hold rows from 0 to {kept[0].shape[0] - 1}; found {rows.tolist()}") from error


@dataclass
class KeyValueCache:
    """Keys and values that a self-attention has made, (rows, kv_heads, capacity, D / nhead), ``length`` in use."""

    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of L positions, (rows, kv_heads, L, D / nhead); return those of all positions so far."""
        end = self.length + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            if end > self.keys.shape[2]:  # at least doubling: appending costs one copy per position, amortised
                more = max(end - self.keys.shape[2], self.keys.shape[2])
                self.keys, self.values = (F.pad(each, (0, 0, 0, more)) for each in (self.keys, self.values))
            # narrow, not an index: torch.compile would take the index for a constant and compile every position anew
            self.keys.narrow(2, self.length, keys.shape[2]).copy_(keys)
            self.values.narrow(2, self.length, keys.shape[2]).copy_(values)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue from the tokens of row ``rows[i]``; raises as :meth:`DecoderCache.reorder`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = select_rows((self.keys, self.values), rows)
