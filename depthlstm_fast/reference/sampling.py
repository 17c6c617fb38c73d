"""Sampling from a causal model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks


class Sampler(NamedTuple):
    """How a token is drawn: from the softmax of logits / temperature, among the ``top_k`` likeliest, of which so many
    are kept that their probabilities reach ``top_p``. None leaves a step out.
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def check(self, beam_size: int, device: torch.device) -> None:
        """Raise TypeError or ValueError naming the argument, what was wanted and what was found."""
        checks.check_finite("temperature", self.temperature, 0.0)
        if self.top_k is not None:
            checks.check_size("top_k", self.top_k)
        if self.top_p is not None:
            checks.check_finite("top_p", self.top_p, 0.0)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must be in (0, 1]; found {self.top_p}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; found {type(self.generator).__name__}")
        if self.generator is not None and self.generator.device.type != device.type:
            raise ValueError(f"generator must be on the device of ids, {device}; found {self.generator.device}")
        if self.temperature and beam_size != 1:
            raise ValueError(f"beam_size must be 1 with a temperature above 0; found {beam_size}")
        if not self.temperature and (self.top_k, self.top_p, self.generator) != (None, None, None):
            raise ValueError("temperature must be above 0 with top_k, top_p or a generator; found 0")

    def draw(self, logp: Tensor) -> Tensor:
        """One token a row, (rows, 1) int64, for log-probabilities (rows, vocab); any number for a row of NaN."""
        scores = logp.nan_to_num(0.0)  # the search finds a NaN and says where
        # no temperature makes all of them infinite, and none is 0 in float32
        scores = (scores - scores.amax(1, keepdim=True)) / max(self.temperature, 1e-30)
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = scores.sort()
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[:, -1] = False  # the likeliest stays
            scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
