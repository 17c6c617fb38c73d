"""The kernels on a GPU: values against fp64 on the same GPU, and what only a GPU can show: streams, graphs, large sizes, allocations.

Whatever the kernels allocate is NaN before they write it. Rehearsed without a GPU: DEPTHLSTM_REHEARSE=1 runs, on tiny sizes, the tests
that Triton's interpreter can run on the CPU.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from gpu_helpers import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    REHEARSE,
    assert_bound,
    assert_identical,
    cell_tensors,
    check,
    few,
    fused_results,
    grads_for,
    make,
    normal,
    results,
)
from helpers import Types, excess
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.reference.gates import dropout_mask

BACKENDS = ["triton"]  # the fused backends for GPUs

pytestmark = [] if REHEARSE else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(REHEARSE, reason="a rehearsal on the CPU")
every_backend = pytest.mark.parametrize("backend", BACKENDS)

TYPES = [Types(F32, F32, F32), *(Types(z, c, affine) for z in (BF16, F16) for c in (z, F32) for affine in (z, F32))]
MAIN_TYPES = [Types(F32, F32, F32), Types(BF16, BF16, BF16)]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "tanh", "silu", "sigmoid", "given"]
NORMS = [("gate", True), ("gate", False), ("joint", True), ("joint", False), ("none", False)]
WIDTHS = [1, 3, 33] if REHEARSE else [1, 3, 33, 100, 256, 511, 512, 768, 1000, 1024, 1600, 2048, 2050, 4096, 5000, 8192]
BOTH_SCHEMES = [12] if REHEARSE else [512, 4096]  # of backward: rows in registers, and not


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
    check(backend, make(few(max(131, 200_000 // features), 3), features, types))


@every_backend
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
def test_many_rows(backend: str, types: Types) -> None:
    check(backend, make(few(100_003, 5), few(96, 8), types))


@every_backend
@pytest.mark.parametrize("features", BOTH_SCHEMES)
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
@pytest.mark.parametrize("features", BOTH_SCHEMES)
def test_rows_are_independent(backend: str, features: int) -> None:
    rows = few(1000, 5)
    tensors = make(rows, features, Types(BF16, BF16, BF16))
    grads = grads_for(tensors)
    before = fused_results(backend, tensors, grads)
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    spoiled["z"][rows // 2] = float("nan")
    after = fused_results(backend, spoiled, grads)
    others = torch.arange(rows, device=DEVICE) != rows // 2
    assert_identical({name: after[name][others] for name in ("h", "c", "dz", "dc")}, {n: before[n][others] for n in ("h", "c", "dz", "dc")})


@every_backend
@pytest.mark.parametrize("features", [512, 1024, 4096] if not REHEARSE else [12])
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
@pytest.mark.parametrize("features", BOTH_SCHEMES)
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
@pytest.mark.parametrize("merge", [None, "add", "concat", "cells"], ids=["encoder", "add", "concat", "cells"])
def test_stacks_in_fp32(backend: str, merge: str | None) -> None:
    """Layers that write beside each other's states, forward and every gradient, against the reference stack on the GPU."""
    width, heads, kind = few(64, 8), 2, "Encoder" if merge is None else "Decoder"
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "device": DEVICE} | ({} if merge is None else {"merge": merge})
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
        torch.autograd.grad(outputs[-1], list(module.parameters()), [torch.randn_like(output) for output in outputs[-1]])
    assert dl.last_backend() == backend
    assert outputs[1][0].dtype == BF16
    assert outputs[1][1].dtype == F32
    exact = modules[0].double()(x.double(), (h.double(), c.double()))
    for found, eager, wanted in zip(outputs[1], outputs[0], exact, strict=True):
        error, allowed = excess(found, eager, wanted)
        assert error <= max(allowed, torch.finfo(BF16).eps), (error, allowed)  # eager's h and c come of one rounded z, too


def test_auto_chooses_a_kernel() -> None:
    tensors = make(3, 8, Types(F32, F32, F32))
    with dl.use_backend("auto"):
        dl.depth_lstm_gates(**tensors)
    assert dl.last_backend() in (["cpp"] if REHEARSE else BACKENDS)


@every_backend
def test_what_no_kernel_takes_is_said(backend: str) -> None:
    with pytest.raises(ValueError, match="float64"):
        dl.depth_lstm_gates(**{name: tensor.double() for name, tensor in make(3, 8, Types(F32, F32, F32)).items()}, backend=backend)
    with pytest.raises(ValueError, match="8192"):
        dl.depth_lstm_gates(**make(1, 8193, Types(F32, F32, F32)), backend=backend)


# --- what only a GPU can show


@needs_gpu
@every_backend
@pytest.mark.parametrize("features", BOTH_SCHEMES)
def test_side_stream(backend: str, features: int) -> None:
    """Work on a side stream behind a slow kernel: whatever ran on another stream would read NaN."""
    tensors = make(3000, features, Types(BF16, BF16, BF16))
    grads = grads_for(tensors)
    wanted = fused_results(backend, tensors, grads)
    late = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        found = fused_results(backend, late, grads)
        found = {name: tensor * 1 for name, tensor in found.items()}
    torch.cuda.current_stream().wait_stream(side)
    assert_identical(found, wanted)


@needs_gpu
@every_backend
@pytest.mark.parametrize("features", BOTH_SCHEMES)
def test_cuda_graph_of_forward_and_backward(backend: str, features: int) -> None:
    tensors = make(1000, features, Types(BF16, BF16, BF16))
    grads = grads_for(tensors)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}

    def run() -> list[Tensor]:
        outputs = dl.depth_lstm_gates(**leaves, backend=backend)
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        changed = make(1000, features, Types(BF16, BF16, BF16))
        with torch.no_grad():
            for name, tensor in changed.items():
                leaves[name].copy_(tensor)
        graph.replay()
        wanted = fused_results(backend, changed, grads)
        assert_identical(dict(zip(wanted, captured, strict=True)), wanted)


