"""Sentence pairs from one of three sources.

These are the catalogs in the Django wheel (BSD licence), two aligned text files, and the pairs of ``sentences.py``.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from depthlstm_fast.translate.placeholders import PLACEHOLDER

from .lines import read_lines, same_text, visible
from .sentences import PAIRS

DJANGO_VERSION = "5.2.19"
DATASETS = ("auto", "django", "builtin")
WORD = re.compile(r"[^\W\d_]{3,}")


class Pair(NamedTuple):
    """One sentence and its translation."""

    source: str
    target: str


class Dataset(NamedTuple):
    """Named sentence pairs, split into training pairs and held-out pairs."""

    name: str
    train: list[Pair]
    heldout: list[Pair]


class DownloadError(RuntimeError):
    """The wheel could not be fetched; the message is one line."""


def cache_folder() -> Path:
    """Return the folder for downloads: below ``XDG_CACHE_HOME`` if set, else below ``~/.cache``.

    Raises:
        DownloadError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthlstm_fast"
    except RuntimeError:
        raise DownloadError("no home folder to keep downloads in; XDG_CACHE_HOME can name another") from None


def fetch_wheel(version: str = DJANGO_VERSION, timeout: float = 60.0) -> Path:
    """Return the path of the Django wheel, which pip downloads the first time.

    Raises:
        DownloadError: pip is missing, found no network or no such version, or took longer than ``timeout`` seconds; or
            there is no folder for the wheel, or the wheel cannot be read.
    """
    wheel = cache_folder() / f"django-{version}-py3-none-any.whl"
    try:
        if wheel.exists():
            wheel.open("rb").close()
            return wheel
    except OSError as error:
        raise DownloadError(f"the kept wheel cannot be read: {error}") from error
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "1",
    ]
    try:
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
            what = ["--timeout", "10", "--no-deps", "--only-binary=:all:", "--dest", folder, f"django=={version}"]
            done = subprocess.run(
                [*pip, *what], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
            )
            found = sorted(Path(folder).glob("*.whl"))
            if done.returncode != 0 or not found:
                errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
                raise DownloadError(
                    f"pip download django=={version}: {errors[-1] if errors else f'exit status {done.returncode}'}"
                )
            os.replace(found[0], wheel)  # at once, so that a second process never reads half a file
    except subprocess.TimeoutExpired:
        raise DownloadError(f"pip download django=={version}: no answer within {timeout:.0f} s") from None
    except OSError as error:
        raise DownloadError(f"pip download django=={version}: {error}") from error
    return wheel


def parse_catalog(text: str) -> list[Pair]:
    """Return the finished translations of a .po catalog, given as text: neither fuzzy, obsolete nor empty.

    A message with plural forms gives one pair, its plural, because the singular says nearly the same.
    """
    try:
        import polib  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("reading .po catalogs needs polib: pip install polib") from error
    pairs = []
    for entry in polib.pofile(text):
        if entry.obsolete or not entry.translated():
            continue
        plural = entry.msgid_plural and entry.msgstr_plural.get(1)
        pairs.append(
            Pair(entry.msgid_plural, plural) if plural else Pair(entry.msgid, entry.msgstr or entry.msgstr_plural[0])
        )
    return pairs


def read_wheel(wheel: Path, language: str = "de") -> list[Pair]:
    """Return the pairs of every catalog for ``language`` in ``wheel``, in the order of the files' names.

    Raises:
        ValueError: the file is not a wheel, or holds no such catalog.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(
                name for name in archive.namelist() if name.endswith(".po") and f"/locale/{language}/" in name
            )
            pairs = [pair for name in names for pair in parse_catalog(archive.read(name).decode("utf-8"))]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"wheel must be a zip archive; found a damaged file, remove it and try again: {wheel}"
        ) from error
    if not pairs:
        raise ValueError(f"wheel must hold .po catalogs for language {language!r}; found none in {wheel}")
    return pairs


def read_aligned(source: Path, target: Path) -> list[Pair]:
    """Return the pairs of two UTF-8 text files; line n of one is the translation of line n of the other.

    Raises:
        ValueError: the files differ in their number of lines, or one is not UTF-8.
    """
    left, right = read_lines(source), read_lines(target)
    if len(left) != len(right):
        raise ValueError(
            f"source and target must have equally many lines; found "
            f"{len(left)} in {source} and {len(right)} in {target}"
        )
    return [Pair(*pair) for pair in zip(left, right, strict=True)]


def clean(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the cleaned pairs, with single spaces.

    Empty and untranslated pairs, bare formats, mark-up, and repeated sources are dropped.
    """
    kept: dict[str, Pair] = {}
    for pair in pairs:
        source, target = (" ".join(text.split()) for text in pair)
        words = all(visible(text) and WORD.search(PLACEHOLDER.sub(" ", text)) for text in (source, target))
        if words and source != target and "<" not in source:
            kept.setdefault(same_text(source), Pair(source, target))
    return list(kept.values())


def split(name: str, pairs: Iterable[Pair], heldout_share: float = 0.05) -> Dataset:
    """Hold out the share of ``pairs`` whose sources have the smallest hashes, but at least one pair.

    Every run holds out the same pairs.

    Raises:
        ValueError: fewer than two pairs.
    """
    ranked = sorted(pairs, key=lambda pair: hashlib.sha256(pair.source.encode()).digest())
    if len(ranked) < 2:
        raise ValueError(f"pairs must be two at least after cleaning; found {len(ranked)}")
    count = max(1, round(heldout_share * len(ranked)))
    return Dataset(name, ranked[count:], ranked[:count])


def read_named(data: str, language: str = "de") -> tuple[str, list[Pair]]:
    """Return the name and the clean pairs of ``data``; ``language`` is that of the translations.

    ``"auto"`` is ``"django"``. If the wheel cannot be fetched, it is ``"builtin"`` (German only), with one line on
    stderr.

    Raises:
        ValueError: an unknown ``data``, or a ``language`` that it does not have.
        DownloadError: ``data="django"`` and no network.
    """
    if data not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}; found {data!r}")
    if data != "builtin":
        try:
            return f"gettext catalogs of Django {DJANGO_VERSION}, en-{language}", clean(
                read_wheel(fetch_wheel(), language)
            )
        except DownloadError as error:
            if data == "django" or language != "de":
                raise
            print(f"no Django wheel ({error}); using the {len(PAIRS)} built-in sentence pairs", file=sys.stderr)
    if language != "de":
        raise ValueError(f"language must be 'de' for the built-in sentences; found {language!r}")
    return "built-in everyday sentences, en-de", [Pair(*pair) for pair in PAIRS]


def load_dataset(data: str = "auto", source: Path | None = None, target: Path | None = None) -> Dataset:
    """Return the training pairs: those of ``source`` and ``target`` if given, else the German pairs of ``data``.

    Raises:
        ValueError: one of ``source`` and ``target`` without the other, or as ``read_named``.
        DownloadError: as ``read_named``.
    """
    if (source is None) != (target is None):
        raise ValueError(f"source and target must be given together; found source={source}, target={target}")
    if source is not None and target is not None:
        return split(f"{source.name} + {target.name}", clean(read_aligned(source, target)))
    return split(*read_named(data))
