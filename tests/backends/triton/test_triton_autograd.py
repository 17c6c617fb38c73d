"""The Triton kernels below autograd, torch.library, torch.compile and a training step."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CALLS,
    DEVICE,
    F32,
    Types,
    assert_identical,
    cotangents,
    needs_triton,
    normal,
    results,
)
from test_ops import CHECKED, Cell, Gates, backward_arguments, raw, step, with_gradients
from torch import Tensor
from triton_helpers import FULL, MIXED, dropout, fused, given, memory, on_device, real_memory, small_wide  # noqa: F401, fixtures

import depthlstm_fast as dl
from depthlstm_fast.ops.depth_lstm import split
from depthlstm_fast.ops.depth_lstm_autograd import gates

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's, of overflows


# --- autograd


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_nothing_given_is_written(kind: str, types: Types) -> None:
    tensors, options = given(5, 9, types, kind=kind)
    options.update(dropout())
    grads = cotangents(tensors)
    everything = {**tensors, "seed": options["seed"], "dh": grads[0], "dc": grads[1]}
    before = {key: tensor.clone() for key, tensor in everything.items()}
    versions = {key: tensor._version for key, tensor in everything.items()}
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    first = [output.detach().clone() for output in outputs]
    torch.autograd.grad(outputs, list(leaves.values()), grads)
    assert {key: tensor._version for key, tensor in everything.items()} == versions
    assert_identical({key: tensor.detach() for key, tensor in everything.items()}, before)
    assert_identical(dict(zip("hc", [output.detach() for output in outputs], strict=True)), dict(zip("hc", first, strict=True)))


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_backward_twice_gives_twice_the_gradient(norm: str, affine: bool, kind: str) -> None:
    tensors, options = given(5, 9, FULL, norm, affine, kind)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    grads = cotangents(tensors)
    torch.autograd.backward(outputs, grads, retain_graph=True)
    once = {key: tensor.grad.clone() for key, tensor in leaves.items()}
    torch.autograd.backward(outputs, grads)
    assert_identical({key: tensor.grad for key, tensor in leaves.items()}, {key: 2 * gradient for key, gradient in once.items()})


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_every_subset_of_gradients(kind: str) -> None:
    tensors, options = given(3, 7, FULL, kind=kind)
    grads = cotangents(tensors)
    every = results(fused, tensors, grads, **options)
    for size in range(len(tensors)):
        for wanted in itertools.combinations(tensors, size):
            leaves = {key: tensor.detach().requires_grad_(key in wanted) for key, tensor in tensors.items()}
            outputs = fused(**leaves, **options)
            assert all(output.requires_grad == bool(wanted) for output in outputs)
            if wanted:
                torch.autograd.backward(outputs, grads)
            for key, leaf in leaves.items():
                assert (leaf.grad is not None) == (key in wanted), (wanted, key)
                assert leaf.grad is None or torch.equal(leaf.grad, every[f"d{key}"]), (wanted, key)


@pytest.mark.parametrize(
    ("scheme", "norm", "affine", "kind"), [("narrow", *call) for call in CALLS] + [("wide", *call) for call in (CALLS[0], CALLS[4])]
)
@pytest.mark.parametrize("used", ["h", "c"])
def test_undefined_gradients_are_zeros(used: str, scheme: str, norm: str, affine: bool, kind: str, request: pytest.FixtureRequest) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(2, 17, FULL, norm, affine, kind)
    dh, dc = cotangents(tensors)
    dh, dc = (dh, torch.zeros_like(dc)) if used == "h" else (torch.zeros_like(dh), dc)
    wanted = results(fused, tensors, (dh, dc), **options)
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    h, c = fused(**leaves, **options)
    torch.autograd.backward([h] if used == "h" else [c], [dh] if used == "h" else [dc])
    for key, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted[f"d{key}"]), key


def test_neither_gradient() -> None:
    """An output can be in the graph and yet get no gradient: nothing may crash on it."""
    tensors, options = given(5, 17, FULL)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    h, c = fused(**leaves, **options)
    extra = normal(3).requires_grad_()
    gradients = torch.autograd.grad((extra * 2).sum(), [extra, h, c, *leaves.values()], allow_unused=True)
    assert gradients[1:] == (None,) * (len(leaves) + 2)


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_kept_for_backward(kind: str) -> None:
    """Only what was given is kept, no copy and nothing derived; and without gradients there is no graph."""
    tensors, options = given(5, 17, FULL, kind=kind)
    options.update(dropout())
    stored: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tensor) or tensor, lambda tensor: tensor):
        leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
        fused(**leaves, **options)
        assert {tensor.data_ptr() for tensor in stored} == {tensor.data_ptr() for tensor in (*tensors.values(), options["seed"])}
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not fused(**leaves, **options)[0].requires_grad


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_double_backward_is_refused_with_a_hint(kind: str) -> None:
    tensors, options = given(3, 8, FULL, kind=kind)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    outputs = fused(**tensors, **options)
    gradients = torch.autograd.grad(outputs, leaves, cotangents(tensors), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r'no second derivative; use backend="reference"'):
            torch.autograd.grad(gradient, leaves, torch.randn_like(gradient), retain_graph=True, allow_unused=True)


# --- torch


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
@pytest.mark.usefixtures("real_memory")
def test_opcheck_forward(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    inputs = with_gradients(on_device(raw((2, 2), 5, FULL, norm, affine, kind, z_bias, seed)))
    torch.library.opcheck(torch.ops.depthlstm_fast.triton_gates_forward.default, tuple(inputs))


@pytest.mark.parametrize(
    ("call", "dh", "dc", "wanted"), [(CHECKED[0], True, True, True), (CHECKED[1], False, True, True), (CHECKED[3], True, False, False)]
)
@pytest.mark.usefixtures("real_memory")
def test_opcheck_backward(call: tuple, dh: bool, dc: bool, wanted: bool) -> None:
    norm, affine, kind, z_bias, seed = call
    inputs = on_device(backward_arguments(raw((2, 2), 5, FULL, norm, affine, kind, z_bias, seed), dh, dc, wanted))
    torch.library.opcheck(torch.ops.depthlstm_fast.triton_gates_backward.default, tuple(inputs))


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
def test_operator_equals_function(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    """The autograd that is registered for tracers gives what the autograd.Function of eager gives."""
    inputs = with_gradients(on_device(raw((4,), 9, FULL, norm, affine, kind, z_bias, seed)))
    leaves = [x for x in inputs[:6] if x is not None]
    grads = (normal(4, 9, dtype=F32).to(DEVICE), normal(4, 9, dtype=F32).to(DEVICE))
    both = []
    for outputs in (torch.ops.depthlstm_fast.triton_gates_forward(*inputs), gates(*split(tuple(inputs)), "triton")):
        both.append((*outputs, *torch.autograd.grad(outputs, leaves, grads)))
    for a, e in zip(*both, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("kind", [Gates, Cell])
def test_compiled_once_for_any_number_of_rows(kind: type[torch.nn.Module]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"dropout_p": 0.5, "training": True}
    model, reference = kind(5, backend="triton", **options).to(DEVICE), kind(5, backend="reference", **options).to(DEVICE)
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (7, 2, 3, 4, 5, 9, 16, 17, 20, 33):
        inputs = [normal(number, (4 if kind is Gates else 2) * 5, dtype=F32).to(DEVICE), normal(number, 5, dtype=F32).to(DEVICE)]
        grads = (normal(number, 5, dtype=F32).to(DEVICE), normal(number, 5, dtype=F32).to(DEVICE))
        torch.manual_seed(1)
        wanted = step(reference, reference, *inputs, grads)
        torch.manual_seed(1)
        found = step(compiled, model, *inputs, grads)
        assert dl.last_backend() == "triton" or number != 7  # noted when the call is traced
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
    """As a user has it: the backend named by a variable, a model trained for a step, the weights those of the reference."""
    environment = {**os.environ, "DEPTHLSTM_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    if DEVICE == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", TRAINING]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"  # every parameter moved
