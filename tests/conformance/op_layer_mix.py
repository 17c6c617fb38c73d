"""layer_mix in the conformance suite: numbers of sources, and its paths through every backend's kernels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from helpers import TYPES, Types, normal
from suite import DOUBLE, FULL, GPU_MAIN, GPU_TYPES, HALF, HALF16, MIXED, Op, Path
from torch import Tensor

import depthlstm_fast as dl

# The kernels take sources by four: one group, partial and whole, then more. Triton's take them by other numbers, which
# tests/ops/layer_mix covers.
SOURCES = [(1,), (3,), (4,), (6,), (9,)]
OUTPUTS = 3  # for backward one group; tests/ops/layer_mix has the other numbers


def arguments(
    shape: int | tuple[int, ...], features: int, types: Types, sources: int, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return sources whose dtypes alternate between those of z and of c, and weights of that of the affine."""
    leading = (shape,) if isinstance(shape, int) else shape
    tensors = {"weights": normal(OUTPUTS, sources, dtype=types.affine)}
    tensors |= {f"x{l}": normal(*leading, features, dtype=types[l % 2], shift=0.1 * l) for l in range(sources)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}, {}


def split(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.startswith("x")]


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    sources = split(tensors)
    dtype = sources[0].dtype if len(sources) == 1 else torch.promote_types(sources[0].dtype, sources[1].dtype)
    return tuple(normal(*sources[0].shape, dtype=dtype).to(sources[0].device) for _ in range(OUTPUTS))


def function(backend: str, weights: Tensor, **sources: Tensor) -> tuple[Tensor, ...]:
    with dl.use_backend(backend):
        return dl.layer_mix(list(sources.values()), weights)


def reference(weights: Tensor, **sources: Tensor) -> tuple[Tensor, ...]:
    return dl.reference.layer_mix(list(sources.values()), weights)


# Beside and on the vectors of every instruction set. A tile has 512 features where V is 3, and two lie side by side.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 512, 513, 1000, 1024, 1025]
# Dense rows are one long row for the C++ kernels, so these sizes lie beside tiles and beside chunks of 32 of them.
CPP_ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 511, 512, 513, 1000]
CPP_ROWS_AND_FEATURES = [
    *itertools.product(CPP_ROWS, (1, 5, 33)),
    *((rows, 512) for rows in (1, 31, 32, 33, 63, 64, 65, 127, 129)),
]

PATHS = [
    Path(
        backend="cpp",
        name="",
        sizes=(17, 33),
        features=WIDTHS,
        rows=CPP_ROWS_AND_FEATURES,
        types=TYPES,
        main=[FULL, DOUBLE, HALF, HALF16, MIXED],
        every_kernel=TYPES,
        rows_of=lambda features: 17,
        row_group=70,
        native=True,
    ),
    Path(
        backend="triton",
        name="",
        sizes=(5, 7),
        features=[1, 2, 3, 7, 31, 33, 65, 129, 511, 512, 1000, 1024],
        rows=list(itertools.product((0, 1, 2, 3, 17, 40), (1, 33))),
        types=GPU_TYPES,
        main=GPU_MAIN,
        every_kernel=[FULL, HALF],
        rows_of=lambda features: 3,
        row_group=33,
    ),
]

_NUMBERS = range(max(sources for (sources,) in SOURCES))
OP = Op(
    name="layer_mix",
    function=function,
    reference=reference,
    arguments=arguments,
    cotangents=cotangents,
    variants=SOURCES,
    every_variant=SOURCES,
    outputs=tuple(f"u{v}" for v in range(OUTPUTS)),
    rows=(*(f"u{v}" for v in range(OUTPUTS)), *(f"dx{l}" for l in _NUMBERS)),
    sums=("dweights",),
    parameters={"weights"},
    linear_in={f"dx{l}" for l in _NUMBERS},
    unkept=set(),
    has_dropout=False,
    paths=PATHS,
)
