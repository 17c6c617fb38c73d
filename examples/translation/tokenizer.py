"""One subword vocabulary for both languages, by SentencePiece, with the model's ids for padding, begin and end."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("the translation example needs SentencePiece: pip install sentencepiece") from error
    return sentencepiece


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> Any:
    """Train byte-pair encoding on ``texts`` and return the ``SentencePieceProcessor``.

    A text too small for ``vocab_size`` pieces gives fewer: ask ``len(tokenizer)``.
    """
    model = io.BytesIO()
    _sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=UNKNOWN,
        minloglevel=2,
    )
    return load_tokenizer(model.getvalue())


def load_tokenizer(model: bytes) -> Any:
    """Return the ``SentencePieceProcessor`` of a model kept by ``tokenizer.serialized_model_proto()``."""
    return _sentencepiece().SentencePieceProcessor(model_proto=model)
