"""Helpers of the tests of GPU kernels.

They make random arguments on the GPU, poison memory, and compare results with fp64 on the same GPU.
DEPTHLSTM_REHEARSE=1 puts everything on the CPU, where Triton's interpreter runs its kernels, and makes all sizes tiny.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Types, excess
from torch import Tensor

import depthlstm_fast as dl

REHEARSE = os.environ.get("DEPTHLSTM_REHEARSE", "0") not in ("", "0")
DEVICE = "cpu" if REHEARSE else "cuda"
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BACKENDS = ["triton", "cuda"]  # the fused backends for GPUs
# backward schemes: rows in registers, longer rows, and rows without whole vectors
SCHEMES = [12] if REHEARSE else [512, 4096, 1001]
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
FREE_BYTES, SMALL_BYTES = 1 << 29, 1 << 20
Function = Callable[..., tuple[Tensor, Tensor]]


def runnable(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return ``backend``, which runs until the end of the test; skip the test if it cannot run."""
    if REHEARSE and backend == "cuda":
        import simulated

        simulated.use(monkeypatch, simulated.stand_in())
    elif not dl.backends()[backend].available:
        pytest.skip(f"no {backend} backend: {dl.backends()[backend].detail}")
    return backend


def few(size: int, rehearsed: int) -> int:
    return rehearsed if REHEARSE else size


def normal(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale + shift).to(dtype)


def make(rows: int, features: int, types: Types, affine: bool = True, kind: str = "gelu") -> dict[str, Tensor]:
    """Return random arguments of depth_lstm_gates."""
    gates = 3 if kind == "given" else 4
    tensors = {
        "z": normal(rows, gates * features, dtype=types.z, scale=1.5, shift=0.3),
        "c": normal(rows, features, dtype=types.c),
    }
    if affine:
        tensors["weight"] = normal(gates, features, dtype=types.affine, scale=0.3, shift=1.0)
        tensors["bias"] = normal(gates, features, dtype=types.affine, scale=0.5)
    if kind == "given":
        tensors["hidden"] = normal(rows, features, dtype=types.z)
    return tensors


def grads_for(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    shape = tensors["c"].shape
    return normal(*shape, dtype=tensors["z"].dtype), normal(*shape, dtype=tensors["c"].dtype)


def spoil_free_memory() -> None:
    """Leave NaN in the memory that the next allocations get.

    No mode of torch fills memory allocated over the stable ABI.
    """
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        # the allocator keeps small blocks apart
        blocks = [
            torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE) for size in (FREE_BYTES, *[SMALL_BYTES] * 16)
        ]
        del blocks


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill the results of torch.empty with NaN, and leave NaN in a GPU's free memory."""
    spoil_free_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def results(
    function: Function, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Return h, c and the gradient of every tensor."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    h, c = function(**leaves, **options)
    found = torch.autograd.grad((h, c), list(leaves.values()), grads)
    return {"h": h.detach(), "c": c.detach(), **{f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}}


def fused_results(
    backend: str, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor], **options: Any
) -> dict[str, Tensor]:
    found = results(functools.partial(dl.depth_lstm_gates, backend=backend), tensors, grads, **options)
    assert dl.last_backend() == backend
    return found


def assert_bound(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == eager.keys()
    for name in found:
        assert (found[name].dtype, found[name].shape) == (eager[name].dtype, eager[name].shape), name
        error, allowed = excess(found[name], eager[name], exact[name])
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails, too


def check(
    backend: str, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Compare the fused gates with the bound, with poisoned memory; return their results."""
    grads = grads_for(tensors) if grads is None else grads
    with poisoned():
        found = fused_results(backend, tensors, grads, **options)
    eager = results(dl.reference.depth_lstm_gates, tensors, grads, **options)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    exact = results(dl.reference.depth_lstm_gates, double, (grads[0].double(), grads[1].double()), **options)
    assert_bound(found, eager, exact)
    return found


def assert_identical(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def cell_tensors(rows: int, features: int, dtype: torch.dtype, beside: bool) -> dict[str, Tensor]:
    x, h, c = (normal(rows, features, dtype=dtype) for _ in range(3))
    if beside:
        x, h = torch.cat((x, h), dim=1).split(features, dim=1)
    w, b = (
        normal(4 * features, 2 * features, dtype=dtype, scale=(2 * features) ** -0.5),
        normal(4 * features, dtype=dtype, scale=0.1),
    )
    weight, bias = normal(4, features, dtype=dtype, scale=0.3, shift=1.0), normal(4, features, dtype=dtype, scale=0.3)
    return {"x": x, "h": h, "c": c, "w": w, "b": b, "weight": weight, "bias": bias}
