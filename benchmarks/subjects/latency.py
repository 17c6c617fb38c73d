"""The time from a call of the gates on few rows until a GPU has finished it."""

from __future__ import annotations

import functools

import torch

import depthlstm_fast as dl

from ..measure.calls import Function, Runs, name_of
from ..measure.gpu_timing import captured
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target
from . import gates

GRAPHS = "reduce-overhead"  # the mode of torch.compile that captures CUDA graphs


def few_rows(place: Place, dtype: torch.dtype, rows: int, features: int) -> Problem:
    """Make the problem of plain calls, or of CUDA graphs if torch.compile captures its own."""
    graphs = place.compiled.mode == GRAPHS
    inputs = gates.make_inputs(rows, features, dtype, place.device)

    def three_times(function: Function) -> None:
        for _ in range(3):  # a run, a recording, a replay; nothing may hold the outputs meanwhile
            function(*inputs)

    with torch.no_grad():
        compiled = place.compiled.get(gates.reference_gates, three_times)
        runs: Runs = {"eager": functools.partial(gates.reference_gates, *inputs)}
        runs |= {name: functools.partial(call, *inputs) for name, call in place.functions(dl.depth_lstm_gates).items()}
        if graphs:
            runs = {name: captured(run, place.device) for name, run in runs.items()}
    if compiled is not None:
        runs["compile"] = lambda: compiled(*inputs)
    name = "few rows, CUDA graph" if graphs else "few rows, plain call"
    row = Row(
        "latency", name, name_of(dtype), f"N={rows} D={features}", "us", note="from the call until the GPU is done"
    )
    row.missing = place.compiled.missing()
    targets = [Target("eager", "speedup"), Target("compile", "speedup")]
    return Problem(row, runs, targets, 0.3, grad=False, place=place, clock="latency")


SUBJECT = Subject("latency", needs=("gates",), in_table=False)
