"""Sentence pairs from paired documents.

The steps are alignment of blocks and sentences, filters, and the split into train, dev and test.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher

from .data import Pair
from .debian_text import Block, Row, normalize, word_set

# Alignment

SENTENCE_END = re.compile(r"[.!?…][\"”“»)\]]?\s+")
ABBREVIATIONS = word_set(
    "e.g i.e etc vs cf no dr mr mrs st ca max min z.b d.h u.a o.ä usw bzw "
    "ggf evtl nr abb vgl inkl resp z tj např atd tzn apod p.ex"
)


def split_sentences(text: str) -> list[str]:
    """Split after ``.!?…`` before a capital or a digit.

    Dots of abbreviations and of one or two digits do not end a sentence.
    """
    sentences, start = [], 0
    for end in SENTENCE_END.finditer(text):
        following = text[end.end() :].lstrip('"“„«»([')[:1]
        words = text[start : end.start()].split()
        last = words[-1].lstrip('("„“').casefold() if words else ""
        unfinished = end[0].startswith(".") and (last in ABBREVIATIONS or (last.isdigit() and len(last) <= 2))
        if words and (following.isupper() or following.isdigit()) and not unfinished:
            sentences.append(text[start : end.end()].strip())
            start = end.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


BEADS = {(1, 1): 0.89, (1, 0): 0.00495, (0, 1): 0.00495, (2, 1): 0.0445, (1, 2): 0.0445, (2, 2): 0.011}
LENGTH_VARIANCE = 6.8  # of the target's characters, for each character of the source


def length_cost(source: int, target: int) -> float:
    """Return -log of the probability that texts of these lengths, in characters, differ at least as much as they do."""
    mean = max((source + target) / 2, 1.0)
    deviation = abs(target - source) / math.sqrt(LENGTH_VARIANCE * mean)
    return -math.log(max(math.erfc(deviation / math.sqrt(2)), 1e-300))


def align_sentences(source: list[str], target: list[str]) -> list[Pair]:
    """Align the sentences of a paragraph by their lengths; sentences without a counterpart are left out.

    W. A. Gale and K. W. Church, "A Program for Aligning Sentences in Bilingual Corpora", Computational Linguistics
    19(1), 1993.
    """
    best = {(0, 0): 0.0}
    step: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(len(source) + 1):
        for j in range(len(target) + 1):
            for (p, q), prior in BEADS.items():
                if (i - p, j - q) not in best:
                    continue
                lengths = sum(map(len, source[i - p : i])), sum(map(len, target[j - q : j]))
                cost = best[i - p, j - q] - math.log(prior) + length_cost(*lengths)
                if cost < best.get((i, j), math.inf):
                    best[i, j], step[i, j] = cost, (p, q)
    pairs = []
    i, j = len(source), len(target)
    while i or j:
        p, q = step[i, j]
        if p and q:
            pairs.append(Pair(" ".join(source[i - p : i]), " ".join(target[j - q : j])))
        i, j = i - p, j - q
    return pairs[::-1]


def sentence_pairs(source: str, target: str, most: int = 40) -> list[Pair]:
    """Return the sentence pairs of a paragraph and its translation.

    A paragraph of more than ``most`` sentences gives none.
    """
    left, right = split_sentences(source), split_sentences(target)
    if min(len(left), len(right)) == 1:
        return [Pair(source, target)]
    return align_sentences(left, right) if max(len(left), len(right)) <= most else []


def align_blocks(source: list[Block], target: list[Block], shortest: int = 3, highest: float = 2.0) -> list[Pair]:
    """Pair the blocks of equal signatures.

    If the documents differ, a run of such blocks counts in two cases. It has an identifier (a signature with ``#``), or
    it has ``shortest`` blocks or more with a mean ``length_cost`` of ``highest`` or less. The mean cost of true pairs
    is near 1, because the exponential of the cost is uniform.
    """
    left, right = [block.signature for block in source], [block.signature for block in target]
    if left == right:
        return [Pair(a.text, b.text) for a, b in zip(source, target, strict=True)]
    pairs = []
    for a, b, size in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        run = [Pair(source[a + k].text, target[b + k].text) for k in range(size)]
        cost = sum(length_cost(len(pair.source), len(pair.target)) for pair in run)
        if any("#" in signature for signature in left[a : a + size]) or (size >= shortest and cost <= highest * size):
            pairs += run
    return pairs


def document_rows(name: str, source: list[Block], target: list[Block]) -> Iterator[Row]:
    """Yield the paired blocks of the document ``name``."""
    for pair in align_blocks(source, target):
        yield Row(name, *pair)


# Filters and the split

COMMON_WORDS = {
    "en": word_set("the a of to and is in for this with that be are not or on you it as by from an can if"),
    "de": word_set(
        "der die das und ist nicht ein eine zu den von mit für auf im wird "
        "werden sie oder kann dem des zum wenn als sich bei"
    ),
    "fr": word_set("le la les de des et est un une pour dans par sur que qui en du pas ou avec ce sont vous cette au"),
    "cs": word_set(
        "a je na v se pro s do z nebo že to jsou k není aby by jako o po lze tento tato který při která které být ze"
    ),
}
NOT_LETTERS = re.compile(r"[^\w\s]|[\d_]")
MARKUP = re.compile(r"[\\{}|<>]|%[-#0-9$]*[sdiuxf]|\$\(|https?://")


def letters_key(text: str) -> str:
    """Return the letters of ``text`` in lower case.

    Sentences that differ only in numbers and signs have equal keys.
    """
    return normalize(NOT_LETTERS.sub("", text.casefold()))


def letters_share(text: str) -> float:
    """Return the share of letters and blanks in ``text``."""
    return 1 - len(NOT_LETTERS.findall(text)) / len(text)


def rejection(source: str, target: str, language: str) -> str | None:
    """Return why a pair is useless for training, in one word, or None."""
    left, right = source.split(), target.split()
    shorter, longer = sorted((len(source), len(target)))
    if source == target:
        return "identical"
    if not (2 <= len(left) <= 80 and 1 <= len(right) <= 80):
        return "length"
    if longer > max(20, 2.5 * shorter):
        return "ratio"
    if min(letters_share(source), letters_share(target)) < 0.65:
        return "signs"
    if MARKUP.search(source) or MARKUP.search(target):
        return "markup"
    words = [word.casefold().strip(".,;:()") for word in right]
    if len(words) >= 8 and sum(word in COMMON_WORDS["en"] for word in words) > sum(
        word in COMMON_WORDS[language] for word in words
    ):
        return "untranslated"
    if len(set(re.findall(r"\d+", source)) ^ set(re.findall(r"\d+", target))) > 1:
        return "numbers"
    return None


def clean_rows(rows: Iterable[Row], language: str) -> tuple[list[Row], Counter[str]]:
    """Split paragraphs into sentences, and drop useless and repeated pairs.

    Returns the remaining pairs, and the reasons for the dropped ones.
    """
    kept, reasons, seen = [], Counter[str](), set()
    for row in rows:
        for source, target in sentence_pairs(row.source, row.target):
            key = letters_key(source), letters_key(target)
            reason = "repeated" if key in seen else rejection(source, target, language)
            if reason:
                reasons[reason] += 1
            else:
                seen.add(key)
                kept.append(Row(row.document, source, target))
    return kept, reasons


def part_of(document: str, held_out: float = 0.02) -> str:
    """Return the part that ``document`` belongs to, by the hash of its name.

    dev and test get a share ``held_out`` each.
    """
    fraction = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
    return "test" if fraction < held_out else "dev" if fraction < 2 * held_out else "train"


def split_rows(rows: Iterable[Row], most: int = 60) -> dict[str, list[Row]]:
    """Split by document; drop train sentences that dev or test have, and dev sentences that test has, on either side.

    Dev and test take sentences of 4 to 60 words, and at most ``most`` of a document, so that no long one outweighs the
    others.
    """
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    taken = Counter[str]()
    for row in rows:
        part = part_of(row.document)
        if part == "train" or (4 <= len(row.source.split()) <= 60 and taken[row.document] < most):
            parts[part].append(row)
            taken[row.document] += 1
    held: set[str] = set()
    for part in ("test", "dev", "train"):
        keys = [(row, {letters_key(row.source), letters_key(row.target)}) for row in parts[part]]
        parts[part] = [row for row, key in keys if not key & held]
        held |= set().union(*(key for _, key in keys))
    return parts
