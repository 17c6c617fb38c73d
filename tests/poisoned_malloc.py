"""malloc that fills memory with NaN, for the whole test process.

This is a module of its own, because several folders have a conftest.
"""

from __future__ import annotations

import ctypes
import sys

M_PERTURB = -6  # glibc's malloc.h
POISON = 0x100  # malloc fills with the complement of the low byte: 0xff, which is NaN in every floating-point type


def poison_malloc(value: int = POISON) -> bool:
    """Make glibc fill allocated memory with NaN, or with the complement of ``value``.

    Returns whether there is a glibc that does. torch's own filling of uninitialised memory reaches neither outputs
    allocated over the stable ABI nor the kernels' scratch.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_PERTURB, value) == 1


POISONED = poison_malloc()
