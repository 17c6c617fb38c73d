"""A quantity over one axis, and the line through it: a fixed cost and a constant cost a unit."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .calls import Runs
from .rows import Settings
from .timing import interleave, spread

# relative distance from the line above which a point is reported
BEND = 0.25

Curve = dict[str, Any]


def fit(xs: Sequence[float], times: Sequence[float]) -> tuple[float, float, list[float]]:
    """Fit ``times`` as ``fixed + slope * x``; return both numbers, at least 0, and each point's time over the line's.

    The fit is least squares of relative errors, so that points of small x count as much as those of large x.
    """
    columns = torch.tensor([[1 / time, x / time] for x, time in zip(xs, times, strict=True)], dtype=torch.float64)
    fixed, slope = torch.linalg.lstsq(columns, torch.ones(len(xs), 1, dtype=torch.float64)).solution.flatten().tolist()
    if fixed < 0:
        # a line through the origin minimises sum (slope x / t - 1)^2
        fixed, slope = 0.0, float(columns[:, 1].sum() / columns[:, 1].square().sum())
    if slope < 0:
        fixed, slope = float(columns[:, 0].sum() / columns[:, 0].square().sum()), 0.0
    return fixed, slope, [time / (fixed + slope * x) for x, time in zip(xs, times, strict=True)]


def curve(name: str, axis: str, fixed: str, against: str, points: list[dict[str, Any]], unit: str = "ms") -> Curve:
    """Return a curve, fit for JSON, with a line for each contestant present at all points."""
    found: Curve = {
        "name": name,
        "axis": axis,
        "fixed": fixed,
        "unit": unit,
        "against": against,
        "points": points,
        "lines": {},
    }
    for side in points[0]["values"]:
        chosen = [point for point in points if side in point["values"]]
        if len(chosen) > 2 and axis != "threads":
            xs = [point["x"] for point in chosen]
            start, slope, over = fit(xs, [point["values"][side]["median"] for point in chosen])
            bent = {str(x): part for x, part in zip(xs, over, strict=True) if abs(part - 1) > BEND}
            found["lines"][side] = {"fixed": start, "slope": slope, "bent": bent}
    return found


def point(x: int, runs: Runs, settings: Settings, tick: Callable[[], None], seconds: float = 0.5) -> dict[str, Any]:
    """Return the contestants' milliseconds at one ``x``, and what the fused call costs the system."""
    samples = interleave(runs, seconds=seconds * settings.seconds, minimum=settings.minimum, maximum=400, warmups=2)
    tick()
    return {
        "x": x,
        "values": {name: asdict(spread(times, 1e3)) for name, times in samples.items()},
        "repetitions": len(samples["fused"]),
        **system_cost(runs["fused"]),
    }


def system_cost(run: Callable[[], object]) -> dict[str, float]:
    """Return the page faults of a call and its milliseconds inside the system, over all threads of the process."""
    run()
    before = resource.getrusage(resource.RUSAGE_SELF)
    run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {"faults": after.ru_minflt - before.ru_minflt, "system_ms": (after.ru_stime - before.ru_stime) * 1e3}
