"""The vocabulary of a run: subwords by SentencePiece, with the model's ids for padding, begin and end."""

from __future__ import annotations

from typing import Any

from .files import DamagedError
from .placeholders import SYMBOLS

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3


def sentencepiece_library() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("the subwords of a run need SentencePiece: pip install sentencepiece") from error
    return sentencepiece


def load_tokenizer(model: bytes, name: str = "tokenizer") -> Any:
    """Return the ``SentencePieceProcessor`` of a model kept by ``tokenizer.serialized_model_proto()``.

    Raises:
        DamagedError: ``model``, called ``name`` in the message, is cut, or prepare.py did not make it.
    """
    try:
        tokenizer = sentencepiece_library().SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError as error:
        raise DamagedError(
            f"{name} must be a whole SentencePiece model; found {' '.join(str(error).split())}"
        ) from None
    if tokenizer is None:
        raise DamagedError(f"{name} must be a whole SentencePiece model; found an empty file")
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if ids != (PAD, BOS, EOS, UNKNOWN) or any(
        tokenizer.is_unknown(tokenizer.piece_to_id(symbol)) for symbol in SYMBOLS
    ):
        raise DamagedError(
            f"{name} must have the ids and symbols that prepare.py gives it; found another SentencePiece model"
        )
    return tokenizer
