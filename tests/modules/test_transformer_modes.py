"""The whole Transformer at its usual size, 6 + 6 layers of d = 512: compiled, under autocast and with checkpointing.

Forward and backward are compared with the reference by the bound of helpers.py. The largest error against fp64 is at
most twice that of the eager reference at the same precision.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import F32, TINY, needs_cpp
from torch import Tensor

import depthlstm_fast as dl

SOURCE, TARGET = 61, 67


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Return fused, reference, and reference in fp64, with the same parameters."""
    torch.manual_seed(0)
    reference = dl.reference.DepthLSTMTransformer(SOURCE, TARGET, dropout=0.0, forget_bias=2.0)
    fused = dl.DepthLSTMTransformer(SOURCE, TARGET, dropout=0.0, forget_bias=2.0)
    fused.load_state_dict(reference.state_dict())
    return fused, reference, copy.deepcopy(reference).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, SOURCE, (2, 9), generator=generator)
    source[1, 6:] = 0  # padding
    target = torch.randint(3, TARGET, (2, 7), generator=generator)
    return source, target, torch.randn(2, 7, TARGET, generator=generator, dtype=torch.float64)


def results(model: torch.nn.Module, call: torch.nn.Module, autocast: bool = False) -> dict[str, Tensor]:
    """Return logits and every parameter's gradient for one random cotangent."""
    source, target, cotangent = batch()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = call(source, target)
    logits.backward(cotangent.to(logits.dtype))
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_within_bound(
    fused: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], eps: float
) -> None:
    assert fused.keys() == eager.keys() == exact.keys()
    wrong = []
    for name, value in exact.items():
        error = (fused[name].double() - value).abs().max().item()
        allowed = 2 * (eager[name].double() - value).abs().max().item() + TINY[F32] * eps * value.abs().max().item()
        if not error <= allowed:
            wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    assert not wrong, "\n".join(wrong)


@needs_cpp
@pytest.mark.slow  # inductor compiles some 500 kernels
def test_compiled_by_inductor(models: tuple[torch.nn.Module, ...]) -> None:
    fused, reference, exact = models
    outcome = results(fused, torch.compile(fused, fullgraph=True))
    assert dl.last_backend() == "cpp"
    assert_within_bound(outcome, results(reference, reference), results(exact, exact), torch.finfo(F32).eps)


@needs_cpp
def test_compiled_graph_is_whole(models: tuple[torch.nn.Module, ...]) -> None:
    fused, reference, exact = models
    outcome = results(fused, torch.compile(fused, fullgraph=True, backend="aot_eager"))
    assert dl.last_backend() == "cpp"
    assert_within_bound(outcome, results(reference, reference), results(exact, exact), torch.finfo(F32).eps)


@needs_cpp
def test_autocast(models: tuple[torch.nn.Module, ...]) -> None:
    fused, reference, exact = models
    outcome = results(fused, fused, autocast=True)
    assert dl.last_backend() == "cpp"
    assert_within_bound(
        outcome, results(reference, reference, autocast=True), results(exact, exact), torch.finfo(torch.bfloat16).eps
    )


@needs_cpp
def test_activation_checkpointing(models: tuple[torch.nn.Module, ...]) -> None:
    fused = models[0]
    plain = results(fused, fused)
    fused.encoder.gradient_checkpointing = fused.decoder.gradient_checkpointing = True
    try:
        checkpointed = results(fused, fused)
    finally:
        fused.encoder.gradient_checkpointing = fused.decoder.gradient_checkpointing = False
    assert dl.last_backend() == "cpp"
    assert_within_bound(checkpointed, plain, plain, torch.finfo(F32).eps)  # recomputed by the same kernels
