"""The Triton kernels below autograd, torch.library, torch.compile and a training step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    DEVICE,
    F32,
    needs_triton,
    normal,
)
from test_ops import CHECKED, Cell, Gates, backward_arguments, raw, step, with_gradients
from triton_helpers import FULL, MIXED, dropout, fused, given, memory, on_device, real_memory, small_wide  # noqa: F401, fixtures

import depthlstm_fast as dl
from depthlstm_fast.ops.depth_lstm import split
from depthlstm_fast.ops.depth_lstm_autograd import gates

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's overflows


# --- autograd


# --- torch


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
@pytest.mark.usefixtures("real_memory")
def test_opcheck_forward(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    inputs = with_gradients(on_device(raw((2, 2), 5, FULL, norm, affine, kind, z_bias, seed)))
    torch.library.opcheck(torch.ops.depthlstm_fast.triton_gates_forward.default, tuple(inputs))


@pytest.mark.parametrize(
    ("call", "dh", "dc", "wanted"),
    [(CHECKED[0], True, True, True), (CHECKED[1], False, True, True), (CHECKED[3], True, False, False)],
)
@pytest.mark.usefixtures("real_memory")
def test_opcheck_backward(call: tuple, dh: bool, dc: bool, wanted: bool) -> None:
    norm, affine, kind, z_bias, seed = call
    inputs = on_device(backward_arguments(raw((2, 2), 5, FULL, norm, affine, kind, z_bias, seed), dh, dc, wanted))
    torch.library.opcheck(torch.ops.depthlstm_fast.triton_gates_backward.default, tuple(inputs))


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
def test_operator_equals_function(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    """Check that the autograd registered for tracers equals the autograd.Function of eager."""
    inputs = with_gradients(on_device(raw((4,), 9, FULL, norm, affine, kind, z_bias, seed)))
    leaves = [x for x in inputs[:6] if x is not None]
    grads = (normal(4, 9, dtype=F32).to(DEVICE), normal(4, 9, dtype=F32).to(DEVICE))
    both = []
    tensors, options = split(tuple(inputs))
    for outputs in (torch.ops.depthlstm_fast.triton_gates_forward(*inputs), gates(*tensors, options, "triton")):
        both.append((*outputs, *torch.autograd.grad(outputs, leaves, grads)))
    for a, e in zip(*both, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("kind", [Gates, Cell])
def test_compiled_once_for_any_number_of_rows(kind: type[torch.nn.Module]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"dropout_p": 0.5, "training": True}
    model, reference = (
        kind(5, backend="triton", **options).to(DEVICE),
        kind(5, backend="reference", **options).to(DEVICE),
    )
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (7, 2, 3, 4, 5, 9, 16, 17, 20, 33):
        inputs = [
            normal(number, (4 if kind is Gates else 2) * 5, dtype=F32).to(DEVICE),
            normal(number, 5, dtype=F32).to(DEVICE),
        ]
        grads = (normal(number, 5, dtype=F32).to(DEVICE), normal(number, 5, dtype=F32).to(DEVICE))
        torch.manual_seed(1)
        wanted = step(reference, reference, *inputs, grads)
        torch.manual_seed(1)
        found = step(compiled, model, *inputs, grads)
        assert dl.last_backend() == "triton" or number != 7  # the backend is noted when the call is traced
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- from outside


TRAINING = """
import torch
import depthlstm_fast as dl

device = "cuda" if torch.cuda.is_available() else "cpu"


def weights_after_a_step():
    torch.manual_seed(0)
    model = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(64, 4, dropout=0.1), 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    h = model(torch.randn(5, 2, 64, device=device))
    h.backward(torch.randn_like(h))
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


found = weights_after_a_step()
assert dl.last_backend() == "triton", dl.last_backend()
with dl.use_backend("reference"):
    wanted = weights_after_a_step()
    assert dl.last_backend() == "reference"
for name in wanted:
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
torch.manual_seed(0)
start = dict(dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(64, 4, dropout=0.1), 2).named_parameters())
print(sum(not torch.equal(found[name], start[name].to(device)) for name in found) == len(found))
"""


def test_training_step_by_environment(tmp_path: Path) -> None:
    """Train a model for a step as a user does, with the backend named by a variable.

    The weights must be those of the reference.
    """
    environment = {**os.environ, "DEPTHLSTM_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    if DEVICE == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", TRAINING]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"  # every parameter moved
