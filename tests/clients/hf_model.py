"""The Transformer as a model of Hugging Face's transformers.

A user writes such a wrapper for Trainer, save_pretrained and HF's generate.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from client_helpers import HEADS, LAYERS, LONGEST, SOURCE, TARGET, D
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

import depthlstm_fast as dl


class Config(transformers.PretrainedConfig):
    model_type = "depth_lstm_test"

    def __init__(self, tied: bool = True, positions: str = "sinusoidal", **options: Any) -> None:
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        super().__init__(**{"is_encoder_decoder": True, **tokens, **options})
        self.tied, self.positions = tied, positions
        self.num_hidden_layers, self.hidden_size, self.vocab_size, self.tie_word_embeddings = LAYERS, D, TARGET, tied


class Encoder(nn.Module):
    """The encoder that HF's generate calls once for each source."""

    main_input_name = "input_ids"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are in the whole model already

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(
            last_hidden_state=self.model.encode(input_ids, None if attention_mask is None else attention_mask == 0)
        )


class Model(transformers.PreTrainedModel, transformers.GenerationMixin):
    config_class = Config
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.output.weight": "model.tgt_embedding.weight"}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = dl.DepthLSTMTransformer(
            SOURCE,
            TARGET,
            D,
            HEADS,
            LAYERS,
            LAYERS,
            dropout=0.0,
            max_len=LONGEST,
            tie_output=config.tied,
            positions=config.positions,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, so that the package's own initialisation stays."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tgt_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return Encoder(self.model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        if decoder_input_ids is None:
            decoder_input_ids = torch.cat((torch.full_like(labels[:, :1], 1), labels[:, :-1]), 1).clamp(min=0)
        padding = None if attention_mask is None else attention_mask == 0
        if padding is None and input_ids is not None:
            padding = input_ids == 0
        memory = self.model.encode(input_ids, padding) if encoder_outputs is None else encoder_outputs[0]
        logits = self.model.decode(decoder_input_ids, memory, None, padding)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=memory)
