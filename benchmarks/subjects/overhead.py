"""The host's time for one call with next to nothing to compute."""

from __future__ import annotations

import functools

import torch

import depthlstm_fast as dl

from ..measure.calls import Runs
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target
from . import gates

ROWS, FEATURES = 1, 8
CALLS_AT_ONCE = 200
MICROSECONDS = {False: 15.0, True: 45.0}


def one_call(place: Place, grad: bool, calls: int = CALLS_AT_ONCE) -> Problem:
    """Make the problem of a call without gradients, or of a forward call that records a graph."""
    inputs = [tensor.requires_grad_(grad) for tensor in gates.make_inputs(ROWS, FEATURES, torch.float32, place.device)]
    runs: Runs = {"eager": lambda: gates.reference_gates(*inputs)}
    runs |= {name: functools.partial(call, *inputs) for name, call in place.functions(dl.depth_lstm_gates).items()}
    name = f"one gates call, {'grad' if grad else 'no grad'}"
    row = Row("overhead", name, "fp32", f"N={ROWS} D={FEATURES}", "us", note=f"means over {calls} calls in a row")
    targets = [Target("fused", "value", MICROSECONDS[grad]), Target("eager", "speedup")]
    return Problem(row, runs, targets, 1.0, grad, calls, place=place, clock="call")


SUBJECT = Subject(
    "overhead",
    {"grad" if grad else "no grad": functools.partial(one_call, grad=grad) for grad in MICROSECONDS},
    needs=("gates",),
)
