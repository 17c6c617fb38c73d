"""How a stack's matrices are drawn. Norms, mixing weights, queries, states and embeddings are never touched here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import sharding
from .connections import Connection, DepthGRUCell
from .reference.attention import CrossAttention, SelfAttention
from .reference.cell import DepthLSTMCell
from .reference.decoder_attention import MultiscaleAttention

INITS = ("lipschitz", "glorot", "ds", "ds-released", "depth", "deepnorm")

Part = tuple[nn.Module, str, tuple[str, ...], tuple[int, ...] | None]
"""A module, its parameter's name, the kinds of the stacked matrices, and their rows; None for equal ones."""


def initialise_layer(layer: nn.Module, init: str, index: int, beta: float) -> None:
    """Draw the matrices of layer ``index``, counted from 0, and set their biases to zero.

    For a matrix (do, di), l = index + 1:

    - "lipschitz": U(+-1/sqrt(di)), Xu et al., arXiv 1911.03179.
    - "glorot": U(+-sqrt(6/(di + do))).
    - "ds": U(+-sqrt(6/(di + do)) / sqrt(l)), Zhang et al., arXiv 1908.11365, equation 6. "ds-released": divided by
      l ** 0.25, as the released code does.
    - "depth": N(0, (0.02 / sqrt(2 l))^2).
    - "deepnorm": Xavier's variance, times ``beta`` squared for values, outputs and feed-forward networks, Wang et al.,
      arXiv 2203.00555; uniform, where the paper draws normal numbers of that variance.
    """
    for module, name, kinds, rows in _parts(layer):
        _draw(getattr(module, name), init, index, kinds, beta, rows)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)


def initialise_connection(connection: Connection, init: str, branches_per_layer: int) -> None:
    """Draw the matrices of a recurrent connection's cells as :func:`initialise_layer`; their biases are the cells'."""
    cells = getattr(connection, "cells", ())
    for branch, cell in reversed(list(enumerate(cells))):  # a shared cell is that of the first layer
        for module, name, kinds, _ in _cell_parts(cell):
            _draw(getattr(module, name), init, branch // branches_per_layer, kinds, 1.0)


def _parts(layer: nn.Module) -> Iterator[Part]:
    for module in layer.modules():
        if isinstance(module, SelfAttention):
            yield from _linear(module.in_proj, "q", "k", "v", rows=module.parts)
            yield from _linear(module.out_proj, "out")
        elif isinstance(module, CrossAttention):
            yield from _linear(module.q_proj, "q")
            yield from _linear(module.kv_proj, "k", "v")
            yield from _linear(module.out_proj, "out")
        if isinstance(module, MultiscaleAttention) and isinstance(module.gate, nn.Module):
            yield from _linear(module.gate, "gate")
    yield from _linear(getattr(layer, "linear1", None), *["ffn"] * (2 if getattr(layer, "gated", False) else 1))
    yield from _linear(getattr(layer, "linear2", None), "ffn")


def _cell_parts(cell: nn.Module) -> Iterator[Part]:
    if isinstance(cell, DepthLSTMCell):
        gates = 4 if cell.hidden == "linear" else 3
        yield from _linear(cell.gates, *["gate"] * gates)
        for name in ("ffn_in", "ffn_out"):
            yield from _linear(getattr(cell, name, None), "ffn")
    elif isinstance(cell, DepthGRUCell):
        yield from _linear(cell.input_proj, *["gate"] * 3)
        yield from _linear(cell.state_proj, *["gate"] * (3 if cell.reset_weight is None else 2))
        if cell.reset_weight is not None:
            yield cell, "reset_weight", ("gate",), None


def _linear(module: nn.Module | None, *kinds: str, rows: tuple[int, ...] | None = None) -> Iterator[Part]:
    """Nothing for a module that stands where an nn.Linear was."""
    if isinstance(module, nn.Linear):
        yield module, "weight", kinds, rows


@torch.no_grad()
def _draw(
    weight: Tensor, init: str, index: int, kinds: tuple[str, ...], beta: float, rows: tuple[int, ...] | None = None
) -> None:
    """Draw the matrices that are stacked in ``weight``; a sharded one takes its part of a whole draw."""
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    fan_in, layer = weight.shape[1], index + 1
    parts = whole.chunk(len(kinds)) if rows is None else whole.split(rows)
    for part, kind in zip(parts, kinds, strict=True):
        if init == "depth":
            part.normal_(0, 0.02 / math.sqrt(2 * layer))
            continue
        bound = math.sqrt(6 / (fan_in + part.shape[0]))
        if init == "lipschitz":
            bound = 1 / math.sqrt(fan_in)
        elif init == "ds":
            bound /= math.sqrt(layer)
        elif init == "ds-released":
            bound /= layer**0.25
        elif init == "deepnorm" and kind in ("v", "out", "ffn"):
            bound *= beta
        part.uniform_(-bound, bound)
    weight.copy_(sharding.replicated(whole, weight))
