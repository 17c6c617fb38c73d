"""The language model as a model of transformers."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .. import LanguageModel, checks
from ..reference.causal import Places
from ..reference.token_checks import can_look
from ..reference.translation import check_ids
from .attention import recorded, wants_weights
from .base import DepthLSTMPreTrainedModel, LayerOfCache, check_tensors, past_of
from .configuration import DepthLSTMConfig


class DepthLSTMForCausalLM(DepthLSTMPreTrainedModel, GenerationMixin):
    """A :class:`depthlstm_fast.LanguageModel`, which is ``model``, with transformers' arguments and outputs.

    The state of a depth connection runs over the layers of one token, and is in no cache: transformers' own caches
    serve as they are.
    """

    config_class = DepthLSTMConfig
    config: DepthLSTMConfig
    model_class = LanguageModel
    embedding_name = "embedding"
    _no_split_modules: ClassVar[list[str]] = ["CausalStack"]  # a connection runs through all layers

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding, self.model.vocab_size = value, value.num_embeddings

    @deprecate_kwarg("past_key_values", "7", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with ``labels`` the loss, as transformers' causal models give them.

        Args:
            input_ids: (batch, L) int64, or ``inputs_embeds`` (batch, L, hidden_size) in their place.
            attention_mask: (batch, past + L), 1 for a real token; or a mask (batch, 1, L, S) that is used as it is.
            position_ids: (batch, L); None counts the real tokens.
            cache: any cache of transformers.
            labels: (batch, L), the ids themselves: they are shifted here, and -100 is left out.
            use_cache: make a cache where none is given, and return it.
            output_attentions: also each layer's weights (batch, heads, L, past + L), with
                ``attn_implementation="eager"``.
            output_hidden_states: also what the connection makes of the input and of the state after each layer.
            logits_to_keep: only the last so many positions, or those of an index; 0 for all.

        Raises:
            TypeError, ValueError: not one of ``input_ids`` and ``inputs_embeds`` is given; naming the argument, what
                was found and what was wanted.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids must be given, or inputs_embeds in their place; found both or none")
        check_tensors(attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds)
        if position_ids is not None and position_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"position_ids must be int64 or int32; found {position_ids.dtype}")
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, (int, Tensor)):
            raise TypeError(f"logits_to_keep must be an int or a tensor; found {type(logits_to_keep).__name__}")
        if input_ids is not None:
            self._check(input_ids, attention_mask, position_ids, cache, labels)
        embedded = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        given = position_ids
        if position_ids is None:
            position_ids = _positions(embedded, attention_mask, past)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=given,
        )
        caches = None if cache is None else [LayerOfCache(cache, index) for index in range(self.model.num_layers)]
        places = Places(position_ids, mask, mask is None and embedded.shape[1] > 1)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs: list[Tensor] | None = [] if wanted else None
        hidden, attentions = recorded(
            wants_weights(self.config, output_attentions),
            [layer.self_attn for layer in self.model.decoder.layers],
            lambda: self.model._through_layers(embedded, places, caches, outputs),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.model.output(hidden[:, kept] if isinstance(kept, (slice, Tensor)) else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        states = None if outputs is None else tuple(outputs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=cache, hidden_states=states, attentions=attentions
        )

    def _check(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any, labels: Any) -> None:
        """Raise TypeError or ValueError where a token or a tensor beside the tokens cannot be one."""
        check_ids(
            "input_ids",
            input_ids,
            self.model.vocab_size,
            sys.maxsize,
            range_too=isinstance(input_ids, Tensor) and can_look(input_ids),
        )
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"cache must be a Cache of transformers; found {type(cache).__name__}")
        rows, length = input_ids.shape
        past = past_of(cache)
        if isinstance(past, int):
            if position_ids is None and self.model.positions is not None:
                self._check_length("input_ids", past + length)
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                checks.check_shape("attention_mask", attention_mask, (rows, past + length))
        if isinstance(position_ids, Tensor):
            checks.check_shape("position_ids", position_ids.expand(rows, -1), (rows, length))
            if self.model.positions is not None and can_look(position_ids):
                most = self.config.max_position_embeddings - 1
                if wrong := [each for each in position_ids.aminmax() if not 0 <= each <= most]:
                    raise ValueError(
                        f"position_ids must hold positions from 0 to max_position_embeddings - 1, {most}; "
                        f"found {int(wrong[0])}"
                    )
        if labels is not None:
            self.model._check_labels(labels, input_ids, None, False)


def _positions(embedded: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    length = embedded.shape[1]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + length, device=embedded.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
