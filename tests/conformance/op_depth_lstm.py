"""The depth-wise LSTM in the conformance suite: its variants, and its paths through every backend's kernels."""

from __future__ import annotations

import itertools

import torch
from helpers import CALLS, DEVICE, NORMS, TYPES, arguments, cotangents
from suite import DOUBLE, FULL, GPU_MAIN, GPU_TYPES, HALF, HALF16, MIXED, Op, Path

import depthlstm_fast as dl
from depthlstm_fast.checks import ACTIVATIONS

# forward gives a row a warp above 4 rows a multiprocessor; a simulated GPU has two multiprocessors
FEW = 8 if DEVICE == "cpu" else 4 * torch.cuda.get_device_properties(0).multi_processor_count
MANY = FEW + 1
WIDTHS = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]
# Sizes beside, on and beyond every vector width (2 to 16 lanes), a Philox block (4) and a group of them (64), and model
# widths up to 4096. Parameter gradients are summed by at most 64 chunks of at least 32 rows; sizes lie beside and on
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
    # BLOCK = D and one column more (masked and not), one row a tile and several, and rows that are not a power of two
    triton("narrow", (5, 7), WIDTHS, list(itertools.product((0, 1, 2, 3, 17, 40), (1, 33))), 33),
    # for any D, in blocks of 16 and tiles of two rows: see make_small_wide
    triton("wide", (3, 20), [20, 32], [(1, 20), (5, 20)], 5),
    # V vectors of a lane; then of a thread of a block, of narrow backward (2048) and of a full block (8192); then rows
    # without whole vectors
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

OP = Op(
    name="depth_lstm",
    function=dl.depth_lstm_gates,
    reference=dl.reference.depth_lstm_gates,
    arguments=arguments,
    cotangents=cotangents,
    variants=CALLS,
    every_variant=[(*norm, kind) for norm in NORMS for kind in (*ACTIVATIONS, "given")],
    outputs=("h", "c_out"),
    rows=("h", "c_out", "dz", "dc", "dhidden"),
    sums=("dweight", "dbias"),
    parameters={"weight", "bias"},
    linear_in={"dc"},
    unkept=set(),
    has_dropout=True,
    paths=PATHS,
)
