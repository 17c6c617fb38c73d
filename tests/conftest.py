"""Fixtures and markers shared by all tests.

Unwritten memory is NaN. Triton is interpreted on machines without a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from poisoned_malloc import POISONED

# Triton and the package decide at their import whether kernels are interpreted. Neither is imported before this line.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from depthlstm_fast import memory

# A block of the pool is filled with NaN before it is handed out again, as malloc fills its memory.
memory.poison(True)
# Several test processes share a machine, and some of their tensors have 2^31 elements.
memory.set_pool_limit(256 << 20)

# Arguments drawn at the import of test modules, and test names made of them, are the same in every process.
torch.manual_seed(0)


def pytest_report_header() -> str:
    return f"uninitialised memory: {'NaN' if POISONED else 'whatever it was (malloc is not glibc)'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # a keyword is also the name of a folder
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Fix the seed, because a test may not depend on the tests before it."""
    torch.manual_seed(0)
