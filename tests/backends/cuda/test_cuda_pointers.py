"""The CUDA C++ kernels behind their C functions: the choice of kernels, and operands anywhere in memory.

The operands move one at a time. The tests are simulated on every machine, because a GPU has no row that begins 2^33
elements after the first. The operators would also allocate the outputs themselves.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_calls import CudaCall
from cuda_pointers import PARAMETERS, check, library
from helpers import BF16, F32, Types, arguments, assert_identical, normal
from test_dropout import mask_by_hand
from torch import Tensor

from depthlstm_fast.checks import ACTIVATIONS

HERE = Path(__file__).resolve().parent
FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
FEW, MANY = 3, 9  # rows that take a block each, and a warp each, on the simulated GPU's two multiprocessors
NARROW, WIDE = ["narrow_backward", "sums_kernel"], ["row_statistics", "wide_backward", "sums_kernel"]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    library()


def given(
    rows: int, features: int, types: Types, norm: str = "gate", kind: str = "gelu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, options = arguments(rows, features, types, norm, norm != "none", kind)
    tensors["z_bias"] = normal(tensors["z"].shape[1], dtype=types.affine)
    return tensors, options


@pytest.mark.parametrize(
    ("rows", "features", "types", "norm", "kernels"),
    [
        (MANY, 8, FULL, "gate", ["forward_warp", *NARROW]),
        (MANY, 512, FULL, "joint", ["forward_warp", *NARROW]),
        (MANY, 516, FULL, "gate", ["forward_block", *NARROW]),
        (MANY, 1024, MIXED, "gate", ["forward_warp", *NARROW]),
        (MANY, 1032, HALF, "gate", ["forward_block", *NARROW]),
        (MANY - 1, 8, HALF, "gate", ["forward_block", *NARROW]),
        (MANY, 12, HALF, "gate", ["forward_any", *WIDE]),
        (1, 2048, FULL, "gate", ["forward_block", *NARROW]),
        (1, 2052, FULL, "gate", ["forward_block", *WIDE]),
        (1, 8192, FULL, "none", ["forward_block", *WIDE[1:]]),
        (1, 8196, FULL, "none", ["forward_any", *WIDE[1:]]),
    ],
)
def test_the_kernels_of_a_call(rows: int, features: int, types: Types, norm: str, kernels: list[str]) -> None:
    assert check(*given(rows, features, types, norm)) == kernels


@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize("types", [FULL, HALF, MIXED], ids=str)
def test_a_second_product_takes_a_block(types: Types, kind: str) -> None:
    tensors, options = given(MANY, 40, types, kind=kind)
    tensors["z_more"] = normal(*tensors["z"].shape, dtype=types.z)
    assert check(tensors, options) == ["forward_block"]


@pytest.mark.parametrize("code", [-1, len(ACTIVATIONS), len(ACTIVATIONS) + 1])
def test_a_code_of_no_activation_is_refused(code: int) -> None:
    """Check that an unknown code is refused before a launch; to the kernels' switch it would be the identity.

    The first code after the list stands for `hidden`, which is absent here.
    """
    call = CudaCall()
    call.gates.rows, call.gates.features, call.gates.activation = 3, 8, code
    invalid_value = 1
    assert library().depthlstm_cuda_gates_forward(ctypes.byref(call)) == invalid_value
    assert library().depthlstm_cuda_gates_backward(ctypes.byref(call)) == invalid_value
    assert library().depthlstm_cuda_workspace_bytes(ctypes.byref(call)) == -invalid_value


# --- alignment and strides

FORWARD = ("z", "hidden", "c", "h", "c_out")
BACKWARD = ("z", "hidden", "c", "dh", "dc", "dz", "dc_in", "dhidden")
READ_BY_VECTORS = ("weight", "bias", "z_bias")


def moved(x: Tensor, offset: int, apart: int) -> Tensor:
    """Return ``x`` ``offset`` elements after a multiple of 64 bytes, surrounded by NaN.

    Its rows are ``apart`` elements further from each other.
    """
    rows, width = (1, x.numel()) if x.dim() == 1 else x.shape
    room = torch.full((offset + rows * (width + apart) + 64,), torch.nan, dtype=x.dtype)
    return room.as_strided(x.shape, (1,) if x.dim() == 1 else (width + apart, 1), offset).copy_(x)


@pytest.mark.parametrize("types", [FULL, HALF, MIXED], ids=str)
@pytest.mark.parametrize("name", dict.fromkeys((*FORWARD, *BACKWARD, *READ_BY_VECTORS, "z_more")))
def test_one_operand_that_is_not_aligned(name: str, types: Types) -> None:
    """Move the start or the rows of one operand by one element and by the largest part of 16 bytes.

    Only the kernels that touch it stop using vectors.
    """
    for rows, by_start in itertools.product((FEW, MANY), (True, False)):
        if not by_start and name in READ_BY_VECTORS:
            continue
        tensors, options = given(rows, 40, types, kind="given" if "hidden" in name else "gelu")
        if name == "z_more":
            tensors["z_more"] = normal(*tensors["z"].shape, dtype=types.z)
        size = tensors.get(name, tensors["c"] if name in ("c_out", "dc", "dc_in") else tensors["z"]).itemsize
        for step in (1, 8 // size):

            def place(other: str, x: Tensor, step: int = step, by_start: bool = by_start) -> Tensor:
                return moved(x, step * by_start, step * (not by_start)) if other == name else x

            found = check(tensors, options, place)
            forward, backward = name in (*FORWARD, *READ_BY_VECTORS, "z_more"), name in (*BACKWARD, *READ_BY_VECTORS)
            assert found[0] == ("forward_any" if forward else "forward_warp" if rows == MANY else "forward_block")
            assert found[1:] == ([] if name == "z_more" else WIDE if backward else NARROW)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize(("features", "step"), [(40, 8), (33, 1)])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_every_operand_has_its_own_row_stride(rows: int, features: int, step: int, kind: str, more: bool) -> None:
    tensors, options = given(rows, features, MIXED, kind=kind)
    if more:
        tensors["z_more"] = normal(*tensors["z"].shape, dtype=BF16)
    names = ("z_more", *FORWARD, *BACKWARD[3:])
    found = check(tensors, options, lambda name, x: moved(x, 0, step * (1 + names.index(name))) if name in names else x)
    assert ("forward_any" in found) == (step == 1)


# --- offsets beyond 32 bits


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize(("rows", "features"), [(MANY, 16), (6, 16), (6, 33)])
def test_rows_far_apart(rows: int, features: int, kind: str, more: bool) -> None:
    """Check rows of every operand that lie 2^30 elements apart.

    With a signed 32-bit product row 2 would begin before row 0. With an unsigned one row 4 would be row 0.
    """
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which mmap names from Python 3.13 on
    try:
        pages = mmap.mmap(-1, 2 * ((rows + 2) * 2**30), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    room = torch.frombuffer(pages, dtype=BF16)
    tensors, options = given(rows, features, HALF, kind=kind)
    if more:
        tensors["z_more"] = normal(*tensors["z"].shape, dtype=BF16)
    names: list[str] = []

    def place(name: str, x: Tensor) -> Tensor:
        if name in PARAMETERS:
            return x
        names.append(name)
        return room.as_strided(x.shape, (2**30, 1), 2**31 + 512 * len(names)).copy_(x)

    kernels = check(tensors, options, place)
    assert ("forward_warp" in kernels) == (rows == MANY and not more)


# forward by warp, by block, and of rows without whole vectors; narrow and wide backward
@pytest.mark.parametrize("features", [8, 516, 3])
@pytest.mark.parametrize("first", [2**31 - 8, 2**32 - 8])
def test_rows_beyond_2_to_the_31(features: int, first: int, tmp_path: Path) -> None:
    """Check 64-bit row numbers.

    Blocks, the step from row to row, and the row in dropout's counter all have 64 bits.
    """
    command = [
        sys.executable,
        str(HERE / "cuda_far_rows.py"),
        library()._name,
        str(tmp_path),
        str(features),
        str(first),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    near, far, dropped = (
        {key: torch.from_numpy(x) for key, x in np.load(tmp_path / f"{name}.npz").items()}
        for name in ("near", "far", "mask")
    )
    assert not any(x.isnan().any() for x in near.values())
    assert_identical(far, near)
    mask = torch.from_numpy(mask_by_hand(7, len(far["h"]), features, 0.4, first))
    assert torch.equal(dropped["c_out"] != 0, mask)
    assert torch.equal(dropped["dhidden"] != 0, mask)


# --- the sums over blocks


@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize(("features", "backward"), [(8, NARROW), (5, WIDE)])
def test_sums_over_as_many_blocks_as_a_gpu_has(features: int, backward: list[str], kind: str) -> None:
    """Check 264 partial sums of 300 rows, which a block adds by 16 and, unrolled, by 128.

    The GPU is not the current one.
    """
    kernels = check(*given(300, features, FULL, kind=kind), device=1)
    assert kernels[1:] == backward
    assert library().ptx_devices() == 16  # the launch's device times 16; device 0 is the current one again


@pytest.mark.parametrize("rows", [15, 16, 17, 127, 129, 144])
def test_sums_over_some_blocks(rows: int) -> None:
    check(*given(rows, 4, FULL), device=1)
