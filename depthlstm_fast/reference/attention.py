"""Multi-head attention, its masks and the decoding cache.

Heads are split and merged by layout. The masks are those of ``torch.nn.Transformer*``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, sharding

INITS = ("lipschitz", "glorot")


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float) -> None:
    """Draw ``parameter`` from U(+-bound).

    A sharded parameter takes its part of a whole draw, so one seed gives the values of a single process. DTensor's own
    draw on the CPU gives every rank the same numbers, and the shards would be copies of each other.
    """
    if sharding.is_dtensor(parameter):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device).uniform_(-bound, bound)
        parameter.copy_(sharding.replicated(whole, parameter))
    else:
        nn.init.uniform_(parameter, -bound, bound)


def initialise_linear(linear: nn.Module, init: str, matrices: int = 1) -> None:
    """Draw the weight of ``linear`` anew and set its bias to zero.

    ``init="lipschitz"`` draws from U(+-1/sqrt(fan_in)). ``"glorot"`` is Xavier's uniform for each of the ``matrices``
    logical matrices stacked in the weight. A module that replaces the nn.Linear and has no plain ``weight`` is left
    alone.
    """
    if not isinstance(linear, nn.Linear):
        return
    fan_out, fan_in = linear.weight.shape
    bound = 1 / math.sqrt(fan_in) if init == "lipschitz" else math.sqrt(6 / (fan_in + fan_out // matrices))
    draw_uniform(linear.weight, bound)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _check_mask(argument: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; found {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{argument} must be bool or floating point; found {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{argument} must have shape {' or '.join(map(str, shapes))}; found {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{argument} must be on the device of its queries, {device}; found {mask.device}")


def attention_mask(
    attention: Tensor | None,
    key_padding: Tensor | None,
    is_causal: bool,
    *,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    arguments: tuple[str, str] = ("mask", "key_padding_mask"),
) -> tuple[Tensor | None, bool]:
    """Merge the two masks of ``nn.MultiheadAttention`` into one for ``scaled_dot_product_attention``.

    Args:
        attention: (L, S) or (batch * nhead, L, S); bool (True: may not attend) or floating point (added to the scores).
        key_padding: (batch, S); bool (True: not attended) or floating point (added to the scores).
        is_causal: the mask is causal. As in torch, a mask with this hint is read only if there is a key padding mask
            too. Unlike in torch, the hint also works alone.
        sizes: (batch, nhead, L, S).
        device: device of a causal mask that has to be built.
        arguments: names of the two masks for the error messages.

    Returns:
        (mask, is_causal) for ``scaled_dot_product_attention``. The mask is bool with True for "attend", or floating
        point, broadcastable to (batch, nhead, L, S). A mask never comes with ``is_causal``.

    Raises:
        TypeError: a mask is not a tensor, or neither bool nor floating point, or is_causal is no bool.
        ValueError: a mask has the wrong shape.
    """
    if is_causal is not True and is_causal is not False:
        checks.check_flags(**{arguments[0].rpartition("mask")[0].removeprefix("src_") + "is_causal": is_causal})
    batch, nhead, queries, keys = sizes
    if attention is not None:
        _check_mask(arguments[0], attention, ((queries, keys), (batch * nhead, queries, keys)), device)
    if key_padding is not None:
        _check_mask(arguments[1], key_padding, ((batch, keys),), device)
    if is_causal and key_padding is None:
        return None, True
    if is_causal and attention is None:
        attention = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
    masks = []
    if attention is not None:
        masks.append(
            attention.view(1, 1, queries, keys) if attention.dim() == 2 else attention.unflatten(0, (batch, nhead))
        )
    if key_padding is not None:
        masks.append(key_padding[:, None, None, :])
    if not masks:
        return None, False
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] | masks[1] if len(masks) == 2 else masks[0]), False
    dtype = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    added = [torch.zeros_like(m, dtype=dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m for m in masks]
    return (added[0] + added[1] if len(added) == 2 else added[0]), False


@dataclass
class DecoderCache:
    """The state of one decoder layer between the steps of incremental decoding.

    ``memory`` is the encoder's output, (batch, S, D). The cross-attention makes its keys and values, (batch, nhead, S,
    D / nhead), at the first step. The self-attention appends to its own, (rows, nhead, capacity, D / nhead); the first
    ``length`` positions are in use. ``rows`` is ``batch`` times the number of beams. The cache has no cell state: the
    depth-wise LSTM's state runs over the layers of one token and starts afresh with the next.
    """

    memory: Tensor
    memory_mask: Tensor | None = None
    memory_keys_values: tuple[Tensor, Tensor] | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0
    attention: ClassVar[str] = "separate"  # the kind that the cache is for

    @property
    def rows(self) -> int | None:
        """The rows that the first step began with; None before it."""
        return None if self.keys is None else self.keys.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the key and value of one position, (rows, nhead, 1, D / nhead); return those of all positions so far."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            if self.length == self.keys.shape[2]:  # doubling: appending costs one copy per position, amortised
                self.keys, self.values = (torch.cat((t, torch.zeros_like(t)), 2) for t in (self.keys, self.values))
            # narrow, not an index: torch.compile would take the index for a constant and compile every position anew
            self.keys.narrow(2, self.length, 1).copy_(keys)
            self.values.narrow(2, self.length, 1).copy_(values)
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue from the tokens of row ``rows[i]``; rows is int64.

        Rows only move within the beams of one source.

        Raises:
            TypeError, ValueError: rows is no int64 tensor (rows,), or names a row that the cache does not have.
        """
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._select((self.keys, self.values), rows)

    def _select(self, kept: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be an int64 tensor; found {found}")
        checks.check_shape("rows", rows, (rows.numel(),))
        if rows.device != kept[0].device:
            raise ValueError(f"rows must be on the device of the cache, {kept[0].device}; found {rows.device}")
        try:
            return tuple(each.index_select(0, rows) for each in kept)
        except IndexError as error:  # looking at the numbers first would wait for a GPU
            raise ValueError(f"rows must hold rows from 0 to {kept[0].shape[0] - 1}; found {rows.tolist()}") from error


def check_beside(argument: str, found: Tensor, layer: nn.Module | None, *around: nn.Module) -> None:
    """Check ``found`` against the weights of the attention of ``layer`` that it meets, as far as they say something."""
    if layer is None:
        return
    name, attention = "in_proj", layer._modules.get("self_attn")
    if argument == "memory" or attention is None:
        name, attention = "kv_proj" if argument == "memory" else "q_proj", layer._modules.get("cross_attn")
    if attention is not None:
        checks.check_beside(argument, found, attention._modules.get(name), attention, *around)


def new_cache(memory: Tensor, key_padding: Tensor | None, d_model: int, layer: Any = None) -> DecoderCache:
    """Return an empty cache for memory (batch, S, D) and its padding mask (batch, S); ``layer`` will attend to it.

    Raises:
        TypeError, ValueError: memory or the mask is invalid.
    """
    checks.check_float_tensor("memory", memory)
    if memory.dim() != 3 or memory.shape[-1] != d_model:
        raise ValueError(f"memory must have shape (batch, length, {d_model}); found {tuple(memory.shape)}")
    check_beside("memory", memory, layer)
    sizes = (memory.shape[0], 1, 1, memory.shape[1])
    arguments = ("memory_mask", "memory_key_padding_mask")
    mask, _ = attention_mask(None, key_padding, False, sizes=sizes, device=memory.device, arguments=arguments)
    return DecoderCache(memory, mask)


class _Attention(nn.Module):
    """Base of self- and cross-attention; inputs are (batch, length, D)."""

    out_proj: nn.Module

    def __init__(
        self, d_model: int, nhead: int, dropout: float, bias: bool, init: str, device: Any, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        checks.check_placement(device, dtype)
        checks.check_flags(bias=bias)
        checks.check_size("d_model", d_model)
        checks.check_size("nhead", nhead)
        checks.check_probability("dropout", dropout)
        checks.check_name("init", init, INITS)
        if d_model % nhead:
            raise ValueError(f"nhead must divide d_model, {d_model}; found {nhead}")
        self.d_model, self.nhead, self.dropout, self.init = d_model, nhead, dropout, init

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, nhead={self.nhead}, dropout={self.dropout}"

    def _split(self, projected: Tensor, parts: int) -> list[Tensor]:
        """(batch, length, parts * D) -> parts views of shape (batch, nhead, length, D / nhead)."""
        heads = projected.unflatten(-1, (parts, self.nhead, self.d_model // self.nhead))
        return [part.transpose(1, 2) for part in heads.unbind(-3)]

    def _project(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Return linear(x), with x as a matrix unless it is dense.

        nn.Linear adds the bias of a strided batch in a separate pass.
        """
        return linear(x) if x.is_contiguous() else linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return attention with its heads merged, (batch, L, D); a query that may attend to nothing gets zeros."""
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        heads = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )
        # a view: the flash kernels lay their output out as (batch, L, nhead, D / nhead)
        return heads.transpose(1, 2).flatten(2)


class SelfAttention(_Attention):
    """Multi-head self-attention.

    Parameters: ``in_proj`` (D -> 3D: queries, keys, values) and ``out_proj`` (D -> D), both nn.Linear.
    Dropout acts on the attention probabilities.

    Raises:
        TypeError, ValueError: a size, a probability or a name is invalid, or nhead does not divide d_model.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        init: str = "lipschitz",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, nhead, dropout, bias, init, device, dtype)
        self.in_proj: nn.Module = nn.Linear(d_model, 3 * d_model, bias, device, dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_linear(self.in_proj, self.init, 3)
        initialise_linear(self.out_proj, self.init)

    def context(
        self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False, cache: DecoderCache | None = None
    ) -> Tensor:
        """Run :meth:`forward` without the output projection."""
        query, keys, values = self._split(self._project(self.in_proj, x), 3)
        if cache is not None:
            keys, values = cache.append(keys, values)
        return self._attend(query, keys, values, mask, is_causal)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False, cache: DecoderCache | None = None
    ) -> Tensor:
        """Attend; x (batch, L, D) -> (batch, L, D).

        Args:
            x: (batch, L, D); with ``cache`` L is 1.
            mask, is_causal: as returned by :func:`attention_mask`. A row that may attend to nothing gets zeros before
                ``out_proj``.
            cache: keys and values of earlier positions; those of x are appended.
        """
        return self.out_proj(self.context(x, mask, is_causal, cache))


class CrossAttention(_Attention):
    """Multi-head attention to an encoder's output.

    Parameters: ``q_proj`` (D -> D), ``kv_proj`` (D -> 2D: keys, values) and ``out_proj`` (D -> D), all nn.Linear.
    Dropout acts on the attention probabilities.

    Raises:
        TypeError, ValueError: a size, a probability or a name is invalid, or nhead does not divide d_model.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        init: str = "lipschitz",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, nhead, dropout, bias, init, device, dtype)
        self.q_proj: nn.Module = nn.Linear(d_model, d_model, bias, device, dtype)
        self.kv_proj: nn.Module = nn.Linear(d_model, 2 * d_model, bias, device, dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_linear(self.q_proj, self.init)
        initialise_linear(self.kv_proj, self.init, 2)
        initialise_linear(self.out_proj, self.init)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, (batch, nhead, S, D / nhead) each, of memory (batch, S, D)."""
        keys, values = self._split(self.kv_proj(memory), 2)
        return keys, values

    def context(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Run :meth:`forward` without the output projection."""
        if cache is not None and cache.memory_keys_values is not None:
            memory = cache.memory_keys_values
        keys, values = memory if isinstance(memory, tuple) else self.keys_values(memory)
        if cache is not None:
            cache.memory_keys_values = keys, values
        queries = x if x.shape[0] == keys.shape[0] else x.reshape(keys.shape[0], -1, self.d_model)
        query = self._project(self.q_proj, queries).unflatten(-1, (self.nhead, -1)).transpose(1, 2)
        attended = self._attend(query, keys, values, mask, is_causal)
        return attended if queries is x else attended.view(x.shape)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Attend; x (batch, L, D) -> (batch, L, D).

        Args:
            x: (batch, L, D), or in incremental decoding (batch * beams, 1, D). The beams are then queries of their
                common source.
            memory: (batch, S, D), or the result of :meth:`keys_values` for it.
            mask, is_causal: as returned by :func:`attention_mask`. A row that may attend to nothing gets zeros before
                ``out_proj``.
            cache: keeps the keys and values of memory from its first use on.
        """
        return self.out_proj(self.context(x, memory, mask, is_causal, cache))
