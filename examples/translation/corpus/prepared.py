"""A prepared folder.

It has the tokenizer, the text of each split, the ids in one binary file, and a description of these (JSON).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Pair, read_aligned
from .files import DamagedError, check_values, read_json, read_tensors, to_json, write_tensors
from .lines import write_lines
from .tokenizer import Example, encode_pairs, load_tokenizer

TOKENIZER, IDS, META = "tokenizer.model", "ids.safetensors", "meta.json"
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Corpus:
    """The result of ``load_corpus``.

    ``examples`` has ids for each of ``SPLITS``, ``texts`` the unchanged pairs of dev and test.
    """

    tokenizer: Any
    examples: dict[str, list[Example]]
    texts: dict[str, list[Pair]]
    meta: dict[str, Any]
    digest: str  # SHA-256 of the ids


def _flatten(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([id for row in rows for id in row], dtype=torch.int32)
    return ids, torch.tensor([len(row) for row in rows], dtype=torch.int32)


def _rows(path: Path, tensors: dict[str, Tensor], name: str, vocabulary: int) -> list[list[int]]:
    """Return the rows ``name`` in ``tensors``, which were read from ``path``."""
    ids, lengths = (tensors.get(f"{name}.{part}") for part in ("ids", "lengths"))
    if (
        ids is None
        or lengths is None
        or any(tensor.dtype != torch.int32 or tensor.dim() != 1 for tensor in (ids, lengths))
    ):
        raise DamagedError(f"{path} must hold int32 vectors {name}.ids and {name}.lengths; found others")
    if not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum()) != len(ids):
        raise DamagedError(f"{path} must hold as many ids as the lengths of {name} add up to; found {len(ids)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DamagedError(
            f"{path} must hold ids below {vocabulary}, the size of the vocabulary; found others in {name}"
        )
    return [row.tolist() for row in ids.split(lengths.tolist())]


def save_corpus(
    folder: Path, texts: dict[str, list[Pair]], tokenizer: Any, meta: dict[str, Any], longest: int = 256
) -> dict[str, Any]:
    """Write a prepared folder; ``meta.json`` comes last, so that a folder with it is complete.

    Args:
        texts: the pairs of each of ``SPLITS``.
        meta: names to keep; the sizes of the splits and of the vocabulary are added.
        longest: pairs with more ids on a side are left out of the binary file.

    Returns:
        the content of ``meta.json``.

    Raises:
        ValueError: a split has no pair of at most ``longest`` ids a side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    (folder / TOKENIZER).write_bytes(tokenizer.serialized_model_proto())
    tensors: dict[str, Tensor] = {}
    for name in SPLITS:
        for side, column in (("source", 0), ("target", 1)):
            write_lines(folder / f"{name}.{side}.txt", [pair[column] for pair in texts[name]])
        try:
            examples = encode_pairs(texts[name], tokenizer, longest)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for side, rows in zip(("source", "target"), zip(*examples, strict=True), strict=True):
            tensors[f"{name}.{side}.ids"], tensors[f"{name}.{side}.lengths"] = _flatten(rows)
    write_tensors(folder / IDS, tensors)
    meta = meta | {
        "pairs": {name: len(texts[name]) for name in SPLITS},
        "vocabulary": len(tokenizer),
        "longest": longest,
    }
    (folder / META).write_text(to_json(meta, indent=1), encoding="utf-8")
    return meta


def load_corpus(folder: Path) -> Corpus:
    """Return the corpus that ``prepare.py`` wrote below ``folder``.

    Raises:
        ValueError: ``folder`` is not a prepared folder, or one of its files is missing, damaged or another folder's.
    """
    names = [META, IDS, TOKENIZER, *(f"{name}.{side}.txt" for name in SPLITS[1:] for side in ("source", "target"))]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"data must be a folder that prepare.py wrote; found no {', '.join(missing)} in {folder}")
    meta = read_json(folder / META, {"dataset": str, "pairs": dict, "vocabulary": int, "longest": int})
    check_values(folder / META, meta["pairs"], dict.fromkeys(SPLITS, int))
    tokenizer = load_tokenizer((folder / TOKENIZER).read_bytes(), str(folder / TOKENIZER))
    if len(tokenizer) != meta["vocabulary"]:
        raise DamagedError(
            f"{folder / TOKENIZER} must have {meta['vocabulary']} pieces, as {META} says; found {len(tokenizer)}"
        )
    tensors = read_tensors(folder / IDS)
    examples = {}
    for name in SPLITS:
        source, target = (
            _rows(folder / IDS, tensors, f"{name}.{side}", len(tokenizer)) for side in ("source", "target")
        )
        if len(source) != len(target):
            raise DamagedError(
                f"{folder / IDS} must hold as many sources as targets of {name}; found {len(source)} and {len(target)}"
            )
        examples[name] = list(zip(source, target, strict=True))
    texts = {name: read_aligned(folder / f"{name}.source.txt", folder / f"{name}.target.txt") for name in SPLITS[1:]}
    for name, pairs in texts.items():
        if len(pairs) != meta["pairs"][name]:
            raise DamagedError(
                f"{folder / name}.source.txt must have {meta['pairs'][name]} lines, as {META} says; found {len(pairs)}"
            )
        if encode_pairs(pairs, tokenizer, meta["longest"]) != examples[name]:
            raise DamagedError(
                f"{name}.source.txt and {name}.target.txt in {folder} must "
                f"be what {IDS} has the ids of; found other text"
            )
    return Corpus(tokenizer, examples, texts, meta, hashlib.sha256((folder / IDS).read_bytes()).hexdigest())
