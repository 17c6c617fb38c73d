"""pytest-benchmark as the clock of the fused call.

The rivals are timed around it, in the order of :mod:`timing`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import allocator
from .problems import Problem
from .rows import Row, Settings
from .timing import turn_order

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

MOST_ROUNDS = 200


def lap(run: Callable[[], object]) -> float:
    """Return the seconds of one call; its outputs are freed after the clock has stopped."""
    before = time.perf_counter()
    outputs = run()
    seconds = time.perf_counter() - before
    del outputs
    return seconds


def measure_rounds(benchmark: BenchmarkFixture, problem: Problem, settings: Settings) -> Row:
    """Fill the problem's row; in each round every contestant has a turn.

    The fused call runs on the clock of ``benchmark``. Rivals before it in a round's order run in pytest-benchmark's
    setup, the others in its teardown.
    """
    batches = problem.batches()
    names, fused = list(batches), list(batches).index("fused")
    samples: dict[str, list[float]] = {name: [] for name in names}
    outputs: list[object] = []
    order: list[int] = []
    done = 0

    def take_turns(turns: list[int]) -> None:
        for turn in turns:
            samples[names[turn]].append(lap(batches[names[turn]]))

    def before() -> None:
        nonlocal order
        order = turn_order(len(names), done)
        take_turns(order[: order.index(fused)])

    def timed() -> None:
        outputs.append(batches["fused"]())

    def after() -> None:
        nonlocal done
        outputs.clear()
        take_turns(order[order.index(fused) + 1 :])
        done += 1

    with torch.set_grad_enabled(problem.grad), allocator.keeping(problem.keeps_memory):
        for batch in batches.values():  # the warm-up
            batch()
        turn = sum(lap(batch) for batch in batches.values())
        rounds = min(MOST_ROUNDS, max(settings.minimum, math.ceil(problem.seconds * settings.seconds / turn)))
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            benchmark.pedantic(timed, setup=before, teardown=after, rounds=rounds)
        finally:
            if collecting:
                gc.enable()
        if benchmark.stats is None:  # --benchmark-disable: the call was made once, without a clock
            return problem.row
        (row,) = problem.finish(samples | {"fused": list(benchmark.stats.stats.data)})
        return row
