"""Translation of sentences: tokenize, generate, and turn the ids back into text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from batches import pad
from corpus.lines import visible
from corpus.placeholders import hide, restore
from corpus.tokenizer import EOS


def translate(model: Any, tokenizer: Any, lines: Sequence[str], max_length: int = 128, beam_size: int = 1) -> list[str]:
    """Return the translation of each of ``lines``, all in one batch; a line without a visible character stays blank.

    A line of more subwords than the model's positions is cut, and a line on stderr says so.
    """
    translations = [""] * len(lines)
    longest = model.src_positions.max_len - 1
    filled: list[int] = []
    found: list[list[str]] = []
    rows: list[list[int]] = []
    for index, line in enumerate(lines):
        places: list[str] = []
        ids = tokenizer.encode(hide(line.strip(), places)) if visible(line) else []
        if not ids:
            continue
        if len(ids) > longest:
            print(f"a line of {len(ids)} subwords is cut to the model's {longest}", file=sys.stderr)
        filled, found, rows = [*filled, index], [*found, places], [*rows, [*ids[:longest], EOS]]
    if filled:
        model.eval()
        source = pad(rows).to(next(model.parameters()).device)
        with torch.no_grad():
            generated = model.generate(source, max_length=max_length, beam_size=beam_size)
        for index, row, places in zip(filled, generated.tolist(), found, strict=True):
            translations[index] = restore(tokenizer.decode(row[: row.index(EOS)] if EOS in row else row), places)
    return translations


def translate_all(
    model: Any, tokenizer: Any, lines: Sequence[str], max_length: int = 128, beam_size: int = 1, batch_size: int = 32
) -> list[str]:
    """Return the translation of each of ``lines``, in their order; lines of similar length share a batch."""
    order = sorted(range(len(lines)), key=lambda index: len(lines[index]))
    translations = [""] * len(lines)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        for index, text in zip(
            chosen, translate(model, tokenizer, [lines[i] for i in chosen], max_length, beam_size), strict=True
        ):
            translations[index] = text
    return translations
