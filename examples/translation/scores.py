"""BLEU and chrF by sacreBLEU, with signatures of their computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """A metric of a whole test set, from 0 to 100."""

    name: str
    value: float
    signature: str


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> list[Score]:
    """Return BLEU and chrF of ``hypotheses`` against one reference each.

    Raises:
        ImportError: sacreBLEU is missing.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError("scores need sacreBLEU: pip install sacrebleu") from error
    scores = []
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        value = metric.corpus_score(list(hypotheses), [list(references)]).score
        scores.append(Score(name, value, str(metric.get_signature())))
    return scores
