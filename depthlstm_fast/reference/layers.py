"""Transformer layers and stacks with depth-wise LSTMs in place of residual connections, in plain PyTorch.

Inside a layer every tensor is (batch, length, D), for any ``batch_first``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..activations import activate
from .attention import CrossAttention, DecoderCache, SelfAttention, check_beside, initialise_linear, new_cache
from .cell import FORGET_BIAS, DepthLSTMCell
from .layout import Layout

MERGES = ("add", "concat", "cells")


def check_cache(cache: DecoderCache, kind: type[DecoderCache] = DecoderCache) -> None:
    """Raise TypeError unless ``cache`` is of ``kind``; a kind derived from it keeps what another attention needs."""
    if not isinstance(cache, kind) or cache.attention != kind.attention:
        maker = "new_cache" if kind is DecoderCache else "new_caches"
        raise TypeError(f"cache must be a {kind.__name__}, as {maker} makes it; found {type(cache).__name__}")


def check_caches(caches: list[DecoderCache], wanted: int) -> None:
    """Raise ValueError unless ``caches`` is a list of ``wanted``."""
    if not isinstance(caches, list) or len(caches) != wanted:
        found = f"a list of {len(caches)}" if isinstance(caches, list) else type(caches).__name__
        raise ValueError(f"caches must be a list of {wanted}, one a layer, as new_caches makes it; found {found}")


def check_step(h: Tensor, cache: DecoderCache, kind: type[DecoderCache] = DecoderCache) -> None:
    """Raise TypeError or ValueError unless h (rows, 1, D) can be a decoding step that goes on from ``cache``.

    ``kind`` is the cache of the layer's attention.
    """
    check_cache(cache, kind)
    if cache.memory.shape[-1] != h.shape[-1]:
        raise ValueError(f"cache must be of a decoder of {h.shape[-1]} features; found {cache.memory.shape[-1]}")
    if h.shape[1] != 1:
        raise ValueError(f"tgt must hold one position with a cache; found {h.shape[1]}")
    if h.shape[0] % cache.memory.shape[0]:
        raise ValueError(
            f"tgt must have a multiple of the cache's {cache.memory.shape[0]} sources as its batch; found {h.shape[0]}"
        )
    if cache.rows is not None and cache.rows != h.shape[0]:
        raise ValueError(f"tgt must have the batch that the cache began with, {cache.rows}; found {h.shape[0]}")


class _Layer(Layout, nn.Module):
    """What encoder and decoder layers share: layout, and with ``sublayer=True`` the feed-forward network with a cell of
    its own.
    """

    cell_class: type[DepthLSTMCell] = DepthLSTMCell

    def __init__(
        self, d_model: int, nhead: int, batch_first: bool, sublayer: bool, cell: dict[str, Any], dim_feedforward: int
    ) -> None:
        super().__init__()
        checks.check_size("dim_feedforward", dim_feedforward)
        checks.check_placement(cell["device"], cell["dtype"])
        checks.check_flags(batch_first=batch_first, bias=cell["bias"], sublayer=sublayer)
        checks.check_eps("layer_norm_eps", cell["eps"])
        self.d_model, self.nhead, self.batch_first, self.sublayer = d_model, nhead, batch_first, sublayer
        self.dim_feedforward, self.dropout, self.activation, self.init = (
            dim_feedforward,
            cell["dropout"],
            cell["activation"],
            cell["init"],
        )
        if sublayer:
            bias, device, dtype = cell["bias"], cell["device"], cell["dtype"]
            self.linear1: nn.Module = nn.Linear(d_model, dim_feedforward, bias, device, dtype)
            self.linear2: nn.Module = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
            self.ffn_cell = self.cell_class(d_model, d_model, **cell)
            self._reset_feed_forward()

    def _reset_feed_forward(self) -> None:
        initialise_linear(self.linear1, self.init)
        initialise_linear(self.linear2, self.init)

    def reset_parameters(self) -> None:
        """Draw every parameter of the layer anew."""
        for child in self.children():
            if isinstance(child, (DepthLSTMCell, SelfAttention, CrossAttention)):
                child.reset_parameters()
        if self.sublayer:
            self._reset_feed_forward()

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, nhead={self.nhead}, batch_first={self.batch_first}, sublayer={self.sublayer}"

    def _check_beside(self, argument: str, outside: Tensor) -> None:
        if argument != "state":
            check_beside(argument, outside, self)

    def _enter_states(self, argument: str, outside: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self._enter(argument, outside)
        if state is None:
            return h, torch.zeros_like(h)
        checks.check_float_tensor("state", state)
        checks.check_shape("state", state, tuple(outside.shape))
        return h, self._enter("state", state)

    def _feed_forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if not self.sublayer:
            return h, c
        return self.ffn_cell(self.linear2(self._inner(h)), (h, c))

    def _inner(self, h: Tensor) -> Tensor:
        """Run the feed-forward network up to its last matrix."""
        return F.dropout(activate(self.linear1(h), self.activation), self.dropout, self.training)


class DepthLSTMEncoderLayer(_Layer):
    """Encoder layer: a = SelfAttn(h'), then (h, c) = cell(a, (h', c')).

    The layer has no residual connection, no other LayerNorm and no feed-forward network.

    Args:
        d_model: D.
        nhead: attention heads.
        dim_feedforward: inner size of the feed-forward network of ``hidden="ffn"`` or ``sublayer=True``, 4D if None;
            otherwise unused.
        dropout: of attention probabilities, of the cell's g and inside a feed-forward network.
        activation: of the cell's g and of a feed-forward network; a name, see :class:`DepthLSTMCell`.
        layer_norm_eps: eps of the gates' normalisation.
        batch_first: (batch, length, D) outside, else (length, batch, D).
        bias: whether the linear maps have a bias.
        hidden, norm, forget_bias, init: see :class:`DepthLSTMCell`.
        sublayer: keep the feed-forward network and put a second cell (``ffn_cell``) after it.

    Parameters: ``self_attn.in_proj``, ``self_attn.out_proj``, ``cell.*``. With ``sublayer=True`` also ``linear1``,
    ``linear2``, ``ffn_cell.*``.

    Raises:
        TypeError, ValueError: a size, name or number is invalid.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-6,
        batch_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hidden: str = "linear",
        norm: str = "gate",
        forget_bias: float = FORGET_BIAS,
        sublayer: bool = False,
        init: str = "lipschitz",
    ) -> None:
        checks.check_size("d_model", d_model)
        inner = 4 * d_model if dim_feedforward is None else dim_feedforward
        shared: dict[str, Any] = {"dropout": dropout, "bias": bias, "init": init, "device": device, "dtype": dtype}
        cell = {
            **shared,
            "hidden": hidden,
            "ffn_size": inner,
            "norm": norm,
            "activation": activation,
            "eps": layer_norm_eps,
        }
        cell["forget_bias"] = forget_bias
        super().__init__(d_model, nhead, batch_first, sublayer, cell, inner)
        self.self_attn = SelfAttention(d_model, nhead, **shared)
        self.cell = self.cell_class(d_model, d_model, **cell)

    def forward(
        self,
        src: Tensor,
        state: Tensor | None = None,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            src: h', (batch, L, D), (L, batch, D) or, unbatched, (L, D).
            state: c', the cell of the layer below, same shape; zeros if None.
            src_mask, src_key_padding_mask, is_causal: see :func:`attention_mask`.

        Returns:
            (h, c), both in src's shape and layout. A position that may attend to nothing takes a zero context, so its
            result is not NaN.

        Raises:
            TypeError, ValueError: the message names the argument, the wanted and the found value.
        """
        h, c = self._enter_states("src", src, state)
        arguments = ("src_mask", "src_key_padding_mask")
        mask, is_causal = self._masks(h, h, src_mask, src_key_padding_mask, is_causal, arguments, src.dim() == 2)
        h, c = self._feed_forward(*self._run(h, c, mask, is_causal))
        return self._leave(h, src), self._leave(c, src)

    def _run(self, h: Tensor, c: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
        return self.cell(self.self_attn(h, mask, is_causal), (h, c))


class DepthLSTMDecoderLayer(_Layer):
    """Decoder layer: s = SelfAttn(h'), m = CrossAttn(s, memory), then the cell.

    ``merge`` says how s and m meet:

    - "add": cell(s + m).
    - "concat": cell([s ; m]), a cell of input size 2D.
    - "cells": one cell after each attention: (h1, c1) = cell(s, (h', c')), m = CrossAttn(h1, memory), (h, c) =
      cross_cell(m, (h1, c1)).

    With ``sublayer=True`` a feed-forward network and its cell follow. ``merge="cells", sublayer=True`` therefore has
    one cell after each sub-layer. The other arguments are those of :class:`DepthLSTMEncoderLayer`.

    Parameters: ``self_attn.*``, ``cross_attn.q_proj``, ``cross_attn.kv_proj``, ``cross_attn.out_proj``, ``cell.*``.
    With ``merge="cells"`` also ``cross_cell.*``, with ``sublayer=True`` also ``linear1``, ``linear2``, ``ffn_cell.*``.

    Raises:
        TypeError, ValueError: a size, name or number is invalid.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-6,
        batch_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hidden: str = "linear",
        norm: str = "gate",
        forget_bias: float = FORGET_BIAS,
        sublayer: bool = False,
        init: str = "lipschitz",
        merge: str = "add",
    ) -> None:
        checks.check_size("d_model", d_model)
        checks.check_name("merge", merge, MERGES)
        inner = 4 * d_model if dim_feedforward is None else dim_feedforward
        shared: dict[str, Any] = {"dropout": dropout, "bias": bias, "init": init, "device": device, "dtype": dtype}
        cell = {
            **shared,
            "hidden": hidden,
            "ffn_size": inner,
            "norm": norm,
            "activation": activation,
            "eps": layer_norm_eps,
        }
        cell["forget_bias"] = forget_bias
        super().__init__(d_model, nhead, batch_first, sublayer, cell, inner)
        self.merge = merge
        self.self_attn = SelfAttention(d_model, nhead, **shared)
        self.cross_attn = CrossAttention(d_model, nhead, **shared)
        self.cell = self.cell_class(2 * d_model if merge == "concat" else d_model, d_model, **cell)
        if merge == "cells":
            self.cross_cell = self.cell_class(d_model, d_model, **cell)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, merge={self.merge!r}"

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        state: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            tgt: h', (batch, L, D), (L, batch, D) or, unbatched, (L, D).
            memory: the encoder's output, (batch, S, D), (S, batch, D) or (S, D).
            state: c', the cell of the layer below, in tgt's shape; zeros if None.
            tgt_mask and the other masks and hints: see :func:`attention_mask`.
            cache: for incremental decoding. tgt is the next position alone, L = 1, and the cache is updated. The batch
                of tgt is that of memory times any number of beams, with the beams of one source side by side. Masks and
                hints are not used: attention is causal, and the cache has memory's mask.

        Returns:
            (h, c), both in tgt's shape and layout. A position that may attend to nothing takes a zero context, so its
            result is not NaN.

        Raises:
            TypeError, ValueError: the message names the argument, the wanted and the found value.
        """
        begun = isinstance(cache, DecoderCache) and cache.keys is not None
        if begun and state is not None and self.batch_first and tgt.dim() == 3:
            h, c = tgt, state  # the first step has checked these shapes
        else:
            h, c = self._enter_states("tgt", tgt, state)
        if cache is not None:
            check_step(h, cache)
            keys = self._enter("memory", memory) if cache.memory_keys_values is None else memory
            cross_options: dict[str, Any] = {"memory": keys, "mask": cache.memory_mask, "cache": cache}
            h, c = self._feed_forward(*self._run(h, c, cache.options(), cross_options))
            return self._leave(h, tgt), self._leave(c, tgt)
        unbatched = tgt.dim() == 2
        keys = self._enter("memory", memory)
        if keys.shape[0] != h.shape[0] or memory.dim() != tgt.dim():
            raise ValueError(f"memory must be batched as tgt, {tuple(tgt.shape)}, is; found {tuple(memory.shape)}")
        arguments = ("tgt_mask", "tgt_key_padding_mask")
        mask, causal = self._masks(h, h, tgt_mask, tgt_key_padding_mask, tgt_is_causal, arguments, unbatched)
        self_options = {"mask": mask, "is_causal": causal}
        arguments = ("memory_mask", "memory_key_padding_mask")
        mask, causal = self._masks(
            h, keys, memory_mask, memory_key_padding_mask, memory_is_causal, arguments, unbatched
        )
        cross_options = {"memory": keys, "mask": mask, "is_causal": causal}
        h, c = self._feed_forward(*self._run(h, c, self_options, cross_options))
        return self._leave(h, tgt), self._leave(c, tgt)

    def _run(
        self, h: Tensor, c: Tensor, self_options: dict[str, Any], cross_options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        s = self.self_attn(h, **self_options)
        if self.merge == "cells":
            h, c = self.cell(s, (h, c))
            return self.cross_cell(self.cross_attn(h, **cross_options), (h, c))
        m = self.cross_attn(s, **cross_options)
        return self.cell((s, m) if self.merge == "concat" else s + m, (h, c))

    def new_cache(self, memory: Tensor, memory_key_padding_mask: Tensor | None = None) -> DecoderCache:
        """Start incremental decoding; memory (batch, S, D), mask (batch, S) bool or floating point.

        Both are always batch first.
        """
        return new_cache(memory, memory_key_padding_mask, self.d_model, self)

    def step(self, tgt: Tensor, cache: DecoderCache, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run :meth:`forward` with ``cache``; tgt, state and the results are (rows, 1, D), always batch first.

        rows is the batch of the cache times any number of beams, with the beams of one source side by side. The cache
        is updated.
        """
        check_cache(cache)
        if self.batch_first:
            return self(tgt, cache.memory, state, cache=cache)
        above = None if state is None else state.transpose(0, 1)
        h, c = self(tgt.transpose(0, 1), cache.memory.transpose(0, 1), above, cache=cache)
        return h.transpose(0, 1), c.transpose(0, 1)
