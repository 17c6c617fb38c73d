"""Problems of the ops that take a step of a depth connection: any number of tensors in, streams and parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import accuracy
from .calls import forward_and_backward, name_of, on_backend
from .compiled import Compiled
from .place import CPU, IN_USE, Place
from .problems import Problem, Subject
from .rows import Row, Target

SIZES = ((8192, 512), (4096, 1024))
DTYPES = (torch.float32, torch.bfloat16)
SHARE_OF_COPY = {torch.float32: 0.80, torch.bfloat16: 0.60}  # of the forward
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Step:
    """One op with one set of options.

    Attributes:
        subject, name: of its rows.
        fused, reference: functions of ``inputs``, by position.
        inputs: (rows, features, dtype, device) -> random tensors.
        names: of the inputs, and of the outputs.
        forward, backward: elements that have to move, in C a token.
        speedup: of forward + backward over torch.compile.
    """

    subject: str
    name: str
    fused: Function
    reference: Function
    inputs: Callable[[int, int, torch.dtype, torch.device | str], list[Tensor]]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    forward: int
    backward: int
    speedup: float


def affines(count: int, features: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Return weights and biases of ``count`` norms, near their initial values."""
    made = []
    for _ in range(count):
        made += [1 + 0.1 * torch.randn(features, device=device), 0.1 * torch.randn(features, device=device)]
    return [tensor.to(dtype) for tensor in made]


def rows_of(count: int, rows: int, features: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    return [torch.randn(rows, features, device=device).to(dtype) for _ in range(count)]


def moved_bytes(step: Step, rows: int, features: int, dtype: torch.dtype, backward: bool) -> int:
    return rows * features * (step.forward + step.backward * backward) * dtype.itemsize


def copies(step: Step, inputs: list[Tensor], backward: bool) -> Callable[[], object]:
    """Return a copy of as many bytes, half of them read, into memory allocated afresh."""
    like = inputs[0]
    counts = [like.numel() * step.forward // 2, *([like.numel() * step.backward // 2] if backward else [])]
    source = torch.randn(max(counts), device=like.device).to(like.dtype)
    return lambda: [torch.empty_like(source[:count]).copy_(source[:count]) for count in counts]


def problem(place: Place, step: Step, dtype: torch.dtype, rows: int, features: int, backward: bool) -> Problem:
    inputs = step.inputs(rows, features, dtype, place.device)
    if backward:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        cotangents = [torch.randn_like(inputs[0]) for _ in step.names[1]]
        call = functools.partial(forward_and_backward, leaves=leaves, cotangents=cotangents)
    else:
        call = functools.partial(_apply, inputs=inputs)
    with torch.set_grad_enabled(backward):
        compiled = place.compiled.get(step.reference, call)
    runs: dict[str, Callable[[], object]] = {"eager": lambda: call(step.reference)}
    if compiled is not None:
        runs["compile"] = lambda: call(compiled)
    runs |= place.fused(lambda: call(step.fused))
    runs["against"] = copies(step, inputs, backward)
    elements = step.forward + step.backward * backward
    label = f"{step.name} forward{' + backward' if backward else ''}"
    row = Row(step.subject, label, name_of(dtype), f"N={rows} C={features}", "ms", against=f"copy of {elements}C")
    size = moved_bytes(step, rows, features, dtype, backward)
    row.missing, row.note = place.compiled.missing(), f"{size / 1e6:.1f} MB moved"
    share = None if backward else SHARE_OF_COPY[dtype]
    targets = [
        Target("eager", "speedup", None),
        Target("compile", "speedup", step.speedup if backward else 1.0),
        Target("against", "share", share),
    ]
    return Problem(row, runs, targets, 0.6, backward, moved_bytes=size, floor="against", place=place)


def _apply(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return function(*inputs)


def check(
    step: Step,
    dtype: torch.dtype,
    rows: int,
    features: int,
    backend: str = IN_USE,
    device: torch.device = CPU,
    roundings: float = 1,
) -> accuracy.Check:
    """Compare outputs and every gradient with fp64."""
    inputs = step.inputs(rows, features, dtype, device)
    cotangents = [torch.randn_like(inputs[0]) for _ in step.names[1]]

    def run(function: Function, to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(to).requires_grad_() for tensor in inputs]
        return forward_and_backward(function, leaves, [tensor.to(to) for tensor in cotangents])

    labels = [*step.names[1], *(f"gradient of {name}" for name in step.names[0])]
    exact, eager = run(step.reference, torch.float64), run(step.reference, dtype)
    call = functools.partial(run, step.fused, dtype)
    found: Any = (on_backend(backend, call) if backend else call)()
    return accuracy.compare(step.subject, dtype, labels, exact, eager, found, roundings)


def subject(name: str, found: list[Step]) -> Subject:
    """Make the subject of an op's steps."""
    problems = {}
    for step in found:
        for dtype in DTYPES:
            for rows, features in SIZES:
                for backward in (False, True):
                    label = f"{step.name} {'training' if backward else 'forward'} {name_of(dtype)} {features}"
                    problems[label] = functools.partial(
                        problem, step=step, dtype=dtype, rows=rows, features=features, backward=backward
                    )

    def checks(dtype: torch.dtype) -> Iterator[accuracy.Check]:
        for step in found:
            for rows, features in ((64, 512), (17, 65)):
                yield check(step, dtype, rows, features)

    def compile_all(compiled: Compiled, dtype: torch.dtype) -> None:
        for made in problems.values():
            if made.keywords["dtype"] == dtype:
                made(Place(compiled))

    return Subject(name, problems, checks, dtypes=DTYPES, compile=compile_all, on_request=True)
