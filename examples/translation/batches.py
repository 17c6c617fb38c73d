"""Batches of padded token ids.

Sentences of similar length go together, as many as a token budget holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from corpus.tokenizer import BOS, PAD, Example
from torch import Tensor


class Batch(NamedTuple):
    """A batch of int64 ids, padded at the end.

    source (batch, S) ends with EOS. target (batch, T) begins with BOS and ends with EOS.
    """

    source: Tensor
    target: Tensor
    tokens: int  # source and predicted target tokens, without padding


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return ``rows`` as one int64 tensor (rows, longest row), padded at the end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])


def collate(examples: Sequence[Example]) -> Batch:
    """Return ``examples`` as one batch."""
    sources, targets = zip(*examples, strict=True)
    return Batch(pad(sources), pad(targets), sum(len(source) + len(target) - 1 for source, target in examples))


def group(examples: Iterable[Example], token_budget: int) -> Iterator[list[Example]]:
    """Cut ``examples`` into groups of at most ``token_budget`` ids of source and target, padding counted.

    A group has at least one example.
    """
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


class BatchOrder:
    """An endless sequence of batches, every example once an epoch; ``order[n]`` depends on n and ``seed`` only.

    ``per_epoch`` is the number of batches of an epoch. It is the same in each, because only examples of one length
    change places.
    """

    def __init__(self, examples: Sequence[Example], token_budget: int, seed: int) -> None:
        self.examples, self.token_budget, self.seed = examples, token_budget, seed
        self.epoch, self.groups = -1, self._groups(0)
        self.per_epoch = len(self.groups)

    def _groups(self, epoch: int) -> list[list[Example]]:
        generator = random.Random(f"{self.seed}/{epoch}")
        shuffled = generator.sample(self.examples, len(self.examples))
        # the sort is stable, so examples of one length meet different neighbours in each epoch
        groups = list(
            group(sorted(shuffled, key=lambda example: (len(example[0]), len(example[1]))), self.token_budget)
        )
        generator.shuffle(groups)
        return groups

    def __getitem__(self, index: int) -> list[Example]:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.groups = epoch, self._groups(epoch)
        return self.groups[place]


def share(examples: Sequence[Example], rank: int = 0, size: int = 1) -> Batch:
    """Return every ``size``-th of ``examples``, from number ``rank`` on, as one batch.

    A process without examples must still run along with the others. It gets the first example, with all of its targets
    as padding.
    """
    if mine := examples[rank::size]:
        return collate(mine)
    source, target = examples[0]
    return Batch(pad([source]), pad([[BOS] + [PAD] * (len(target) - 1)]), 0)


def target_tokens(examples: Iterable[Example]) -> int:
    """Return the number of target tokens to predict: all but the first of each."""
    return sum(len(target) - 1 for _, target in examples)
