"""Captum's attributions, which hook modules, on the cell, its product and its normalisation.

The tests were run with captum 0.9.0.
"""

from __future__ import annotations

import pytest
import torch
from client_helpers import HEADS, D
from torch import Tensor, nn

import depthlstm_fast as dl

attr = pytest.importorskip("captum.attr")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, batch_first=True)
        self.encoder, self.output = dl.DepthLSTMEncoder(layer, 2), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.encoder(x).mean(1))


@pytest.fixture
def classifier() -> Classifier:
    return Classifier().eval()


def test_activation_and_gradient_of_the_norm(classifier: Classifier) -> None:
    norm, x = classifier.encoder.layers[0].cell.norm, torch.randn(2, 4, D)
    with torch.no_grad():
        norm.bias.normal_()
    activations = attr.LayerActivation(classifier, norm).attribute(x)
    for found, wanted in zip(activations, (norm.weight, norm.bias), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=0)
    products = attr.LayerGradientXActivation(classifier, norm).attribute(x, target=1)
    wanted_gradients = torch.autograd.grad(classifier(x)[:, 1].sum(), (norm.weight, norm.bias))
    for found, parameter, gradient in zip(products, (norm.weight, norm.bias), wanted_gradients, strict=True):
        torch.testing.assert_close(found, (parameter * gradient).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["encoder.layers.0.cell.gates", "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.cell"]
)
def test_layer_activation(name: str, classifier: Classifier) -> None:
    seen = []
    module, x = classifier.get_submodule(name), torch.randn(2, 4, D)
    found = attr.LayerActivation(classifier, module).attribute(x)
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    classifier(x)
    torch.testing.assert_close(found, seen[0])


def test_integrated_gradients_are_complete(classifier: Classifier) -> None:
    """Check that attributions add up to the difference between the output and the baseline's output.

    The gradients are then right along the way.
    """
    x, baseline = torch.randn(2, 2, 4, D)
    found = attr.IntegratedGradients(classifier).attribute(x, baseline, target=0, n_steps=64)
    with torch.no_grad():
        difference = (classifier(x) - classifier(baseline))[:, 0]
    torch.testing.assert_close(found.sum((1, 2)).float(), difference, rtol=1e-3, atol=1e-4)
