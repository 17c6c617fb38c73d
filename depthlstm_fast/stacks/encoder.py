"""The encoder around any depth connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..reference.attention import CrossAttention
from ..reference.encoder import ENCODER_POSITIONS
from ..reference.rotary import check_rotation, count_positions, make_rotation
from .base import Factory, Stack
from .layer import StackLayer


class RotaryLayer(StackLayer):
    """A layer whose attention is given a rotation.

    What runs a StackLayer's parameters by itself, as the decode engine does, knows by the class that this is none.
    """


class Encoder(Stack):
    """A Transformer encoder around any depth connection.

    Args:
        d_model: C.
        nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, bias, device, dtype: as in
            nn.TransformerEncoderLayer. ``dim_feedforward`` is 4C if None, ``activation`` a name as in
            :class:`depthlstm_fast.DepthLSTMCell`. Dropout acts on attention probabilities, inside feed-forward networks
            and on the branches' outputs, where the connection does not drop itself.
        num_layers: layers, each a self-attention and a feed-forward network.
        connection: a name (:func:`depthlstm_fast.connections.names`), or a callable (d_model, num_branches) ->
            Connection: a class of your own, or ``functools.partial`` of one with options.
        feed_forward: whether layers have a feed-forward network; None for what the connection says.
        kv_heads: heads of keys and values, a divisor of ``nhead`` (grouped-query attention); ``nhead`` if None.
        positions: "none", where the input says where its tokens are, or "rope": queries and keys are turned by their
            positions (rotary, Su et al., arXiv 2104.09864), which count the tokens that are not padding.
        rope_theta: the base of the rotary frequencies.
        init: "lipschitz", "glorot", "ds", "ds-released", "depth" or "deepnorm":
            :func:`depthlstm_fast.initialisation.initialise_layer`.

    Set ``gradient_checkpointing = True`` to recompute each layer in the backward pass instead of keeping its
    activations. The connection's state is kept between layers.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted, or connection makes no Connection.
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
        connection: Factory = "depth-lstm",
        feed_forward: bool | None = None,
        kv_heads: int | None = None,
        positions: str = "none",
        rope_theta: float = 10000.0,
        init: str = "lipschitz",
    ) -> None:
        checks.check_size("num_layers", num_layers)
        checks.check_name("positions", positions, ENCODER_POSITIONS)
        super().__init__(
            d_model, nhead, num_layers, connection, feed_forward, dim_feedforward, dropout, activation, layer_norm_eps,
            batch_first, bias, init, device, dtype, None, [CrossAttention] * num_layers, kv_heads,
            layer_class=RotaryLayer if positions == "rope" else StackLayer,
        )  # fmt: skip
        check_rotation(positions, d_model // nhead, rope_theta)
        self.positions, self.rope_theta = positions, rope_theta
        self.arguments |= {"kv_heads": kv_heads, "positions": positions, "rope_theta": rope_theta}

    def _run(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool, outputs: list[Tensor] | None
    ) -> Tensor:
        x = self._enter("src", src)
        names = ("mask", "src_key_padding_mask")
        mask, causal = self._masks(x, x, mask, padding, causal, names, src.dim() == 2)
        options: dict[str, Any] = {"self": {"mask": mask, "is_causal": causal}}
        if self.positions == "rope":
            places = count_positions(x, padding)
            options["self"]["rotation"] = make_rotation(places, self.d_model // self.nhead, self.rope_theta, x.dtype)
        return self._through_layers(x, [options] * self.num_layers, outputs)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The output in src's shape.

        Args:
            src: (batch, L, C), (L, batch, C) or, unbatched, (L, C).
            mask, src_key_padding_mask: as :func:`depthlstm_fast.reference.attention_mask` takes them.
            is_causal: None means False: the mask is used as it is, and not examined.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted.
        """
        return self._leave(self._run(src, mask, src_key_padding_mask, is_causal is not None and is_causal, None), src)

    def layer_outputs(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """num_layers + 1 outputs: what the connection makes of the input, and of the state after each layer.

        The last is what :meth:`forward` returns; the arguments are the same.
        """
        outputs: list[Tensor] = []
        self._run(src, mask, src_key_padding_mask, is_causal is not None and is_causal, outputs)
        return tuple(self._leave(each, src) for each in outputs)
