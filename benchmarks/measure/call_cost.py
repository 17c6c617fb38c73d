"""Costs of one call besides time: operator calls and the peak memory of torch's allocator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from depthlstm_fast import memory


class Cost(NamedTuple):
    """The cost of a call, as torch.profiler saw it.

    Attributes:
        op_calls: operators that called no further one (`aten::mm`, not the `aten::matmul` around it), with those of
            backward, views and allocations.
        peak_bytes: the most memory allocated at once, above the level before the call.
    """

    op_calls: int
    peak_bytes: int


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Silence file descriptor 2 inside the ``with`` block.

    The profiler's library reports every start and stop there, at every log level.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def torchs_memory() -> Iterator[None]:
    """Leave all memory to torch's allocator, because the profiler does not see blocks of the package's pool."""
    limit = memory.memory_stats().limit_bytes
    memory.set_pool_limit(0)
    try:
        yield
    finally:
        memory.set_pool_limit(limit)


def of_call(run: Callable[[], object]) -> Cost:
    """Return the cost of one call.

    Memory that a library allocates by itself, as oneDNN does for its scratch, is not seen.
    """
    with torchs_memory(), silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
    del outputs  # freed after the profile, because outputs count until the end of the call
    # The raw events are read, because a table of them takes longer than most calls. It also gives bytes to operators
    # and has no peak.
    raw = profiler.profiler.kineto_results.events()
    operators = [event for event in raw if "::" in event.name() and not event.name().startswith("autograd::")]
    spans = sorted((event.start_thread_id(), event.start_ns(), -event.end_ns()) for event in operators)
    inside = sum(thread == other and start < -end for (other, _, end), (thread, start, _) in pairwise(spans))
    now = peak = 0
    for event in sorted((event for event in raw if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Cost(len(spans) - inside, peak)
