"""The branches of one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import activate, swiglu
from ..connections import Connection
from ..layers import add_cross_attention, attend_into, linear_into
from ..ops import shared_buffer
from ..reference.attention import CrossAttention, SelfAttention

BRANCHES = {  # of a layer's attention, by kind; None is an encoder's
    None: ("self_attention",),
    "separate": ("self_attention", "cross_attention"),
    "add": ("added_attention",),
    "merged": ("merged_attention",),
}


def checked_state(state: Any, connection: Connection, method: str) -> tuple[Tensor, ...]:
    if not isinstance(state, tuple) or not all(isinstance(each, Tensor) for each in state):
        found = f"a tuple of {[type(each).__name__ for each in state]}" if isinstance(state, tuple) else type(state)
        raise TypeError(
            f"{type(connection).__name__}.{method} must return a state that is a tuple of tensors; found "
            f"{found if isinstance(found, str) else found.__name__}"
        )
    return state


class StackLayer(nn.Module):
    """The branches of one layer; what connects them is the stack's.

    Parameters: ``self_attn`` but with merged attention, ``cross_attn`` in decoders, ``linear1`` and ``linear2`` with a
    feed-forward network, named as in :class:`DepthLSTMDecoderLayer`. With ``gated`` ``linear1`` is twice as wide: the
    gate's rows, and then the value's.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        attention: str | None,
        feed_forward: bool,
        dim_feedforward: int,
        dropout: float,
        activation: str,
        bias: bool,
        cross_class: Callable[..., CrossAttention],
        kv_heads: int | None = None,
        gated: bool = False,
        **placed: Any,
    ) -> None:
        super().__init__()
        self.d_model, self.dropout, self.activation, self.gated = d_model, dropout, activation, gated
        self.branches = branch_names(attention, feed_forward)
        if attention != "merged":
            self.self_attn = SelfAttention(d_model, nhead, dropout=dropout, bias=bias, kv_heads=kv_heads, **placed)
        if attention is not None:
            self.cross_attn = cross_class(d_model, nhead, dropout=dropout, bias=bias, **placed)
        if feed_forward:
            self.linear1: nn.Module = nn.Linear(d_model, dim_feedforward * (1 + gated), bias, **placed)
            self.linear2: nn.Module = nn.Linear(dim_feedforward, d_model, bias, **placed)

    def forward(
        self,
        u: Tensor,
        state: tuple[Tensor, ...],
        options: dict[str, Any],
        connection: Connection,
        first: int,
        dropout: float,
    ) -> tuple[Tensor, ...]:
        """(the next layer's input, or after the last branch of all the stack's output; the state).

        Args:
            u: the input of the first branch (batch, L, C).
            state: the connection's, before the first branch.
            options: of the attentions, by kind.
            connection: the stack's.
            first: the first branch's number in the stack.
            dropout: of the branches' outputs.
        """
        last = connection.num_branches - 1
        writes = "write" if type(connection).step is Connection.step else "step"
        for i, name in enumerate(self.branches, first):
            y = getattr(self, name)(u, options)
            if dropout:
                y = F.dropout(y, dropout, self.training)
            if i < last:
                found = connection.step(state, y, i)
                if not isinstance(found, tuple) or len(found) != 2:
                    raise TypeError(f"{type(connection).__name__}.step must return (state, next input)")
                state, u = checked_state(found[0], connection, writes), found[1]
            else:
                state = checked_state(connection.write(state, y, i), connection, "write")
                u = connection.finish(state)
        return u, *state

    def self_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return attend_into(self._beside(u), 0, self.self_attn, (u,), options["self"])

    def cross_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return attend_into(self._beside(u), 0, self.cross_attn, (u,), options["cross"])

    def added_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        """s + CrossAttn(s), s = SelfAttn(u)."""
        buffer = self._beside(u)
        return add_cross_attention(self.cross_attn, self.self_attn(u, **options["self"]), options["cross"], buffer)

    def merged_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return self.cross_attn(u, **options["cross"], keep=options["keep"])

    def feed_forward(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        inner = self.linear1(u)
        inner = swiglu(inner) if self.gated else activate(inner, self.activation)
        return linear_into(self._beside(u), 0, self.linear2, F.dropout(inner, self.dropout, self.training))

    def _beside(self, u: Tensor) -> Tensor | None:
        """Free columns beside a cell's h, where u is one: the next cell's product then reads both at once."""
        return shared_buffer.take(u, self.d_model)


def branch_names(attention: str | None, feed_forward: bool) -> tuple[str, ...]:
    """The methods of :class:`StackLayer` that are a layer's branches, in their order."""
    return (*BRANCHES[attention], "feed_forward") if feed_forward else BRANCHES[attention]
