"""siamese_step in the conformance suite: its variants, and its paths through every backend's kernels."""

from __future__ import annotations

import itertools
from typing import Any

from helpers import F64, TYPES, Types, normal
from suite import DOUBLE, FULL, GPU_MAIN, GPU_TYPES, HALF, HALF16, MIXED, Op, Path
from torch import Tensor

import depthlstm_fast as dl

WIDTHS = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]
# Parameter gradients are summed by at most 64 chunks of at least 32 rows; sizes lie beside and on both limits.
CPP_ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 1000, 2047, 2048, 2049]

VARIANTS = [("layer", True), ("layer", False), ("rms", True), ("rms", False)]  # norm, whether there is N


def arguments(
    shape: int | tuple[int, ...],
    features: int,
    types: Types,
    norm: str = "layer",
    normed: bool = True,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return random tensors and options; ``types`` are those of o, of the streams and of the parameters."""
    leading = (shape,) if isinstance(shape, int) else shape
    tensors = {
        "x": normal(*leading, features, dtype=types.c, scale=1.5, shift=0.3),
        "y": normal(*leading, features, dtype=types.c, scale=2.0),
        "o": normal(*leading, features, dtype=types.z, shift=-0.2),
    }
    for suffix in ("_x", "_y", *([""] if normed else [])):
        tensors[f"weight{suffix}"] = normal(features, dtype=types.affine, scale=0.3, shift=1.0)
        if norm == "layer":
            tensors[f"bias{suffix}"] = normal(features, dtype=types.affine, scale=0.5)
    options: dict[str, Any] = {"norm": norm, "c": 1.7}
    if features <= 2 and (types.z == F64 or norm == "rms"):
        options["eps"] = 0.1  # as in op_norm_step.py
    return {name: tensor.to(device) for name, tensor in tensors.items()}, options


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return random gradients of X', Y' and u."""
    return tuple(normal(*tensors[name].shape, dtype=tensors[name].dtype).to(tensors[name].device) for name in "xyo")


def function(*, backend: str, **named: Any) -> tuple[Tensor, ...]:
    with dl.use_backend(backend):
        return dl.siamese_step(**{"bias_x": None, "bias_y": None, **named})


def reference(**named: Any) -> tuple[Tensor, ...]:
    return dl.reference.siamese_step(**{"bias_x": None, "bias_y": None, **named})


PATHS = [
    Path(
        backend="cpp",
        name="",
        sizes=(17, 33),
        features=[*WIDTHS, 1600, 2048, 4096],
        rows=[(n, d) for n, d in itertools.product(CPP_ROWS, (1, 5, 33, 512)) if d != 512 or n <= 1000],
        types=TYPES,
        main=[FULL, DOUBLE, HALF, HALF16, MIXED],
        every_kernel=TYPES,
        rows_of=lambda features: 17,
        row_group=70,
        native=True,
    ),
    # BLOCK = C and one column more (masked and not), one row a tile and several, and rows that are not a power of two
    Path(
        backend="triton",
        name="",
        sizes=(5, 7),
        features=WIDTHS,
        rows=list(itertools.product((0, 1, 2, 3, 17, 40), (1, 33))),
        types=GPU_TYPES,
        main=GPU_MAIN,
        every_kernel=[FULL, HALF],
        rows_of=lambda features: 3,
        row_group=33,
    ),
]
_SUFFIXES = ("_x", "_y", "")

OP = Op(
    name="siamese_step",
    function=function,
    reference=reference,
    arguments=arguments,
    cotangents=cotangents,
    variants=VARIANTS,
    every_variant=VARIANTS,
    outputs=("x_out", "y_out", "u"),
    rows=("x_out", "y_out", "u", "dx", "dy", "do"),
    sums=tuple(f"d{name}{suffix}" for suffix in _SUFFIXES for name in ("weight", "bias")),
    parameters={f"{name}{suffix}" for suffix in _SUFFIXES for name in ("weight", "bias")},
    linear_in={"dbias_x", "dbias_y", "dbias"},
    unkept=set(),
    has_dropout=False,
    paths=PATHS,
    rounds_streams=True,
)
