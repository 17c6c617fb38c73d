"""Operands for tests of PTX instructions: bits of special values and of random ones, by type."""

from __future__ import annotations

import functools
import itertools
import random

import ptx_formulas as formulas
from ptx_formulas import FORMATS, PACKED
from ptx_kernels import bits_of

CASES = 448  # values of each operand


def special_values(type_: str) -> list[int]:
    if type_ == "pred":
        return [0, 1]
    if type_ in PACKED:
        halves = special_values(PACKED[type_])
        return [high << bits_of(PACKED[type_]) | low for high, low in zip(halves, reversed(halves), strict=True)]
    bits = bits_of(type_)
    if type_ not in FORMATS:
        edges = [(1 << (bits - 1)) + offset for offset in (-2, -1, 0, 1)] + [
            (1 << bits) - 1,
            (1 << bits) - 2,
            0x0123456789ABCDEF,
        ]
        return [
            value % (1 << bits) for value in (0, 1, 2, 3, 7, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, *edges)
        ]
    format = FORMATS[type_]
    numbers = [
        1,
        2,
        3,
        0.5,
        0.25,
        1.5,
        2.5,
        3.5,
        0.1,
        1 / 3,
        100.0,
        127.5,
        128,
        255.5,
        1e4,
        65504,
        65520,
        1e-4,
        126,
        149,
        2.0**31,
        2.0**63,
    ]
    numbers += [2.0**32 - 1, 1e9 + 0.5, 1 + 2.0**-7, 1 + 2.0**-8, 1 + 2.0**-11, 1 + 2.0**-24, 1 - 2.0**-24]
    codes = [formulas.encode(format, formulas.Fraction(number)) for number in numbers]
    smallest = 1 << format.fraction_bits
    codes += [
        0,
        1,
        2,
        smallest - 1,
        smallest,
        smallest + 1,
        format.infinity - 1,
        format.infinity,
        format.nan,
        format.infinity | 1,
    ]
    return [code | sign for code in codes for sign in (0, format.sign)]


def random_value(type_: str, rng: random.Random) -> int:
    if type_ in PACKED:
        return random_value(PACKED[type_], rng) << bits_of(PACKED[type_]) | random_value(PACKED[type_], rng)
    if type_ in FORMATS and rng.random() < 0.7:  # of similar size, so that sums do not lose an operand
        return formulas.encode(FORMATS[type_], formulas.Fraction(rng.gauss(0, 4)))
    return rng.getrandbits(1 if type_ == "pred" else bits_of(type_))


@functools.cache
def operands(types: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Return the operands' bits for each case: every special value, combined at random, and random ones."""
    rng = random.Random(repr(types))
    columns = []
    for type_ in types:
        specials = special_values(type_)
        column = list(itertools.islice(itertools.cycle(specials), max(len(specials), CASES // 2)))
        column += [random_value(type_, rng) for _ in range(CASES - len(column))]
        rng.shuffle(column)
        columns.append(column)
    return list(zip(*columns, strict=True))
