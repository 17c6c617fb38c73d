"""Timing of contestants in turn within one process, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of one quantity over the repetitions."""

    median: float
    p10: float
    p90: float


class Stopwatch(Protocol):
    """A clock of one call: ``begin``, the call, ``end``.

    ``laps`` returns (contestant, seconds) of the calls since its last call. ``reset`` forgets earlier calls. Other
    contestants follow, possibly with the same names.
    """

    def reset(self) -> None: ...

    def begin(self, name: str) -> None: ...

    def end(self) -> None: ...

    def laps(self) -> Iterator[tuple[str, float]]: ...


class HostStopwatch:
    """Times calls that have done their work when they return."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self._laps: list[tuple[str, float]] = []
        self._name, self._begun = "", 0.0

    def reset(self) -> None:
        self._laps = []

    def begin(self, name: str) -> None:
        self._name = name
        self._begun = self.clock()

    def end(self) -> None:
        now = self.clock()
        self._laps.append((self._name, now - self._begun))

    def laps(self) -> Iterator[tuple[str, float]]:
        found, self._laps = self._laps, []
        return iter(found)


class BusyStopwatch(HostStopwatch):
    """Notes beside the time of each call what the process computed meanwhile, which other programs lengthen less.

    Attributes:
        busy: seconds on cores of every call since the last reset, by contestant.
    """

    def __init__(self, clock: Clock = time.perf_counter, busy_clock: Clock = time.process_time) -> None:
        super().__init__(clock)
        self.busy_clock, self._busy_begun = busy_clock, 0.0
        self.busy: dict[str, list[float]] = {}

    def reset(self) -> None:
        super().reset()
        self.busy = {}

    def begin(self, name: str) -> None:
        self._busy_begun = self.busy_clock()
        super().begin(name)

    def end(self) -> None:
        super().end()
        self.busy.setdefault(self._name, []).append(self.busy_clock() - self._busy_begun)


def quantile(samples: Sequence[float], fraction: float) -> float:
    """Return the quantile of ``samples`` with linear interpolation between neighbours."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(samples: Sequence[float], scale: float = 1.0) -> Spread:
    """Return median, p10 and p90 of ``scale * samples``.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("samples must hold at least one number; found none")
    return Spread(*(scale * quantile(samples, fraction) for fraction in (0.5, 0.1, 0.9)))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return ``over`` / ``under``: the ratio of the medians.

    Its spread is that of the ratios within each repetition.
    """
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return Spread(quantile(over, 0.5) / quantile(under, 0.5), quantile(pairs, 0.1), quantile(pairs, 0.9))


def turn_order(count: int, repetition: int) -> list[int]:
    """Return the contestants' order in one repetition: a Williams design.

    Each contestant follows each other one equally often. A fixed order would give one contestant the caches and the
    heap that the same neighbour always leaves behind.
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
    stopwatch: Stopwatch | None = None,
) -> dict[str, list[float]]:
    """Time every contestant once in each repetition, until ``seconds`` are over, but at least ``minimum`` times.

    A contestant's results are freed after its clock has stopped. Python's garbage collector is off meanwhile.
    ``stopwatch`` times the calls; without one the host's ``clock`` does.

    Returns:
        the seconds of every repetition, for each contestant.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    watch = HostStopwatch(clock) if stopwatch is None else stopwatch
    watch.reset()
    for _ in range(warmups):
        for name in names:
            if stopwatch is None:
                contestants[name]()
            else:  # the stopwatch learns how long the host takes
                watch.begin(name)
                contestants[name]()
                watch.end()
    list(watch.laps())
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
                watch.begin(names[index])
                outputs = run()
                watch.end()
                del outputs
            for name, lap in watch.laps():
                samples[name].append(lap)
            if on_repetition is not None:
                on_repetition()
    finally:
        if collecting:
            gc.enable()
    return samples
