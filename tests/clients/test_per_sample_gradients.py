"""Gradients of each sample by torch.func.vmap over torch.func.grad, as in differentially private training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from client_helpers import batch, cotangent, model
from torch import Tensor, nn

from depthlstm_fast.backends import choice


@pytest.fixture(autouse=True)
def fallback_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow the fallback: torch.func takes the reference, which strict mode forbids."""
    monkeypatch.setattr(choice, "_strict", False)


def per_sample(made: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of each row of the batch, stacked."""
    made = copy.deepcopy(made)  # torch's functional_call leaves its own tensors in shared modules
    source, target = batch()
    values = {name: parameter.detach() for name, parameter in made.named_parameters()}

    def loss(values: dict[str, Tensor], source: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        return (torch.func.functional_call(made, values, (source[None], target[None]))[0] * grad).sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(values, source, target, cotangent().double())


@pytest.mark.parametrize("options", [{}, {"hidden": "ffn", "share_cell": True, "merge": "concat"}], ids=str)
def test_vmap_of_grad(options: dict[str, Any]) -> None:
    made = model(dtype=torch.float64, **options)
    found = per_sample(made)
    source, target = batch()
    for row in range(len(source)):
        made.zero_grad()
        made(source[row : row + 1], target[row : row + 1]).backward(cotangent()[row : row + 1].double())
        for name, parameter in made.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-8, atol=1e-10)


def test_clipped_gradients_by_opacus() -> None:
    """Check that opacus (1.6.0) clips and sums the gradients of vmap, once they stand where its own hooks put them."""
    bound, optimizers = 1.0, pytest.importorskip("opacus.optimizers")
    made = model(dtype=torch.float64)
    parameters = dict(made.named_parameters())
    values, samples = {name: parameter.detach().clone() for name, parameter in parameters.items()}, per_sample(made)
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(made.parameters(), 1.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=4,
        loss_reduction="mean",
    )
    for name, parameter in parameters.items():
        parameter.grad_sample = samples[name]
    optimizer.step()
    norms = sum(sample.flatten(1).square().sum(1) for sample in samples.values()).sqrt()
    factors = (bound / (norms + 1e-6)).clamp(max=1)
    for name, parameter in parameters.items():
        step = torch.einsum("i,i...->...", factors, samples[name]) / 4
        torch.testing.assert_close(parameter.detach(), values[name] - step)


def test_hooks_of_opacus_are_no_way() -> None:
    """Check that opacus raises an error at cell.norm.

    It takes samples apart at each module's output. The output of cell.norm, weight and bias, has no samples.
    """
    grad_sample = pytest.importorskip("opacus.grad_sample")
    logits = grad_sample.GradSampleModule(model(), strict=False)(*batch())
    with pytest.raises(TypeError):
        logits.backward(cotangent())
