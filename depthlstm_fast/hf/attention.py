"""Attention of the models for transformers: PyTorch's, or plain products whose weights can be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.attention import CrossAttention, SelfAttention

Found = TypeVar("Found")


class Product:
    """What an attention calls, with the arguments of PyTorch's ``scaled_dot_product_attention``.

    It is PyTorch's own but where the configuration says ``attn_implementation="eager"``.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.keeps = config, False
        self.weights: Tensor | None = None

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        if self.config._attn_implementation != "eager":
            return F.scaled_dot_product_attention(query, keys, values, **options)
        found, weights = eager(query, keys, values, **options)
        if self.keeps:
            self.weights = weights
        return found


def eager(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention by plain products, and its weights (batch, heads, L, S) after dropout.

    As in ``scaled_dot_product_attention`` a query that may attend to nothing has weights of zero.
    """
    if enable_gqa:
        keys, values = (each.repeat_interleave(query.shape[1] // keys.shape[1], 1) for each in (keys, values))
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    allowed = attn_mask
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    elif attn_mask is not None and attn_mask.is_floating_point():
        scores, allowed = scores + attn_mask, attn_mask != -torch.inf
    if allowed is not None:  # the least number in place of -inf, which would give NaN where nothing is allowed
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32 if scores.itemsize < 4 else None).to(query.dtype)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ values, weights


def set_products(model: nn.Module, config: Any) -> None:
    """Let each attention of the model ask ``config`` which product to take."""
    for module in model.modules():
        if isinstance(module, (SelfAttention, CrossAttention)):
            module.product = Product(config)


def wants_weights(config: Any, output_attentions: bool | None) -> bool:
    """Whether a call returns attentions; raises ValueError where the product has no weights to return."""
    wanted = config.output_attentions if output_attentions is None else output_attentions
    if wanted and config._attn_implementation != "eager":
        raise ValueError(
            f'output_attentions must be False unless attn_implementation is "eager", as '
            f'set_attn_implementation("eager") makes it; found {config._attn_implementation!r}'
        )
    return bool(wanted)


def recorded(wanted: bool, attentions: Sequence[Any], run: Callable[[], Found]) -> tuple[Found, tuple[Any, ...] | None]:
    """What ``run`` returns, and where ``wanted`` the weights of each of ``attentions`` in it."""
    if not wanted:
        return run(), None
    products: list[Product] = [each.product for each in attentions]
    try:
        for product in products:
            product.keeps = True
        found = run()
        return found, tuple(product.weights for product in products)
    finally:
        for product in products:
            product.keeps, product.weights = False, None
