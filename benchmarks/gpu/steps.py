"""The ops of depth connections as `make gpu` checks and times them: forward, and forward + backward.

A backend without kernels for an op has no row of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from depthlstm_fast.backends.choice import RECORDS

from ..measure import lists, steps
from ..measure.accuracy import Check
from ..measure.place import Place
from ..measure.problems import Problem
from ..measure.rows import Row
from ..subjects import depth_gru_gates, layer_attend, layer_mix, norm_step, siamese_step


class Call(NamedTuple):
    """An op with one set of options.

    Attributes:
        problem: (place, dtype, rows, features, backward) -> its problem.
        check: (dtype, rows, features, backend, device, roundings) -> its check.
    """

    op: str
    problem: Callable[[Place, torch.dtype, int, int, bool], Problem]
    check: Callable[..., Check]


def _step(step: steps.Step) -> Call:
    def problem(place: Place, dtype: torch.dtype, rows: int, features: int, backward: bool) -> Problem:
        return steps.problem(place, step, dtype, rows, features, backward)

    return Call(step.subject, problem, partial(steps.check, step))


def _lists(op: lists.ListOp) -> Call:
    def problem(place: Place, dtype: torch.dtype, rows: int, features: int, backward: bool) -> Problem:
        return lists.make(place, op, rows, features, dtype, backward)

    return Call(op.subject, problem, partial(lists.check, op))


def _gru(normed: bool) -> Call:
    def problem(place: Place, dtype: torch.dtype, rows: int, features: int, backward: bool) -> Problem:
        return depth_gru_gates.problem(place, (rows, features), dtype, normed, backward)

    return Call(depth_gru_gates.NAME, problem, partial(depth_gru_gates.check_at, normed))


CALLS: dict[str, Call] = {
    **{f"norm_step {step.name}": _step(step) for step in norm_step.STEPS},
    "siamese_step": _step(siamese_step.STEP),
    "depth_gru_gates LayerNorm": _gru(True),
    "depth_gru_gates": _gru(False),
    **{op.label: _lists(op) for op in (layer_mix.op(1), layer_mix.op(6), layer_attend.OP)},
}


def backends_of(label: str, backends: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of ``backends`` that have kernels for a call's op."""
    return tuple(name for name in backends if CALLS[label].op in RECORDS[name].widest)


def step_rows(
    bench: Any, label: str, features: int, rows: int, dtype: torch.dtype, compile: bool = True
) -> Iterator[Row]:
    """Yield a call's rows: forward, then forward + backward with every gradient."""
    backends = backends_of(label, bench.backends)
    for backward in (False, True) if backends else ():

        def make(place: Place, backward: bool = backward) -> Problem:
            return CALLS[label].problem(place, dtype, rows, features, backward)

        yield from bench.rows(make, (label, dtype, features), compile, backends=backends)
