"""Calls of the C functions in csrc/depth_lstm/cuda.h on arrays of exact size, without torch, under a sanitizer.

    python cuda_calls.py LIBRARY FOLDER SEED

This command runs CALLS with the threads in the order of SEED, and writes FOLDER/<number>.npz.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a separate process lacks pytest's paths

from ptx_simulator.device import copy, empty, load

POINTER, INT64, INT32, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
EPS, DROPOUT, SEED = 1e-6, 0.25, 1234567890123
ACTIVATION = 5  # sigmoid


class Rows(ctypes.Structure):
    _fields_ = (("data", POINTER), ("stride", INT64))


class GatesCall(ctypes.Structure):
    """csrc/depth_lstm/call.h"""

    _fields_ = (
        *((name, INT64) for name in ("rows", "features")),
        *((name, INT32) for name in ("z_dtype", "c_dtype", "affine_dtype", "z_bias_dtype", "norm", "activation")),
        *(("eps", DOUBLE), ("dropout_p", DOUBLE), ("seed", ctypes.c_uint64), ("stream", ctypes.c_bool)),
        *((name, Rows) for name in ("z", "hidden", "c")),
        *((name, POINTER) for name in ("z_bias", "weight", "bias")),
        *((name, Rows) for name in ("h", "c_out", "dh", "dc", "dz", "dhidden", "dc_in")),
        *((name, POINTER) for name in ("dweight", "dbias", "dz_bias")),
    )


class CudaCall(ctypes.Structure):
    """csrc/depth_lstm/cuda.h"""

    _fields_ = (
        *(("gates", GatesCall), ("seed", POINTER), ("z_more", Rows)),
        *(("workspace", POINTER), ("device", INT32), ("stream", POINTER)),
    )


# Rows and features, all in fp32. The first four are forward by warp and by block, and narrow backward of one warp and
# of several, with a part of a vector's lanes idle. The others are rows without whole vectors: forward_any and the two
# kernels of wide backward.
CALLS = [(9, 136), (3, 520), (9, 40), (5, 33), (2, 259)]


def arrays(rows: int, features: int) -> dict[str, np.ndarray]:
    """Return the arrays that a call reads."""
    random = np.random.default_rng(rows * 10_000 + features)
    shapes = {"z": (rows, 4 * features), "c": (rows, features), "dh": (rows, features), "dc": (rows, features)}
    shapes |= {"z_bias": (4 * features,), "weight": (4, features), "bias": (4, features)}
    found = {name: copy(random.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    return {**found, "seed": copy(np.array([SEED], np.int64))}


def run(library: ctypes.CDLL, rows: int, features: int) -> dict[str, np.ndarray]:
    """Run forward and backward with all arguments but `hidden`; return the written arrays."""
    read = arrays(rows, features)
    outputs = dict.fromkeys(("h", "c_out", "dc_in"), (rows, features)) | {"dz": (rows, 4 * features)}
    outputs |= {"dweight": (4, features), "dbias": (4, features), "dz_bias": (4 * features,)}
    written = {name: empty(shape, np.float32) for name, shape in outputs.items()}
    call = CudaCall()
    gates = call.gates
    gates.rows, gates.features, gates.activation, gates.eps, gates.dropout_p = rows, features, ACTIVATION, EPS, DROPOUT
    for name, array in {**read, **written}.items():
        if name == "seed":
            call.seed = array.ctypes.data
        elif name in ("z_bias", "weight", "bias", "dweight", "dbias", "dz_bias"):
            setattr(gates, name, array.ctypes.data)
        else:
            setattr(gates, name, Rows(array.ctypes.data, array.shape[1]))
    library.depthlstm_cuda_workspace_bytes.restype = INT64

    def check(code: int) -> None:
        if code:
            raise RuntimeError(library.ptx_error().decode())

    check(library.depthlstm_cuda_gates_forward(ctypes.byref(call)))
    workspace: Any = empty(library.depthlstm_cuda_workspace_bytes(ctypes.byref(call)), np.uint8)
    call.workspace = workspace.ctypes.data
    check(library.depthlstm_cuda_gates_backward(ctypes.byref(call)))
    return written


def main() -> None:
    path, folder, seed = sys.argv[1:]
    library = load(Path(path))
    library.ptx_seed(int(seed))
    for number, (rows, features) in enumerate(CALLS):
        np.savez(Path(folder) / f"{number}.npz", **run(library, rows, features))


if __name__ == "__main__":
    main()
