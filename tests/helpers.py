"""Helpers of the tests of kernels and operators: random arguments, results with gradients, and the error bound.

The bound is err(fused) <= 2 err(eager PyTorch, same dtypes) + tiny. Both errors are the largest absolute difference
from the fp64 reference. tiny is TINY eps max|exact|, with the eps of the output's dtype:

- 16-bit results hardly need it. They are rounded once, eager's several times.
- In fp32 eager's largest error over a few dozen elements can be luckily small. The kernels were seen to need at most
  3.7 eps.
- In fp64 eager is the reference itself, so tiny is the whole bound: a few ulp of exp2 and erfc through some ten
  operations (9 eps seen). It is absolute, because with D=2 a LayerNorm's gradient is the rest of cancelling terms of
  order 1.

A wrong formula differs by a share of the value itself. ``test_reference.py`` shows that the bound rejects such mutants.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.checks import ACTIVATIONS

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# device of tests that run on either; on the CPU Triton's kernels are interpreted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def absence(backend: str) -> str | None:
    """Say why the tests of a backend are skipped; None if it can run and DEPTHLSTM_BACKEND names no other."""
    status, wanted = dl.backends()[backend], os.environ.get("DEPTHLSTM_BACKEND") or "auto"
    if not status.available:
        return f"no {backend} backend: {status.detail}"
    return None if wanted in ("auto", backend) else f"DEPTHLSTM_BACKEND={wanted}"


HAS_CPP, HAS_TRITON = absence("cpp") is None, absence("triton") is None
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason=absence("cpp") or "")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason=absence("triton") or "")

TINY = {F16: 1, BF16: 1, F32: 8, F64: 64}


class Types(NamedTuple):
    """The dtypes of (z, hidden, h), of c, and of the affine."""

    z: torch.dtype
    c: torch.dtype
    affine: torch.dtype

    def __str__(self) -> str:
        return "-".join(str(dtype).removeprefix("torch.").replace("float", "f") for dtype in self)


# every accepted combination
TYPES = [Types(F32, F32, F32), Types(F64, F64, F64)]
TYPES += [Types(z, c, affine) for z in (BF16, F16) for c in (z, F32) for affine in (z, F32)]
# one for each type of memory, and autocast's mixture
MAIN_TYPES = [
    Types(F32, F32, F32),
    Types(F64, F64, F64),
    Types(BF16, BF16, BF16),
    Types(F16, F16, F16),
    Types(BF16, F32, F32),
]

NORMS = [("gate", True), ("gate", False), ("joint", True), ("joint", False), ("none", False)]  # norm, affine
KINDS = [*ACTIVATIONS, "given"]  # "given": hidden instead of an activation
# every shape of call once: the cases that differ in the Python above the kernels
CALLS = [
    ("gate", True, "gelu"),
    ("gate", False, "given"),
    ("joint", True, "given"),
    ("joint", False, "tanh"),
    ("none", False, "silu"),
]


def normal(*shape: int, dtype: torch.dtype = F64, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers drawn in fp64 and rounded once, so that every dtype sees nearly the same problem."""
    return (torch.randn(shape, dtype=F64) * scale + shift).to(dtype)


def arguments(
    shape: int | tuple[int, ...],
    features: int,
    types: Types,
    norm: str = "gate",
    affine: bool = True,
    kind: str = "gelu",
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return random tensors and the options for ``depth_lstm_gates`` on rows of ``shape``."""
    leading = (shape,) if isinstance(shape, int) else shape
    gates = 3 if kind == "given" else 4
    tensors = {
        "z": normal(*leading, gates * features, dtype=types.z, scale=1.5, shift=0.3),
        "c": normal(*leading, features, dtype=types.c),
    }
    if affine:
        tensors["weight"] = normal(gates, features, dtype=types.affine, scale=0.3, shift=1.0)
        tensors["bias"] = normal(gates, features, dtype=types.affine, scale=0.5)
    if kind == "given":
        tensors["hidden"] = normal(*leading, features, dtype=types.z)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, {
        "norm": norm,
        "activation": "gelu" if kind == "given" else kind,
    }


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return random gradients of h and c.

    They are never ones: a LayerNorm's gradient of a sum is zero for every kernel.
    """
    z, c = tensors["z"], tensors["c"]
    return normal(*c.shape, dtype=z.dtype).to(c.device), normal(*c.shape, dtype=c.dtype).to(c.device)


def results(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor],
    grads: tuple[Tensor, ...],
    outputs: tuple[str, ...] = ("h", "c_out"),
    **options: Any,
) -> dict[str, Tensor]:
    """Return outputs by name, and the gradient of every tensor ("dz", "dc", ...) under the cotangents."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    made = function(**leaves, **options)
    found = torch.autograd.grad(made, list(leaves.values()), grads)
    return {
        **{name: output.detach() for name, output in zip(outputs, made, strict=True)},
        **{f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)},
    }


def fused(*positional: Any, backend: str = "cpp", **named: Any) -> tuple[Tensor, Tensor]:
    """Run ``depth_lstm_gates`` by a fused backend, and check that this backend ran."""
    outputs = dl.depth_lstm_gates(*positional, backend=backend, **named)
    assert dl.last_backend() == backend
    return outputs


def fused_cell(*positional: Any, backend: str = "cpp", **named: Any) -> tuple[Tensor, Tensor]:
    """Run ``depth_lstm_cell`` by a fused backend, and check that this backend ran."""
    outputs = dl.depth_lstm_cell(*positional, backend=backend, **named)
    assert dl.last_backend() == backend
    return outputs


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def excess(found: Tensor, eager: Tensor, exact: Tensor, condition: float = 0.0) -> tuple[float, float]:
    """Return (the error of ``found``, the allowed error) as the largest absolute differences from ``exact``.

    ``condition`` is mean / standard deviation of a LayerNorm's rows. Rounding their mean alone moves the results by
    condition * eps / 2.
    """
    if exact.numel() == 0:
        return 0.0, 0.0
    error = (found.double() - exact).abs().max().item()
    scale = max(exact.abs().max().item(), 1.0 if found.dtype == F64 else 0.0)
    allowed = (
        2 * (eager.double() - exact).abs().max().item()
        + TINY[found.dtype] * (1 + condition / 8) * torch.finfo(found.dtype).eps * scale
    )
    return error, allowed


def assert_bound(
    found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], condition: float = 0.0
) -> None:
    """Check that each result has the type and shape of eager's and keeps the bound."""
    assert found.keys() == eager.keys() == exact.keys()
    for name in found:
        assert (found[name].dtype, found[name].shape) == (eager[name].dtype, eager[name].shape), name
        error, allowed = excess(found[name], eager[name], exact[name], condition)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails, too


def check_gates(
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor] | None = None,
    condition: float = 0.0,
    backend: str = "cpp",
) -> dict[str, Tensor]:
    """Run the fused gates, eager and fp64 on the same arguments, and compare the first with the bound.

    Returns the results of the fused gates.
    """
    grads = cotangents(tensors) if grads is None else grads
    found = results(functools.partial(fused, backend=backend), tensors, grads, **options)
    check_results(found, tensors, options, grads, condition)
    return found


def check_results(
    found: dict[str, Tensor],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor],
    condition: float = 0.0,
) -> None:
    """Compare ``found``, results of some gates on these arguments, with the bound."""
    eager = results(dl.reference.depth_lstm_gates, tensors, grads, **options)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    assert_bound(found, eager, exact, condition)


def assert_identical(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check for equality bit for bit, with NaN equal to NaN."""
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
