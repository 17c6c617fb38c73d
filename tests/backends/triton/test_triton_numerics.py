"""The Triton kernels on difficult rows.

The rows have NaN, far means, constant values and the largest numbers. Rows are independent, and runs are identical.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DEVICE,
    F32,
    KINDS,
    assert_identical,
    cotangents,
    needs_triton,
    normal,
    results,
)
from triton_helpers import FULL, HALF, MEMORIES, among_nan, check, dropout, fused, given, memory, programs, small_wide  # noqa: F401, fixtures

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's overflows


# --- rows and numbers


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_columns_and_rows_that_are_not_there(norm: str, kind: str) -> None:
    """Check masked columns and rows.

    n would be -mean / sqrt(eps) past the last column, and its powers overflow fp32. Past the last row it would be 1 / 0
    with eps = 0.
    """
    tensors, options = given(3, 7, FULL, norm, False, kind)
    tensors["z"] = torch.full_like(tensors["z"], 2.0**60)
    check(tensors, options)
    tensors["z"] = normal(3, 28, dtype=F32).to(DEVICE)
    check(tensors, {**options, "eps": 0.0})


@pytest.mark.parametrize(("rows", "features", "count"), [(9, 65, 3), (1, 2049, 1)])
def test_runs_are_identical(rows: int, features: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        rows = 1000
    else:
        programs(monkeypatch, count)
    tensors, options = given(rows, features, FULL)
    options.update(dropout())
    grads = cotangents(tensors)
    first = results(fused, tensors, grads, **options)
    for _ in range(19 if DEVICE == "cuda" else 2):
        assert_identical(results(fused, tensors, grads, **options), first)
