"""Helpers of the Triton kernels' tests.

They have the kernels' modules, NaN and guards around all memory, and arguments on the device.
"""

from __future__ import annotations

import functools
import importlib
import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    HAS_TRITON,
    TYPES,
    Types,
    arguments,
    check_gates,
    cotangents,
)
from helpers import fused as fused_by
from torch import Tensor

if HAS_TRITON:
    gates = importlib.import_module("depthlstm_fast.kernels.depth_lstm")
    launcher = importlib.import_module("depthlstm_fast.kernels.common.launch")
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    dropout_factors = importlib.import_module("depthlstm_fast.kernels.common.formulas").dropout_factors

    @triton.jit
    def factors_kernel(seed, out, row, first, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        rows = (row + tl.arange(0, ROWS).to(tl.int64))[:, None]
        factors = dropout_factors(tl.load(seed), rows, first, threshold, scale, ROWS, BLOCK)
        tl.store(out + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], factors)
else:
    gates = launcher = triton = tl = factors_kernel = None  # skipped tests may still be imported


fused = functools.partial(fused_by, backend="triton")
FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
TRITON_TYPES = [types for types in TYPES if types.z != F64]
# One for each type of memory, and the mixtures in which a 16-bit z and fp32 meet: autocast's, and only the parameters
# in fp32.
MEMORIES = [FULL, HALF, Types(F16, F16, F16), MIXED, Types(F16, F16, F32)]

GUARD = 1 << 13  # elements on either side, a multiple of every alignment
SENTINEL = 1536.0  # exact in every type


class Memory:
    """Stand-in for the module torch in the launcher: allocated memory is NaN between two guards of SENTINELs."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __getattr__(self, attribute: str) -> Any:
        return getattr(torch, attribute)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        buffer[GUARD : GUARD + size] = torch.nan
        self.buffers.append((buffer, size))
        # a tensor of its own and no view, as torch.empty's result
        return buffer.new_empty(0).set_(buffer.untyped_storage(), GUARD, shape)

    def check_guards(self) -> None:
        for buffer, size in self.buffers:
            outside = torch.cat((buffer[:GUARD], buffer[GUARD + size :]))
            assert (outside == SENTINEL).all(), f"guard: written beside {size} elements of {buffer.dtype}"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found = Memory()
    monkeypatch.setattr(gates, "torch", found)
    yield found
    found.check_guards()


def make_small_wide(monkeypatch: pytest.MonkeyPatch, kernels: Any = None) -> None:
    """Use the wide scheme of an op's kernels for any D, in blocks of 16 and tiles of two rows.

    The test then avoids the seconds that 2049 features cost.
    """
    kernels = kernels or gates  # no default argument: test_triton_mutations.py exchanges the module behind this name
    monkeypatch.setattr(kernels, "narrow_plans", lambda *_: [])
    monkeypatch.setattr(kernels, "WIDE_PLANS", [launcher.Launch(1, {"ROWS": 2, "BLOCK": 16, "STAGES": 2})])
    monkeypatch.setattr(kernels, "ROW_SUMS_PLAN", launcher.Launch(1, {"BLOCK": 16}))


@pytest.fixture
def small_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small_wide(monkeypatch)


def among_nan(x: Tensor, apart: int = 0) -> Tensor:
    """Return x in the middle of NaN, its rows ``apart`` elements further from each other."""
    if x.dim() == 0:
        return among_nan(x.unsqueeze(0))[0]
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    room = torch.full((rows * (width + apart) + 2 * GUARD,), torch.nan, dtype=x.dtype, device=x.device)
    inner = room[GUARD:-GUARD].view(*x.shape[:-1], width + apart)[..., :width]
    return inner.copy_(x).detach()


def given(*positional: Any, **named: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return arguments(*positional, **named, device=DEVICE)


def on_device(inputs: list[Any]) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs]


def check(
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor] | None = None,
    condition: float = 0.0,
) -> dict[str, Tensor]:
    """Run check_gates with every argument and gradient among NaN."""
    dh, dc = cotangents(tensors) if grads is None else grads
    surrounded = {key: among_nan(tensor) for key, tensor in tensors.items()}
    return check_gates(surrounded, options, (among_nan(dh), among_nan(dc)), condition, backend="triton")


def dropout(seed: int = 77, p: float = 0.3) -> dict[str, Any]:
    return {"dropout_p": p, "training": True, "seed": torch.tensor([seed], device=DEVICE)}


def programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Pretend a GPU that holds ``count`` programs of one warp."""
    monkeypatch.setattr(gates, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(gates, "WARPS", count)


@pytest.fixture
def real_memory(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    """Let outputs begin where their memory begins, as the shapes for tracing say."""
    monkeypatch.setattr(memory, "empty", torch.empty)


def lazy_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Return memory that does not exist before it is touched; on a GPU it is real."""
    size = elements * dtype.itemsize
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < size + 2**30:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of the GPU's memory")
        return torch.zeros(elements, dtype=dtype, device=DEVICE)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which mmap names from Python 3.13 on
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"{size / 2**30:.0f} GiB of address space: {error}")
    return torch.frombuffer(pages, dtype=dtype)
