"""The decoder around any depth connection."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..reference.attention import CrossAttention, DecoderCache, new_cache
from ..reference.decoder_attention import FUSIONS, MergedAttention, MergedCache, MultiscaleAttention, MultiscaleCache
from ..reference.layers import check_caches, check_step
from ..reference.stacks import takes
from .base import Factory, Stack, absorbs_feed_forward

DECODER_ATTENTIONS = ("separate", "add", "merged")


class Decoder(Stack):
    """A Transformer decoder around any depth connection; arguments as those of :class:`Encoder`.

    Args:
        decoder_attention: "separate": self-attention and cross-attention are a branch each. "add": they are one branch,
            s + CrossAttn(s) with s = SelfAttn(u). "merged": one branch with the causal mean in the self-attention's
            place, :class:`depthlstm_fast.reference.MergedAttention`; it is causal whatever ``tgt_is_causal`` says, and
            takes no ``tgt_mask``. None: "add" where the connection absorbs the feed-forward network, else "separate".
        context: the top layer also attends to a second memory,
            :class:`depthlstm_fast.reference.MultiscaleAttention`; "gate" or "scalar" says how the two are mixed.
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
        init: str = "lipschitz",
        decoder_attention: str | None = None,
        context: str | None = None,
    ) -> None:
        checks.check_size("num_layers", num_layers)
        if decoder_attention is None:
            decoder_attention = "add" if absorbs_feed_forward(connection) else "separate"
        checks.check_name("decoder_attention", decoder_attention, DECODER_ATTENTIONS)
        if context is not None:
            checks.check_name("context", context, FUSIONS)
        if context is not None and decoder_attention == "merged":
            raise ValueError('decoder_attention must not be "merged" with a second memory; found "merged"')
        classes: list[Callable[..., CrossAttention]] = [
            MergedAttention if decoder_attention == "merged" else CrossAttention
        ] * num_layers
        if context is not None:
            classes[-1] = functools.partial(MultiscaleAttention, fusion=context)
        self.has_context = context is not None
        super().__init__(
            d_model, nhead, num_layers, connection, feed_forward, dim_feedforward, dropout, activation, layer_norm_eps,
            batch_first, bias, init, device, dtype, decoder_attention, classes,
        )  # fmt: skip
        self.arguments |= {"decoder_attention": decoder_attention, "context": context}

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | tuple[Tensor, ...],
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        caches: list[DecoderCache] | None = None,
    ) -> Tensor:
        """The output in tgt's shape.

        Args:
            tgt: (batch, L, C), (L, batch, C) or, unbatched, (L, C).
            memory: an encoder's output in the same layout, or a tuple of them, one for each layer; with ``context`` one
                more, the second memory.
            tgt_mask and the other masks and hints: as :class:`depthlstm_fast.DepthLSTMDecoder` takes them.
            caches: of :meth:`new_caches`, for incremental decoding: tgt is the next position alone, and the caches are
                updated. Masks and hints are not used.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted.
        """
        x = self._enter("tgt", tgt)
        if caches is not None:
            return self._leave(self._through_layers(x, self._step_options(x, caches)), tgt)
        memories = [self._enter("memory", each) for each in self._split(memory)]
        for each in memories:
            if each.shape[0] != x.shape[0] or each.shape[1] != memories[0].shape[1]:
                raise ValueError(f"memory must be batched as tgt, {tuple(tgt.shape)}, is; found {tuple(each.shape)}")
        unbatched = tgt.dim() == 2
        if self.attention == "merged" and tgt_mask is not None:
            raise ValueError('tgt_mask must be None with decoder_attention="merged", which is causal; found a tensor')
        names = ("tgt_mask", "tgt_key_padding_mask")
        mask, causal = self._masks(
            x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal is not None and tgt_is_causal, names, unbatched
        )
        names = ("memory_mask", "memory_key_padding_mask")
        memory_mask, memory_is_causal = self._masks(
            x, memories[0], memory_mask, memory_key_padding_mask, memory_is_causal, names, unbatched
        )
        shared: dict[str, Any] = {"self": {"mask": mask, "is_causal": causal}, "keep": None}
        if self.attention == "merged" and tgt_key_padding_mask is not None:
            if tgt_key_padding_mask.dtype != torch.bool:
                raise TypeError(
                    f'tgt_key_padding_mask must be bool with decoder_attention="merged"; '
                    f"found {tgt_key_padding_mask.dtype}"
                )
            shared["keep"] = ~tgt_key_padding_mask.view(x.shape[:2])
        cross = {"mask": memory_mask, "is_causal": memory_is_causal}
        options = [{**shared, "cross": {**cross, "memory": each}} for each in memories[: self.num_layers]]
        if self.has_context:
            options[-1]["cross"]["context"] = memories[-1]
        return self._leave(self._through_layers(x, options), tgt)

    def _split(self, memory: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A memory for each layer, and with ``context`` the second one."""
        wanted = self.num_layers + self.has_context
        if isinstance(memory, Tensor) and not self.has_context:
            return (memory,) * wanted
        if not isinstance(memory, tuple) or len(memory) != wanted:
            found = f"a tuple of {len(memory)}" if isinstance(memory, tuple) else type(memory).__name__
            raise ValueError(f"memory must be a tensor, or a tuple of {wanted} with a memory a layer; found {found}")
        return memory

    def _step_options(self, x: Tensor, caches: list[DecoderCache]) -> list[dict[str, Any]]:
        check_caches(caches, self.num_layers)
        options = []
        for index, cache in enumerate(caches):
            check_step(x, cache, self._cache_kind(index))
            cross = {"memory": cache.memory, "mask": cache.memory_mask, "cache": cache}
            options.append({"self": cache.options(), "cross": cross, "keep": None})
        return options

    def _cache_kind(self, index: int) -> type[DecoderCache]:
        if self.attention == "merged":
            return MergedCache
        return MultiscaleCache if self.has_context and index == self.num_layers - 1 else DecoderCache

    def new_caches(
        self, memory: Tensor | tuple[Tensor, ...], memory_key_padding_mask: Tensor | None = None
    ) -> list[DecoderCache]:
        """Start incremental decoding: one cache a layer for memory, as :meth:`forward` takes it but batch first."""
        memories = self._split(memory)
        made = [new_cache(each, memory_key_padding_mask, self.d_model, self.layers[0]) for each in memories]
        if self.attention == "merged":
            return [MergedCache(each.memory, each.memory_mask) for each in made]
        if self.has_context:
            top, context = made[-2:]
            return [*made[:-2], MultiscaleCache(top.memory, top.memory_mask, context=context)]
        return made

    def step(self, tgt: Tensor, caches: list[DecoderCache]) -> Tensor:
        """:meth:`forward` with ``caches``, but tgt and the result are (rows, 1, C), always batch first."""
        return self._through_layers(tgt, self._step_options(tgt, caches))

    def takes_caches(self) -> bool:
        """Whether each attention, possibly replaced by the user's own, takes the cache of a decoding step."""
        attentions = [getattr(layer, name, None) for layer in self.layers for name in ("self_attn", "cross_attn")]
        return all(takes(each, "cache") for each in attentions if isinstance(each, nn.Module))
