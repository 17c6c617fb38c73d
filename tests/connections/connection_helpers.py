"""Small connections and stacks, shared by the tests of depth connections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.connections import DLCL, AttentionResiduals, Connection, DenseFormer, DepthGRU, DepthLSTM

F64 = torch.float64
C = 8
NAMES = dl.connections.names()
# every name, and the forms that options choose
FORMS: dict[str, Any] = {name: name for name in NAMES} | {
    "pre-norm, rms": functools.partial(dl.connections.PreNorm, norm="rms"),
    "siamese, rms": functools.partial(dl.connections.Siamese, norm="rms"),
    "depth-lstm, ffn": functools.partial(DepthLSTM, hidden="ffn", share_cell=True, init_cell="learned"),
    "depth-gru, before": functools.partial(DepthGRU, reset_before=True, gate_norm=True, update_bias=2.0),
    "depth-gru, normed": functools.partial(DepthGRU, gate_norm=True, bias=False),
    "dlcl, post": functools.partial(DLCL, normalize_before=False),
    "denseformer, dilation 3, period 2": functools.partial(DenseFormer, dilation=3, period=2),
    "attention-residuals, block": functools.partial(AttentionResiduals, block_size=3),
    "attention-residuals, rms": functools.partial(AttentionResiduals, norm="rms"),
}


def make(form: str, branches: int, per_layer: int = 1, width: int = C) -> Connection:
    factory = dl.connections.get(FORMS[form]) if isinstance(FORMS[form], str) else FORMS[form]
    base = factory.func if isinstance(factory, functools.partial) else factory
    options = {"branches_per_layer": per_layer} if base in (DLCL, DenseFormer, dl.connections.Siamese) else {}
    return factory(width, branches, **options).double()


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Every parameter moved, so that no term is one or zero."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return module


def branches(number: int, width: int = C) -> list[Callable[[Tensor], Tensor]]:
    """Branches that are not linear, each another."""
    matrices = [torch.randn(width, width, dtype=F64) / width**0.5 for _ in range(number)]
    return [lambda u, matrix=matrix: torch.tanh(u @ matrix) for matrix in matrices]


def run(
    connection: Connection, x: Tensor, functions: list[Callable[[Tensor], Tensor]], fused: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the branches' inputs; ``fused``: by ``step``, or else by ``write`` and ``read``."""
    state = connection.start(x)
    inputs = [connection.read(state, 0)]
    for i, function in enumerate(functions):
        y = function(inputs[-1])
        if i + 1 == len(functions):
            state = connection.write(state, y, i)
        elif fused:
            state, u = connection.step(state, y, i)
            inputs.append(u)
        else:
            state = connection.write(state, y, i)
            inputs.append(connection.read(state, i + 1))
    return connection.finish(state), inputs


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


SMALL: dict[str, Any] = {
    "src_vocab": 11,
    "tgt_vocab": 13,
    "d_model": C,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dropout": 0.0,
    "dtype": F64,
}


def model(form: str = "pre-norm", **options: Any) -> dl.Transformer:
    return dl.Transformer(**{**SMALL, "connection": FORMS[form], **options})


def batch() -> tuple[Tensor, Tensor]:
    """Ragged sources and targets, padded on the right."""
    src, tgt = torch.randint(3, 11, (3, 6)), torch.randint(3, 13, (3, 5))
    tgt[:, 0] = 1
    src[1, 4:] = tgt[1, 3:] = src[2, 2:] = 0
    return src, tgt


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
