"""Timing on a GPU: stopwatches, CUDA graphs, memory, the two ceilings of the machine.

A rehearsal on the CPU has a stand-in for each.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .timing import HostStopwatch, Stopwatch, quantile

FLUSH_BYTES = 1 << 28  # several times the second-level cache of any GPU
SLACK_SECONDS = 1e-4  # the GPU is kept busy for this much longer than the host takes
LONGEST_HOST_SECONDS = 0.02


class EventStopwatch:
    """Times a call's work on the GPU by a pair of events around it.

    Before a call a large buffer is read. Afterwards the cache holds nothing of the inputs, and no written line whose
    way to memory would fall into the measured time. Filling a buffer would leave as many such lines as fit. Then the
    GPU waits for as long as the host needs to enqueue the call. The time between the events therefore has no gaps in
    which the GPU waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._host: dict[str, deque[float]] = {}  # the host's latest times for each contestant, in seconds
        self._pending: list[tuple[str, Any, Any]] = []
        self._begun = 0.0
        self._cycles = self._cycles_a_second()

    def _cycles_a_second(self) -> float:
        cycles, fastest = 20_000_000, 0.0
        for _ in range(5):  # the first rounds run at the clock of an idle GPU
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            torch.cuda._sleep(cycles)
            after.record()
            torch.cuda.synchronize(self.device)
            fastest = max(fastest, cycles / max(before.elapsed_time(after) * 1e-3, 1e-6))
        return fastest

    def reset(self) -> None:
        self._host.clear()
        self._pending.clear()

    def begin(self, name: str) -> None:
        self._buffer.sum()
        wait = min(1.5 * quantile(self._host.get(name, (0.0,)), 0.5) + SLACK_SECONDS, LONGEST_HOST_SECONDS)
        torch.cuda._sleep(int(wait * self._cycles))
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._pending.append((name, before, after))
        before.record()
        self._begun = time.perf_counter()

    def end(self) -> None:
        name, _, after = self._pending[-1]
        after.record()
        self._host.setdefault(name, deque(maxlen=5)).append(time.perf_counter() - self._begun)

    def laps(self) -> Iterator[tuple[str, float]]:
        torch.cuda.synchronize(self.device)
        found = [(name, before.elapsed_time(after) * 1e-3) for name, before, after in self._pending]
        self._pending.clear()
        return iter(found)


class WaitingStopwatch:
    """Times calls by the host's clock, which starts when the device is idle.

    Args:
        until_done: whether the clock stops when the device has finished the work, or when the call returns.
    """

    def __init__(self, device: torch.device, until_done: bool) -> None:
        self.device, self.until_done = device, until_done
        self.host = HostStopwatch()

    def reset(self) -> None:
        self.host.reset()

    def begin(self, name: str) -> None:
        synchronize(self.device)
        self.host.begin(name)

    def end(self) -> None:
        if self.until_done:
            synchronize(self.device)
        self.host.end()

    def laps(self) -> Iterator[tuple[str, float]]:
        return self.host.laps()


def stopwatch(device: torch.device, clock: str = "work") -> Stopwatch:
    """Return the stopwatch of a clock.

    "work" is the device's own time, "call" the host's, and "latency" lasts from the call until the work is done.
    """
    if clock == "work":
        return EventStopwatch(device) if device.type == "cuda" else HostStopwatch()
    return WaitingStopwatch(device, until_done=clock == "latency")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give freed memory back, so that later work finds all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return ``run`` as the replay of a CUDA graph; on the CPU ``run`` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay(outputs: object = outputs) -> None:
        graph.replay()

    return replay


def allocated_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the growth of allocated memory after ``run``, with its outputs held; 0 on the CPU, which counts none."""
    if device.type != "cuda":
        return 0
    warm = run()
    del warm
    release(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    after = torch.cuda.memory_allocated(device)
    del outputs
    return after - before


def ceilings(device: torch.device, copied_bytes: int = 1 << 30, size: int = 8192) -> dict[str, float]:
    """Measure the two ceilings of this machine.

    They are the GB/s of a large copy, bytes read plus bytes written, and the TFLOP/s of a large bf16 product.
    """
    source = torch.randn(copied_bytes // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product: Tensor = torch.empty_like(left)

    def copy() -> object:
        return target.copy_(source)

    def multiply() -> object:
        return torch.mm(left, right, out=product)

    watch = stopwatch(device)
    watch.reset()
    times: dict[str, list[float]] = {"copy": [], "multiply": []}
    for repetition in range(-2, 9):
        for name, run in (("copy", copy), ("multiply", multiply)):
            watch.begin(name)
            run()
            watch.end()
        for name, seconds in watch.laps():
            if repetition >= 0:
                times[name].append(seconds)
    medians = {name: quantile(samples, 0.5) for name, samples in times.items()}
    return {
        "copy_gb_per_s": 2 * copied_bytes / medians["copy"] / 1e9,
        "bf16_tflop_per_s": 2 * size**3 / medians["multiply"] / 1e12,
    }
