"""layer_attend in the conformance suite: numbers of sources, norms, and its paths through every backend's kernels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from helpers import TYPES, Types, normal
from suite import DOUBLE, FULL, GPU_MAIN, GPU_TYPES, HALF, HALF16, MIXED, Op, Path
from torch import Tensor

import depthlstm_fast as dl

# (sources, norm, key_weight): the C++ kernels take sources by four forward and by two backward
VARIANTS = [(5, "layer", True), (1, "none", True), (4, "rms", False), (2, "layer", False), (3, "none", False)]
EVERY = list(itertools.product((1, 2, 5, 8), ("none", "layer", "rms"), (False, True)))
MOST = 8


def arguments(
    shape: int | tuple[int, ...],
    features: int,
    types: Types,
    sources: int,
    norm: str,
    key_weight: bool,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return sources whose dtypes alternate between those of z and of c, and parameters of that of the affine.

    The query gives scores of the order of one.
    """
    leading = (shape,) if isinstance(shape, int) else shape
    tensors = {f"x{l}": normal(*leading, features, dtype=types[l % 2], shift=0.1 * l) for l in range(sources)}
    tensors["query"] = normal(features, dtype=types.affine, scale=features**-0.5)
    if key_weight:
        tensors["key_weight"] = normal(features, dtype=types.affine, scale=0.3, shift=1.0)
    if norm != "none":
        tensors["weight"] = normal(features, dtype=types.affine, scale=0.3, shift=1.0)
    if norm == "layer":
        tensors["bias"] = normal(features, dtype=types.affine, scale=0.5)
    # At C = 1 the variance is 0 and every gradient through N too. With 1 / sqrt(1e-6) the fp64 reference has errors of
    # 3e-14 there.
    options = {"norm": "rms" if norm == "rms" else "layer", "eps": 1e-3 if features == 1 else 1e-6}
    return {name: tensor.to(device) for name, tensor in tensors.items()}, options


def split(named: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    sources = [value for name, value in named.items() if name.startswith("x")]
    return sources, {name: value for name, value in named.items() if not name.startswith("x")}


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    sources, _ = split(tensors)
    dtype = sources[0].dtype if len(sources) == 1 else torch.promote_types(sources[0].dtype, sources[1].dtype)
    return (normal(*sources[0].shape, dtype=dtype).to(sources[0].device),)


def function(backend: str, **named: Any) -> tuple[Tensor, ...]:
    sources, others = split(named)
    with dl.use_backend(backend):
        return (dl.layer_attend(sources, **others),)


def reference(**named: Any) -> tuple[Tensor, ...]:
    sources, others = split(named)
    return (dl.reference.layer_attend(sources, **others),)


# beside and on the vectors of every instruction set, and pairs of them
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]
# parameter gradients are summed by at most 64 chunks of at least 32 rows
CPP_ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 1000, 2047, 2048, 2049]
CPP_ROWS_AND_FEATURES = [
    (rows, features) for rows in CPP_ROWS for features in (1, 5, 33, 512) if features != 512 or rows <= 1000
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

OP = Op(
    name="layer_attend",
    function=function,
    reference=reference,
    arguments=arguments,
    cotangents=cotangents,
    variants=VARIANTS,
    every_variant=EVERY,
    outputs=("u",),
    rows=("u", *(f"dx{l}" for l in range(MOST))),
    sums=("dquery", "dkey_weight", "dweight", "dbias"),
    parameters={"query", "key_weight", "weight", "bias"},
    linear_in={"dbias"},
    unkept=set(),
    has_dropout=False,
    paths=PATHS,
)