@needs_gpu
@every_backend
def test_cuda_graph_draws_dropout_anew(backend: str) -> None:
    tensors = make(200, 512, Types(BF16, BF16, BF16))
    with torch.no_grad():
        dl.depth_lstm_gates(**tensors, dropout_p=0.5, training=True, backend=backend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h, _ = dl.depth_lstm_gates(**tensors, dropout_p=0.5, training=True, backend=backend)
    found = []
    for _ in range(2):
        graph.replay()
        found.append(h.clone())
    assert not torch.equal(*found)


class Gates(nn.Module):
    def __init__(self, features: int, backend: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(4, features)), nn.Parameter(normal(4, features))
        self.backend = backend

    def forward(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h, c = dl.depth_lstm_gates(z * 2, c, self.weight, self.bias, backend=self.backend)
        return h + 1, c


@every_backend
def test_compiled_once_for_any_number_of_rows(backend: str) -> None:
    features = few(128, 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Gates(features, backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager" if REHEARSE else "inductor")
    for rows in (5, 2, 3) if REHEARSE else (50, 2, 3, 4, 7, 17, 33, 64, 1000, 4099):
        z, c = normal(rows, 4 * features).requires_grad_(), normal(rows, features).requires_grad_()
        leaves, grads = [z, c, *model.parameters()], [normal(rows, features), normal(rows, features)]
        outputs = compiled(z, c)
        found = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
        outputs = model(z, c)
        wanted = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_gpu
@every_backend
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """z of 2^31 elements and a few rows: first and last rows, and those about element 2^31, are those of small calls, bit for bit."""
    features = 4096
    edge = 2**31 // (4 * features)
    rows = edge + 3
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    z = torch.empty(rows, 4 * features, dtype=BF16, device=DEVICE).normal_()
    c, dh, dc = (torch.empty(rows, features, dtype=BF16, device=DEVICE).normal_() for _ in range(3))
    affine = {name: tensor for name, tensor in make(1, features, Types(BF16, BF16, BF16)).items() if name in ("weight", "bias")}
    large = fused_results(backend, {"z": z, "c": c}, (dh, dc))
    for part in (slice(0, 5), slice(edge - 2, rows)):
        small = fused_results(backend, {"z": z[part].clone(), "c": c[part].clone()}, (dh[part].clone(), dc[part].clone()))
        assert_identical({name: tensor[part] for name, tensor in large.items()}, small)
    del large
    forward = dl.depth_lstm_gates(z, c, **affine, backend=backend)
    part = slice(edge - 2, rows)
    for found, wanted in zip(forward, dl.depth_lstm_gates(z[part].clone(), c[part].clone(), **affine, backend=backend), strict=True):
        assert torch.equal(found[part], wanted)


@needs_gpu
@every_backend
def test_on_a_gpu_that_is_not_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = make(300, 512, Types(BF16, BF16, BF16))
    grads = grads_for(tensors)
    wanted = fused_results(backend, tensors, grads)
    moved = {name: tensor.to("cuda:1") for name, tensor in tensors.items()}
    found = fused_results(backend, moved, (grads[0].to("cuda:1"), grads[1].to("cuda:1")))
    assert torch.cuda.current_device() == 0
    assert {tensor.device.index for tensor in found.values()} == {1}
    assert_identical({name: tensor.to("cuda:0") for name, tensor in found.items()}, wanted)


@needs_gpu
@every_backend
@pytest.mark.parametrize("features", BOTH_SCHEMES)
def test_nothing_is_kept_but_inputs_and_outputs(backend: str, features: int) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in make((1 << 23) // features, features, Types(BF16, BF16, BF16)).items()}
    grads = grads_for(tensors)

    def forward() -> tuple[Tensor, Tensor]:
        return dl.depth_lstm_gates(**tensors, backend=backend)

    torch.autograd.grad(forward(), list(tensors.values()), grads)
    before = torch.cuda.memory_allocated()
    outputs = forward()
    size = sum(output.nbytes for output in outputs)
    assert torch.cuda.memory_allocated() - before == size
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(outputs, list(tensors.values()), grads)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.25 * sum(gradient.nbytes for gradient in found)  # beside the gradients the partial sums, and statistics of rows


@needs_gpu
@every_backend
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("features", BOTH_SCHEMES)
def test_a_call_never_waits_for_the_gpu(backend: str, features: int, dropout: float) -> None:
    gates, cell = make(300, features, Types(BF16, BF16, BF16)), cell_tensors(300, features, BF16, True)
    calls = []
    for function, tensors in ((dl.depth_lstm_gates, gates), (dl.depth_lstm_cell, cell)):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        calls.append((function, leaves, grads_for({"z": tensors["c"], "c": tensors["c"]})))

    def run() -> None:
        for function, leaves, grads in calls:
            outputs = function(**leaves, dropout_p=dropout, training=True, backend=backend)  # type: ignore[operator]
            torch.autograd.grad(outputs, list(leaves.values()), grads)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@every_backend
def test_work_of_other_streams_on_freed_memory(backend: str) -> None:
    """Calls on two streams at once, with allocations and frees in between, do not disturb each other."""
    tensors = make(4000, 1024, Types(BF16, BF16, BF16))
    grads = grads_for(tensors)
    wanted = fused_results(backend, tensors, grads)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    every: list[dict[str, Tensor]] = []
    for _, stream in itertools.product(range(5), streams):
        with torch.cuda.stream(stream):
            every.append(fused_results(backend, tensors, grads))
    torch.cuda.synchronize()
    for found in every:
        assert_identical(found, wanted)
