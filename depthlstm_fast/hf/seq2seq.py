"""The encoder-decoder as a model of transformers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .. import Transformer, checks
from ..reference.attention import CrossAttention
from ..reference.token_checks import can_look
from ..reference.translation import check_ids
from .attention import recorded, wants_weights
from .base import DepthLSTMPreTrainedModel, LayerOfCache, check_tensors, past_of
from .configuration import DepthLSTMSeq2SeqConfig


@dataclass
class EncoderOutput(BaseModelOutput):
    """An encoder's output, and with ``memory="transparent"`` or ``"multiscale"`` what each decoder layer attends to.

    ``memories`` is (batch, memories, S, D): one tensor with the batch first, which transformers' beams repeat.
    """

    memories: Tensor | None = None


class Encoder(nn.Module):
    """What transformers' generate calls once for each source."""

    main_input_name = "input_ids"

    def __init__(self, owner: DepthLSTMForSeq2SeqLM) -> None:
        super().__init__()
        self.__dict__["_owner"] = owner  # not a submodule: its parameters are in the whole model already

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> EncoderOutput:
        """The output, and the attentions and hidden states that are asked for, as the whole model takes them."""
        owner: DepthLSTMForSeq2SeqLM = self.__dict__["_owner"]
        owner._check_source(input_ids, attention_mask)
        model, config = owner.model, owner.config
        x, padding = model._embed_source(input_ids, None if attention_mask is None else attention_mask == 0)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_layers = wanted or model.memories is not None
        encoder = model.encoder
        outputs, attentions = recorded(
            wants_weights(config, output_attentions),
            [layer.self_attn for layer in encoder.layers],
            lambda: (encoder.layer_outputs if all_layers else encoder)(x, src_key_padding_mask=padding),
        )
        layers = outputs if all_layers else (outputs,)
        return EncoderOutput(
            last_hidden_state=layers[-1],
            hidden_states=layers if wanted else None,
            attentions=attentions,
            memories=None if model.memories is None else torch.stack(model.memories(layers), 1),
        )


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
        return Encoder(self)

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of the targets, and with ``labels`` the loss, as transformers' models give them.

        Args:
            input_ids: sources (batch, S) int64, or ``encoder_outputs`` of :meth:`get_encoder` in their place.
            attention_mask: (batch, S), 1 for a real token; None for ``input_ids != pad_token_id``.
            decoder_input_ids: (batch, L) int64; made from ``labels`` where it is None.
            decoder_attention_mask: (batch, past + L), 1 for a real token; or (batch, 1, L, S), used as it is.
            cache: transformers' EncoderDecoderCache.
            labels: (batch, L), -100 is left out.
            use_cache: make a cache where none is given, and return it.
            output_attentions: also each layer's weights (batch, heads, L, S), with ``attn_implementation="eager"``:
                those of the encoder, the decoder, and from the decoder to the encoder.
            output_hidden_states: also what the connections make of the input and of the state after each layer.

        With ``memory="transparent"`` or ``"multiscale"`` the decoder attends to all layers of the encoder:
        ``encoder_outputs`` then come from :meth:`get_encoder`, or have ``hidden_states``, one more than layers.

        Raises:
            TypeError, ValueError: sources or targets are missing; naming the argument, what was found and what was
                wanted.
        """
        masks = {"attention_mask": attention_mask, "decoder_attention_mask": decoder_attention_mask}
        check_tensors(**masks, labels=labels)
        for argument in ("inputs_embeds", "decoder_inputs_embeds"):
            if kwargs.get(argument) is not None:
                raise ValueError(f"{argument} must be None, because the encoder-decoder takes ids; found a tensor")
        if input_ids is None and encoder_outputs is None:
            raise ValueError("input_ids must be given, or encoder_outputs in their place; found neither")
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids must be given, or labels in their place; found neither")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if attention_mask is None and isinstance(input_ids, Tensor):
            attention_mask = (input_ids != self.model.pad_id).long()
        kept = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, **kept)
        memories = self._memories(encoder_outputs)
        self._check_target(decoder_input_ids, attention_mask, memories[0], cache)
        if labels is not None:
            checks.check_shape("labels", labels, tuple(decoder_input_ids.shape))
        past, own_mask = past_of(cache), decoder_attention_mask
        if own_mask is not None and own_mask.dim() == 2 and isinstance(past, int):
            rows, length = decoder_input_ids.shape
            checks.check_shape("decoder_attention_mask", own_mask, (rows, past + length))
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        x, options = self._decoder_call(decoder_input_ids, decoder_attention_mask, memories, attention_mask, cache)
        decoder = self.model.decoder
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs: list[Tensor] | None = [] if wanted else None
        hidden, weights = recorded(
            wants_weights(self.config, output_attentions),
            [getattr(layer, name) for name in ("self_attn", "cross_attn") for layer in decoder.layers],
            lambda: decoder._through_layers(x, options, outputs),
        )
        logits = self.model.output(hidden)
        loss = None
        if labels is not None:  # targets are shifted already
            loss = self.loss_function(logits, None, logits.shape[-1], shift_labels=labels, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            cache=cache,
            decoder_hidden_states=None if outputs is None else tuple(outputs),
            decoder_attentions=None if weights is None else weights[: decoder.num_layers],
            cross_attentions=None if weights is None else weights[decoder.num_layers :],
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None) if wanted else None,
            encoder_attentions=None if weights is None else getattr(encoder_outputs, "attentions", None),
        )

    def _check_source(self, input_ids: Any, attention_mask: Any) -> None:
        """Raise TypeError or ValueError where a source cannot be one."""
        range_too = isinstance(input_ids, Tensor) and can_look(input_ids)
        check_ids("input_ids", input_ids, self.model.src_vocab, sys.maxsize, range_too=range_too)
        self._check_length("input_ids", input_ids.shape[1], "")
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            checks.check_shape("attention_mask", attention_mask, tuple(input_ids.shape))

    def _check_target(self, ids: Any, memory_mask: Any, memory: Tensor, cache: Any) -> None:
        """Raise TypeError or ValueError where targets cannot be those of the sources."""
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise TypeError(f"cache must be an EncoderDecoderCache of transformers; found {type(cache).__name__}")
        range_too = isinstance(ids, Tensor) and can_look(ids)
        check_ids("decoder_input_ids", ids, self.model.tgt_vocab, sys.maxsize, range_too=range_too)
        past = past_of(cache)
        if isinstance(past, int):
            self._check_length("decoder_input_ids", past + ids.shape[1])
        if memory.shape[0] != ids.shape[0]:
            raise ValueError(
                f"decoder_input_ids must have the batch of the sources, {memory.shape[0]}; found {ids.shape[0]}"
            )
        if isinstance(memory_mask, Tensor):
            checks.check_shape("attention_mask", memory_mask, tuple(memory.shape[:2]))

    def _memories(self, encoder_outputs: Any) -> tuple[Tensor, ...]:
        """What each decoder layer attends to, (batch, S, D), and with ``memory="multiscale"`` the context, too.

        Raises:
            TypeError, ValueError: encoder_outputs are no outputs of an encoder, or lack the layers that memory needs.
        """
        is_output = isinstance(encoder_outputs, (tuple, list, ModelOutput)) and len(encoder_outputs) > 0
        if not is_output or not isinstance(encoder_outputs[0], Tensor):
            raise TypeError(
                f"encoder_outputs must be outputs of get_encoder(), or a tuple that begins with a tensor; "
                f"found {type(encoder_outputs).__name__}"
            )
        model, last = self.model, encoder_outputs[0]
        if last.dim() != 3 or last.shape[-1] != model.d_model:
            raise ValueError(
                f"encoder_outputs must begin with a tensor of shape (batch, length, {model.d_model}); "
                f"found {tuple(last.shape)}"
            )
        if model.memories is None:
            return (last,) * model.decoder.num_layers
        memories = getattr(encoder_outputs, "memories", None)
        if memories is not None:
            return memories.unbind(1)
        layers, wanted = getattr(encoder_outputs, "hidden_states", None), model.encoder.num_layers + 1
        if layers is None or len(layers) != wanted:
            raise ValueError(
                f"encoder_outputs must have memories, as get_encoder() makes them, or {wanted} hidden_states, with "
                f"memory={model.memory!r}; found {'neither' if layers is None else f'{len(layers)} hidden_states'}"
            )
        return model.memories(layers)

    def _decoder_call(
        self,
        ids: Tensor,
        ids_mask: Tensor | None,
        memories: tuple[Tensor, ...],
        memory_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The decoder's embedded input, and each layer's options."""
        own = None if cache is None else cache.self_attention_cache
        past = 0 if own is None else own.get_seq_length()
        places = torch.arange(ids.shape[1], device=ids.device)[None] + past
        x = self.model._embed(ids, self.model.tgt_embedding, self.model.tgt_positions, places)
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=ids_mask, cache=own)
        attending = {"mask": mask, "is_causal": mask is None and ids.shape[1] > 1}
        cross_mask = None if memory_mask is None else memory_mask.bool()[:, None, None, :]
        decoder, options = self.model.decoder, []
        for index, layer in enumerate(decoder.layers):
            attentions, attended = [layer.cross_attn], [memories[index]]
            if decoder.has_context and index == decoder.num_layers - 1:
                attentions, attended = [*attentions, layer.cross_attn.context_attn], [*attended, memories[-1]]
            found: list[Any] = attended if cache is None else self._kept(attentions, attended, cache, index)
            cross = dict(zip(("memory", "context"), found, strict=False), mask=cross_mask)
            kept = None if own is None else LayerOfCache(own, index)
            options.append({"self": {**attending, "cache": kept}, "cross": cross, "keep": None})
        return x, options

    @staticmethod
    def _kept(
        attentions: list[CrossAttention], memories: list[Tensor], cache: EncoderDecoderCache, index: int
    ) -> list[tuple[Tensor, ...]]:
        """Each attention's keys and values of its memory, made at the first step.

        A layer of transformers' cache keeps one tensor of each: two attentions' lie beside each other as heads.
        """
        if cache.is_updated.get(index):
            layer = cache.cross_attention_cache.layers[index]
            keys, values = layer.keys, layer.values
        else:
            cache.is_updated[index] = True
            made = [each.keys_values(memory) for each, memory in zip(attentions, memories, strict=True)]
            keys, values = made[0] if len(made) == 1 else (torch.cat(each, 1) for each in zip(*made, strict=True))
            keys, values = cache.cross_attention_cache.update(keys, values, index)
        count = len(attentions)
        return list(zip(keys.chunk(count, 1), values.chunk(count, 1), strict=True))
