"""Contestants timed in turn within one process, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of one quantity over the repetitions."""

    median: float
    p10: float
    p90: float


def quantile(samples: Sequence[float], fraction: float) -> float:
    """The quantile of ``samples`` with linear interpolation between neighbours."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(samples: Sequence[float], scale: float = 1.0) -> Spread:
    """Median, p10 and p90 of ``scale * samples``.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("samples must hold at least one number; found none")
    return Spread(*(scale * quantile(samples, fraction) for fraction in (0.5, 0.1, 0.9)))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """``over`` / ``under``: the ratio of the medians; its spread is that of the ratios within each repetition."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return Spread(quantile(over, 0.5) / quantile(under, 0.5), quantile(pairs, 0.1), quantile(pairs, 0.9))


def turn_order(count: int, repetition: int) -> list[int]:
    """Who goes when in one repetition: a Williams design, in which each contestant follows each other one equally often.

    A fixed order would give one contestant the caches and the heap that the same neighbour always leaves behind.
    """
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    order = [(repetition + offset) % count for offset in zigzag]
    # an odd count needs the mirrored square too
    return order[::-1] if count % 2 and repetition // count % 2 else order


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    minimum: int = 7,
    maximum: int = 200,
    warmups: int = 1,
    clock: Clock = time.perf_counter,
    on_repetition: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Time every contestant once in each repetition, until ``seconds`` are over, but at least ``minimum`` times.

    What a contestant returns is freed after its clock has stopped. Python's garbage collector is off meanwhile.

    Returns:
        the seconds of every repetition, for each contestant.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmups):
        for name in names:
            contestants[name]()
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for repetition in range(max(minimum, maximum)):
            if repetition >= minimum and clock() - start >= seconds:
                break
            for index in turn_order(len(names), repetition):
                run = contestants[names[index]]
                before = clock()
                outputs = run()
                samples[names[index]].append(clock() - before)
                del outputs
            if on_repetition is not None:
                on_repetition()
    finally:
        if collecting:
            gc.enable()
    return samples
