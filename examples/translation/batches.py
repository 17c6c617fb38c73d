"""Batches of padded token ids: sentences of like length together, as many as a budget of tokens holds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from data import Pair
from tokenizer import BOS, EOS, PAD
from torch import Tensor

Example = tuple[list[int], list[int]]


class Batch(NamedTuple):
    """int64 ids, padded at the end: source (batch, S) ends with EOS, target (batch, T) begins with BOS and ends with EOS."""

    source: Tensor
    target: Tensor
    tokens: int  # source and predicted target tokens, padding not counted


def encode_pairs(pairs: Iterable[Pair], tokenizer: Any, longest: int = 256) -> list[Example]:
    """Return the ids of each pair as ``Batch`` describes them, less the pairs with a side of more than ``longest`` ids.

    Raises:
        ValueError: no pair is left.
    """
    examples = []
    for pair in pairs:
        source, target = tokenizer.encode(pair.source) + [EOS], [BOS] + tokenizer.encode(pair.target) + [EOS]
        if max(len(source), len(target)) <= longest:
            examples.append((source, target))
    if not examples:
        raise ValueError(f"pairs must hold one of at most {longest} tokens a side; found none")
    return examples


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return ``rows`` as one int64 tensor (rows, longest row), padded at the end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])


def collate(examples: Sequence[Example]) -> Batch:
    """Return ``examples`` as one batch."""
    sources, targets = zip(*examples, strict=True)
    return Batch(pad(sources), pad(targets), sum(len(source) + len(target) - 1 for source, target in examples))


def group(examples: Iterable[Example], token_budget: int) -> Iterator[list[Example]]:
    """Cut ``examples`` into groups of at most ``token_budget`` ids of source and target, padding counted; one example at least."""
    chosen: list[Example] = []
    longest_source = longest_target = 0
    for example in examples:
        longest_source, longest_target = max(longest_source, len(example[0])), max(longest_target, len(example[1]))
        if chosen and (len(chosen) + 1) * (longest_source + longest_target) > token_budget:
            yield chosen
            chosen, longest_source, longest_target = [], len(example[0]), len(example[1])
        chosen.append(example)
    if chosen:
        yield chosen


def endless_batches(examples: Sequence[Example], token_budget: int, seed: int) -> Iterator[Batch]:
    """Yield batches for ever, every example once an epoch; the same ``seed`` gives the same batches."""
    generator = random.Random(seed)
    while True:
        shuffled = generator.sample(examples, len(examples))
        # the sort is stable: examples of one length meet different neighbours in each epoch
        groups = list(group(sorted(shuffled, key=lambda example: (len(example[0]), len(example[1]))), token_budget))
        generator.shuffle(groups)
        yield from map(collate, groups)
