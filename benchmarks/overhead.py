"""What one call costs where there is next to nothing to compute: the host's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

import depthlstm_fast as dl
from depthlstm_fast.bench import gates
from depthlstm_fast.bench.compiled import Compiled, reference_gates
from depthlstm_fast.bench.rows import Figure, Row, Settings
from depthlstm_fast.bench.timing import Spread, ratio, spread

ROWS, FEATURES = 1, 8
BATCHES, CALLS = 5, 2000
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


def measure(settings: Settings, compiled: Compiled, tick: Callable[[], None]) -> Iterator[Row]:
    """One row without gradients, one where a graph is recorded (the forward call alone)."""
    calls = CALLS if settings.minimum >= 7 else CALLS // 10
    for grad, target in MICROSECONDS.items():
        inputs = [tensor.requires_grad_(grad) for tensor in gates.make_inputs(ROWS, FEATURES, torch.float32)]
        runs: dict[str, Callable[[], object]] = {
            "eager": lambda i=inputs: reference_gates(*i),  # type: ignore[misc]
            "fused": lambda i=inputs: dl.depth_lstm_gates(*i),  # type: ignore[misc]
        }
        with torch.set_grad_enabled(grad):
            best = best_batches(runs, BATCHES, calls, tick)
        yield overhead_row(grad, best["eager"], best["fused"], target, f"best median of {BATCHES} batches of {calls} calls")
