"""The encoder-decoder as a model of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .. import Transformer
from .base import DepthLSTMPreTrainedModel, LayerOfCache
from .configuration import DepthLSTMSeq2SeqConfig


class Encoder(nn.Module):
    """What transformers' generate calls once for each source."""

    main_input_name = "input_ids"

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.__dict__["_model"] = model  # not a submodule: its parameters are in the whole model already

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        padding = None if attention_mask is None else attention_mask == 0
        model: Transformer = self.__dict__["_model"]
        return BaseModelOutput(last_hidden_state=model.encode(input_ids, padding))


class DepthLSTMForSeq2SeqLM(DepthLSTMPreTrainedModel, GenerationMixin):
    """A :class:`depthlstm_fast.Transformer`, which is ``model``, with transformers' arguments and outputs.

    Positions are absolute: pad sources on the right.
    """

    config_class = DepthLSTMSeq2SeqConfig
    config: DepthLSTMSeq2SeqConfig
    model_class = Transformer
    embedding_name = "tgt_embedding"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["Encoder", "Decoder"]  # a connection runs through all layers

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return Encoder(self.model)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if self.model.src_embedding is self.model.tgt_embedding:
            self.model.src_embedding, self.model.src_vocab = value, value.num_embeddings
        self.model.tgt_embedding, self.model.tgt_vocab = value, value.num_embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The targets behind the token that begins them; -100 becomes padding."""
        first = torch.full_like(labels[:, :1], self.model.bos_id)
        shifted = torch.cat((first, labels[:, :-1]), 1)
        return shifted.masked_fill(shifted == -100, self.model.pad_id)

    @deprecate_kwarg("past_key_values", "7", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of the targets, and with ``labels`` the loss, as transformers' models give them.

        Args:
            input_ids: sources (batch, S) int64, or ``encoder_outputs`` of :meth:`get_encoder` in their place.
            attention_mask: (batch, S), 1 for a real token; None for ``input_ids != pad_token_id``.
            decoder_input_ids: (batch, L) int64; made from ``labels`` where it is None.
            decoder_attention_mask: (batch, past + L), 1 for a real token.
            cache: transformers' EncoderDecoderCache.
            labels: (batch, L), -100 is left out.
            use_cache: make a cache where none is given, and return it.

        Raises:
            ValueError: sources or targets are missing.
        """
        if input_ids is None and encoder_outputs is None:
            raise ValueError("input_ids must be given, or encoder_outputs in their place; found neither")
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids must be given, or labels in their place; found neither")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if attention_mask is None and input_ids is not None:
            attention_mask = (input_ids != self.model.pad_id).long()
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        memory = encoder_outputs[0]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        logits = self.model.output(
            self._decode(decoder_input_ids, decoder_attention_mask, memory, attention_mask, cache)
        )
        loss = None
        if labels is not None:  # targets are shifted already
            loss = self.loss_function(logits, None, logits.shape[-1], shift_labels=labels, **kwargs)
        return Seq2SeqLMOutput(loss=loss, logits=logits, cache=cache, encoder_last_hidden_state=memory)

    def _decode(
        self,
        ids: Tensor,
        ids_mask: Tensor | None,
        memory: Tensor,
        memory_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        own = None if cache is None else cache.self_attention_cache
        past = 0 if own is None else own.get_seq_length()
        places = torch.arange(ids.shape[1], device=ids.device)[None] + past
        x = self.model._embed(ids, self.model.tgt_embedding, self.model.tgt_positions, places)
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=ids_mask, cache=own)
        attending = {"mask": mask, "is_causal": mask is None and ids.shape[1] > 1}
        cross_mask = None if memory_mask is None else memory_mask.bool()[:, None, None, :]
        decoder, options = self.model.decoder, []
        for index, layer in enumerate(decoder.layers):
            keys_values: Any = memory if cache is None else self._memory_of(layer.cross_attn, memory, cache, index)
            kept = None if own is None else LayerOfCache(own, index)
            cross = {"memory": keys_values, "mask": cross_mask}
            options.append({"self": {**attending, "cache": kept}, "cross": cross, "keep": None})
        return decoder._through_layers(x, options)

    @staticmethod
    def _memory_of(attention: Any, memory: Tensor, cache: EncoderDecoderCache, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, made at the first step."""
        if cache.is_updated.get(index):
            layer = cache.cross_attention_cache.layers[index]
            return layer.keys, layer.values
        cache.is_updated[index] = True
        return cache.cross_attention_cache.update(*attention.keys_values(memory), index)
