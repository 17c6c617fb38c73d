"""A problem is a row of the table before it is measured. The command line and pytest-benchmark measure the same problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import call_cost
from .rows import Figure, Row, Settings, Target, figure
from .timing import Spread, interleave, spread

Runs = dict[str, Callable[[], object]]
SECONDS = {"ms": 1e3, "us": 1e6}


def repeated(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """``calls`` calls of ``run`` as one, the last call's outputs returned."""
    if calls == 1:
        return run

    def batch() -> object:
        outputs = None
        for _ in range(calls):
            outputs = run()
        return outputs

    return batch


@dataclass
class Problem:
    """Who takes part, what has to be moved or computed, and which figures are made of the times.

    Attributes:
        row: what the row says apart from numbers; its unit is "ms", "us" or "tokens/s".
        runs: a call of each contestant, by its name in ``Row.values``; "fused" is among them.
        seconds: how long to measure, at ``Settings.seconds`` of 1.
        grad: whether gradients are enabled.
        calls: calls in a repetition, more than one where a single one is too short for a clock.
        tokens: what a call handles, for the unit "tokens/s".
        moved_bytes, flops: what a call moves or computes at least, by a formula; 0 where the row is about something else.
        floor: the contestant that does no more than that; empty where none does.
    """

    row: Row
    runs: Runs
    targets: Sequence[Target] = ()
    seconds: float = 1.0
    grad: bool = True
    calls: int = 1
    tokens: int = 0
    moved_bytes: int = 0
    flops: int = 0
    floor: str = ""

    def batches(self) -> Runs:
        """What is timed: for each contestant one repetition."""
        return {name: repeated(run, self.calls) for name, run in self.runs.items()}

    def measure(self, settings: Settings, tick: Callable[[], None]) -> Row:
        """Time all contestants in turn, then look at one call of the fused and the eager one."""
        with torch.set_grad_enabled(self.grad):
            samples = interleave(self.batches(), seconds=self.seconds * settings.seconds, minimum=settings.minimum, on_repetition=tick)
            return self.finish(samples)

    def finish(self, samples: Mapping[str, Sequence[float]]) -> Row:
        """The row, from the seconds of every repetition of every contestant."""
        row, times = self.row, {name: [seconds / self.calls for seconds in found] for name, found in samples.items()}
        row.repetitions = len(times["fused"])
        if row.unit == "tokens/s":
            row.values = {name: spread([self.tokens / seconds for seconds in found]) for name, found in times.items()}
        else:
            row.values = {name: spread(found, SECONDS[row.unit]) for name, found in times.items()}
        row.figures = [self.judge(target, times) for target in self.targets if target.column in times]
        seconds = spread(times["fused"]).median
        if self.moved_bytes:
            row.numbers |= {"bytes": self.moved_bytes, "gb_per_s": self.moved_bytes / seconds / 1e9}
        if self.flops:
            row.numbers |= {"flops": self.flops, "gflop_per_s": self.flops / seconds / 1e9}
        if self.floor:
            row.numbers["floor_share"] = spread(times[self.floor]).median / seconds
        self.count()
        return row

    def judge(self, target: Target, times: Mapping[str, Sequence[float]]) -> Figure:
        """A target of kind "value" is held against the row's own value, all others against a ratio of times."""
        if target.kind != "value":
            return figure(target, times)
        found = self.row.values[target.column]
        return Figure(target.column, "value", found.median, found.p10, found.p90, target.number, target.sense)

    def count(self) -> None:
        """Operator calls and peak memory of one call, fused and eager."""
        with torch.set_grad_enabled(self.grad):
            for name in ("fused", "eager"):
                if name in self.runs:
                    found = call_cost.of_call(self.runs[name])
                    self.row.numbers |= {f"{name}_op_calls": found.op_calls, f"{name}_peak_mb": found.peak_bytes / 1e6}


def fill_kept(row: Row, kept: Mapping[str, int], column: str, target: float) -> Row:
    """``row`` (unit "MB") with the bytes ``kept``, those of "fused" held to at most ``target`` times those of ``column``."""
    row.repetitions = 1
    row.values = {name: Spread(*(count / 1e6,) * 3) for name, count in kept.items()}
    found = kept["fused"] / kept[column]
    row.figures = [Figure(column, "ratio", found, found, found, target, "at most")]
    return row


@dataclass
class KeptProblem(Problem):
    """A row on bytes kept for backward, in "MB": ``runs`` are the forward calls that keep them, and nothing is timed.

    Attributes:
        kept: the bytes, by contestant; "fused" among them.
        share: column, and how much of its bytes the fused call may keep.
    """

    kept: dict[str, int] = field(default_factory=dict)
    share: tuple[str, float] = ("eager", 1.0)

    def measure(self, settings: Settings, tick: Callable[[], None]) -> Row:
        tick()
        return self.finish({})

    def finish(self, samples: Mapping[str, Sequence[float]]) -> Row:
        fill_kept(self.row, self.kept, *self.share)
        self.count()
        return self.row
