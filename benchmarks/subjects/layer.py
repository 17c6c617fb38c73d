"""One training step of an encoder layer (forward, backward, no optimizer) against PyTorch's own residual layer of equal parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import matrix_products
from ..measure.compiled import Compiled
from ..measure.problems import Problem, Runs
from ..measure.rows import Row, Target

FEATURES, HEADS, BATCH, LENGTH = 512, 8, 16, 256
RESIDUAL = "nn.TransformerEncoderLayer"


def residual_layer(
    features: int = FEATURES, heads: int = HEADS, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer; its matrices have 12 D^2 entries, as ours have."""
    return nn.TransformerEncoderLayer(
        features, heads, 4 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=dtype, device=device
    )


def depth_lstm_layers(
    features: int = FEATURES, heads: int = HEADS, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """The reference layer and the fused one with the same parameters."""
    eager = dl.reference.DepthLSTMEncoderLayer(features, heads, dropout=0.0, batch_first=True, dtype=dtype, device=device)
    fused = dl.DepthLSTMEncoderLayer(features, heads, dropout=0.0, batch_first=True, dtype=dtype, device=device)
    fused.load_state_dict(eager.state_dict())
    return {"eager": eager, "fused": fused}


def matrix_entries(layer: nn.Module) -> int:
    """Entries of the layer's matrices; the gates' (4, D) affine is no matrix."""
    norms = [module for module in layer.modules() if isinstance(module, (nn.LayerNorm, dl.reference.GateNorm))]
    excluded = {id(parameter) for module in norms for parameter in module.parameters()}
    return sum(p.numel() for p in layer.parameters() if p.dim() == 2 and id(p) not in excluded)


def depth_lstm_step(layer: nn.Module, h: Tensor, c: Tensor, cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Both states in, both states out, gradients of both and of every parameter: a layer in the middle of a stack."""
    return torch.autograd.grad(layer(h, c), [h, c, *layer.parameters()], cotangents)


def residual_step(layer: nn.Module, h: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(h), [h, *layer.parameters()], cotangent)


def training(compiled: Compiled) -> Problem:
    """The step of a layer in the middle of a stack."""
    h, c = (torch.randn(BATCH, LENGTH, FEATURES, requires_grad=True) for _ in range(2))
    cotangents = [torch.randn(BATCH, LENGTH, FEATURES) for _ in range(2)]
    layers, residual = depth_lstm_layers(), residual_layer()
    if matrix_entries(residual) != matrix_entries(layers["fused"]):
        raise ValueError(f"layers of unequal size: {matrix_entries(residual)} and {matrix_entries(layers['fused'])} matrix entries")
    needed = matrix_products.encoder_layer(BATCH, LENGTH, FEATURES, HEADS)
    runs: Runs = {
        "eager": lambda: depth_lstm_step(layers["eager"], h, c, cotangents),
        "fused": lambda: depth_lstm_step(layers["fused"], h, c, cotangents),
        "against": lambda: residual_step(residual, h, cotangents[0]),
        "floor": matrix_products.training_run(needed, torch.float32),
    }
    row = Row("layer", "encoder layer step", "fp32", f"{BATCH}x{LENGTH} D={FEATURES}", "ms", against=RESIDUAL)
    row.others = {"floor": "its bare products"}
    row.note = f"{matrix_entries(residual) / 1e6:.2f}M matrix entries in each layer"
    targets = [Target("eager", "speedup"), Target("against", "ratio", 0.95)]
    return Problem(row, runs, targets, 6.0, flops=matrix_products.training_flops(needed), floor="floor")


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {"encoder layer": training}
