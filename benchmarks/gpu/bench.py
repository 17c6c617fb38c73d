"""What `make gpu` measures with: the sizes of its problems and what every subject needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..measure.gpu_timing import release
from ..measure.rows import Row, Settings, Target, timed_backends
from ..measure.timing import Stopwatch
from ..subjects import overhead
from .checker import Checker

BF16, FP32 = torch.bfloat16, torch.float32
Runs = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """The problems: (D, rows, dtype) of the gates, (D, rows) of the cells, (D, heads, batch, length) of the layers."""

    gates: tuple[tuple[int, int, torch.dtype], ...]
    cells: tuple[tuple[int, int], ...]
    layers: tuple[tuple[int, int, int, int], ...]
    stack: tuple[int, int, int, int, int]  # as a layer, and how many of them
    memory: tuple[int, int]
    few: tuple[int, tuple[int, ...]]  # D, and numbers of rows
    check_elements: int  # of c in a check
    copied_bytes: int = 1 << 30
    matrix: int = 8192
    batches: int = overhead.BATCHES
    calls: int = overhead.CALLS
    latencies: int = 200
    main: int = 3  # the first of the gates' problems, which the targets are about


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
    check_elements=1 << 22,
)
TINY = Sizes(
    gates=((16, 5, BF16), (16, 5, FP32)),
    cells=((16, 5),),
    layers=((16, 2, 1, 3),),
    stack=(16, 2, 1, 3, 2),
    memory=(16, 4),
    few=(16, (1,)),
    check_elements=48,
    copied_bytes=1 << 12,
    matrix=16,
    batches=1,
    calls=2,
    latencies=2,
    main=1,
)


@dataclass
class Bench:
    """What every subject needs."""

    device: torch.device
    watch: Stopwatch
    backends: tuple[str, ...]
    sizes: Sizes
    checker: Checker
    settings: Settings = field(default_factory=Settings)
    warmups: int = 3

    def reset(self) -> None:
        """Forget what was compiled, so that no limit on recompilations is met, and release memory."""
        if self.settings.compile:
            torch._dynamo.reset()
        release(self.device)

    def split(self, blank: Callable[[], Row], *key: object) -> tuple[dict[str, Row], list[Row]]:
        """Rows to be timed, by backend, and rows that their check keeps from it; ``key`` is that of the check without the backend."""
        timed, red = {}, []
        subject, dtype, features = key
        for backend in self.backends:
            row = blank()
            row.backend = backend
            row.failure = self.checker.failure(subject, backend, dtype, features)  # type: ignore[arg-type]
            if row.failure is None:
                made = self.checker.check(subject, backend, dtype, features)  # type: ignore[arg-type]
                row.numbers = {"error": made.error, "eager_error": made.eager_error}
                timed[backend] = row
            else:
                red.append(row)
        return timed, red

    def time(self, rows: Mapping[str, Row], runs: Runs, targets: list[Target], seconds: float) -> list[Row]:
        return timed_backends(rows, runs, targets, self.settings, seconds, self.watch, self.warmups)
