"""The Triton and CUDA C++ kernels on a GPU: values against fp64 on the same GPU.

test_gpu_device.py has the properties that only a GPU can show. The kernels' outputs hold NaN before they are written.
DEPTHLSTM_REHEARSE=1 rehearses the tests without a GPU: tiny sizes, Triton's interpreter, and the stand-in for the CUDA
kernels from the tests of their binding.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from gpu_helpers import (
    BACKENDS,
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    REHEARSE,
    SCHEMES,
    assert_bound,
    assert_identical,
    cell_tensors,
    check,
    every_backend,
    few,
    fused_results,
    grads_for,
    make,
    normal,
    poisoned,
    results,
    runnable,
)
from helpers import Types, excess

import depthlstm_fast as dl
from depthlstm_fast.reference.depth_lstm import dropout_mask

pytestmark = [] if REHEARSE else [pytest.mark.gpu]
cuda_alone = pytest.mark.parametrize("backend", ["cuda"], indirect=True)

TYPES = [Types(F32, F32, F32), *(Types(z, c, affine) for z in (BF16, F16) for c in (z, F32) for affine in (z, F32))]
MAIN_TYPES = [Types(F32, F32, F32), Types(BF16, BF16, BF16)]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "tanh", "silu", "sigmoid", "given"]
NORMS = [("gate", True), ("gate", False), ("joint", True), ("joint", False), ("none", False)]
WIDTHS = [1, 3, 33] if REHEARSE else [1, 3, 33, 100, 256, 511, 512, 768, 1000, 1024, 1600, 2048, 2050, 4096, 5000, 8192]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return runnable(request.param, monkeypatch)


# --- values


@every_backend
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_values_of_every_type(backend: str, types: Types) -> None:
    check(backend, make(few(1003, 3), few(192, 12), types))


@every_backend
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_of_every_activation(backend: str, types: Types, kind: str) -> None:
    check(backend, make(few(517, 3), few(320, 12), types, kind=kind), activation="gelu" if kind == "given" else kind)


@every_backend
@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize(("norm", "affine"), NORMS)
def test_values_of_every_norm(backend: str, norm: str, affine: bool, kind: str) -> None:
    check(backend, make(few(517, 3), few(320, 12), Types(BF16, F32, F32), affine, kind), norm=norm)


@every_backend
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("features", WIDTHS)
def test_values_of_every_width(backend: str, features: int, types: Types) -> None:
    check(backend, make(few(max(131, 600_000 // features), 3), features, types))


@cuda_alone
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("features", [8200, 16384, 20_001] if not REHEARSE else [35])
def test_values_of_rows_that_triton_does_not_take(backend: str, features: int, types: Types) -> None:
    check(backend, make(few(131, 3), features, types))


@every_backend
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
def test_many_rows(backend: str, types: Types) -> None:
    check(backend, make(few(100_003, 5), few(96, 8), types))


@every_backend
@pytest.mark.parametrize("features", SCHEMES)
@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(backend: str, features: int, which: int) -> None:
    tensors = make(few(300, 3), features, Types(BF16, BF16, BF16))
    cotangent = normal(few(300, 3), features, dtype=BF16)
    every = []
    for dtype, name in ((None, backend), (None, "reference"), (F64, "reference")):
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors.values()]
        output = dl.depth_lstm_gates(*leaves, backend=name)[which]
        found = torch.autograd.grad(output, leaves, cotangent.to(output.dtype))
        every.append(dict(zip(tensors, found, strict=True)))
    assert_bound(*every)


@every_backend
def test_unaligned_offsets_and_odd_strides(backend: str) -> None:
    rows, features = few(259, 3), few(512, 16)
    tensors = make(rows, features, Types(BF16, BF16, BF16))
    apart = {}
    for name, tensor in tensors.items():
        base = torch.full((tensor.shape[0], tensor.shape[1] + 3), float("nan"), dtype=BF16, device=DEVICE)
        apart[name] = base[:, 1:-2].copy_(tensor)
        assert apart[name].stride(0) % 2 == 1 or tensor.shape[1] % 2
    gradient = normal(features, dtype=BF16).expand(rows, features), normal(rows, features, dtype=BF16)[:, ::1]
    check(backend, apart, gradient)
    check(backend, {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}, gradient)


@every_backend
def test_zero_rows(backend: str) -> None:
    tensors = make(0, few(512, 8), Types(BF16, BF16, BF16))
    found = fused_results(backend, tensors, grads_for(tensors))
    assert found["h"].shape == found["c"].shape == found["dc"].shape == tensors["c"].shape
    assert found["dz"].shape == tensors["z"].shape
    assert not found["dweight"].any()
    assert not found["dbias"].any()


@every_backend
@pytest.mark.parametrize("features", SCHEMES)
def test_rows_are_independent(backend: str, features: int) -> None:
    rows = few(1000, 5)
    tensors = make(rows, features, Types(BF16, BF16, BF16))
    grads = grads_for(tensors)
    before = fused_results(backend, tensors, grads)
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    spoiled["z"][rows // 2] = float("nan")
    after = fused_results(backend, spoiled, grads)
    others = torch.arange(rows, device=DEVICE) != rows // 2
    assert_identical(
        {name: after[name][others] for name in ("h", "c", "dz", "dc")},
        {n: before[n][others] for n in ("h", "c", "dz", "dc")},
    )


@every_backend
@pytest.mark.parametrize("features", [512, 1024, 4096, 1001] if not REHEARSE else [12])
def test_twenty_runs_are_bitwise_equal(backend: str, features: int) -> None:
    tensors = make(few(20_011, 5), features, Types(BF16, BF16, F32))
    kept, grads = {name: tensor.clone() for name, tensor in tensors.items()}, grads_for(tensors)
    first = fused_results(backend, tensors, grads)
    for _ in range(few(19, 2)):
        assert_identical(fused_results(backend, tensors, grads), first)
    assert_identical(tensors, kept)  # nothing writes to an argument


@every_backend
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63), 123_456_789_123])
def test_dropout_mask_is_the_same_everywhere(backend: str, seed: int) -> None:
    rows, features, p = few(77, 3), few(1000, 12), 0.4
    z, c, g = (torch.zeros(rows, width, device=DEVICE) for width in (3 * features, features, features))
    key = torch.tensor([seed], dtype=torch.int64, device=DEVICE)
    options: dict[str, Any] = {"norm": "none", "dropout_p": p, "training": True}
    _, found = dl.depth_lstm_gates(z, c, hidden=g + 1, seed=key, backend=backend, **options)
    assert torch.equal(found > 0, dropout_mask(key, rows, features, p))
    if dl.backends()["cpp"].available:
        _, cpu = dl.depth_lstm_gates(z.cpu(), c.cpu(), hidden=g.cpu() + 1, seed=key.cpu(), backend="cpp", **options)
        assert torch.equal(found.cpu() > 0, cpu > 0)


@every_backend
@pytest.mark.parametrize("features", SCHEMES)
def test_values_with_dropout(backend: str, features: int) -> None:
    key = torch.tensor([42], dtype=torch.int64, device=DEVICE)
    check(backend, make(few(300, 3), features, Types(BF16, BF16, BF16)), dropout_p=0.3, training=True, seed=key)


# --- cells and layers


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("beside", [False, True], ids=["apart", "beside"])
def test_values_of_the_cell(backend: str, dtype: torch.dtype, beside: bool) -> None:
    tensors = cell_tensors(few(1003, 3), few(384, 8), dtype, beside)
    grads = normal(*tensors["c"].shape, dtype=dtype), normal(*tensors["c"].shape, dtype=dtype)
    found = results(functools.partial(dl.depth_lstm_cell, backend=backend), tensors, grads)
    assert dl.last_backend() == backend
    eager = results(dl.reference.depth_lstm_cell, tensors, grads)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    assert_bound(found, eager, results(dl.reference.depth_lstm_cell, double, (grads[0].double(), grads[1].double())))


@every_backend
@pytest.mark.parametrize("beside", [False, True], ids=["apart", "beside"])
@pytest.mark.parametrize("rows", [1, 8, 64] if not REHEARSE else [2])
def test_values_of_a_decoding_step(backend: str, rows: int, beside: bool) -> None:
    """Check few rows without gradients, where a cell may make two products and leave their sum to the gates."""
    tensors = cell_tensors(rows, few(512, 8), F32 if REHEARSE else BF16, beside)
    with torch.no_grad(), poisoned():
        found = dl.depth_lstm_cell(**tensors, backend=backend)
    eager = dl.reference.depth_lstm_cell(**tensors)
    exact = dl.reference.depth_lstm_cell(**{name: tensor.double() for name, tensor in tensors.items()})
    assert_bound(*(dict(zip(("h", "c"), outputs, strict=True)) for outputs in (found, eager, exact)))


@every_backend
@pytest.mark.parametrize("merge", [None, "add", "concat", "cells"], ids=["encoder", "add", "concat", "cells"])
def test_stacks_in_fp32(backend: str, merge: str | None) -> None:
    """Check layers that write beside each other's states: forward and every gradient.

    The reference stack runs on the same GPU.
    """
    width, heads, kind = few(64, 8), 2, "Encoder" if merge is None else "Decoder"
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "device": DEVICE} | (
        {} if merge is None else {"merge": merge}
    )
    stacks = []
    for module in (dl.reference, dl):
        layer = getattr(module, f"DepthLSTM{kind}Layer")(width, heads, **options)
        stacks.append(getattr(module, f"DepthLSTM{kind}")(layer, 2))
    stacks[1].load_state_dict(stacks[0].state_dict())
    source, memory = normal(2, few(17, 2), width), normal(2, few(9, 2), width)
    arguments = (source.requires_grad_(),) if merge is None else (source.requires_grad_(), memory.requires_grad_())
    cotangent, every = torch.randn_like(source), []
    for stack in stacks:
        with dl.use_backend(backend if stack is stacks[1] else "reference"):
            output = stack(*arguments)
            every.append((output, *torch.autograd.grad(output, [*arguments, *stack.parameters()], cotangent)))
    for found, wanted in zip(every[1], every[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)


@every_backend
def test_cell_module_under_autocast(backend: str) -> None:
    features, rows = few(128, 8), few(300, 3)
    modules = [module.DepthLSTMCell(features, features).to(DEVICE) for module in (dl.reference, dl)]
    modules[1].load_state_dict(modules[0].state_dict())
    x, h, c = (normal(rows, features) for _ in range(3))
    outputs = []
    for module, name in zip(modules, ("reference", backend), strict=True):
        with torch.autocast(DEVICE, BF16), dl.use_backend(name):
            outputs.append(module(x, (h, c)))
        torch.autograd.grad(
            outputs[-1], list(module.parameters()), [torch.randn_like(output) for output in outputs[-1]]
        )
    assert dl.last_backend() == backend
    assert outputs[1][0].dtype == BF16
    assert outputs[1][1].dtype == F32
    exact = modules[0].double()(x.double(), (h.double(), c.double()))
    for found, eager, wanted in zip(outputs[1], outputs[0], exact, strict=True):
        error, allowed = excess(found, eager, wanted)
        # eager's h and c come from one rounded z, too
        assert error <= max(allowed, torch.finfo(BF16).eps), (
            error,
            allowed,
        )


def test_auto_chooses_a_kernel() -> None:
    tensors = make(3, 8, Types(F32, F32, F32))
    with dl.use_backend("auto"):
        dl.depth_lstm_gates(**tensors)
    assert dl.last_backend() in (["cpp"] if REHEARSE else BACKENDS)


@every_backend
def test_what_no_kernel_takes_is_said(backend: str) -> None:
    if REHEARSE and backend == "cuda":
        pytest.skip("what stands in for the kernels takes more")
    with pytest.raises(ValueError, match="float64"):
        dl.depth_lstm_gates(
            **{name: tensor.double() for name, tensor in make(3, 8, Types(F32, F32, F32)).items()}, backend=backend
        )
    if backend == "triton":
        with pytest.raises(ValueError, match="8192"):
            dl.depth_lstm_gates(**make(1, 8193, Types(F32, F32, F32)), backend=backend)
