"""norm_step in the conformance suite: its placements of norms, and its paths through every backend's kernels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from helpers import F32, F64, TYPES, Types, normal
from suite import DOUBLE, FULL, GPU_MAIN, GPU_TYPES, HALF, HALF16, MIXED, Op, Path
from torch import Tensor

import depthlstm_fast as dl

WIDTHS = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]
# Parameter gradients are summed by at most 64 chunks of at least 32 rows; sizes lie beside and on both limits.
CPP_ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 1000, 2047, 2048, 2049]

# norms, a, kind of b, norm. The first two have every norm between them; the first rounds nothing on its way, so that
# its fp32 results have the accuracy of fp32 beside any types.
VARIANTS = [
    ("13", 1.7, "features", "layer"),
    ("2", 1.0, "one", "layer"),  # the gradients of x and y are one
    ("123", 1.3, "scalar", "rms"),
    ("12", 6.0, "one", "layer"),
    ("2", 1.0, "scalar", "rms"),
    ("23", 1.0, "one", "layer"),
    ("1", 1.0, "one", "rms"),
]
EVERY_VARIANT = [
    (norms, a, b, norm)
    for norms in ("", "1", "2", "3", "12", "13", "23", "123")
    for a, b in ((1.0, "one"), (1.7, "number"), (1.0, "scalar"), (0.6, "features"))
    for norm in ("layer", "rms")
]


def arguments(
    shape: int | tuple[int, ...],
    features: int,
    types: Types,
    norms: str = "2",
    a: float = 1.0,
    b: str = "one",
    norm: str = "layer",
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return random tensors and options; ``types`` are those of y, of x and of the parameters."""
    leading = (shape,) if isinstance(shape, int) else shape
    tensors = {
        "x": normal(*leading, features, dtype=types.c, scale=1.5, shift=0.3),
        "y": normal(*leading, features, dtype=types.z, shift=-0.2),
    }
    if b == "features":
        tensors["b"] = normal(features, dtype=types.affine, scale=0.3, shift=0.8)
    elif b == "scalar":
        # Behind a 16-bit stream an fp32 gradient has the stream's rounding in it. As one number it may be luckily small
        # in eager, and no bound for the kernels. test_norm_step.py has an fp32 b behind no rounding.
        tensors["b"] = normal(dtype=types.affine if types.c == F32 else types.c, scale=0.3, shift=0.8)
    for number in norms:
        tensors[f"weight{number}"] = normal(features, dtype=types.affine, scale=0.3, shift=1.0)
        if norm == "layer" and (number, b) != ("2", "number"):  # a bias is optional
            tensors[f"bias{number}"] = normal(features, dtype=types.affine, scale=0.5)
    options: dict[str, Any] = {"a": a, "norm": norm}
    if features <= 2 and (types.z == F64 or norm == "rms"):
        # The gradient through a norm of one or two features is a difference of equal numbers, whose rounding PyTorch
        # has as well. An eps beside the variance leaves digits.
        options["eps"] = 0.1
    if b == "number":
        options["b"] = 0.4
    return {name: tensor.to(device) for name, tensor in tensors.items()}, options


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return random gradients of x' and u.

    Without N2 u is x', and PyTorch adds both gradients in the type of x: zeros keep that exact. The gradient of a
    single b is one number, and a bound in terms of the largest element needs a number that does not cancel by luck.
    Gradients that lean towards y give its terms one sign.
    """
    x, y = tensors["x"], tensors["y"]
    of_x, of_u = normal(*x.shape), normal(*x.shape)
    if "b" in tensors and tensors["b"].dim() == 0:
        of_x += y.double().cpu()
    if "weight2" not in tensors:
        return of_x.to(x), torch.zeros_like(x)
    return of_x.to(x), of_u.to(y)


def kept(tensors: dict[str, Tensor]) -> set[str]:
    """Return what is kept for backward: x' in place of x and y where no norm comes before it."""
    parameters = tensors.keys() - {"x", "y"}
    rows = {"x", "y"} if "weight1" in tensors else {"x_out"} if "weight2" in tensors else set()
    return parameters | rows | ({"y"} if {"weight3", "b"} & parameters else set())


def function(*, backend: str, **named: Any) -> tuple[Tensor, ...]:
    with dl.use_backend(backend):
        return dl.norm_step(**named)


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

OP = Op(
    name="norm_step",
    function=function,
    reference=dl.reference.norm_step,
    arguments=arguments,
    cotangents=cotangents,
    variants=VARIANTS,
    every_variant=EVERY_VARIANT,
    outputs=("x_out", "u"),
    rows=("x_out", "u", "dx", "dy"),
    sums=("db", *(f"d{name}{number}" for number in "123" for name in ("weight", "bias"))),
    parameters={"b", *(f"{name}{number}" for number in "123" for name in ("weight", "bias"))},
    linear_in={"dbias1", "dbias2"},
    unkept=set(),
    has_dropout=False,
    paths=PATHS,
    kept=kept,
)
