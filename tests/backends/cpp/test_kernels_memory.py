"""Memory of each instruction set's kernels: past the caches, off alignment, far apart.

The kernels must write the right bytes, and no others.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    TYPES,
    Types,
    arguments,
    assert_identical,
    check_results,
    cotangents,
    fused,
    needs_cpp,
    results,
)
from kernel_calls import ISAS, STREAM_BYTES, run
from torch import Tensor

OPTIONS: dict[str, Any] = {"dropout_p": 0.25, "seed": 2**40 + 7}


def call(
    rows: int, features: int, types: Types, norm: str, affine: bool, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, options = arguments(rows, features, types, norm, affine, kind)
    tensors["z_bias"] = torch.randn(tensors["z"].shape[1]).to(types.affine)
    return tensors, {**options, **OPTIONS}


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("isa", ISAS)
def test_streamed_results_are_the_others(isa: str, norm: str, affine: bool, kind: str, types: Types) -> None:
    """Check streamed calls of whole vectors, as csrc/depth_lstm/cpu_op.cpp makes them.

    The results are equal bit for bit, and no byte beside the outputs changes.
    """
    for rows, features in ((1, 64), (5, 64), (3, 192)):
        tensors, options = call(rows, features, types, norm, affine, kind)
        grads = cotangents(tensors)
        plain = run(isa, tensors, options, grads)
        assert not any(value.isnan().any() for value in plain.values())
        assert_identical(
            run(isa, tensors, options, grads, stream=True, chunk_rows=2),
            run(isa, tensors, options, grads, chunk_rows=2),
        )
        assert_identical(run(isa, tensors, options, grads, stream=True), plain)


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_outputs_need_no_alignment(isa: str, types: Types, shift: int) -> None:
    for features in (1, 7, 33, 64):
        tensors, options = call(3, features, types, "gate", True, "gelu")
        grads = cotangents(tensors)
        assert_identical(run(isa, tensors, options, grads, shift=shift), run(isa, tensors, options, grads))


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("isa", ISAS)
def test_partial_vectors(isa: str, norm: str, affine: bool, kind: str, types: Types) -> None:
    """Check few and many lanes in the last vector: the reference's results, and no byte written after it."""
    for features in (1, 2, 3, 5, 7, 11, 15, 17):
        tensors, options = arguments(3, features, types, norm, affine, kind)
        options["eps"] = 1e-2  # at D = 1 and 2 the variance may vanish, and 1/sqrt(eps) magnifies every rounding
        grads = cotangents(tensors)
        found = run(isa, tensors, options, grads, chunk_rows=2)
        check_results(found, tensors, options, grads)


STREAMED = [
    (types, 512)
    for types in (Types(F32, F32, F32), Types(F64, F64, F64), Types(BF16, BF16, BF16), Types(F16, F32, F32))
]
STREAMED += [(STREAMED[0][0], 514)]  # rows that begin on 8-byte boundaries, which must not be streamed


def check_large(types: Types, features: int) -> None:
    """Check a call with so many bytes that its outputs are streamed.

    It repeats 251 rows, and the results are those of 251 rows.
    """
    few, options = arguments(251, features, types)
    # of the forward pass; the backward pass moves more
    bytes_a_row = features * (5 * types.z.itemsize + 2 * types.c.itemsize)
    again = torch.arange(STREAM_BYTES // bytes_a_row + 3) % 251
    grads = cotangents(few)
    wanted = results(fused, few, grads, **options)
    many = {name: tensor if name in ("weight", "bias") else tensor[again] for name, tensor in few.items()}
    found = results(fused, many, (grads[0][again], grads[1][again]), **options)
    times = torch.bincount(again, minlength=251).double()
    exact = results(
        fused,
        {name: tensor.double() for name, tensor in few.items()},
        tuple(times[:, None] * g for g in grads),
        **options,
    )
    for name in ("dweight", "dbias"):
        difference = (found.pop(name).double() - exact[name]).abs().max()
        assert difference <= 8 * torch.finfo(types.affine).eps * exact[name].abs().max(), name
        del wanted[name]
    assert_identical(found, {name: value[again] for name, value in wanted.items()})


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_large_calls(isa: str) -> None:
    """Check the operator itself in a subprocess, because the library chooses its instruction set once in a process."""
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\nimport torch, test_kernels_memory as tests\ntorch.manual_seed(0)\n"
    )
    script += "for call in tests.STREAMED:\n    tests.check_large(*call)\n"
    environment = {**os.environ, "DEPTHLSTM_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def far_apart(rows: int, features: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Return rows ``stride`` elements apart, in memory of which only the touched pages exist."""
    size = ((rows - 1) * stride + features) * dtype.itemsize
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    except (OSError, OverflowError) as error:
        pytest.skip(f"no {size / 2**30:.0f} GiB of address space: {error}")
    return torch.frombuffer(room, dtype=dtype).as_strided((rows, features), (stride, 1))


def distant(stride: int) -> Callable[[Tensor], Tensor]:
    def move(x: Tensor) -> Tensor:
        return far_apart(*x.shape, stride, x.dtype).copy_(x)

    return move


@needs_cpp
@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="mmap has no private mappings here")
@pytest.mark.parametrize("types", [Types(BF16, BF16, F32), Types(F32, F32, F32)], ids=str)
def test_rows_beyond_2_to_the_31_elements(types: Types) -> None:
    """Check offsets of 64 bits in every operand: the third row begins at element 2^31 + 2."""
    move = distant(2**30 + 1)
    tensors, options = arguments(5, 33, types, kind="given")
    grads = cotangents(tensors)
    moved = {name: tensor if name in ("weight", "bias") else move(tensor) for name, tensor in tensors.items()}
    assert_identical(
        results(fused, moved, (move(grads[0]), move(grads[1])), **options), results(fused, tensors, grads, **options)
    )


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="mmap has no private mappings here")
@pytest.mark.parametrize("types", [Types(BF16, BF16, F32), Types(F32, F32, F32)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_outputs_beyond_2_to_the_31_elements(isa: str, types: Types) -> None:
    tensors, options = call(5, 33, types, "gate", True, "given")
    grads = cotangents(tensors)
    assert_identical(run(isa, tensors, options, grads, place=distant(2**30 + 1)), run(isa, tensors, options, grads))
