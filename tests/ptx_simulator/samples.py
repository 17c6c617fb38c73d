"""Run the kernels of kernels/samples.cu and compare with numpy.

Usage: python -m ptx_simulator.samples LIBRARY KERNEL FAULT SEEDS
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

from .device import copy, empty, load, pointer

FAULTS = (
    "none",
    "no_syncthreads",
    "no_syncwarp",
    "divergent_barrier",
    "lonely_barrier",
    "absent_lane",
    "beyond_global",
    "beyond_shared",
    "misaligned",
    "blocks_add_without_atomics",
)


def check(library: ctypes.CDLL, error: int) -> None:
    library.error_text.restype = ctypes.c_char_p
    if error:
        raise RuntimeError(library.error_text(error).decode())


def sum_rows(library: ctypes.CDLL, fault: str, rows: int = 3, columns: int = 1000) -> bytes:
    """Return the bytes that the kernel writes; AssertionError if they are wrong."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    source, sums, rows_done = copy(values), empty(rows, np.float32), copy(np.zeros(1, np.int32))
    pointers = (pointer(array) for array in (source, sums, rows_done))
    check(library, library.sum_rows(FAULTS.index(fault), *pointers, rows, columns, None))
    assert np.allclose(sums, values.sum(1, dtype=np.float64), rtol=1e-5, atol=1e-4), "wrong sums"
    assert rows_done[0] == rows, "a wrong number of rows"
    return sums.tobytes()


def copy_rows(library: ctypes.CDLL, fault: str, rows: int = 13, columns: int = 531) -> bytes:
    rng = np.random.default_rng(0)
    source_stride, target_stride = columns + 5, columns + 21  # multiples of 8
    values = rng.integers(0, 0x7F80, (rows, source_stride), dtype=np.uint16)
    source, target = copy(values), empty((rows, target_stride), np.uint16)
    strides = ctypes.c_longlong(source_stride), ctypes.c_longlong(target_stride)
    check(
        library, library.copy_rows(FAULTS.index(fault), pointer(source), pointer(target), *strides, rows, columns, None)
    )
    assert np.array_equal(target[:, :columns], values[:, :columns]), "a wrong copy"
    assert (target[:, columns:] == 0xFFFF).all(), "written beyond the rows"
    return target.tobytes()


KERNELS = {"sum_rows": sum_rows, "copy_rows": copy_rows}


def results(library: Path, kernel: str, fault: str, seeds: int) -> set[bytes]:
    """Return the different results over the orders of blocks and threads of ``seeds`` seeds."""
    loaded = load(library)
    found = set()
    for seed in range(seeds):
        loaded.ptx_seed(seed)
        found.add(KERNELS[kernel](loaded, fault))
    return found


def main() -> None:
    library, kernel, fault, seeds = sys.argv[1:]
    try:
        found = results(Path(library), kernel, fault, int(seeds))
    except (AssertionError, RuntimeError) as error:
        sys.exit(str(error))
    print(len(found))


if __name__ == "__main__":
    main()
