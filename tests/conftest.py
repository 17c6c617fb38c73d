"""Fixtures and markers shared by all tests; poisoned memory: whatever nobody wrote is NaN; Triton's interpreter where
there is no GPU.
"""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch

# Triton decides once, when it is imported, whether it compiles kernels or interprets them, and nothing has imported it
# yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Arguments that are drawn while test modules are imported, and the names of tests made of them, are the same in every
# process.
torch.manual_seed(0)

M_PERTURB = -6  # glibc's malloc.h
POISON = 0x100  # malloc fills with the complement of its low byte: 0xff, which is NaN in every floating-point type


def poison_malloc(value: int = POISON) -> bool:
    """Make glibc fill what malloc gives with NaN, or with the complement of ``value``; returns whether there is a glibc
    that does.

    torch's own filling of uninitialised memory reaches neither outputs allocated over the stable ABI nor the kernels'
    scratch."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_PERTURB, value) == 1


POISONED = poison_malloc()


def pytest_report_header() -> str:
    return f"uninitialised memory: {'NaN' if POISONED else 'whatever it was (malloc is not glibc)'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test may not depend on which tests ran before it."""
    torch.manual_seed(0)
