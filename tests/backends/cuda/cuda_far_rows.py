"""A few rows beyond 2^31 through the simulated CUDA kernels, without torch.

Only the last blocks of the grid run, because the whole grid would take too long.

    python cuda_far_rows.py LIBRARY FOLDER FEATURES FIRST

This command writes three files:

- FOLDER/near.npz: the results of some rows from 0 on.
- FOLDER/far.npz: the results of the same rows from FIRST on.
- FOLDER/mask.npz: the same rows with dropout, g = 1 and c' = 0. c and the gradient of g are then the mask.

There is no memory before the rows, so a row number that wraps ends the process.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

import numpy as np
from cuda_calls import CudaCall, Rows
from ptx_simulator.device import copy, empty, load

ROWS = 32  # a few for each of the four blocks that the simulated GPU holds, and for each of their 16 warps
DROPOUT, SEED, GIVEN = 0.4, 7, 6
STATISTICS = 20  # floats a row: csrc/depth_lstm/cuda_backward_kernel.cu


def run(library: ctypes.CDLL, features: int, first: int, dropout: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(features)
    widths = {"z": 3 * features, **dict.fromkeys(("hidden", "c", "dh", "dc"), features)}
    read = {name: random.standard_normal((ROWS, width)).astype(np.float32) for name, width in widths.items()}
    call = CudaCall()
    gates = call.gates
    gates.rows, gates.features, gates.eps, gates.activation = first + ROWS, features, 1e-6, GIVEN
    if dropout:
        seed = copy(np.array([SEED], np.int64))
        call.seed, gates.dropout_p = seed.ctypes.data, DROPOUT
        read["hidden"][:], read["c"][:], read["dh"][:], read["dc"][:] = 1, 0, 0, 1
    widths = {"h": features, "c_out": features, "dz": 3 * features, "dhidden": features, "dc_in": features}
    written = {name: empty((ROWS, width), np.float32) for name, width in widths.items()}
    statistics = empty((ROWS, STATISTICS), np.float32)

    def begin(array: np.ndarray) -> int:
        """Return the address of row 0."""
        return array.ctypes.data - first * array.shape[1] * array.itemsize

    placed = {**{name: copy(array) for name, array in read.items()}, **written}
    for name, array in placed.items():
        setattr(gates, name, Rows(begin(array), array.shape[1]))
    call.workspace = begin(statistics)

    def check(code: int) -> None:
        if code:
            raise RuntimeError(library.ptx_error().decode())

    library.ptx_first_block(first // 4 if features == 8 else first)  # by warp, four rows to a block
    check(library.depthlstm_cuda_gates_forward(ctypes.byref(call)))
    library.ptx_first_block(first)
    check(library.depthlstm_cuda_gates_backward(ctypes.byref(call)))
    return written


def main() -> None:
    path, folder, *numbers = sys.argv[1:]
    features, first = map(int, numbers)
    signal.alarm(60)  # wrapped rows may loop for ever
    library = load(Path(path))
    for name, start, dropout in (("near", 0, False), ("far", first, False), ("mask", first, True)):
        np.savez(Path(folder) / name, **run(library, features, start, dropout))


if __name__ == "__main__":
    main()
