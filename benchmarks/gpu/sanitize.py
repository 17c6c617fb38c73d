"""Small calls of every kernel, for compute-sanitizer.

They cover every scheme of a backend, both sides of a tile's edge, dropout, and a given g.

    python -m depthlstm_fast.bench.gpu.sanitize cuda     or triton

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor its own allocation, so that an access past its end is seen. Every
launch is instrumented. The operators are therefore called without the GEMM of a cell, and the CPU makes and checks the
numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.ops import depth_lstm_autograd
from depthlstm_fast.ops.depth_lstm import Options, Tensors
from depthlstm_fast.ops.registry import OPERATORS

Case = tuple[int, int, dict[str, Any]]  # D, rows, options
DROPOUT = {"dropout_p": 0.3, "training": True}
CASES: dict[str, list[Case]] = {
    "triton": [
        (512, 37, {}),
        (100, 5, DROPOUT),
        (1000, 3, {"norm": "joint"}),
        (4096, 3, DROPOUT),
        (64, 7, {"norm": "none"}),
    ],
    # Forward: few rows take a block each, with 1, 2 and 4 vectors a thread. The widths 33, 100 in 16 bits and 8200 take
    # `any`. More than 4 rows a multiprocessor take a warp each. Backward: narrow up to 2048 in whole vectors, else
    # wide.
    "cuda": [
        *(
            (512, 37, DROPOUT),
            (100, 5, {}),
            (1000, 3, {"norm": "joint"}),
            (2048, 3, {}),
            (4096, 3, DROPOUT),
            (33, 7, {"norm": "none"}),
        ),
        *((8192, 2, {}), (8200, 2, {"norm": "joint"}), (33, 5, DROPOUT)),
        *((40, 0, DROPOUT), (264, 0, {}), (512, 0, {"norm": "joint"}), (1024, 0, {})),
    ],
}
TINY: list[Case] = [(16, 3, DROPOUT), (17, 2, {"norm": "joint"}), (8, 2, {"norm": "none"})]
BF16, F32 = torch.bfloat16, torch.float32
TYPES = ((BF16, BF16), (BF16, F32), (F32, F32))  # of z and of c
MANY_ROWS = 5  # rows for each multiprocessor, in the cases of 0 rows


def rows_of(rows: int, device: str) -> int:
    if rows:
        return rows
    return (
        MANY_ROWS * torch.cuda.get_device_properties(device).multi_processor_count + 1
        if device == "cuda"
        else MANY_ROWS
    )


def normal(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def inputs_of(
    rows: int, features: int, gates: int, dtypes: tuple[torch.dtype, torch.dtype], affine: bool, device: str
) -> dict[str, Tensor]:
    shapes = {"z": (rows, gates * features), "c": (rows, features)}
    if affine:
        shapes |= {"weight": (gates, features), "bias": (gates, features)}
    if gates == 3:
        shapes["hidden"] = (rows, features)
    return {name: normal(shape, dtypes[name == "c"], device).requires_grad_() for name, shape in shapes.items()}


def with_gradients(outputs: tuple[Tensor, ...], leaves: Sequence[Tensor], device: str) -> tuple[Tensor, ...]:
    return (
        *outputs,
        *torch.autograd.grad(outputs, leaves, [normal(output.shape, output.dtype, device) for output in outputs]),
    )


def with_z_bias(backend: str, tensors: dict[str, Tensor], device: str) -> tuple[Tensor, ...]:
    """Call the gates as a cell does: with the GEMM's bias, and its gradient."""
    z_bias = normal(tensors["z"].shape[-1:], tensors["z"].dtype, device).requires_grad_()
    hidden, weight, bias = (tensors.get(name) for name in ("hidden", "weight", "bias"))
    given = Tensors(tensors["z"], z_bias, hidden, tensors["c"], weight, bias, None)
    outputs = depth_lstm_autograd.gates(*given, Options(0, 0, 1e-6, 0.0), backend)
    return with_gradients(outputs, [z_bias, *tensors.values()], device)


def into_a_buffer(backend: str, tensors: dict[str, Tensor], more: bool, device: str) -> tuple[Tensor, ...]:
    """Call the gates as a cell without gradients does: h goes into a buffer of other columns.

    The call adds a second partial product if the backend can.
    """
    z, c, weight, bias = (tensors[name].detach() for name in ("z", "c", "weight", "bias"))
    h = torch.empty(c.shape[0], 2 * c.shape[1], dtype=z.dtype, device=device)[:, c.shape[1] :]
    second = {"z_more": normal(z.shape, z.dtype, device)} if more else {}
    forward = OPERATORS["depth_lstm"][backend].eager(z).forward
    return forward(*Tensors(z, None, None, c, weight, bias, None), *Options(0, 0, 1e-6, 0.0), h, **second)


def gates_of(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return dl.depth_lstm_gates(**{**tensors, **options})


def main(backend: str = "triton", cases: Sequence[Case] | None = None, device: str = "cuda") -> None:
    """Run forward and backward of every case in bf16, mixed and fp32, and once with a given g."""
    for features, few, options in CASES[backend] if cases is None else cases:
        rows, affine = rows_of(few, device), options.get("norm") != "none"
        for dtypes in TYPES:
            for gates in (4, 3):
                tensors = inputs_of(rows, features, gates, dtypes, affine, device)
                outputs = gates_of(tensors, options | {"backend": backend})
                found = [*with_gradients(outputs, list(tensors.values()), device)]
                if affine and "norm" not in options:
                    found += with_z_bias(backend, tensors, device)
                if affine and gates == 4:
                    # the CPU stand-in for the kernels adds no product in 16 bits
                    more = backend == "cuda" and (device == "cuda" or dtypes[0] == F32)
                    found += into_a_buffer(backend, tensors, more, device)
                assert all(bool(tensor.cpu().isfinite().all()) for tensor in found)
    print("sanitize: done")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "triton")
