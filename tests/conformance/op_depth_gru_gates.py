"""The gates of the depth-wise GRU in the conformance suite: the reset after the product, which has kernels."""

from __future__ import annotations

import itertools
from typing import Any

from helpers import TYPES, Types, normal
from suite import DOUBLE, FULL, GPU_MAIN, GPU_TYPES, HALF, HALF16, MIXED, Op, Path
from torch import Tensor

import depthlstm_fast as dl

VARIANTS = [(True,), (False,)]  # with a LayerNorm on each gate, and without
# Sizes beside every vector width (2 to 16 lanes), and model widths. Parameter gradients are summed by at most 64 chunks
# of at least 32 rows; sizes lie beside and on both limits.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]
CPP_ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 1000, 2047, 2048, 2049]


def arguments(
    shape: int | tuple[int, ...], features: int, types: Types, norm: bool = True, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    leading = (shape,) if isinstance(shape, int) else shape
    tensors = {
        "z": normal(*leading, 4 * features, dtype=types.z, scale=1.5, shift=0.3),
        "h": normal(*leading, features, dtype=types.c),
    }
    if norm:
        tensors["weight"] = normal(4, features, dtype=types.affine, scale=0.3, shift=1.0)
        tensors["bias"] = normal(4, features, dtype=types.affine, scale=0.5)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, {}


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    h = tensors["h"]
    return (normal(*h.shape, dtype=h.dtype).to(h.device),)


def function(*, backend: str, **named: Any) -> tuple[Tensor, ...]:
    with dl.use_backend(backend):
        return (dl.depth_gru_gates(**named),)


def reference(**named: Any) -> tuple[Tensor, ...]:
    return (dl.reference.depth_gru_gates(**named),)


def triton(name: str, sizes: tuple[int, int], features: list[int], rows: list[tuple[int, int]], row_group: int) -> Path:
    return Path("triton", name, sizes, features, rows, GPU_TYPES, GPU_MAIN, [FULL, HALF], lambda size: 3, row_group)


PATHS = [
    Path(
        backend="cpp",
        name="",
        sizes=(17, 33),
        features=[*WIDTHS, 1600, 2048, 4096],
        rows=[(n, c) for n, c in itertools.product(CPP_ROWS, (1, 5, 33, 512)) if c != 512 or n <= 1000],
        types=TYPES,
        main=[FULL, DOUBLE, HALF, HALF16, MIXED],
        every_kernel=TYPES,
        rows_of=lambda features: 17,
        row_group=70,
        native=True,
    ),
    # BLOCK = C and one column more (masked and not), one row a tile and several, and rows that are not a power of two
    triton("narrow", (5, 7), WIDTHS, list(itertools.product((0, 1, 2, 3, 17, 40), (1, 33))), 33),
    # for any C, in blocks of 16 and tiles of two rows: see make_small_wide; without a LayerNorm the only scheme
    triton("wide", (3, 20), [20, 32], [(1, 20), (5, 20)], 5),
]

OP = Op(
    name="depth_gru_gates",
    function=function,
    reference=reference,
    arguments=arguments,
    cotangents=cotangents,
    variants=VARIANTS,
    every_variant=VARIANTS,
    outputs=("h_out",),
    rows=("h_out", "dz", "dh"),
    sums=("dweight", "dbias"),
    parameters={"weight", "bias"},
    linear_in=set(),
    unkept=set(),
    has_dropout=False,
    paths=PATHS,
)
