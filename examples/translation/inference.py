"""Translation of many sentences at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthlstm_fast.translate.sentences import in_batches, translate

__all__ = ["translate", "translate_all"]


def translate_all(
    model: Any, tokenizer: Any, lines: Sequence[str], max_length: int = 128, beam_size: int = 1, batch_size: int = 32
) -> list[str]:
    """Return the translation of each of ``lines``, in their order; lines of similar length share a batch."""

    def translate_batch(batch: list[str]) -> list[str]:
        return translate(model, tokenizer, batch, max_length, beam_size)

    (translations,) = in_batches(iter(lines), translate_batch, batch_size, len(lines)) if lines else [[]]
    return translations
