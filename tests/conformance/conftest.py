"""Preparation of each test's path.

It sets up simulated CUDA kernels, guards around Triton's memory, and Triton's wide scheme at small sizes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import simulated
import triton_helpers
from helpers import DEVICE
from suite import Path

import depthlstm_fast as dl


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    found: Path = request.param
    if found.backend == "cuda":
        if DEVICE == "cpu":
            simulated.use(monkeypatch, simulated.load())
        elif not dl.backends()["cuda"].available:
            pytest.skip(dl.backends()["cuda"].detail)
        yield found
    elif found.backend == "triton":
        memory = triton_helpers.Memory()
        kernels = importlib.import_module(f"depthlstm_fast.kernels.{request.node.callspec.params['op'].name}")
        monkeypatch.setattr(kernels, "torch", memory)
        if found.name == "wide":
            triton_helpers.make_small_wide(monkeypatch, kernels)
        yield found
        memory.check_guards()
    else:
        yield found
