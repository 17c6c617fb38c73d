"""The cases of the conformance suite: every op, on every path through a backend's kernels.

A new op is a file op_<name>.py with its record ``OP``. A new backend is one more path in the record of each op that it
has. The tests of this folder then run on them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path as File
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    TYPES,
    Types,
    absence,
    assert_bound,
    double,
    results,
)
from torch import Tensor
from triton_helpers import among_nan

import depthlstm_fast as dl

FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
HALF16, MIXED16, DOUBLE = Types(F16, F16, F16), Types(F16, F16, F32), Types(F64, F64, F64)
GPU_TYPES = [types for types in TYPES if types.z != F64]
GPU_MAIN = [FULL, HALF, HALF16, MIXED, MIXED16]
Variant = tuple[Any, ...]


class Path(NamedTuple):
    """One way through a backend's kernels, and sizes that take it.

    Attributes:
        sizes: (rows, features) of an ordinary problem, without whole vectors unless the path needs them.
        features: sizes beside every boundary of the path: vectors, blocks, tiles, schemes; ``rows_of`` gives their
            rows.
        rows: sizes beside every boundary of rows.
        types: every accepted combination of dtypes. ``main``: one for each type of memory, and autocast's mixture.
            ``every_kernel``: those with separate kernels.
        row_group: a number of rows that fills a chunk or tile and begins one more.
        native: runs compiled on the CPU: fast enough for full products, also in fp64, and exact below the smallest
            normal number.
    """

    backend: str
    name: str
    sizes: tuple[int, int]
    features: list[int]
    rows: list[tuple[int, int]]
    types: list[Types]
    main: list[Types]
    every_kernel: list[Types]
    rows_of: Callable[[int], int]
    row_group: int
    native: bool = False

    def among(self, *types: Types) -> list[Types]:
        """Return those of ``types`` that it takes."""
        return [one for one in types if one in self.types]

    @property
    def device(self) -> str:
        return "cpu" if self.native else DEVICE

    def __str__(self) -> str:
        return f"{self.backend}-{self.name}" if self.name else self.backend


class Op(NamedTuple):
    """An op as the suite calls it.

    Attributes:
        name: its name in depthlstm_fast.ops.registry.OPERATORS.
        function: the public function, which takes ``backend``.
        reference: its twin in PyTorch, the oracle in fp64.
        arguments: (leading shape, features, types, *variant, device=) -> named tensors, options.
        cotangents: named tensors -> a random gradient for each output.
        variants: arguments of ``arguments`` that make every shape of call once; ``every_variant``: the full product.
        outputs: their names.
        rows: tensors, results and gradients with one row for each of the input's.
        sums: the gradients that are sums over rows.
        parameters: the tensors without rows.
        linear_in: the gradients that show no NaN of the tensors, because they do not depend on them.
        unkept: the tensors that backward does not need, and that forward must not keep.
        has_dropout: whether it takes ``dropout_p``, ``training`` and ``seed``.
        paths: through the kernels of every backend that has the op.
        kept: named tensors -> the names of the arguments and outputs that forward keeps; None for every argument but
            those of ``unkept``.
        rounds_streams: whether every variant rounds a result to the type of c, and goes on from there. fp32 results
            beside a 16-bit c then have that rounding in them.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    arguments: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]
    cotangents: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    variants: list[Variant]
    every_variant: list[Variant]
    outputs: tuple[str, ...]
    rows: tuple[str, ...]
    sums: tuple[str, ...]
    parameters: set[str]
    linear_in: set[str]
    unkept: set[str]
    has_dropout: bool
    paths: list[Path]
    kept: Callable[[dict[str, Tensor]], set[str]] | None = None
    rounds_streams: bool = False


@functools.cache
def ops() -> list[Op]:
    """Return the records of the files op_*.py."""
    names = sorted(file.stem for file in File(__file__).parent.glob("op_*.py"))
    return [importlib.import_module(name).OP for name in names]


def _absent(backend: str) -> str | None:
    if backend == "cuda":
        return None  # simulated without a GPU; the simulator gives its own reason
    return absence(backend)


def _words(value: Any) -> str:
    """Format a value for the name of a test; a variant or a shape by its parts."""
    return "-".join(map(str, value)) or "scalar" if type(value) is tuple else str(value)


def cases(
    names: str = "",
    choose: Callable[[Op, Path], Iterable[Any]] = lambda op, path: [()],
    one_path: bool = False,
    only: str | None = None,
) -> Any:
    """Parametrise over every op on every path, with further arguments ``names`` that ``choose`` lists for each.

    ``one_path`` takes only the first path of each backend, for tests that do not depend on the kernels. ``only`` names
    the single op of a test.
    """
    arguments = names.replace(",", " ").split()
    found, seen = [], set()
    chosen = [op for op in ops() if only in (None, op.name)]
    for op, path in itertools.chain.from_iterable(itertools.product([op], op.paths) for op in chosen):
        if one_path and (op.name, path.backend) in seen:
            continue
        seen.add((op.name, path.backend))
        reason = _absent(path.backend)
        marks = [pytest.mark.skipif(reason is not None, reason=reason or "")]
        for values in choose(op, path):
            given = values if len(arguments) != 1 else (values,)
            name = "-".join([op.name, str(path), *map(_words, given)])
            found.append(pytest.param(op, path, *given, id=name, marks=marks))
    return pytest.mark.parametrize(("op", "path", *arguments), found, indirect=["path"])


def make(
    op: Op, path: Path, shape: Any, features: int, types: Types, variant: Variant
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return arguments on the path's device."""
    return op.arguments(shape, features, types, *variant, device=path.device)


def fused(op: Op, path: Path, **named: Any) -> tuple[Tensor, ...]:
    """Run the op on the path's backend, and check that this backend ran."""
    outputs = op.function(**named, backend=path.backend)
    assert dl.last_backend() == path.backend
    return outputs


def surrounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: among_nan(tensor) for key, tensor in tensors.items()}


def plain(
    op: Op, tensors: dict[str, Tensor], grads: tuple[Tensor, ...], exact: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Return the reference's outputs and gradients, in fp64 if ``exact``."""
    if exact:
        tensors, grads = double(tensors), tuple(grad.double() for grad in grads)
    return results(op.reference, tensors, grads, op.outputs, **options)


def run(op: Op, path: Path, tensors: dict[str, Tensor], grads: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
    """Return outputs and gradients, with every argument and gradient in the middle of NaN."""
    around = tuple(among_nan(grad) for grad in grads)
    return results(functools.partial(fused, op, path), surrounded(tensors), around, op.outputs, **options)


def three(
    op: Op, path: Path, tensors: dict[str, Tensor], options: dict[str, Any], grads: tuple[Tensor, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the results of the kernels, of eager in the same dtypes, and in fp64."""
    grads = op.cotangents(tensors) if grads is None else grads
    eager, exact = (plain(op, tensors, grads, exact, **options) for exact in (False, True))
    return run(op, path, tensors, grads, **options), eager, exact


def check(
    op: Op,
    path: Path,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, ...] | None = None,
    condition: float = 0.0,
) -> dict[str, Tensor]:
    """Compare the kernels with the error bound; return their results."""
    found, eager, exact = three(op, path, tensors, options, grads)
    assert_bound(found, eager, exact, condition)
    return found


def dropout(op: Op, path: Path, seed: int = 77, p: float = 0.3) -> dict[str, Any]:
    """Return options that turn dropout on, if the op has it."""
    if not op.has_dropout:
        return {}
    return {"dropout_p": p, "training": True, "seed": torch.tensor([seed], device=path.device)}
