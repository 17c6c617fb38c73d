"""Memory of large CPU tensors: the pool of the package's own outputs, and glibc's memory kept between calls.

glibc takes every block above 32 MiB from the system and gives it back. The system zeroes its pages at every call: 436
ms of forward + backward become 669 (one thread, busy AVX2 machine, float32, 32,768 tokens, D=512).
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends.library import LIBRARY, load_error
from .checks.environment import check_pool_bytes
from .modes import is_direct

POOLED_BYTES = 4 << 20  # pool_least_bytes of csrc/common/cpu/pool.h

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGEST_INT = 2**31 - 1
# (while memory is kept, glibc's own). glibc raises its own thresholds as blocks are freed, up to these.
_SETTINGS = {
    _M_MMAP_MAX: (0, 65536),
    _M_TRIM_THRESHOLD: (_LARGEST_INT, 64 << 20),
    _M_TOP_PAD: (64 << 20, 128 << 10),
    _M_MMAP_THRESHOLD: (32 << 20, 32 << 20),
}


class MemoryStats(NamedTuple):
    """The pool of large CPU outputs.

    Attributes:
        limit_bytes: what idle blocks may hold; 0 where there is no pool.
        idle_bytes, idle_blocks: blocks that wait for the next output.
        live_bytes, live_blocks: blocks of tensors that are alive.
        reused, fresh: how often an output took an idle block, and a block of the system.
        returned: blocks given back to the system.

    A block's pages hold 64 KiB more than its bytes, because blocks begin at different places of their pages.
    """

    limit_bytes: int
    idle_bytes: int
    idle_blocks: int
    live_bytes: int
    live_blocks: int
    reused: int
    fresh: int
    returned: int


@functools.cache
def _library() -> Any:
    """Return the library with the pool's functions; None where it did not load, or was built before it had a pool."""
    if load_error is not None:
        return None
    library = ctypes.CDLL(str(LIBRARY))
    return library if hasattr(library, "depthlstm_pool_statistics") else None


def memory_stats() -> MemoryStats:
    """Return what the pool of large CPU outputs holds.

    Outputs and gradients of the package's operators from 4 MiB on lie in blocks of the pool. A block goes back to the
    pool when its tensor dies. Idle blocks hold at most ``limit_bytes``: DEPTHLSTM_POOL_BYTES, else an eighth of the
    memory of the machine or control group.

    Raises:
        ValueError: DEPTHLSTM_POOL_BYTES is no number of bytes.
    """
    check_pool_bytes()
    if _library() is None:
        return MemoryStats(*[0] * len(MemoryStats._fields))
    found = (ctypes.c_int64 * len(MemoryStats._fields))()
    _library().depthlstm_pool_statistics(found)
    return MemoryStats(*found)


def empty_cache() -> None:
    """Give the pool's idle blocks back to the system, as :func:`torch.cuda.empty_cache` does on a GPU."""
    if _library() is not None:
        _library().depthlstm_pool_empty()


def set_pool_limit(limit_bytes: int) -> None:
    """Let idle blocks hold at most ``limit_bytes``; 0 leaves all memory to torch."""
    checks.check_size("limit_bytes", limit_bytes, least=0)
    if _library() is not None:
        _library().depthlstm_pool_set_limit(ctypes.c_int64(limit_bytes))


def poison(on: bool) -> None:
    """Fill blocks with NaN before they are handed out; for tests."""
    if _library() is not None:
        _library().depthlstm_pool_poison(ctypes.c_int(on))


def keep_memory(enabled: bool = True) -> None:
    """Let glibc keep freed memory for the whole process, for every library in it; off by default.

    Large CPU batches then spare most page faults. The price is peak memory: the process keeps the most that it held.
    (Forward + backward of the gates at 32,768 tokens, float32, D=512: 406 ms instead of 669, 1,668 MB instead of
    1,156.) ``keep_memory(False)`` gives glibc its own rules back, and returns free memory to the system.

    Raises:
        TypeError: enabled is no bool.

    Warns:
        RuntimeWarning: the C library is not glibc, or refuses; nothing changes then.
    """
    checks.check_flags(enabled=enabled)
    reason = _set_glibc(enabled)
    if reason is not None:
        warnings.warn(f"keep_memory({enabled}) changes nothing: {reason}", RuntimeWarning, stacklevel=2)


def _set_glibc(enabled: bool) -> str | None:
    """Returns None, or why glibc's settings are as they were."""
    if not sys.platform.startswith("linux"):
        return f"it sets glibc's malloc, which {sys.platform} does not have"
    process = ctypes.CDLL(None)
    mallopt = getattr(process, "mallopt", None)
    if mallopt is None or not hasattr(process, "gnu_get_libc_version"):
        return "the C library is not glibc"
    refused = [option for option, values in _SETTINGS.items() if mallopt(option, values[not enabled]) != 1]
    if not enabled:
        process.malloc_trim(0)
    return f"glibc's mallopt refuses its options {refused}" if refused else None


def empty_matrix(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an uninitialised matrix (rows, columns) of the dtype and device of ``like``, pooled where it is large."""
    if like.device.type == "cpu" and rows * columns * like.itemsize >= POOLED_BYTES and is_direct(like):
        operator = _operator()
        if operator is not None:
            return operator(like, rows, columns)
    return like.new_empty((rows, columns))


@functools.cache
def _operator() -> Callable[[Tensor, int, int], Tensor] | None:
    if _library() is None:
        return None
    check_pool_bytes()
    return torch.ops.depthlstm_fast.empty_matrix.default
