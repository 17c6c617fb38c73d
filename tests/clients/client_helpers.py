"""Helpers of the tests that run the package under other tools.

They have a small model, a batch, and a comparison of two runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

SOURCE, TARGET, D, HEADS, LAYERS, LONGEST = 23, 19, 16, 2, 2, 24


def model(module: Any = dl, **options: Any) -> Any:
    """Return a model with 2 + 2 layers of d = 16, without dropout."""
    sizes = {
        "d_model": D,
        "nhead": HEADS,
        "num_encoder_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "max_len": LONGEST,
    }
    return module.DepthLSTMTransformer(SOURCE, TARGET, **{**sizes, "dropout": 0.0, **options})


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    """Return source and target ids; two tokens of the first source are padding."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, SOURCE, (rows, 7), generator=generator)
    source[0, 5:] = 0
    target = torch.randint(3, TARGET, (rows, 5), generator=generator)
    target[:, 0] = 1
    return source, target


def cotangent(rows: int = 4) -> Tensor:
    """Return a random gradient of the logits; with constant ones LayerNorm's gradient would vanish."""
    return torch.randn(rows, 5, TARGET, generator=torch.Generator().manual_seed(2))


def gradients(module: nn.Module, forward: Any = None) -> dict[str, Tensor]:
    """Return the gradient of every trained parameter of ``module`` under :func:`cotangent`; zeros if there is none."""
    module.zero_grad()
    (forward or module)(*batch()).backward(cotangent())
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def assert_equal_dicts(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerances: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


def fill_with_nan(module: nn.Module) -> None:
    """Fill memory that ``to_empty`` leaves uninitialised with NaN, to make it visible."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(float("nan"))
