"""Format placeholders of a pair, hidden on both of its sides."""

from __future__ import annotations

from depthlstm_fast.translate.placeholders import SYMBOLS, hide, restore

from .data import Pair

__all__ = ["SYMBOLS", "hide", "hide_pair", "restore"]


def hide_pair(pair: Pair) -> Pair:
    """Return ``pair`` with symbols for the placeholders of its source, on both sides."""
    found: list[str] = []
    return Pair(hide(pair.source, found), hide(pair.target, found, add=False))
