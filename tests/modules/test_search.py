"""The searches on tables of random logits.

The tests compare beams with a search written anew, and cover any eos_id and logits that are not numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.reference.generation import Settings, beam_search, greedy_search

Prefix = tuple[int, ...]


class Trial(NamedTuple):
    vocab: int
    beams: int
    longest: int
    eos: int
    alpha: float
    sources: int
    seed: int

    def logp(self, source: int, prefix: Prefix) -> list[float]:
        """Return log-probabilities of the next token, drawn for each prefix."""
        drawn = random.Random(f"{self.seed} {source} {prefix}")
        logits = [drawn.gauss(0, 1.5) for _ in range(self.vocab)]
        total = math.log(sum(map(math.exp, logits)))
        return [logit - total for logit in logits]


def draw(seed: int) -> Trial:
    """Draw few words and many beams: most sources have fewer continuations than 2 * beams."""
    r = random.Random(seed)
    vocab = r.randint(2, 4)
    return Trial(
        vocab, r.randint(1, 6), r.randint(1, 5), r.randrange(vocab), r.choice((0.0, 1.0, 2.0)), r.randint(1, 3), seed
    )


def by_hand(trial: Trial, source: int) -> tuple[Prefix, float]:
    """Search with beams over Python lists: an ended candidate is a hypothesis, and never continues."""
    live: list[tuple[float, Prefix]] = [(0.0, ())]
    ended: list[tuple[float, Prefix]] = []
    for length in range(1, trial.longest + 1):
        candidates = [
            (score + logp, *prefix, token)
            for score, prefix in live
            for token, logp in enumerate(trial.logp(source, prefix))
        ]
        ranked = [
            (score, tuple(prefix))
            for score, *prefix in sorted(candidates, key=lambda each: -each[0])[: 2 * trial.beams]
        ]
        for score, prefix in ranked[: trial.beams]:
            if (prefix[-1] == trial.eos or length == trial.longest) and len(ended) < trial.beams:
                ended.append((score / ((5 + length) / 6) ** trial.alpha, prefix))
        live = [(score, prefix) for score, prefix in ranked if prefix[-1] != trial.eos][: trial.beams]
        if len(ended) >= trial.beams or not live:
            break
    score, prefix = max(ended, key=lambda each: each[0])
    return prefix, score


def searched(trial: Trial, pad: int) -> tuple[Tensor, Tensor]:
    rows = trial.beams if trial.beams > 1 else 1

    def next_logits(ids: Tensor) -> Tensor:
        found = [trial.logp(row // rows, tuple(prefix[1:])) for row, prefix in enumerate(ids.tolist())]
        return torch.tensor(found, dtype=torch.float64)

    settings = Settings(trial.sources, trial.beams, trial.longest, trial.alpha, 1, trial.eos, pad, torch.device("cpu"))
    return (beam_search if trial.beams > 1 else greedy_search)(next_logits, lambda rows: None, settings)


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_against_a_search_by_hand(first: int) -> None:
    for seed in range(first, first + 100):
        trial = draw(seed)
        pad = (trial.eos + 1) % trial.vocab
        tokens, scores = searched(trial, pad)
        for source in range(trial.sources):
            wanted, score = by_hand(trial, source)
            found = tuple(tokens[source].tolist())
            assert found == wanted + (pad,) * (len(found) - len(wanted)), trial
            assert scores[source].item() == pytest.approx(score), trial


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(beams: int, value: float) -> None:
    def next_logits(ids: Tensor) -> Tensor:
        logits = torch.randn(2 * beams, 5)
        if ids.shape[1] == 2:
            logits[beams:, 3] = value  # the second source, at its second token
        return logits

    search: Callable[..., Any] = beam_search if beams > 1 else greedy_search
    settings = Settings(2, beams, 4, 1.0, 1, 4, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="logits must be numbers; found NaN for source 1 at token 2"):
        search(next_logits, lambda rows: None, settings)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_source_that_ended_before_may_become_nan(beams: int) -> None:
    def next_logits(ids: Tensor) -> Tensor:
        logits = torch.full((2 * beams, 4), -9.0)
        logits[:, 2] = 0
        if ids.shape[1] == 1:
            logits[:beams, 3], logits[:beams, 1] = 9, 8  # the first source ends at once, or a token later
        elif ids.shape[1] == 2:
            logits[:beams, 3] = 9
        else:
            logits[:beams] = math.nan
        return logits

    settings = Settings(2, beams, 5, 0.0, 1, 3, 0, torch.device("cpu"))
    tokens, scores = (beam_search if beams > 1 else greedy_search)(next_logits, lambda rows: None, settings)
    assert tokens[0].tolist() == [3, 0, 0, 0, 0]
    assert tokens[1].tolist() == [2] * 5
    assert scores.isfinite().all()


@pytest.mark.parametrize("module", [dl, dl.reference], ids=["fused", "reference"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_with_nan_weights(module: Any, beams: int, use_cache: bool) -> None:
    model = module.DepthLSTMTransformer(
        9, 7, d_model=8, nhead=2, num_encoder_layers=1, num_decoder_layers=1, max_len=12
    )
    with torch.no_grad():
        model.decoder.layers[0].cell.gates.weight[0, 0] = math.nan
    model.train()
    with pytest.raises(
        ValueError, match="logits must be numbers; found NaN for source 0 at token 1: look for NaN in the weights"
    ):
        model.generate(torch.randint(3, 9, (2, 4)), 6, beams, use_cache=use_cache)
    assert all(each.training for each in model.modules())
