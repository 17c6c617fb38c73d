"""Ops that take a list of tensors, forward and forward + backward, against the bytes that have to move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import accuracy
from .calls import Runs, name_of, on_backend
from .compiled import Compiled
from .place import CPU, Place
from .problems import Problem, Subject
from .rows import Row, Target

DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((8192, 512), (4096, 1024))  # rows, features
Lists = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class ListOp:
    """An op as it is measured.

    Attributes:
        subject, label: of its rows.
        sources, outputs: numbers of tensors (rows, features).
        function, reference: called with the sources and then the parameters; ``function`` uses the default backend.
        parameters: (features) -> further inputs, in fp32.
        share: of the copy's speed that the forward has to reach, by dtype.
        speedup: of forward + backward over torch.compile.
    """

    subject: str
    label: str
    sources: int
    outputs: int
    function: Lists
    reference: Lists
    parameters: Callable[[int], list[Tensor]]
    share: dict[torch.dtype, float]
    speedup: float

    def inputs(self, rows: int, features: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        sources = [torch.randn(rows, features, device=device).to(dtype) for _ in range(self.sources)]
        return [*sources, *(parameter.to(device) for parameter in self.parameters(features))]

    def elements(self, backward: bool) -> int:
        """Elements a token over C: sources in and outputs out; backward, sources and du in and dsources out."""
        return self.sources + self.outputs + (2 * self.sources + self.outputs if backward else 0)


def train(function: Lists, leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = function(*leaves)
    return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))


def _copy(like: Tensor, elements: int) -> Callable[[], object]:
    """Return a copy that reads one half of ``elements`` times ``like`` and writes the other, afresh."""
    sources = [torch.randn(like.shape, device=like.device).to(like.dtype) for _ in range(elements // 2)]
    half = torch.randn(like.numel() // 2, device=like.device).to(like.dtype) if elements % 2 else None

    def run() -> object:
        made = [torch.empty_like(source).copy_(source) for source in sources]
        return made if half is None else [*made, torch.empty_like(half).copy_(half)]

    return run


def make(place: Place, op: ListOp, rows: int, features: int, dtype: torch.dtype, backward: bool) -> Problem:
    """Make a problem: the op against its copy, eager and torch.compile of the reference."""
    inputs = op.inputs(rows, features, dtype, place.device)
    leaves = [tensor.requires_grad_() for tensor in inputs] if backward else inputs
    cotangents = [torch.randn_like(inputs[0]) for _ in range(op.outputs)]

    def call(function: Lists) -> object:
        return train(function, leaves, cotangents) if backward else function(*inputs)

    with torch.set_grad_enabled(backward):  # the timed calls' mode: another one would be compiled anew
        compiled = place.compiled.get(op.reference, call)
    runs: Runs = {"eager": lambda: call(op.reference)}
    if compiled is not None:
        runs["compile"] = lambda: call(compiled)
    runs |= place.fused(lambda: call(op.function))
    elements = op.elements(backward)
    runs["against"] = _copy(inputs[0].detach(), elements)
    name = f"{op.label} forward" + (" + backward" if backward else "")
    row = Row(op.subject, name, name_of(dtype), f"N={rows} C={features}", "ms", against=f"copy of {elements}C")
    row.missing, size = place.compiled.missing(), rows * features * elements * dtype.itemsize
    row.note = f"{size / 1e6:.1f} MB moved"
    targets = [
        Target("eager", "speedup"),
        Target("compile", "speedup", op.speedup if backward else 1.0),
        Target("against", "share", None if backward else op.share[dtype]),
    ]
    return Problem(
        row, runs, [] if place.gpu else targets, 1.0, backward, moved_bytes=size, floor="against", place=place
    )


def check(
    op: ListOp,
    dtype: torch.dtype,
    rows: int,
    features: int,
    backend: str = "auto",
    device: torch.device = CPU,
    roundings: float = 1,
) -> accuracy.Check:
    """Compare outputs and every gradient with fp64."""
    inputs = op.inputs(rows, features, dtype, device)
    cotangents = [torch.randn(rows, features, device=device).to(dtype) for _ in range(op.outputs)]

    def run(function: Lists, to: torch.dtype | None) -> tuple[Tensor, ...]:
        leaves, gradients = (
            [t.detach() if to is None else t.to(to) for t in tensors] for tensors in (inputs, cotangents)
        )
        return train(function, [leaf.requires_grad_() for leaf in leaves], gradients)

    exact, eager = run(op.reference, torch.float64), run(op.reference, None)
    names = [*(f"u{v}" for v in range(op.outputs)), *(f"gradient {n}" for n in range(len(inputs)))]
    found: Any = on_backend(backend, lambda: run(op.function, None))()
    return accuracy.compare(op.subject, dtype, names, exact, eager, found, roundings)


def subject(name: str, ops: list[ListOp]) -> Subject:
    """Return the subject of ``ops``, at every size and dtype."""
    problems = {
        f"{op.label} {'training' if backward else 'forward'} {name_of(dtype)} C={features}": functools.partial(
            make, op=op, rows=rows, features=features, dtype=dtype, backward=backward
        )
        for op in ops
        for dtype in DTYPES
        for rows, features in SIZES
        for backward in (False, True)
    }

    def checks(dtype: torch.dtype) -> Iterator[accuracy.Check]:
        for op in ops:
            for rows, features in ((64, 512), (17, 65)):
                yield check(op, dtype, rows, features)

    def compile_all(compiled: Compiled, dtype: torch.dtype) -> None:
        for op in ops:
            for rows, features in SIZES:
                for backward in (False, True):
                    make(Place(compiled), op, rows, features, dtype, backward)

    return Subject(name, problems, checks, dtypes=DTYPES, compile=compile_all, on_request=True)
