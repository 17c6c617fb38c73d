"""The simulated C functions of csrc/depth_lstm/cuda.h, without an operator in between.

Each tensor, outputs included, may lie anywhere.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any

import simulated
import torch
from cuda_calls import CudaCall, GatesCall, Rows
from helpers import BF16, F16, F32, assert_bound, cotangents, double, results
from ptx_simulator.device import load
from torch import Tensor

import depthlstm_fast as dl

CODES = {F32: 0, BF16: 2, F16: 3}
PARAMETERS = ("weight", "bias", "z_bias", "dweight", "dbias", "dz_bias")
KERNELS = r"forward_(?:warp|block|any)|narrow_backward|row_statistics|wide_backward|sums_kernel"
Place = Callable[[str, Tensor], Tensor]


@functools.cache
def library() -> ctypes.CDLL:
    found = load(simulated.kernels())
    found.depthlstm_cuda_workspace_bytes.restype = ctypes.c_int64
    return found


def launched() -> list[str]:
    """Return the kernels that ran since the last call."""
    return re.findall(KERNELS, library().ptx_launched().decode())


def _check(code: int) -> None:
    if code:
        raise RuntimeError(library().ptx_error().decode())


def _fill(call: CudaCall, name: str, x: Tensor) -> None:
    if name in PARAMETERS:
        setattr(call.gates, name, x.data_ptr())
    else:
        setattr(call if name == "z_more" else call.gates, name, Rows(x.data_ptr(), x.stride(0)))


def run(
    tensors: dict[str, Tensor],
    grads: tuple[Tensor, Tensor],
    options: dict[str, Any],
    place: Place = lambda name, x: x,
    device: int = 0,
) -> dict[str, Tensor]:
    """Return the results of helpers.results, with the names of csrc/depth_lstm/call.h for ``place``.

    With "z_more" only forward runs.
    """
    z, c = tensors["z"], tensors["c"]
    outputs = {"h": c.to(z.dtype), "c_out": c}
    if "z_more" not in tensors:
        outputs |= {"dz": z, "dc_in": c}
        outputs |= {f"d{name}": x for name, x in tensors.items() if name not in ("z", "c")}
    read = {**tensors, "dh": grads[0], "dc": grads[1]}
    placed = {
        name: place(name, x)
        for name, x in {**read, **{name: torch.full_like(x, torch.nan) for name, x in outputs.items()}}.items()
    }
    call = CudaCall(device=device)
    gates: GatesCall = call.gates
    gates.rows, gates.features, gates.eps = *c.shape, options.get("eps", 1e-6)
    gates.z_dtype, gates.c_dtype = CODES[z.dtype], CODES[c.dtype]
    gates.affine_dtype, gates.z_bias_dtype = (
        CODES[tensors[name].dtype] if name in tensors else 0 for name in ("weight", "z_bias")
    )
    gates.norm = dl.ops.depth_lstm.NORM_CODES[options["norm"]]
    gates.activation = 6 if "hidden" in tensors else dl.ops.depth_lstm.ACTIVATION_CODES[options["activation"]]
    for name, x in placed.items():
        _fill(call, name, x)
    _check(library().depthlstm_cuda_gates_forward(ctypes.byref(call)))
    if "z_more" not in tensors:
        size = library().depthlstm_cuda_workspace_bytes(ctypes.byref(call))
        room = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
        call.workspace = room.data_ptr() + -room.data_ptr() % 256
        _check(library().depthlstm_cuda_gates_backward(ctypes.byref(call)))
    return {{"dc_in": "dc"}.get(name, name): placed[name] for name in outputs}


def reference(
    z: Tensor, c: Tensor, z_bias: Tensor | None = None, z_more: Tensor | None = None, **named: Any
) -> tuple[Tensor, Tensor]:
    for more in (z_bias, z_more):
        z = z if more is None else z + more.to(z.dtype)
    return dl.reference.depth_lstm_gates(z, c, **named)


def check(
    tensors: dict[str, Tensor], options: dict[str, Any], place: Place = lambda name, x: x, device: int = 0
) -> list[str]:
    """Compare the results of :func:`run` with the error bound; return the kernels that ran."""
    grads = cotangents(tensors)
    launched()
    found = run(tensors, grads, options, place, device)
    eager, exact = (
        results(reference, values, cast, **options)
        for values, cast in ((tensors, grads), (double(tensors), (grads[0].double(), grads[1].double())))
    )
    assert_bound(found, {name: eager[name] for name in found}, {name: exact[name] for name in found})
    return launched()
