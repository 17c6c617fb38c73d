"""One subword vocabulary for both languages, by SentencePiece, with the model's ids for padding, begin and end."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from depthlstm_fast.translate.tokenizer import BOS, EOS, PAD, UNKNOWN, load_tokenizer, sentencepiece_library

from .data import Pair
from .lines import visible
from .placeholders import SYMBOLS, hide_pair

__all__ = ["BOS", "EOS", "PAD", "UNKNOWN", "Example", "encode_pairs", "load_tokenizer", "train_tokenizer"]

Example = tuple[list[int], list[int]]  # ids of a source and of its target

LONGEST_LINE = 4192  # bytes; SentencePiece skips longer lines


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> Any:
    """Train byte-pair encoding on ``texts`` and return the ``SentencePieceProcessor``.

    A text too small for ``vocab_size`` pieces gives fewer; ``len(tokenizer)`` has the number.

    Raises:
        ValueError: ``vocab_size`` is smaller than the number of different characters, or no line is short enough to
            train on.
    """
    model = io.BytesIO()
    texts = [text for text in texts if len(text.encode()) <= LONGEST_LINE]
    if not any(map(visible, texts)):
        raise ValueError(f"texts must hold a line of at most {LONGEST_LINE} bytes to train a vocabulary on; found none")
    required = len({character for text in texts for character in text}) + 4 + len(SYMBOLS)
    try:
        sentencepiece_library().SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=LONGEST_LINE,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNKNOWN,
            user_defined_symbols=list(SYMBOLS),
            minloglevel=2,
        )
    except RuntimeError as error:
        if vocab_size > required:
            raise ValueError(
                f"texts must be what SentencePiece can train on; found {' '.join(str(error).split())}"
            ) from error
        raise ValueError(
            f"vocab_size must hold a piece for every character, about {required}; found {vocab_size}"
        ) from error
    return load_tokenizer(model.getvalue())


def encode_pairs(pairs: Iterable[Pair], tokenizer: Any, longest: int = 256) -> list[Example]:
    """Return the ids of each pair, without pairs that have a side that is blank or of more than ``longest`` ids.

    A source ends with EOS. A target begins with BOS and ends with EOS.

    Raises:
        ValueError: no pair is left.
    """
    examples = []
    for pair in map(hide_pair, pairs):
        source, target = tokenizer.encode(pair.source) + [EOS], [BOS] + tokenizer.encode(pair.target) + [EOS]
        if max(len(source), len(target)) <= longest and len(source) > 1 and len(target) > 2:
            examples.append((source, target))
    if not examples:
        raise ValueError(f"pairs must hold one of at most {longest} tokens a side; found none")
    return examples
