"""The split of a text into train, dev and test.

A hash of the source cuts the text, or the user gives a file for each split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .data import Pair, clean, read_aligned
from .lines import same_text, visible
from .prepared import SPLITS

Texts = dict[str, list[Pair]]

HELDOUT_SHARE, HELDOUT_MOST = 0.08, 2000


def split(pairs: Sequence[Pair], seed: int, heldout: Sequence[str] = SPLITS[1:]) -> Texts:
    """Give each split of ``heldout`` 8% of ``pairs``, at least one and at most 2000; the rest is train.

    The place of a pair depends on ``seed`` and on its source only, not on the order of ``pairs``.

    Raises:
        ValueError: there are fewer pairs than splits.
    """
    if len(pairs) <= len(heldout):
        raise ValueError(f"pairs must be {len(heldout) + 1} at least after cleaning; found {len(pairs)}")
    ranked = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}\t{pair.source}".encode()).digest())
    count = min(HELDOUT_MOST, max(1, round(HELDOUT_SHARE * len(ranked))))
    texts = {name: ranked[index * count : (index + 1) * count] for index, name in enumerate(heldout)}
    return texts | {"train": ranked[len(heldout) * count :]}


def read_split_files(files: dict[str, tuple[Path, Path]], seed: int) -> Texts:
    """Return the pairs of two aligned text files a split; dev and test without files are cut from train's.

    Train is cleaned, and loses every pair whose source is also in dev or test. Given dev and test only lose blank
    lines.

    Raises:
        ValueError: two files differ in their number of lines, or a split is empty.
    """
    given = {
        name: [Pair(*(text.strip() for text in pair)) for pair in read_aligned(*files[name]) if all(map(visible, pair))]
        for name in files
        if name != "train"
    }
    for name, pairs in given.items():
        if not pairs:
            raise ValueError(f"{name} must hold a pair without blank sides; found none in {files[name][0]}")
    heldout = {same_text(pair.source) for pairs in given.values() for pair in pairs}
    pairs = [pair for pair in clean(read_aligned(*files["train"])) if same_text(pair.source) not in heldout]
    return split(pairs, seed, [name for name in SPLITS[1:] if name not in given]) | given
