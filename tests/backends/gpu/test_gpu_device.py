"""Properties of the Triton and CUDA C++ kernels that only a GPU can show.

They are streams, graphs, compilation, large sizes and allocations. Most of the tests need a GPU; test_gpu.py says how
to rehearse.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_helpers import (
    BF16,
    DEVICE,
    REHEARSE,
    SCHEMES,
    assert_identical,
    cell_tensors,
    every_backend,
    few,
    fused_results,
    grads_for,
    make,
    normal,
    runnable,
)
from helpers import Types
from torch import Tensor, nn

import depthlstm_fast as dl

pytestmark = [] if REHEARSE else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(REHEARSE, reason="a rehearsal on the CPU")


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return runnable(request.param, monkeypatch)


@needs_gpu
@every_backend
@pytest.mark.parametrize("features", SCHEMES)
def test_side_stream(backend: str, features: int) -> None:
    """Check work on a side stream behind a slow kernel: work on another stream would read NaN."""
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
@pytest.mark.parametrize("features", SCHEMES)
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


def hold_large_call(backend: str, features: int) -> None:
    """Check a z of 2^31 elements and a few rows.

    The first and last rows, and those about element 2^31, equal those of small calls bit for bit.
    """
    edge = 2**31 // (4 * features)
    rows = edge + 3
    z = torch.empty(rows, 4 * features, dtype=BF16, device=DEVICE).normal_()
    c, dh, dc = (torch.empty(rows, features, dtype=BF16, device=DEVICE).normal_() for _ in range(3))
    affine = {
        name: tensor
        for name, tensor in make(1, features, Types(BF16, BF16, BF16)).items()
        if name in ("weight", "bias")
    }
    large = fused_results(backend, {"z": z, "c": c}, (dh, dc))
    for part in (slice(0, 5), slice(edge - 2, rows)):
        small = fused_results(
            backend, {"z": z[part].clone(), "c": c[part].clone()}, (dh[part].clone(), dc[part].clone())
        )
        assert_identical({name: tensor[part] for name, tensor in large.items()}, small)
    del large
    forward = dl.depth_lstm_gates(z, c, **affine, backend=backend)
    part = slice(edge - 2, rows)
    for found, wanted in zip(
        forward, dl.depth_lstm_gates(z[part].clone(), c[part].clone(), **affine, backend=backend), strict=True
    ):
        assert torch.equal(found[part], wanted)


@needs_gpu
@every_backend
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Check both backward schemes; one after the other, to save memory."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for features in (2048, 4096):
        hold_large_call(backend, features)


@needs_gpu
@every_backend
def test_a_call_leaves_device_and_stream_as_they_were(backend: str) -> None:
    tensors = make(300, 512, Types(BF16, BF16, BF16))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        before = torch.cuda.current_device(), torch.cuda.current_stream()
        fused_results(backend, tensors, grads_for(tensors))
        assert (torch.cuda.current_device(), torch.cuda.current_stream()) == before
    side.synchronize()


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
@pytest.mark.parametrize("features", SCHEMES[:2])  # torch counts whole blocks, which these sizes fill
def test_nothing_is_kept_but_inputs_and_outputs(backend: str, features: int) -> None:
    tensors = {
        name: tensor.requires_grad_()
        for name, tensor in make((1 << 24) // features, features, Types(BF16, BF16, BF16)).items()
    }
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
    # partial sums and statistics of rows come beside the gradients
    assert peak <= 1.25 * sum(gradient.nbytes for gradient in found)


@needs_gpu
@every_backend
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("features", SCHEMES)
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
