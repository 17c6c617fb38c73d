"""A prepared folder: the tokenizer, the text of each split, its ids in one binary file, and what all that is (JSON)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batches import Example, encode_pairs
from data import Pair, read_aligned
from tokenizer import load_tokenizer, safetensors_torch
from torch import Tensor

TOKENIZER, IDS, META = "tokenizer.model", "ids.safetensors", "meta.json"
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Corpus:
    """What ``load_corpus`` returns: ``examples`` has ids for each of ``SPLITS``, ``texts`` the pairs of dev and test as they are."""

    tokenizer: Any
    examples: dict[str, list[Example]]
    texts: dict[str, list[Pair]]
    meta: dict[str, Any]
    digest: str  # SHA-256 of the ids


def _flatten(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([id for row in rows for id in row], dtype=torch.int32)
    return ids, torch.tensor([len(row) for row in rows], dtype=torch.int32)


def _rows(ids: Tensor, lengths: Tensor) -> list[list[int]]:
    return [row.tolist() for row in ids.split(lengths.tolist())]


def save_corpus(folder: Path, texts: dict[str, list[Pair]], tokenizer: Any, meta: dict[str, Any], longest: int = 256) -> dict[str, Any]:
    """Write a prepared folder; ``meta.json`` comes last, so that a folder that has one is complete.

    Args:
        texts: the pairs of each of ``SPLITS``.
        meta: names to keep; the sizes of the splits and of the vocabulary are added.
        longest: pairs of which a side has more ids are left out of the binary file.

    Returns:
        what ``meta.json`` holds.

    Raises:
        ValueError: a split has no pair of at most ``longest`` ids a side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    (folder / TOKENIZER).write_bytes(tokenizer.serialized_model_proto())
    tensors: dict[str, Tensor] = {}
    for name in SPLITS:
        for side, column in (("source", 0), ("target", 1)):
            text = "".join(pair[column] + "\n" for pair in texts[name])
            (folder / f"{name}.{side}.txt").write_text(text, encoding="utf-8", newline="\n")
        try:
            examples = encode_pairs(texts[name], tokenizer, longest)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for side, rows in zip(("source", "target"), zip(*examples, strict=True), strict=True):
            tensors[f"{name}.{side}.ids"], tensors[f"{name}.{side}.lengths"] = _flatten(rows)
    safetensors_torch().save_file(tensors, folder / IDS)
    meta = meta | {"pairs": {name: len(texts[name]) for name in SPLITS}, "vocabulary": len(tokenizer), "longest": longest}
    (folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


def load_corpus(folder: Path) -> Corpus:
    """Return what ``prepare.py`` wrote below ``folder``.

    Raises:
        ValueError: ``folder`` is no prepared folder, or a file of it is missing.
    """
    names = [META, IDS, TOKENIZER, *(f"{name}.{side}.txt" for name in SPLITS[1:] for side in ("source", "target"))]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"data must be a folder that prepare.py wrote; found no {', '.join(missing)} in {folder}")
    binary = (folder / IDS).read_bytes()
    tensors = safetensors_torch().load(binary)
    examples = {}
    for name in SPLITS:
        sides = [_rows(tensors[f"{name}.{side}.ids"], tensors[f"{name}.{side}.lengths"]) for side in ("source", "target")]
        examples[name] = list(zip(*sides, strict=True))
    texts = {name: read_aligned(folder / f"{name}.source.txt", folder / f"{name}.target.txt") for name in SPLITS[1:]}
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    return Corpus(load_tokenizer((folder / TOKENIZER).read_bytes()), examples, texts, meta, hashlib.sha256(binary).hexdigest())
