"""What a causal model attends to and where its tokens stand, its cache, and its layers in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..activations import activate, swiglu
from .attention import INITS, SelfAttention, initialise_linear
from .caches import KeyValueCache, check_rows, select_rows
from .cell import DepthLSTMCell
from .normalise import NORM_CLASSES
from .rotary import Rotation

FEED_FORWARDS = ("gelu", "swiglu")
PLAIN_CONNECTIONS = ("depth-lstm", "pre-norm")


class Places(NamedTuple):
    """Where the tokens of a call stand.

    ``positions`` is (rows or 1, L) int64. ``mask`` is bool, True where a query may attend to a key, and broadcasts to
    (rows, nhead, L, S), or it is None. ``is_causal`` never comes with a mask. ``runs`` numbers the documents of packed
    rows, (rows, L).
    """

    positions: Tensor
    mask: Tensor | None
    is_causal: bool
    runs: Tensor | None = None


class CausalCache:
    """Keys and values of every layer of a :class:`LanguageModel`, and which of the tokens so far are real.

    The depth-wise LSTM's state is not in it: that runs over the layers of one token and starts afresh with the next.
    """

    def __init__(self, layers: int, kv_heads: int, size: int) -> None:
        self.layers = [KeyValueCache() for _ in range(layers)]
        self.kv_heads, self.size = kv_heads, size
        self.real: Tensor | None = None  # (rows, length) bool; None while every token is real
        self.length, self.rows = 0, 0

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue from the tokens of row ``rows[i]``, which may be more rows or fewer than before.

        Raises:
            TypeError, ValueError: rows is no int64 tensor (rows,), or names a row that the cache does not have.
        """
        check_rows(rows)
        for layer in self.layers:
            layer.reorder(rows)
        if self.real is not None:
            (self.real,) = select_rows((self.real,), rows)
        if self.length:
            self.rows = rows.numel()


def place(ids: Tensor, real: Tensor | None, documents: Tensor | None, cache: CausalCache | None) -> Places:
    """Positions and mask of ids (rows, L); ``real`` (rows, L) bool, ``documents`` (rows, L) int64.

    A position counts the real tokens before it, in the same document. What follows the tokens of a cache attends to
    them. The cache is told of these tokens.
    """
    rows, length = ids.shape
    past = 0 if cache is None else cache.length
    if cache is not None:
        if real is not None or cache.real is not None:
            earlier = ids.new_ones((rows, past), dtype=torch.bool) if cache.real is None else cache.real
            real = torch.cat((earlier, ids.new_ones(ids.shape, dtype=torch.bool) if real is None else real), 1)
            cache.real = real
        cache.length, cache.rows = past + length, rows
    if real is None and documents is None:
        positions = torch.arange(past, past + length, device=ids.device)[None]
        if past == 0 or length == 1:
            return Places(positions, None, bool(past == 0 and length > 1))  # no SymBool, which attention refuses
    causal = torch.ones(length, past + length, dtype=torch.bool, device=ids.device).tril(past)
    if real is None and documents is None:
        return Places(positions, causal, False)
    counted = torch.ones_like(ids) if real is None else real.long()
    before = counted.cumsum(1) - counted
    mask, runs = causal[None], None
    if documents is not None:
        first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        runs = first.long().cumsum(1)
        before = before - torch.where(first, before, 0).cummax(1).values
        mask = mask & (runs[:, :, None] == runs[:, None, :])
    if real is not None:
        mask = mask & real[:, None, :]
    return Places(before[:, past:], mask[:, None], False, runs)


