"""What stands in a stack where a layer, or a part of one, has become a linear map of the state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .connections.base import Connection, State
from .reference.attention import DecoderCache
from .stacks.layer import StackLayer


class StateMap(nn.Module):
    """A linear map with a bias, from the features of some tensors to those of others.

    Args:
        before, after: the shapes of one token in each tensor that it takes and gives, mostly (C,).

    Parameters: ``linear``, an nn.Linear over the tensors' features in their order, not initialised.
    """

    def __init__(self, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], **placed: Any) -> None:
        super().__init__()
        self.before, self.after = (tuple(map(tuple, shapes)) for shapes in (before, after))
        inputs, outputs = (sum(math.prod(shape) for shape in shapes) for shapes in (before, after))
        # nothing is drawn: torch's generator stays where it is
        self.linear: nn.Module = nn.utils.skip_init(nn.Linear, inputs, outputs, **placed)

    def reset_parameters(self) -> None:
        """Draw the map anew."""
        self.linear.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def set(self, matrix: Tensor) -> None:
        """Take the map of :meth:`matrix`, rounded to the parameters' type."""
        self.linear.weight.copy_(matrix[:-1].t())  # type: ignore[operator]
        self.linear.bias.copy_(matrix[-1])  # type: ignore[operator]

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """W in fp64, a row for each input and the bias as the last one."""
        return torch.cat((self.linear.weight.t(), self.linear.bias[None]), 0).double()  # type: ignore[operator, index]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = [
            each.reshape(*each.shape[: each.dim() - len(shape)], math.prod(shape))
            for each, shape in zip(tensors, self.before, strict=True)
        ]
        given = self.linear(torch.cat(flat, -1))
        parts = given.split([math.prod(shape) for shape in self.after], -1)
        # a cell's kernels and an attention's product want rows without gaps
        return tuple(
            part.reshape(*given.shape[:-1], *shape).contiguous() for part, shape in zip(parts, self.after, strict=True)
        )


class Unchanged(nn.Module):
    """The state as it is, without what a branch says: a part that is left out."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[: self.tensors]


class LinearCell(nn.Module):
    """In the place of a cell of a depth-wise LSTM layer: (h, c) = map(h', c', x)."""

    def __init__(self, cell: Any, state_map: nn.Module) -> None:
        super().__init__()
        self.input_size, self.map = cell.input_size, state_map

    def forward(self, input: Tensor | tuple[Tensor, ...], state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return self.map(*state, *(input if isinstance(input, tuple) else (input,)))


class LinearLayer(nn.Module):
    """In the place of a depth-wise LSTM layer: (h, c) = map(h', c')."""

    def __init__(self, layer: Any, state_map: nn.Module) -> None:
        super().__init__()
        self.d_model, self.batch_first, self.map = layer.d_model, layer.batch_first, state_map

    def reset_parameters(self) -> None:
        """Draw the map anew; nothing for a layer that is left out."""
        if isinstance(self.map, StateMap):
            self.map.reset_parameters()


class LinearEncoderLayer(LinearLayer):
    """Called as :class:`depthlstm_fast.DepthLSTMEncoderLayer`; the masks are not used."""

    def forward(self, src: Tensor, state: Tensor | None = None, *masks: Any, **options: Any) -> tuple[Tensor, ...]:
        return self.map(src, torch.zeros_like(src) if state is None else state)


class LinearDecoderLayer(LinearLayer):
    """Called as :class:`depthlstm_fast.DepthLSTMDecoderLayer`; of memory, masks and cache nothing is used."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        state: Tensor | None = None,
        *masks: Any,
        cache: DecoderCache | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        if cache is not None:
            cache.length += 1  # a cache says how many positions its layer has seen
        return self.map(tgt, torch.zeros_like(tgt) if state is None else state)


class PartialLayer(StackLayer):
    """The branches of a layer that a linear map has not taken over; the others give back their input.

    Args:
        layer: its attentions are taken, and its feed-forward network is not.
        attends: whether the attentions are run.
    """

    def __init__(self, layer: StackLayer, attends: bool) -> None:
        nn.Module.__init__(self)
        self.d_model, self.dropout, self.activation = layer.d_model, layer.dropout, layer.activation
        self.branches, self.attends = layer.branches, attends
        for name in ("self_attn", "cross_attn") if attends else ():
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def self_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return super().self_attention(u, options) if self.attends else _seen(u, options["self"])

    def cross_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return super().cross_attention(u, options) if self.attends else u

    def added_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return super().added_attention(u, options) if self.attends else _seen(u, options["self"])

    def merged_attention(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return super().merged_attention(u, options) if self.attends else _seen(u, options["cross"])

    def feed_forward(self, u: Tensor, options: dict[str, Any]) -> Tensor:
        return u


def _seen(u: Tensor, options: dict[str, Any]) -> Tensor:
    cache = options.get("cache")
    if cache is not None:
        cache.length += 1  # a cache says how many positions its layer has seen
    return u


class AroundConnection(Connection):
    """A connection that hands everything on to another one, ``inner``."""

    def __init__(self, inner: Connection) -> None:
        super().__init__(inner.d_model, inner.num_branches)
        self.inner, self.absorbs_feed_forward = inner, inner.absorbs_feed_forward

    def start(self, x: Tensor) -> State:
        return self.inner.start(x)

    def read(self, state: State, i: int) -> Tensor:
        return self.inner.read(state, i)

    def write(self, state: State, y: Tensor, i: int) -> State:
        return self.inner.write(state, y, i)

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        return self.inner.step(state, y, i)

    def finish(self, state: State) -> Tensor:
        return self.inner.finish(state)


class LinearConnection(AroundConnection):
    """A connection in which branches first to last are one map of the state.

    Args:
        inner: what connects the other branches.
        first, last: the branches; the state before the first is mapped to the state after the last.
        state_map: the map.
        takes_branch: it is also given the output of the first branch, which then is the last one, too.
    """

    def __init__(self, inner: Connection, first: int, last: int, state_map: nn.Module, takes_branch: bool) -> None:
        super().__init__(inner)
        self.first, self.last, self.takes_branch, self.map = first, last, takes_branch, state_map

    def extra_repr(self) -> str:
        return f"branches {self.first} to {self.last}"

    def write(self, state: State, y: Tensor, i: int) -> State:
        if i == self.last:
            return self.map(*state, y) if self.takes_branch else self.map(*state)
        return state if self.first <= i < self.last else self.inner.write(state, y, i)

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        if i == self.last:
            state = self.write(state, y, i)
            return state, self.read(state, i + 1)
        # inside, nobody reads: the next branch gives back what it is given
        return (state, y) if self.first <= i < self.last else self.inner.step(state, y, i)
