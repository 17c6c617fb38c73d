"""Problems: rows of the table before they are measured.

A subject is the problems of a file, their check, and the checks that their rows need. The command line,
pytest-benchmark and the run on a GPU measure the same problems, each with its own clock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from . import allocator, call_cost
from .accuracy import Check
from .calls import Runs, repeated
from .compiled import Compiled
from .gpu_timing import allocated_bytes
from .place import FUSED, Place
from .rows import Figure, Row, Settings, Target, figure
from .timing import Spread, Stopwatch, interleave, spread

SECONDS = {"ms": 1e3, "us": 1e6}


@dataclass(frozen=True)
class Timekeeper:
    """Timing method of a run; the default is the command line's.

    Attributes:
        stopwatch: returns the stopwatch for the ``clock`` of a problem; None uses the host's clock for all.
        maximum, warmups: the most repetitions, and the calls before the first.
    """

    stopwatch: Callable[[str], Stopwatch] | None = None
    maximum: int = 200
    warmups: int = 1


HOST = Timekeeper()


@dataclass
class Problem:
    """A problem: the contestants, the bytes or operations they need, and the figures made of their times.

    Attributes:
        row: the row without its numbers; its unit is "ms", "us" or "tokens/s".
        runs: a call of each contestant, by its name in ``Row.values``; ``place`` names the fused ones.
        seconds: how long to measure, at ``Settings.seconds`` of 1.
        grad: whether gradients are enabled.
        calls: calls in a repetition; more than one if a single call is too short for a clock.
        tokens: tokens of a call, for the unit "tokens/s".
        moved_bytes, flops: bytes or operations that a call needs at least, by a formula; 0 if the row is about
            something else.
        floor: the contestant that does only this minimum; empty if there is none.
        place: the place that the problem was made for.
        clock: the timed quantity on a GPU: its own "work", the host's "call", or the "latency" until the work is done.
        verify: checks a backend on the timed tensors themselves; None if the subject's check is enough.
        keeps_memory: whether all contestants run under ``dl.keep_memory()``.
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
    place: Place = field(default_factory=Place)
    clock: str = "work"
    verify: Callable[[str], Check] | None = None
    keeps_memory: bool = False

    def batches(self) -> Runs:
        """Return one repetition of each contestant, as it is timed."""
        return {name: repeated(run, self.calls) for name, run in self.runs.items()}

    def measure(self, settings: Settings, tick: Callable[[], None], keeper: Timekeeper = HOST) -> list[Row]:
        """Time all contestants in turn; return a row for each backend under test."""
        with torch.set_grad_enabled(self.grad), allocator.keeping(self.keeps_memory):
            samples = interleave(
                self.batches(),
                seconds=self.seconds * settings.seconds,
                minimum=settings.minimum,
                maximum=keeper.maximum,
                warmups=keeper.warmups,
                on_repetition=tick,
                stopwatch=None if keeper.stopwatch is None else keeper.stopwatch(self.clock),
            )
            return self.finish(samples)

    def keeping_memory(self) -> Problem:
        """Return this problem for a process that keeps its memory."""
        self.row.name += allocator.KEPT
        self.keeps_memory = True
        return self

    def without(self, backend: str) -> None:
        """Leave a backend out."""
        self.place = replace(self.place, backends=tuple(name for name in self.place.backends if name != backend))
        del self.runs[backend or FUSED]

    def blank(self, backend: str) -> Row:
        """Return the row of a backend, without numbers."""
        row = copy.deepcopy(self.row)
        row.backend = backend
        return row

    def own(self, backend: str) -> dict[str, str]:
        """Return the contestants in a backend's row: their names in the row, by those in ``runs``."""
        fused = {name or FUSED for name in self.place.backends}
        chosen = backend or FUSED
        return {name: FUSED if name == chosen else name for name in self.runs if name not in fused - {chosen}}

    def finish(self, samples: Mapping[str, Sequence[float]]) -> list[Row]:
        """Return a row for each backend, from the seconds of every repetition of every contestant."""
        times = {name: [seconds / self.calls for seconds in found] for name, found in samples.items()}
        return [
            self.fill(self.blank(backend), {shown: times[name] for name, shown in self.own(backend).items()})
            for backend in self.place.backends
        ]

    def fill(self, row: Row, times: Mapping[str, Sequence[float]]) -> Row:
        """Fill ``row`` with its numbers, from the seconds of every call of its contestants."""
        row.repetitions = len(times[FUSED])
        if row.unit == "tokens/s":
            row.values = {name: spread([self.tokens / seconds for seconds in found]) for name, found in times.items()}
        else:
            row.values = {name: spread(found, SECONDS[row.unit]) for name, found in times.items()}
        row.figures = [judge(row, target, times) for target in self.targets if target.column in times]
        seconds = spread(times[FUSED]).median
        if self.moved_bytes:
            row.numbers |= {"bytes": self.moved_bytes, "gb_per_s": self.moved_bytes / seconds / 1e9}
        if self.flops:
            row.numbers |= {"flops": self.flops, "gflop_per_s": self.flops / seconds / 1e9}
        if self.floor:
            row.numbers["floor_share"] = spread(times[self.floor]).median / seconds
        self.count(row)
        return row

    def count(self, row: Row) -> None:
        """Count operator calls and peak memory of one call, fused and eager.

        On a GPU, which has its own memory, neither is counted.
        """
        if self.place.gpu:
            return
        with torch.set_grad_enabled(self.grad):
            for name in (FUSED, "eager"):
                if name in self.runs:
                    found = call_cost.of_call(self.runs[name])
                    row.numbers |= {f"{name}_op_calls": found.op_calls, f"{name}_peak_mb": found.peak_bytes / 1e6}


