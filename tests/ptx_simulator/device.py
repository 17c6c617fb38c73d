"""Memory for simulated kernels, and processes under a sanitizer.

This file needs neither torch nor pytest.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .build import COMPILER, run

ALIGNMENT = 256  # bytes, as cudaMalloc's
LIBC = ctypes.CDLL(None)
LIBC.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array in a separate allocation of its exact size, so that a sanitizer sees accesses out of bounds.

    All bits are set, which is NaN.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    pointer = ctypes.c_void_p()
    if LIBC.posix_memalign(ctypes.byref(pointer), ALIGNMENT, size):
        raise MemoryError(size)
    assert pointer.value is not None
    ctypes.memset(pointer, 0xFF, size)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value)).view(dtype).reshape(shape)


def copy(array: np.ndarray) -> np.ndarray:
    """Return a copy in such an allocation."""
    result = empty(array.shape, array.dtype)
    result[...] = array
    return result


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def load(library: Path) -> ctypes.CDLL:
    """Load a library of build.py, with the types of its own functions."""
    loaded = ctypes.CDLL(str(library.absolute()))
    loaded.ptx_error.restype = loaded.ptx_kernels.restype = loaded.ptx_launched.restype = ctypes.c_char_p
    loaded.ptx_seed.argtypes = [ctypes.c_uint64]
    loaded.ptx_first_block.argtypes = [ctypes.c_uint]
    return loaded


def launch(
    library: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: list[Any],
    shared: int = 0,
) -> None:
    """Launch a kernel without host code.

    ``arguments`` are arrays and ctypes values. A RuntimeError has the simulator's message.
    """
    values = [pointer(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    if library.ptx_launch(kernel.encode(), *grid, *block, ctypes.c_size_t(shared), addresses):
        raise RuntimeError(library.ptx_error().decode())


def run_sanitized(mode: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments``, with the run-time library of a mode (plain, asan, tsan) loaded from the start."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, *arguments]
    if mode != "plain":
        libraries = (run(COMPILER, f"-print-file-name=lib{name}.so").strip() for name in (mode, "stdc++"))
        environment["LD_PRELOAD"] = " ".join(libraries)
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
        environment["TSAN_OPTIONS"] = "halt_on_error=1"
        command = ["setarch", "--addr-no-randomize", *command]  # ThreadSanitizer does not know every layout of memory
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