def number_documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """The document of each of ``length`` tokens, (1, length) int64, that lie one after the other."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens[1:-1].long(), right=True)[None]


class CausalLayer(nn.Module):
    """The branches of one layer: a self-attention, and a feed-forward network or none.

    Parameters: ``self_attn``, and ``linear1`` and ``linear2`` of the network. With ``gated`` the rows of ``linear1``
    are the gate's, and then the value's.
    """

    def __init__(
        self,
        attention: SelfAttention,
        dim_feedforward: int | None,
        gated: bool,
        bias: bool,
        init: str,
        activation: str,
        placed: dict[str, Any],
    ) -> None:
        super().__init__()
        self.self_attn, self.gated, self.dropout, self.init = attention, gated, attention.dropout, init
        self.activation = activation
        self.branches = 1 if dim_feedforward is None else 2
        if dim_feedforward is not None:
            self.linear1 = nn.Linear(attention.d_model, dim_feedforward * (1 + gated), bias, **placed)
            self.linear2 = nn.Linear(dim_feedforward, attention.d_model, bias, **placed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.self_attn.reset_parameters()
        if self.branches == 2:
            initialise_linear(self.linear1, self.init, 1 + self.gated)
            initialise_linear(self.linear2, self.init)

    def branch(self, index: int, u: Tensor, options: dict[str, Any]) -> Tensor:
        if index == 0:
            return self.self_attn(u, **options)
        inner = self.linear1(u)
        inner = swiglu(inner) if self.gated else activate(inner, self.activation)
        return self.linear2(F.dropout(inner, self.dropout, self.training))


class PlainDepthLSTM(nn.Module):
    """:class:`depthlstm_fast.connections.DepthLSTM` in plain PyTorch, with the same parameters."""

    def __init__(
        self, d_model: int, branches: int, norm: str, eps: float, options: dict[str, Any], placed: dict[str, Any]
    ) -> None:
        super().__init__()
        cells = [DepthLSTMCell(d_model, d_model, eps=eps, **options, **placed) for _ in range(branches)]
        self.cells = nn.ModuleList(cells)
        self.final_norm = NORM_CLASSES[norm](d_model, eps=eps, **placed)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, torch.zeros_like(x)

    def read(self, state: tuple[Tensor, ...], i: int) -> Tensor:
        return state[0]

    def write(self, state: tuple[Tensor, ...], y: Tensor, i: int) -> tuple[Tensor, ...]:
        return self.cells[i](y, state)


class PlainPreNorm(nn.Module):
    """:class:`depthlstm_fast.connections.PreNorm` in plain PyTorch, with the same parameters."""

    def __init__(
        self, d_model: int, branches: int, norm: str, eps: float, options: dict[str, Any], placed: dict[str, Any]
    ) -> None:
        super().__init__()
        self.dropout = options["dropout"]
        self.read_norms = nn.ModuleList([NORM_CLASSES[norm](d_model, eps=eps, **placed) for _ in range(branches)])
        self.final_norm = NORM_CLASSES[norm](d_model, eps=eps, **placed)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def read(self, state: tuple[Tensor, ...], i: int) -> Tensor:
        return self.read_norms[i](state[0])

    def write(self, state: tuple[Tensor, ...], y: Tensor, i: int) -> tuple[Tensor, ...]:
        return (state[0] + F.dropout(y, self.dropout, self.training),)


class PlainCausalStack(nn.Module):
    """The layers of a :class:`LanguageModel` with the depth-wise LSTM or pre-norm, in plain PyTorch."""

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
        connection: Any,
        feed_forward: bool | None,
        init: str,
        kv_heads: int | None,
        gated: bool,
        norm: str,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        checks.check_name("connection", connection, PLAIN_CONNECTIONS)
        checks.check_name("init", init, INITS)
        checks.check_eps("layer_norm_eps", layer_norm_eps)
        if feed_forward is not None:
            checks.check_flags(feed_forward=feed_forward)
        has_network = connection == "pre-norm" if feed_forward is None else feed_forward
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = dim_feedforward if has_network else None
        attention: dict[str, Any] = {"dropout": dropout, "bias": bias, "init": init, "kv_heads": kv_heads, **placed}
        self.layers = nn.ModuleList(
            [
                CausalLayer(SelfAttention(d_model, nhead, **attention), inner, gated, bias, init, activation, placed)
                for _ in range(num_layers)
            ]
        )
        self.branches, self.gradient_checkpointing = 2 if has_network else 1, False
        connect = PlainDepthLSTM if connection == "depth-lstm" else PlainPreNorm
        options = {"dropout": dropout, "bias": bias, "init": init, "activation": activation}
        self.connection = connect(d_model, num_layers * self.branches, norm, layer_norm_eps, options, placed)

    def reset_parameters(self) -> None:
        """Draw every matrix anew, and set every other parameter to its initial value."""
        cells_or_norms: Any = self.connection.cells if hasattr(self.connection, "cells") else self.connection.read_norms
        parts: Any = (*self.layers, *cells_or_norms, self.connection.final_norm)
        for module in parts:
            module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        places: Places,
        rotation: Rotation | None = None,
        caches: list[KeyValueCache] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """The output (rows, L, D) for the embedded input x (rows, L, D).

        ``outputs`` is given the normalised state before the first layer and after each.
        """
        state = self.connection.start(x)
        if outputs is not None:
            outputs.append(self.connection.final_norm(state[0]))
        for index in range(len(self.layers)):
            options = attention_options(places, rotation, caches, index)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                state = checkpoint(self._layer, index, options, *state, use_reentrant=False)
            else:
                state = self._layer(index, options, *state)
            if outputs is not None:
                outputs.append(self.connection.final_norm(state[0]))
        return self.connection.final_norm(state[0]) if outputs is None else outputs[-1]

    def _layer(self, index: int, options: dict[str, Any], *state: Tensor) -> tuple[Tensor, ...]:
        for branch in range(self.branches):
            i = index * self.branches + branch
            y = self.layers[index].branch(branch, self.connection.read(state, i), options)  # type: ignore[operator]
            state = self.connection.write(state, y, i)
        return state


def attention_options(
    places: Places, rotation: Rotation | None, caches: list[KeyValueCache] | None, index: int
) -> dict[str, Any]:
    """The arguments of layer ``index``'s attention besides its input."""
    cache = None if caches is None else caches[index]
    return {"mask": places.mask, "is_causal": places.is_causal, "cache": cache, "rotation": rotation}
