"""The matrix products that a subject needs: their FLOPs, and a run of these products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

import depthlstm_fast as dl


class Product(NamedTuple):
    """``batch`` products of an (rows, inner) and an (inner, columns) matrix.

    The second is stored as its transpose, as weights are.
    """

    batch: int
    rows: int
    inner: int
    columns: int


def training_flops(products: Sequence[Product]) -> int:
    """Return the floating-point operations of the products and of their two gradients each.

    A multiplication and an addition count as two.
    """
    return sum(3 * 2 * batch * rows * inner * columns for batch, rows, inner, columns in products)


def training_run(
    products: Sequence[Product], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Callable[[], object]:
    """Return a run of the products on contiguous random inputs, with outputs allocated afresh.

    Each product is y = x w^T, dx = dy w and dw = dy^T x.
    """

    def operands(product: Product) -> list[torch.Tensor]:
        batch, rows, inner, columns = product
        shapes = (rows, inner), (columns, inner), (rows, columns)
        return [torch.randn(*(() if batch == 1 else (batch,)), *shape, device=device).to(dtype) for shape in shapes]

    inputs = [operands(product) for product in products]
    return lambda: [(x @ w.mT, dy @ w, dy.mT @ x) for x, w, dy in inputs]


def cell(tokens: int, features: int) -> list[Product]:
    """Return the products of a cell: z = [x ; h] W^T."""
    return [Product(1, tokens, 2 * features, 4 * features)]


def attention(batch: int, queries: int, keys: int, features: int, heads: int) -> list[Product]:
    """Return the products of attention: scores and weighted sums, all heads."""
    width = features // heads
    return [Product(batch * heads, queries, width, keys), Product(batch * heads, queries, keys, width)]


def encoder_layer(batch: int, length: int, features: int, heads: int) -> list[Product]:
    """Return the products of self-attention with its input and output projections, and of the cell.

    A feed-forward network of 4D features takes as many FLOPs.
    """
    tokens = batch * length
    projections = [Product(1, tokens, features, 3 * features), Product(1, tokens, features, features)]
    return [*projections, *attention(batch, length, length, features, heads), *cell(tokens, features)]


def decoder_layer(batch: int, target: int, source: int, features: int, heads: int) -> list[Product]:
    """Return the products of masked self-attention (counted whole), cross-attention and the cell.

    The cross-attention attends to a memory of ``source`` tokens. The cell sees the sum of both attentions.
    """
    tokens = batch * target
    cross = [
        Product(1, tokens, features, features),
        Product(1, batch * source, features, 2 * features),
        Product(1, tokens, features, features),
    ]
    return [*encoder_layer(batch, target, features, heads), *cross, *attention(batch, target, source, features, heads)]


def matrix_entries(layer: nn.Module) -> int:
    """Return the number of entries of the layer's matrices; the gates' (4, D) affine does not count as one."""
    norms = [module for module in layer.modules() if isinstance(module, (nn.LayerNorm, dl.reference.GateNorm))]
    excluded = {id(parameter) for module in norms for parameter in module.parameters()}
    return sum(p.numel() for p in layer.parameters() if p.dim() == 2 and id(p) not in excluded)
