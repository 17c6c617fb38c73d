"""The encoder with the depth-wise LSTM or pre-norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .attention import check_beside
from .causal import Places, PlainCausalStack
from .layout import Layout
from .rotary import check_rotation, count_positions, make_rotation

ENCODER_POSITIONS = ("none", "rope")


class Encoder(Layout, PlainCausalStack):
    """:class:`depthlstm_fast.Encoder` in plain PyTorch, for the connections "depth-lstm" and "pre-norm".

    Arguments, parameters and errors are those of that class, but ``init``, which is "lipschitz" or "glorot".
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-6,
        batch_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        connection: str = "depth-lstm",
        feed_forward: bool | None = None,
        kv_heads: int | None = None,
        positions: str = "none",
        rope_theta: float = 10000.0,
        init: str = "lipschitz",
    ) -> None:
        for argument, size in (("num_layers", num_layers), ("d_model", d_model)):
            checks.check_size(argument, size)
        checks.check_name("positions", positions, ENCODER_POSITIONS)
        checks.check_name("activation", activation, checks.ACTIVATIONS)
        checks.check_flags(batch_first=batch_first, bias=bias)
        inner = 4 * d_model if dim_feedforward is None else dim_feedforward
        checks.check_size("dim_feedforward", inner)
        super().__init__(
            d_model, nhead, num_layers, inner, dropout, layer_norm_eps, bias, device, dtype, connection=connection,
            feed_forward=feed_forward, init=init, kv_heads=kv_heads, gated=False, norm="layer", activation=activation,
        )  # fmt: skip
        check_rotation(positions, d_model // nhead, rope_theta)
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first
        self.positions, self.rope_theta = positions, rope_theta

    def _check_beside(self, argument: str, outside: Tensor) -> None:
        check_beside(argument, outside, self.layers[0], self.layers[0])

    def forward(  # type: ignore[override]
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """See :meth:`depthlstm_fast.Encoder.forward`."""
        return self._leave(self._run(src, mask, src_key_padding_mask, is_causal, None), src)

    def layer_outputs(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """See :meth:`depthlstm_fast.Encoder.layer_outputs`."""
        outputs: list[Tensor] = []
        self._run(src, mask, src_key_padding_mask, is_causal, outputs)
        return tuple(self._leave(each, src) for each in outputs)

    def _run(
        self,
        src: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        causal: bool | None,
        outputs: list[Tensor] | None,
    ) -> Tensor:
        x = self._enter("src", src)
        names = ("mask", "src_key_padding_mask")
        merged, is_causal = self._masks(x, x, mask, padding, causal is not None and causal, names, src.dim() == 2)
        places, rotation = count_positions(x, padding), None
        if self.positions == "rope":
            rotation = make_rotation(places, self.d_model // self.nhead, self.rope_theta, x.dtype)
        return super().forward(x, Places(places, merged, is_causal), rotation, None, outputs)