def judge(row: Row, target: Target, times: Mapping[str, Sequence[float]]) -> Figure:
    """Return the figure of ``target``: the row's own value for kind "value", else a ratio of times."""
    if target.kind != "value":
        return figure(target, times)
    found = row.values[target.column]
    return Figure(target.column, "value", found.median, found.p10, found.p90, target.number, target.sense)


@dataclass
class KeptProblem(Problem):
    """A row on bytes kept for backward, in "MB".

    ``runs`` are the forward calls that keep the bytes. Nothing is timed.

    Attributes:
        kept: the bytes, by contestant.
        share: a column, and the largest allowed share of its bytes for a fused call.
    """

    kept: dict[str, int] = field(default_factory=dict)
    share: tuple[str, float] = ("eager", 1.0)

    def measure(self, settings: Settings, tick: Callable[[], None], keeper: Timekeeper = HOST) -> list[Row]:
        tick()
        return self.finish({})

    def finish(self, samples: Mapping[str, Sequence[float]]) -> list[Row]:
        return [self.fill_kept(self.blank(backend), self.own(backend)) for backend in self.place.backends]

    def fill_kept(self, row: Row, own: Mapping[str, str]) -> Row:
        """Fill ``row`` with its bytes; on a GPU also with the allocator's count, outputs included."""
        column, target = self.share
        kept = {shown: self.kept[name] for name, shown in own.items()}
        row.repetitions = 1
        row.values = {name: Spread(*(size / 1e6,) * 3) for name, size in kept.items()}
        found = kept[FUSED] / kept[column]
        row.figures = [Figure(column, "ratio", found, found, found, target, "at most")]
        if self.place.gpu:
            sizes = {shown: allocated_bytes(self.runs[name], self.place.device) for name, shown in own.items()}
            row.numbers |= {f"allocated_{name}_mb": size / 1e6 for name, size in sizes.items()}
        self.count(row)
        return row


Maker = Callable[[Place], Problem]


@dataclass(frozen=True)
class Subject:
    """One file of ``subjects/``, as ``SUBJECT`` in it.

    Attributes:
        problems: the makers of its rows, by name; a problem is made right before it is measured.
        check: compares the subject with fp64 in one of ``dtypes``, at small sizes.
        needs: the subjects whose checks its rows need; empty for its own.
        in_table: whether its problems are rows of the table; pytest has them in any case.
        on_request: whether a run has them only if it names the subject, because they take minutes.
        compile: compiles the rivals of its problems of one dtype.
        ticks: of the progress bar; None for the smallest number of repetitions of its problems.
    """

    name: str
    problems: Mapping[str, Maker] = field(default_factory=dict)
    check: Callable[[torch.dtype], Iterator[Check]] | None = None
    needs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    in_table: bool = True
    on_request: bool = False
    compile: Callable[[Compiled, torch.dtype], object] | None = None
    ticks: Callable[[Settings], int] | None = None

    @property
    def stands_on(self) -> tuple[str, ...]:
        return self.needs or (self.name,)

    def ticks_in(self, settings: Settings) -> int:
        return len(self.problems) * settings.minimum if self.ticks is None else self.ticks(settings)
