"""Translation of sentences: tokenize, generate, and turn the ids back into text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Any, TypeVar

import torch
from torch import nn

from .lines import visible
from .placeholders import hide, restore
from .tokenizer import EOS, PAD

Translated = TypeVar("Translated")


def translate(model: Any, tokenizer: Any, lines: Sequence[str], max_length: int = 128, beam_size: int = 1) -> list[str]:
    """Return the translation of each of ``lines``, all in one batch; a line without a visible character stays blank.

    A line of more subwords than the model's positions is cut, and a line on stderr says so.

    Args:
        model: a translation model, or what ``compile_decoder`` made of one: ``generate`` and ``max_len``.
    """
    translations = [""] * len(lines)
    longest = model.max_len - 1
    filled: list[int] = []
    found: list[list[str]] = []
    rows: list[torch.Tensor] = []
    for index, line in enumerate(lines):
        places: list[str] = []
        ids = tokenizer.encode(hide(line.strip(), places)) if visible(line) else []
        if not ids:
            continue
        if len(ids) > longest:
            print(f"a line of {len(ids)} subwords is cut to the model's {longest}", file=sys.stderr)
        filled.append(index)
        found.append(places)
        rows.append(torch.tensor([*ids[:longest], EOS]))
    if filled:
        source = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        if isinstance(model, nn.Module):
            model.eval()
            source = source.to(next(model.parameters()).device)
        with torch.no_grad():
            generated = model.generate(source, max_length=max_length, beam_size=beam_size)
        for index, row, places in zip(filled, generated.tolist(), found, strict=True):
            translations[index] = restore(tokenizer.decode(row[: row.index(EOS)] if EOS in row else row), places)
    return translations


def in_batches(
    lines: Iterator[str], translate_batch: Callable[[list[str]], list[Translated]], batch_size: int, window: int
) -> Iterator[list[Translated]]:
    """Yield the translations of ``lines`` in their order; lines of similar length share a batch.

    ``window`` lines are read at once and sorted, and their translations are one list. After a fault of ``lines`` the
    lines before it are translated and yielded before the fault is raised. After a fault of ``translate_batch``, or an
    interrupt, the translations before the first missing one are.

    Args:
        translate_batch: returns the translations of at most ``batch_size`` lines.
    """
    fault: Exception | None = None
    while fault is None:
        read: list[str] = []
        try:
            for line in islice(lines, window):
                read.append(line)
        except (OSError, ValueError) as error:
            fault = error
        if not read:
            break
        order = sorted(range(len(read)), key=lambda index: len(read[index]))
        made: dict[int, Translated] = {}
        try:
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                for index, text in zip(chosen, translate_batch([read[index] for index in chosen]), strict=True):
                    made[index] = text
        except BaseException:
            yield [made[index] for index in takewhile(made.__contains__, range(len(read)))]
            raise
        yield [made[index] for index in range(len(read))]
    if fault is not None:
        raise fault
