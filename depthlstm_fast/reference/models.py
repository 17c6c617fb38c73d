"""A translation Transformer built on depth-wise LSTM layers, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import checks
from .cell import FORGET_BIAS
from .layers import DepthLSTMDecoderLayer, DepthLSTMEncoderLayer
from .positions import sinusoidal_positions as sinusoidal_positions
from .stacks import DepthLSTMDecoder, DepthLSTMEncoder
from .translation import TranslationModel


class DepthLSTMTransformer(TranslationModel):
    """Encoder-decoder Transformer whose residual connections are depth-wise LSTMs; tokens (batch, length) in, logits
    out.

    Args:
        src_vocab, tgt_vocab: vocabulary sizes.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, activation, layer_norm_eps, bias: sizes
            and kinds as in :class:`DepthLSTMEncoderLayer`.
        dropout: of the layers, and of the embedded input.
        hidden, norm, sublayer, init, forget_bias, merge: see the layers.
        share_cell, init_cell: see the stacks.
        positions: "sinusoidal", or "learned": one table for each side.
        max_len: the longest sequence, source or target.
        share_embeddings: one embedding for both sides; the vocabularies must then have one size.
        tie_output: the output layer's weight is the target embedding. The output layer has no bias.
        final_norm: a LayerNorm on the output of each stack.
        pad_id, bos_id, eos_id: special tokens.

    Embeddings are multiplied by sqrt(d_model). They start at U(+-sqrt(2/(vocab + D))) with ``init="lipschitz"``, at
    Xavier's uniform with "glorot". The padding token's row is an ordinary row, because padding is masked wherever it
    could be seen. With a tied output layer that row is also trained as an output.

    Raises:
        TypeError, ValueError: a size, name or number is invalid.
    """

    encoder_layer_class: type[DepthLSTMEncoderLayer] = DepthLSTMEncoderLayer
    decoder_layer_class: type[DepthLSTMDecoderLayer] = DepthLSTMDecoderLayer
    encoder_class: type[DepthLSTMEncoder] = DepthLSTMEncoder
    decoder_class: type[DepthLSTMDecoder] = DepthLSTMDecoder

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        *,
        hidden: str = "linear",
        norm: str = "gate",
        merge: str = "add",
        sublayer: bool = False,
        share_cell: bool = False,
        init: str = "lipschitz",
        init_cell: str = "zeros",
        forget_bias: float = FORGET_BIAS,
        layer_norm_eps: float = 1e-6,
        bias: bool = True,
        positions: str = "sinusoidal",
        max_len: int = 1024,
        share_embeddings: bool = False,
        tie_output: bool = True,
        final_norm: bool = True,
        pad_id: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._begin(
            src_vocab,
            tgt_vocab,
            d_model,
            init=init,
            positions=positions,
            max_len=max_len,
            share_embeddings=share_embeddings,
            tie_output=tie_output,
            pad_id=pad_id,
            bos_id=bos_id,
            eos_id=eos_id,
        )
        checks.check_size("num_encoder_layers", num_encoder_layers)
        checks.check_size("num_decoder_layers", num_decoder_layers)
        checks.check_flags(final_norm=final_norm)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        common: dict[str, Any] = {
            "hidden": hidden,
            "norm": norm,
            "forget_bias": forget_bias,
            "sublayer": sublayer,
            "init": init,
            **placed,
        }
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, True, bias)
        encoder_layer = self.encoder_layer_class(*sizes, **common)
        decoder_layer = self.decoder_layer_class(*sizes, merge=merge, **common)
        norms = [nn.LayerNorm(d_model, layer_norm_eps, **placed) if final_norm else None for _ in range(2)]
        self.encoder = self.encoder_class(encoder_layer, num_encoder_layers, norms[0], share_cell, init_cell)
        self.decoder = self.decoder_class(decoder_layer, num_decoder_layers, norms[1], share_cell, init_cell)
        self._surround(positions, share_embeddings, dropout, device, dtype)
