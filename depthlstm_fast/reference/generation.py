"""Greedy and beam search over any function that gives the next token's logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks

NextLogits = Callable[[Tensor], Tensor]
Reorder = Callable[[Tensor], None]
# what makes the steps of generate(), where its caller has a way of its own: (memory or ids, mask, settings) -> decoding
own_decoding: ContextVar[Callable[..., Any] | None] = ContextVar("own_decoding", default=None)


class Settings(NamedTuple):
    """Arguments of a search besides the logits."""

    batch: int
    beams: int
    max_length: int
    length_penalty: float
    bos_id: int
    eos_id: int
    pad_id: int
    device: torch.device


LARGEST_PENALTY = 1e30  # fp32 then holds the quotient of any sum of log-probabilities


def check_penalty(length_penalty: float, max_length: int) -> None:
    """Raise TypeError or ValueError unless every :func:`penalty` up to ``max_length`` divides without overflow."""
    checks.check_finite("length_penalty", length_penalty)
    growth = math.log((5 + max_length) / 6)
    most = math.log(LARGEST_PENALTY) / growth if growth else math.inf
    if abs(length_penalty) > most:
        raise ValueError(
            f"length_penalty must be at most {most:.3g} in size with max_length={max_length}; found {length_penalty}"
        )


def penalty(length: int, alpha: float) -> float:
    """Return the length penalty of Wu et al. (2016), ((5 + length) / 6) ** alpha, which divides log-probabilities."""
    return ((5 + length) / 6) ** alpha


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log softmax in fp32, or in fp64 for fp64."""
    return F.log_softmax(logits, dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the ``number`` largest of each row of scores (rows, n) in falling order, and their indices.

    Of equal scores the first comes first. argmax guarantees this order; torch.topk leaves it open.
    """
    scores = scores.clone()
    values, indices = [], []
    for _ in range(number):
        index = scores.argmax(dim=1, keepdim=True)
        values.append(scores.gather(1, index))
        indices.append(index)
        scores.scatter_(1, index, -torch.inf)
    return torch.cat(values, 1), torch.cat(indices, 1)


def greedy_search(next_logits: NextLogits, reorder: Reorder, settings: Settings) -> tuple[Tensor, Tensor]:
    """Take the likeliest token at every step.

    Args:
        next_logits: ids (batch, n) int64 that start with bos_id -> (batch, vocab).
        reorder: not used; for the signature of :func:`beam_search`.
        settings: see :class:`Settings`; ``beams`` is not used.

    Returns:
        Tokens (batch, n) without bos_id, and scores (batch,).
    """
    return token_search(next_logits, lambda logp: logp.argmax(dim=1, keepdim=True), settings)


def token_search(next_logits: NextLogits, choose: NextLogits, settings: Settings) -> tuple[Tensor, Tensor]:
    """:func:`greedy_search`, but ``choose`` takes the tokens: log-probabilities (batch, vocab) -> (batch, 1) int64."""
    ids = torch.full((settings.batch, 1), settings.bos_id, device=settings.device)
    finished = torch.zeros(settings.batch, dtype=torch.bool, device=settings.device)
    total = scores = torch.zeros((), device=settings.device)
    for length in range(1, settings.max_length + 1):
        logp = log_probabilities(next_logits(ids))
        token = choose(logp)
        total = total + logp.gather(1, token)[:, 0]
        scores = torch.where(finished, scores, total / penalty(length, settings.length_penalty))
        token = token.masked_fill(finished[:, None], settings.pad_id)
        finished = finished | (token[:, 0] == settings.eos_id)
        ids = torch.cat((ids, token), 1)
        if _check_and_ask(scores, finished.all(), length):
            break
    return ids[:, 1:], scores


def _check_and_ask(scores: Tensor, done: Tensor, length: int) -> bool:
    """Return the tensor ``done`` as a bool, and check the scores.

    One transfer from the device answers both questions.

    Raises:
        ValueError: a score (batch, ...) is NaN.
    """
    invalid = scores.isnan()
    stop, failed = torch.stack((done, invalid.any())).tolist()
    if failed:
        source = int(invalid.view(invalid.shape[0], -1).any(1).nonzero()[0])
        raise nan_error(source, length)
    return bool(stop)


def nan_error(source: int, length: int) -> ValueError:
    """Return the error for a source whose logits of a token are NaN."""
    return ValueError(
        f"logits must be numbers; found NaN for source {source} at token {length}: look for NaN in the weights"
    )


def beam_search(next_logits: NextLogits, reorder: Reorder, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the best hypothesis that ``beams`` beams find for each source.

    Every step looks at the best 2 * beams continuations. Among the first ``beams``, those that end in eos_id are
    hypotheses. The first ``beams`` continuations that do not end continue. At max_length the first ``beams`` are
    hypotheses whether they end or not. A source is finished with ``beams`` hypotheses.

    Args:
        next_logits: ids (batch * beams, n) int64 that start with bos_id -> (batch * beams, vocab).
        reorder: called with rows (batch * beams,) int64 before the next step. Row i continues from the tokens of row
            ``rows[i]``.
        settings: see :class:`Settings`.

    Returns:
        Tokens (batch, n) without bos_id, and scores (batch,), of the best hypothesis of each source.
    """
    batch, beams, device = settings.batch, settings.beams, settings.device
    first_row = torch.arange(batch, device=device)[:, None] * beams
    ids = torch.full((batch * beams, 1), settings.bos_id, device=device)
    live = torch.full((batch, beams), -torch.inf, device=device)
    live[:, 0] = 0  # all beams start alike, so one starts
    hypotheses = torch.full((batch, beams, settings.max_length), settings.pad_id, device=device)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    lengths = torch.zeros(batch, beams, dtype=torch.int64, device=device)
    found = torch.zeros(batch, dtype=torch.int64, device=device)
    for length in range(1, settings.max_length + 1):
        logp = log_probabilities(next_logits(ids))
        vocab = logp.shape[1]
        candidates, index = best((live.to(logp.dtype).view(-1, 1) + logp).view(batch, beams * vocab), 2 * beams)
        rows, token = first_row + index // vocab, index % vocab
        extended = torch.cat((ids[rows], token[..., None]), -1)

        ends, done = token == settings.eos_id, found >= beams
        complete = (
            (ends | (length == settings.max_length))[:, :beams] & ~done[:, None] & (candidates[:, :beams] > -torch.inf)
        )
        new = (candidates[:, :beams] / penalty(length, settings.length_penalty)).masked_fill(~complete, -torch.inf)
        padded = F.pad(extended[:, :beams, 1:], (0, settings.max_length - length), value=settings.pad_id)
        scores, kept = torch.cat((scores.to(new.dtype), new), 1).sort(dim=1, descending=True, stable=True)
        scores, kept = scores[:, :beams], kept[:, :beams]
        lengths = torch.cat((lengths, torch.full_like(lengths, length)), 1).gather(1, kept)
        hypotheses = torch.cat((hypotheses, padded), 1).gather(1, kept[..., None].expand(-1, -1, settings.max_length))
        found = found + complete.sum(1)
        if (
            _check_and_ask(candidates.masked_fill(done[:, None], 0), (found >= beams).all(), length)
            or length == settings.max_length
        ):
            break

        onward = ends.to(torch.int8).argsort(dim=1, stable=True)[:, :beams]
        # with fewer than ``beams`` live candidates, ended ones fill the rows at -inf and never come back
        live = candidates.gather(1, onward).masked_fill(ends.gather(1, onward), -torch.inf)
        rows = rows.gather(1, onward).view(-1)
        ids = torch.cat((ids[rows], token.gather(1, onward).view(-1, 1)), 1)
        reorder(rows)
    return hypotheses[:, 0, : int(lengths[:, 0].max())], scores[:, 0]
