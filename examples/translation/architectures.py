"""Residual Transformers of torch.nn for comparison, with as many matrix weights as the depth-wise LSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

ARCHITECTURES = ("depth-lstm", "pre-norm", "post-norm")


def _initialise(weight: Tensor, init: str) -> None:
    """Draw a matrix (outputs, inputs).

    The stacked query, key and value of an attention count as separate matrices.
    """
    outputs, inputs = weight.shape
    outputs = inputs if outputs == 3 * inputs else outputs
    bound = math.sqrt(1 / inputs if init == "lipschitz" else 6 / (inputs + outputs))
    nn.init.uniform_(weight, -bound, bound)


class ResidualTransformer(dl.reference.DepthLSTMTransformer):
    """Encoder-decoder Transformer of torch.nn's layers with GELU.

    It has the embeddings, output layer and search of ``DepthLSTMTransformer``. ``generate`` keeps no cache. The
    feed-forward width is 4 * d_model. An encoder layer then has 12 d_model^2 matrix weights and a decoder layer 16
    d_model^2, as those of the depth-wise LSTM.

    Args:
        norm_first: LayerNorm before each sub-layer and after each stack ("pre-norm"), else after each addition
            ("post-norm").
        init: "lipschitz" or "glorot", as in ``DepthLSTMTransformer``. The other arguments are also those of that class.
    """

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dropout: float = 0.1,
        *,
        norm_first: bool = True,
        init: str = "lipschitz",
        **options: Any,
    ) -> None:
        # the parent makes and draws everything but the layers; its own stacks, one layer each, are replaced
        super().__init__(src_vocab, tgt_vocab, d_model, nhead, 1, 1, dropout=dropout, init=init, **options)
        layer: dict[str, Any] = {
            "dropout": dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": norm_first,
        }
        norms = [nn.LayerNorm(d_model) if norm_first else None for _ in range(2)]
        encoder_layer = nn.TransformerEncoderLayer(d_model, nhead, 4 * d_model, **layer)
        decoder_layer = nn.TransformerDecoderLayer(d_model, nhead, 4 * d_model, **layer)
        self.encoder = nn.TransformerEncoder(encoder_layer, num_encoder_layers, norms[0], enable_nested_tensor=False)  # type: ignore[assignment]
        self.decoder = nn.TransformerDecoder(decoder_layer, num_decoder_layers, norms[1])  # type: ignore[assignment]
        for stack in (self.encoder, self.decoder):
            for name, parameter in stack.named_parameters():
                if parameter.dim() > 1:
                    _initialise(parameter, init)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def _decode(self, tgt: Tensor, memory: Tensor, tgt_padding: Tensor | None, memory_padding: Tensor | None) -> Tensor:
        length = tgt.shape[1]
        return self.decoder(
            self._embed(tgt, self.tgt_embedding, self.tgt_positions),
            memory,
            tgt_mask=torch.ones(length, length, dtype=torch.bool, device=tgt.device).triu(1),
            tgt_is_causal=True,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=memory_padding,
        )

    def generate(
        self,
        src: Tensor,
        max_length: int | None = None,
        beam_size: int = 1,
        length_penalty: float = 1.0,
        **options: Any,
    ) -> Any:
        """Generate as ``DepthLSTMTransformer.generate``, without a cache."""
        return super().generate(src, max_length, beam_size, length_penalty, **(options | {"use_cache": False}))


def build_architecture(architecture: str, arguments: dict[str, Any], backend: str | None = None) -> nn.Module:
    """Return a new model.

    Args:
        architecture: one of ``ARCHITECTURES``.
        arguments: keyword arguments of ``DepthLSTMTransformer``; "forget_bias" is dropped without such a gate.
        backend: "reference" gives the depth-wise LSTM of plain PyTorch, every other value the fused one.

    Raises:
        ValueError: an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; found {architecture!r}")
    if architecture == "depth-lstm":
        return (dl.reference if backend == "reference" else dl).DepthLSTMTransformer(**arguments)
    kept = {name: value for name, value in arguments.items() if name != "forget_bias"}
    return ResidualTransformer(**kept, norm_first=architecture == "pre-norm")
