"""Fixtures and markers shared by all tests; poisoned memory: whatever nobody wrote is NaN; Triton's interpreter where
there is no GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from poisoned_malloc import POISONED

from depthlstm_fast import memory

# Triton decides once, when it is imported, whether it compiles kernels or interprets them, and nothing has imported it
# yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Blocks of the pool that are handed out again are poisoned like malloc's memory.
memory.poison(True)

# Arguments that are drawn while test modules are imported, and the names of tests made of them, are the same in every
# process.
torch.manual_seed(0)


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
