"""What one call costs where there is next to nothing to compute: the host's time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

import depthlstm_fast as dl

from ..measure.compiled import Compiled, reference_gates
from ..measure.problems import Problem, Runs
from ..measure.rows import Figure, Row, Target
from ..measure.timing import Spread, ratio, spread
from . import gates

ROWS, FEATURES = 1, 8
CALLS_AT_ONCE = 200
BATCHES, CALLS = 5, 2000  # of best_batches
MICROSECONDS = {False: 15.0, True: 45.0}


def best_batches(
    runs: dict[str, Callable[[], object]],
    batches: int,
    calls: int,
    tick: Callable[[], None],
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Each run's seconds a call, from its batch with the smallest median; batches in turn. A disturbance only ever adds time.

    ``synchronize`` is called between batches, so that a queue of unfinished calls never holds up the host.
    """
    best: dict[str, list[float]] = {}
    for _ in range(batches):
        for name, run in runs.items():
            times = []
            for _ in range(calls):
                before = time.perf_counter()
                run()
                times.append(time.perf_counter() - before)
            synchronize()
            if name not in best or spread(times).median < spread(best[name]).median:
                best[name] = times
        tick()
    return best


def overhead_row(grad: bool, eager: list[float], fused: list[float], target: float, note: str) -> Row:
    """The row on one call's host time, from the seconds of the calls."""
    row = Row("overhead", f"one gates call, {'grad' if grad else 'no grad'}", "fp32", f"N={ROWS} D={FEATURES}", "us", BATCHES, note=note)
    row.values = {"eager": spread(eager, 1e6), "fused": spread(fused, 1e6)}
    found: Spread = row.values["fused"]
    against = ratio(eager, fused)
    row.figures = [
        Figure("fused", "value", found.median, found.p10, found.p90, target, "at most"),
        Figure("eager", "speedup", against.median, against.p10, against.p90),
    ]
    return row


def one_call(grad: bool, compiled: Compiled) -> Problem:
    """A call without gradients, or one that records a graph (the forward call alone)."""
    inputs = [tensor.requires_grad_(grad) for tensor in gates.make_inputs(ROWS, FEATURES, torch.float32)]
    runs: Runs = {"eager": lambda: reference_gates(*inputs), "fused": lambda: dl.depth_lstm_gates(*inputs)}
    name = f"one gates call, {'grad' if grad else 'no grad'}"
    row = Row("overhead", name, "fp32", f"N={ROWS} D={FEATURES}", "us", note=f"means over {CALLS_AT_ONCE} calls in a row")
    targets = [Target("fused", "value", MICROSECONDS[grad]), Target("eager", "speedup")]
    return Problem(row, runs, targets, 1.0, grad, CALLS_AT_ONCE)


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {
    "grad" if grad else "no grad": functools.partial(one_call, grad) for grad in MICROSECONDS
}
