"""The operators of every op on every backend: OPERATORS[op][backend].

All backends share an op's schema. The compiled library defines its own operators, and this file defines those of Python
kernels. Tracers see the operators, with the autograd registered here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sharding
from ..backends.choice import RECORDS
from ..backends.record import Backend
from ..modes import is_direct

LIBRARY = "depthlstm_fast"
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    int: "int",
    float: "float",
    bool: "bool",
}


def schema(arguments: list[Any], outputs: Any) -> str:
    """Return the schema of NamedTuples in a row.

    An example is "(Tensor z, Tensor? bias, float eps) -> (Tensor h, Tensor c_out)". A list of tensors is "Tensor[]".
    """

    def listed(fields: Any) -> list[str]:
        hints = typing.get_type_hints(fields)
        return [f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in fields._fields]

    made = ", ".join(listed(outputs))
    if len(outputs._fields) > 1:  # torch prints a single output without parentheses
        made = f"({made})"
    return f"({', '.join(word for fields in arguments for word in listed(fields))}) -> {made}"


class Kernels(NamedTuple):
    """The functions of an op's forward and backward schema."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Operators(NamedTuple):
    """One op on one backend: its operators, and the direct functions of eager calls that only kernels see."""

    traced: Kernels
    direct: Kernels | None = None

    def eager(self, like: Tensor) -> Kernels:
        """Return the functions that an eager call on ``like`` runs."""
        return self.traced if self.direct is None or not is_direct(like) else self.direct


class Op(NamedTuple):
    """The facts of an op that the registry needs.

    Attributes:
        name: its name in OPERATORS and in the folders of kernels.
        operator: its operators' name after the backend's prefix: "gates" for cuda_gates_forward and
            cuda_gates_backward.
        schemas: of forward and backward.
        fakes: shapes for tracers, by the operator's suffix.
        checks: of forward and backward. They raise on arguments that would cause wrong memory accesses, because a
            caller can bypass the public functions.
        save: (ctx, forward arguments): keeps what ``gradients`` needs. With ``saves_outputs`` it is (ctx, forward
            arguments, outputs).
        gradients: (ctx, saved tensors, kernels, *output gradients) -> the gradients of the forward operator's
            arguments.
        layouts: how DTensor shards forward and backward; None where it cannot, as with lists of tensors.
        direct: (operators, torch.ops namespace, prefix) -> the functions of eager calls on a library's operators; None
            for the operators alone.
    """

    name: str
    operator: str
    schemas: tuple[str, str]
    fakes: dict[str, Callable[..., Any]]
    checks: tuple[Callable[..., None], Callable[..., None]]
    save: Callable[..., None]
    gradients: Callable[..., tuple[Any, ...]]
    layouts: tuple[sharding.Layout, sharding.Layout] | None
    direct: Callable[[Kernels, Any, str], Kernels | None]
    saves_outputs: bool = False


OPERATORS: dict[str, dict[str, Operators]] = {}
OPS: dict[str, Op] = {}
_definitions: list[torch.library.Library] = []  # a torch.library.Library must stay alive: its operators go with it


def _define(op: Op, backend: Backend) -> None:
    """Define the operators of Python kernels, with one implementation for every device.

    The first run imports the kernels.
    """
    fragment = torch.library.Library(LIBRARY, "FRAGMENT")
    for suffix, text, check in zip(("forward", "backward"), op.schemas, op.checks, strict=True):

        def run(*arguments: Any, suffix: str = suffix, check: Callable[..., None] = check) -> Any:
            check(backend, *arguments)
            return getattr(backend.kernels(op.name), f"{op.operator}_{suffix}")(*arguments)  # type: ignore[misc]

        name = f"{backend.prefix}{op.operator}_{suffix}"
        fragment.define(name + text)
        # the Triton interpreter takes CPU tensors
        fragment.impl(name, run, "CompositeExplicitAutograd")
    _definitions.append(fragment)


def add_backend(op: Op, backend: Backend, library: str = LIBRARY) -> Operators | None:
    """Register ``op`` on ``backend`` with torch: shapes, autograd, sharding.

    The result is None where the loaded library lacks the op.
    """
    namespace = getattr(torch.ops, library)
    stem = f"{backend.prefix}{op.operator}"
    if backend.kernels is not None:
        _define(op, backend)
    elif not hasattr(namespace, f"{stem}_forward"):
        return None
    for suffix, fake in op.fakes.items():
        if hasattr(namespace, f"{stem}_{suffix}"):
            torch.library.register_fake(f"{library}::{stem}_{suffix}", fake)
    traced = Kernels(*(getattr(namespace, f"{stem}_{suffix}").default for suffix in ("forward", "backward")))
    torch.library.register_autograd(
        f"{library}::{stem}_forward",
        lambda ctx, *grads: op.gradients(ctx, ctx.saved_tensors, traced, *grads),
        setup_context=lambda ctx, inputs, output: op.save(ctx, inputs, *([output] if op.saves_outputs else [])),
    )
    if op.layouts is None:
        sharding.refuse(op.name)
    for operator, layout in zip(traced, op.layouts or (), strict=False):
        sharding.add_operator(operator, layout)
    if backend.kernels is None:
        return Operators(traced, op.direct(traced, namespace, stem))
    return Operators(traced, _Lazy(op, backend))  # type: ignore[arg-type]


class _Lazy:
    """The Kernels of a Python backend, imported at their first run.

    Its functions bypass the dispatcher, which takes longer than a launch.
    """

    def __init__(self, op: Op, backend: Backend) -> None:
        self._op, self._backend = op, backend

    def __getattr__(self, suffix: str) -> Any:
        return getattr(self._backend.kernels(self._op.name), f"{self._op.operator}_{suffix}")  # type: ignore[misc]


def add(op: Op) -> None:
    """Register ``op`` on every backend that has it."""
    OPS[op.name] = op
    found = {name: add_backend(op, backend) for name, backend in RECORDS.items() if op.name in backend.widest}
    for name, operators in found.items():
        if operators is None and RECORDS[name].why_not_here() is None:
            RECORDS[name].absent.add(op.name)
    OPERATORS[op.name] = {name: operators for name, operators in found.items() if operators is not None}
