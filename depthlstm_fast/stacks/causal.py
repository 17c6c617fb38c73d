"""The layers of a language model around any depth connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.attention import CrossAttention
from ..reference.caches import KeyValueCache
from ..reference.causal import Places, attention_options
from ..reference.rotary import Rotation
from .base import Factory, Stack


class CausalStack(Stack):
    """The layers of a :class:`depthlstm_fast.LanguageModel`; its arguments are explained there."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int,
        dropout: float,
        layer_norm_eps: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        connection: Factory,
        feed_forward: bool | None,
        init: str,
        kv_heads: int | None,
        gated: bool,
        norm: str,
    ) -> None:
        super().__init__(
            d_model, nhead, num_layers, connection, feed_forward, dim_feedforward, dropout, "gelu", layer_norm_eps,
            True, bias, init, device, dtype, None, [CrossAttention] * num_layers, kv_heads, gated, norm,
        )  # fmt: skip
        for name in ("activation", "batch_first"):
            del self.arguments[name]
        self.arguments |= {"kv_heads": kv_heads, "gated": gated, "norm": norm}

    def forward(
        self,
        x: Tensor,
        places: Places,
        rotation: Rotation | None = None,
        caches: list[KeyValueCache] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """The output (rows, L, C) for the embedded input x (rows, L, C).

        ``outputs`` is given what the connection makes of the input, and of the state after each layer.
        """
        layers = range(self.num_layers)
        options: list[dict[str, Any]] = [{"self": attention_options(places, rotation, caches, i)} for i in layers]
        return self._through_layers(self._enter("x", x), options, outputs)
