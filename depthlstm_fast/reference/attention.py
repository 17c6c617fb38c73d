"""Multi-head attention and its masks.

Heads are split and merged by layout. The masks are those of ``torch.nn.Transformer*``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, sharding
from .caches import DecoderCache, KeyValueCache
from .rotary import Rotation, rotate

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


@torch.no_grad()
def initialise_linear(linear: nn.Module, init: str, matrices: int | tuple[int, ...] = 1) -> None:
    """Draw the weight of ``linear`` anew and set its bias to zero.

    ``init="lipschitz"`` draws from U(+-1/sqrt(fan_in)). ``"glorot"`` is Xavier's uniform for each of the ``matrices``
    logical matrices stacked in the weight, or of those that have the given numbers of rows. A module that replaces the
    nn.Linear and has no plain ``weight`` is left alone.
    """
    if not isinstance(linear, nn.Linear):
        return
    fan_out, fan_in = linear.weight.shape
    sizes = (fan_out // matrices,) * matrices if isinstance(matrices, int) else matrices
    if init == "lipschitz" or len(set(sizes)) == 1:
        bound = 1 / math.sqrt(fan_in) if init == "lipschitz" else math.sqrt(6 / (fan_in + sizes[0]))
        draw_uniform(linear.weight, bound)
    else:
        weight = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=linear.weight.device)
        for part in weight.split(sizes):
            bound = math.sqrt(6 / (fan_in + part.shape[0]))
            part.uniform_(-bound, bound)
        linear.weight.copy_(sharding.replicated(weight, linear.weight))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _check_mask(argument: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; found {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{argument} must be bool or floating point; found {mask.dtype}")
    checks.check_dense(argument, mask)
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
    product: Any = None  # what is called in the place of PyTorch's scaled_dot_product_attention

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
        options: dict[str, Any] = {"enable_gqa": True} if keys.shape[1] != self.nhead else {}
        options |= {"attn_mask": mask, "dropout_p": self.dropout if self.training else 0.0, "is_causal": is_causal}
        product = F.scaled_dot_product_attention if self.product is None else self.product
        heads = product(query, keys, values, **options)
        # a view: the flash kernels lay their output out as (batch, L, nhead, D / nhead)
        return heads.transpose(1, 2).flatten(2)


class SelfAttention(_Attention):
    """Multi-head self-attention.

    Args:
        d_model, nhead: D, and the heads of the queries.
        dropout: acts on the attention probabilities.
        bias, init, device, dtype: of both matrices.
        kv_heads: heads of keys and values, each for nhead / kv_heads heads of queries (Ainslie et al.,
            arXiv 2305.13245); nhead if None.

    Parameters: ``in_proj`` (D -> D + 2 kv_heads D / nhead: queries, keys, values) and ``out_proj`` (D -> D), both
    nn.Linear.

    Raises:
        TypeError, ValueError: a size, a probability or a name is invalid, nhead does not divide d_model, or kv_heads
            does not divide nhead.
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
        kv_heads: int | None = None,
    ) -> None:
        super().__init__(d_model, nhead, dropout, bias, init, device, dtype)
        self.kv_heads = nhead if kv_heads is None else kv_heads
        checks.check_size("kv_heads", self.kv_heads)
        if nhead % self.kv_heads:
            raise ValueError(f"kv_heads must divide nhead, {nhead}; found {kv_heads}")
        self.in_proj: nn.Module = nn.Linear(d_model, sum(self.parts), bias, device, dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias, device, dtype)
        self.reset_parameters()

    @property
    def parts(self) -> tuple[int, int, int]:
        """The widths of queries, keys and values in ``in_proj``'s output."""
        width = self.kv_heads * (self.d_model // self.nhead)
        return self.d_model, width, width

    def reset_parameters(self) -> None:
        initialise_linear(self.in_proj, self.init, self.parts)
        initialise_linear(self.out_proj, self.init)

    def context(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | KeyValueCache | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Run :meth:`forward` without the output projection."""
        projected = self._project(self.in_proj, x)
        if self.kv_heads == self.nhead:
            query, keys, values = self._split(projected, 3)
        else:
            size = self.d_model // self.nhead
            query, keys, values = (
                part.unflatten(-1, (part.shape[-1] // size, size)).transpose(1, 2)
                for part in projected.split(self.parts, -1)
            )
        if rotation is not None:
            query, keys = rotate(query, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.append(keys, values)
        return self._attend(query, keys, values, mask, is_causal)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | KeyValueCache | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend; x (batch, L, D) -> (batch, L, D).

        Args:
            x: (batch, L, D); with a :class:`DecoderCache` L is 1.
            mask, is_causal: as returned by :func:`attention_mask`. A row that may attend to nothing gets zeros before
                ``out_proj``.
            cache: keys and values of earlier positions; those of x are appended.
            rotation: of :func:`depthlstm_fast.reference.rotary.make_rotation`, by which queries and keys are turned.
        """
        return self.out_proj(self.context(x, mask, is_causal, cache, rotation))


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
