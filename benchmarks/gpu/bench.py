"""The instruments of `make gpu`: the sizes of its problems, and the way from a problem to its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..measure.accuracy import Check
from ..measure.compiled import Compiled
from ..measure.gpu_timing import release, stopwatch
from ..measure.place import Place
from ..measure.problems import Maker, Problem, Timekeeper
from ..measure.rows import Row, Settings
from ..measure.timing import Stopwatch
from ..subjects import overhead
from .checker import Checker

BF16, FP32 = torch.bfloat16, torch.float32
MOST_REPETITIONS = 400
Needed = tuple[str, torch.dtype, int]  # subject, dtype, D of the check that a problem needs


@dataclass(frozen=True)
class Sizes:
    """The problems: (D, rows, dtype) of the gates, (D, rows) of the cells, (D, heads, batch, length) of the layers."""

    gates: tuple[tuple[int, int, torch.dtype], ...]
    cells: tuple[tuple[int, int], ...]
    layers: tuple[tuple[int, int, int, int], ...]
    stack: tuple[int, int, int, int, int]  # a layer's four sizes, and the number of layers
    memory: tuple[int, int]
    few: tuple[int, tuple[int, ...]]  # D, and numbers of rows
    steps: tuple[tuple[int, int, torch.dtype], ...]  # (C, rows, dtype) of the other ops, the main one first
    decoding: tuple[int, int, int, int]  # D, heads, layers, vocabulary
    check_elements: int  # of c in a check
    copied_bytes: int = 1 << 30
    matrix: int = 8192
    calls: int = overhead.CALLS_AT_ONCE
    main: int = 3  # index of the first of the gates' problems with targets


FULL = Sizes(
    gates=(
        *((512, 65536, BF16), (1024, 65536, BF16), (2048, 32768, BF16)),
        *((512, 32768, FP32), (1024, 32768, FP32), (2048, 16384, FP32)),
        *((256, 131072, BF16), (768, 65536, BF16), (4096, 16384, BF16), (8192, 8192, BF16)),
        *((256, 65536, FP32), (768, 32768, FP32), (4096, 8192, FP32), (8192, 4096, FP32)),
    ),
    cells=((512, 65536), (1024, 32768)),
    layers=((512, 8, 32, 512), (1024, 16, 16, 512)),
    stack=(512, 8, 32, 512, 6),
    memory=(512, 16384),
    few=(512, (1, 8, 64)),
    steps=((512, 65536, BF16), (1024, 32768, BF16), (512, 32768, FP32)),
    decoding=(512, 8, 6, 32000),
    check_elements=1 << 22,
)
TINY = Sizes(
    gates=((16, 5, BF16), (16, 5, FP32)),
    cells=((16, 5),),
    layers=((16, 2, 1, 3),),
    stack=(16, 2, 1, 3, 2),
    memory=(16, 4),
    few=(16, (1,)),
    steps=((16, 4, BF16),),
    decoding=(16, 2, 1, 50),
    check_elements=48,
    copied_bytes=1 << 12,
    matrix=16,
    calls=2,
    main=1,
)


@dataclass
class Bench:
    """The common state of all problems.

    Attributes:
        verified: the checks on timed tensors, by subject, backend, dtype and size of the row.
    """

    device: torch.device
    backends: tuple[str, ...]
    sizes: Sizes
    checker: Checker
    settings: Settings = field(default_factory=Settings)
    warmups: int = 3
    watches: dict[str, Stopwatch] = field(default_factory=dict)
    verified: dict[tuple[str, str, str, str], Check] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget compiled code, so that no limit on recompilations is reached, and release memory."""
        if self.settings.compile:
            torch._dynamo.reset()
        release(self.device)

    def watch(self, clock: str) -> Stopwatch:
        """Return the stopwatch of a clock; it is made once, because the stopwatch of events has a large buffer."""
        if clock not in self.watches:
            self.watches[clock] = stopwatch(self.device, clock)
        return self.watches[clock]

    def place(self, backends: tuple[str, ...], compile: bool = True, mode: str | None = None) -> Place:
        return Place(Compiled(self.settings.compile and compile, mode), self.device, backends, gpu=True)

    def failure(self, problem: Problem, backend: str) -> str | None:
        """Say what is wrong with a backend on the timed tensors; None if nothing is, or nothing checks it."""
        if problem.verify is None:
            return None
        key = (problem.row.subject, backend, problem.row.dtype, problem.row.size)
        if key not in self.verified:
            self.verified[key] = replace(problem.verify(backend), backend=backend)
            self.checker.on_check(self.verified[key])
        made = self.verified[key]
        return None if made.passed else f"{made.subject} {made.dtype} {made.size} {made.summary}"

    def rows(
        self,
        make: Maker,
        needed: Needed,
        compile: bool = True,
        mode: str | None = None,
        backends: tuple[str, ...] | None = None,
    ) -> Iterator[Row]:
        """Yield the problem's rows, red ones first; a backend with a red check is not timed.

        Args:
            compile, mode: whether torch.compile is among the rivals, and in which mode.
            backends: those under test; None for all.
        """
        self.reset()
        subject, dtype, features = needed
        red = {name: self.checker.failure(subject, name, dtype, features) for name in backends or self.backends}
        green = tuple(name for name, reason in red.items() if reason is None)
        problem = make(self.place(green, compile and bool(green), mode))
        for name in green:
            red[name] = self.failure(problem, name)
            if red[name] is not None:
                problem.without(name)
        for name, reason in red.items():
            if reason is not None:
                row = problem.blank(name)
                row.failure = reason
                yield row
        if not problem.place.backends:
            return
        keeper = Timekeeper(self.watch, MOST_REPETITIONS, self.warmups)
        for row in problem.measure(self.settings, lambda: None, keeper):
            made = self.checker.check(subject, row.backend, dtype, features)
            row.numbers |= {"error": made.error, "eager_error": made.eager_error}
            yield row
