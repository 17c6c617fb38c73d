"""Small models of depthlstm_fast.hf with weights that say something, and what they are asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthlstm_fast.hf import DepthLSTMConfig, DepthLSTMForCausalLM, DepthLSTMForSeq2SeqLM, DepthLSTMSeq2SeqConfig

VOCAB, SOURCE, TARGET = 29, 19, 23
CAUSAL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "dropout": 0.0}
SEQ2SEQ: dict[str, Any] = {"vocab_size": TARGET, "src_vocab_size": SOURCE, "hidden_size": 16, "num_attention_heads": 2}
SEQ2SEQ |= {"num_encoder_layers": 2, "num_hidden_layers": 2, "max_position_embeddings": 32, "dropout": 0.0}


@torch.no_grad()
def _moved(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def causal(**options: Any) -> Any:
    torch.manual_seed(4)
    return _moved(DepthLSTMForCausalLM(DepthLSTMConfig(**{**CAUSAL, **options})).eval())


def seq2seq(**options: Any) -> Any:
    torch.manual_seed(4)
    return _moved(DepthLSTMForSeq2SeqLM(DepthLSTMSeq2SeqConfig(**{**SEQ2SEQ, **options})).eval())


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts, padded on the left."""
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :1] = 0
    return ids * mask, mask


def sources() -> tuple[Tensor, Tensor]:
    """Three sources, padded on the right."""
    ids = torch.randint(3, SOURCE, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[2, 5:] = 0
    return ids * mask, mask


def labels() -> Tensor:
    found = torch.randint(3, TARGET, (3, 5), generator=torch.Generator().manual_seed(2))
    found[1, 2:] = -100
    return found
