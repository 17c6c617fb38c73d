"""What the conformance suite runs on: every op, on every path that a call can take through a backend's kernels.

A new op is one record in OPS, a new backend its paths in PATHS; every test of this folder then has them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    DEVICE,
    F16,
    F32,
    F64,
    NORMS,
    TYPES,
    Types,
    absence,
    arguments,
    assert_bound,
    cotangents,
    double,
    results,
)
from torch import Tensor
from triton_helpers import among_nan

import depthlstm_fast as dl
from depthlstm_fast.checks import ACTIVATIONS

FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
HALF16, MIXED16, DOUBLE = Types(F16, F16, F16), Types(F16, F16, F32), Types(F64, F64, F64)
GPU_TYPES = [types for types in TYPES if types.z != F64]
GPU_MAIN = [FULL, HALF, HALF16, MIXED, MIXED16]
# forward takes a warp a row above 4 rows a multiprocessor; a simulated GPU has two of them
FEW = 8 if DEVICE == "cpu" else 4 * torch.cuda.get_device_properties(0).multi_processor_count
MANY = FEW + 1


class Op(NamedTuple):
    """An op as the suite calls it.

    Attributes:
        name: its name in depthlstm_fast.ops.registry.OPERATORS.
        function: the public function, which takes ``backend``.
        reference: its twin in PyTorch, the oracle in fp64.
        variants: (norm, affine, kind): every shape of call, as ``arguments`` of helpers takes them.
        every_variant: the full product.
        rows: tensors, results and gradients with one row for each of the input's.
        sums: the gradients that are sums over rows.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    variants: list[tuple[str, bool, str]]
    every_variant: list[tuple[str, bool, str]]
    rows: tuple[str, ...]
    sums: tuple[str, ...]


OPS = [
    Op(
        name="depth_lstm",
        function=dl.depth_lstm_gates,
        reference=dl.reference.depth_lstm_gates,
        variants=CALLS,
        every_variant=[(*norm, kind) for norm in NORMS for kind in (*ACTIVATIONS, "given")],
        rows=("h", "c_out", "dz", "dc", "dhidden"),
        sums=("dweight", "dbias"),
    )
]


Variant = tuple[str, bool, str]


