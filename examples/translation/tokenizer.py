"""One subword vocabulary for both languages, by SentencePiece, with the model's ids for padding, begin and end."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from placeholders import SYMBOLS

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("the translation example needs SentencePiece: pip install sentencepiece") from error
    return sentencepiece


def safetensors_torch() -> Any:
    """Return the module ``safetensors.torch``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("the translation example needs safetensors: pip install safetensors") from error
    return safetensors.torch


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> Any:
    """Train byte-pair encoding on ``texts`` and return the ``SentencePieceProcessor``.

    A text too small for ``vocab_size`` pieces gives fewer: ask ``len(tokenizer)``.

    Raises:
        ValueError: ``vocab_size`` is smaller than the number of different characters.
    """
    model = io.BytesIO()
    texts = list(texts)
    required = len({character for text in texts for character in text}) + 4 + len(SYMBOLS)
    try:
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
            user_defined_symbols=list(SYMBOLS),
            minloglevel=2,
        )
    except RuntimeError as error:
        if vocab_size > required:
            raise
        raise ValueError(f"vocab_size must hold a piece for every character, about {required}; found {vocab_size}") from error
    return load_tokenizer(model.getvalue())


def load_tokenizer(model: bytes) -> Any:
    """Return the ``SentencePieceProcessor`` of a model kept by ``tokenizer.serialized_model_proto()``."""
    return _sentencepiece().SentencePieceProcessor(model_proto=model)
