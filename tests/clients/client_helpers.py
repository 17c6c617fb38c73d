"""A small model and a batch for the tests that run the package under other people's tools, and how two runs are
compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

SOURCE, TARGET, D, HEADS, LAYERS, LONGEST = 23, 19, 16, 2, 2, 24


def model(module: Any = dl, **options: Any) -> Any:
    """A model with 2 + 2 layers of d = 16; no dropout."""
    sizes = {
        "d_model": D,
        "nhead": HEADS,
        "num_encoder_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "max_len": LONGEST,
    }
    return module.DepthLSTMTransformer(SOURCE, TARGET, **{**sizes, "dropout": 0.0, **options})


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    """Source and target ids; two tokens of the first source are padding."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, SOURCE, (rows, 7), generator=generator)
    source[0, 5:] = 0
    target = torch.randint(3, TARGET, (rows, 5), generator=generator)
    target[:, 0] = 1
    return source, target


def cotangent(rows: int = 4) -> Tensor:
    """A random gradient of the logits: a sum of LayerNorm's outputs would have none."""
    return torch.randn(rows, 5, TARGET, generator=torch.Generator().manual_seed(2))


def gradients(module: nn.Module, forward: Any = None) -> dict[str, Tensor]:
    """The gradient of every trained parameter of ``module`` under :func:`cotangent`; zeros where there is none."""
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
    """What ``to_empty`` leaves is whatever was in memory: make it visible."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(float("nan"))