class Path(NamedTuple):
    """One way through a backend's kernels, and sizes that take it.

    Attributes:
        sizes: (rows, features) of an ordinary problem: no whole vectors, or whole ones where only they take the path.
        features: beside every boundary of the path: vectors, blocks, tiles, schemes; the rows for each follow from
            ``rows_of``.
        rows: beside every boundary of rows.
        types: every combination of dtypes that it takes. ``main``: one for each type of memory, and the mixture
            autocast makes. ``every_kernel``: those that have kernels of their own.
        row_group: rows that end with a chunk or tile, and one more begun.
        native: runs on the CPU as compiled: quick enough for full products, in fp64, too, and exact below the smallest
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

    @property
    def device(self) -> str:
        return "cpu" if self.native else DEVICE

    def __str__(self) -> str:
        return f"{self.backend}-{self.name}" if self.name else self.backend


WIDTHS = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]
# Beside, on and beyond every vector width (2 to 16 lanes), a Philox block (4) and a group of them (64), and model
# widths up to 4096. Parameter gradients are summed by chunks of at least 32 rows and at most 64 of them: beside and on
# both limits.
CPP_ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 1000, 2047, 2048, 2049]
CPP_ROWS_AND_FEATURES = [
    (rows, features) for rows in CPP_ROWS for features in (1, 5, 33, 512) if features != 512 or rows <= 1000
]
CPP_MAIN = [FULL, DOUBLE, HALF, HALF16, MIXED]


def triton(name: str, sizes: tuple[int, int], features: list[int], rows: list[tuple[int, int]], row_group: int) -> Path:
    kernels = [FULL, HALF]
    return Path("triton", name, sizes, features, rows, GPU_TYPES, GPU_MAIN, kernels, lambda features: 3, row_group)


def cuda(name: str, sizes: tuple[int, int], features: list[int], rows: list[tuple[int, int]], rows_each: int) -> Path:
    kernels = [FULL, MIXED]
    return Path("cuda", name, sizes, features, rows, GPU_TYPES, GPU_MAIN, kernels, lambda features: rows_each, sizes[0])


PATHS = [
    Path(
        backend="cpp",
        name="",
        sizes=(17, 33),
        features=[*WIDTHS, 1600, 2048, 4096],
        rows=CPP_ROWS_AND_FEATURES,
        types=TYPES,
        main=CPP_MAIN,
        every_kernel=TYPES,
        rows_of=lambda features: 17,
        row_group=70,
        native=True,
    ),
    # BLOCK = D and one column beside it (masked and not), one row a tile and several, and rows that are not a power of
    # two
    triton("narrow", (5, 7), WIDTHS, list(itertools.product((0, 1, 2, 3, 17, 40), (1, 33))), 33),
    # for any D, in blocks of 16 and tiles of two rows: see make_small_wide
    triton("wide", (3, 20), [20, 32], [(1, 20), (5, 20)], 5),
    # V vectors of a lane; then of a thread of a block, of narrow backward (2048) and of what a block holds (8192); then
    # no whole vectors
    cuda("warp", (MANY, 40), [8, 128, 136, 256, 264, 512, 520, 1024], [(MANY, 16)], MANY),
    cuda("block", (3, 40), [16, 1032, 2048, 2056, 4096, 4104, 8192], [(1, 16), (3, 16), (FEW, 16)], 2),
    cuda(
        "any",
        (3, 41),
        [1, 2, 3, 7, 31, 33, 63, 1001, 8200],
        list(itertools.product((0, 1, 2, 3, 17, MANY), (1, 33))),
        2,
    ),
]


def _absent(backend: str) -> str | None:
    if backend == "cuda":
        return None  # simulated where there is no GPU; says itself where it cannot be
    return absence(backend)


def _words(value: Any) -> str:
    """A value in the name of a test; a variant or a shape by its parts."""
    return "-".join(map(str, value)) or "scalar" if type(value) is tuple else str(value)


def cases(
    names: str = "", choose: Callable[[Op, Path], Iterable[Any]] = lambda op, path: [()], one_path: bool = False
) -> Any:
    """Every op on every path, with further arguments ``names`` that ``choose`` lists for each.

    ``one_path`` takes the first path of each backend alone: for what does not reach the kernels.
    """
    arguments = names.replace(",", " ").split()
    found, seen = [], set()
    for op, path in itertools.product(OPS, PATHS):
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
    path: Path, rows: Any, features: int, types: Types, variant: tuple[str, bool, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arguments on the path's device."""
    return arguments(rows, features, types, *variant, device=path.device)


def fused(op: Op, path: Path, **named: Any) -> tuple[Tensor, ...]:
    """The op by the path's backend, which is then known to have run."""
    outputs = op.function(**named, backend=path.backend)
    assert dl.last_backend() == path.backend
    return outputs


def surrounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: among_nan(tensor) for key, tensor in tensors.items()}


def run(
    op: Op, path: Path, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients, with every argument and gradient in the middle of NaN."""
    around = (among_nan(grads[0]), among_nan(grads[1]))
    return results(functools.partial(fused, op, path), surrounded(tensors), around, **options)


def three(
    op: Op, path: Path, tensors: dict[str, Tensor], options: dict[str, Any], grads: tuple[Tensor, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The results of the kernels, of eager in the same dtypes, and in fp64."""
    grads = cotangents(tensors) if grads is None else grads
    exact = results(op.reference, double(tensors), (grads[0].double(), grads[1].double()), **options)
    return run(op, path, tensors, grads, **options), results(op.reference, tensors, grads, **options), exact


def check(
    op: Op,
    path: Path,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor] | None = None,
    condition: float = 0.0,
) -> dict[str, Tensor]:
    """Hold the kernels to the error bound; returns their results."""
    found, eager, exact = three(op, path, tensors, options, grads)
    assert_bound(found, eager, exact, condition)
    return found


def dropout(path: Path, seed: int = 77, p: float = 0.3) -> dict[str, Any]:
    return {
        "dropout_p": p,
        "training": True,
        "seed": torch.tensor([seed], device=path.device),
    }
