"""The translation Transformers, and how to group parameters for an optimiser."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, decode, reference
from .connections import DeepNorm
from .layers import DepthLSTMDecoder, DepthLSTMDecoderLayer, DepthLSTMEncoder, DepthLSTMEncoderLayer, trusted_folds
from .memories import MEMORIES, MultiscaleMemory, TransparentMemory
from .reference.decoder_attention import FUSIONS
from .reference.generation import Settings
from .stacks import Decoder, Encoder
from .stacks.base import Factory


class DepthLSTMTransformer(reference.DepthLSTMTransformer):
    __doc__ = reference.DepthLSTMTransformer.__doc__
    encoder_layer_class = DepthLSTMEncoderLayer
    decoder_layer_class = DepthLSTMDecoderLayer
    encoder_class = DepthLSTMEncoder
    decoder_class = DepthLSTMDecoder

    def _search(
        self, src: Tensor, mask: Tensor | None, settings: Settings, scores: bool
    ) -> tuple[Tensor, Tensor] | None:
        return decode.search(self, src, mask, settings, scores)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        with super()._inference(), trusted_folds(self):
            yield


class Transformer(reference.TranslationModel):
    """Encoder-decoder Transformer around any depth connection; tokens (batch, length) in, logits out.

    Args:
        src_vocab, tgt_vocab: vocabulary sizes.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, layer_norm_eps,
            bias, connection, feed_forward, init: see :class:`Encoder`; dropout acts on the embedded input, too. With
            ``connection="deepnorm"`` the encoder's alpha is 0.81 (N^4 M) ** (1/16), and with ``init="deepnorm"`` its
            matrices are scaled by 0.87 (N^4 M) ** (-1/16), for N encoder and M decoder layers.
        decoder_attention: see :class:`Decoder`.
        memory: what the decoder attends to. "top": the encoder's output. "transparent": for each decoder layer a
            mixture of all encoder layers, :class:`depthlstm_fast.memories.TransparentMemory`. "multiscale": decoder
            layer n attends to encoder layer n, and the top one to a context over all of them, too,
            :class:`depthlstm_fast.memories.MultiscaleMemory`; both stacks then have one depth.
        fusion: with ``memory="multiscale"``, how the top decoder layer mixes the two: "gate" or "scalar",
            :class:`depthlstm_fast.reference.MultiscaleAttention`.
        positions, max_len, share_embeddings, tie_output, pad_id, bos_id, eos_id: see :class:`DepthLSTMTransformer`.

    With ``connection="depth-lstm"`` the files of a :class:`DepthLSTMTransformer` can be loaded.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted, or connection makes no Connection.
    """

    decoder_class = Decoder

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
        connection: Factory = "depth-lstm",
        feed_forward: bool | None = None,
        decoder_attention: str | None = None,
        memory: str = "top",
        fusion: str = "gate",
        init: str = "lipschitz",
        layer_norm_eps: float = 1e-6,
        bias: bool = True,
        positions: str = "sinusoidal",
        max_len: int = 1024,
        share_embeddings: bool = False,
        tie_output: bool = True,
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
        checks.check_name("memory", memory, MEMORIES)
        checks.check_name("fusion", fusion, FUSIONS)
        if memory == "multiscale" and num_encoder_layers != num_decoder_layers:
            raise ValueError(
                f'num_decoder_layers must equal num_encoder_layers, {num_encoder_layers}, with memory="multiscale"; '
                f"found {num_decoder_layers}"
            )
        self.memory = memory
        sizes = (dim_feedforward, dropout, activation, layer_norm_eps, True, bias, device, dtype)
        common: dict[str, Any] = {"feed_forward": feed_forward, "init": init}
        depth = (num_encoder_layers**4 * num_decoder_layers) ** (1 / 16)
        below = functools.partial(DeepNorm, alpha=0.81 * depth) if connection == "deepnorm" else connection
        self.encoder = Encoder(d_model, nhead, num_encoder_layers, *sizes, connection=below, **common)
        if init == "deepnorm":
            self.encoder.beta = 0.87 / depth
            self.encoder.reset_parameters()
        common |= {"decoder_attention": decoder_attention, "context": fusion if memory == "multiscale" else None}
        self.decoder = Decoder(d_model, nhead, num_decoder_layers, *sizes, connection=connection, **common)
        self.memories: nn.Module | None = None
        if memory == "transparent":
            self.memories = TransparentMemory(num_encoder_layers, num_decoder_layers)
        elif memory == "multiscale":
            self.memories = MultiscaleMemory(d_model, num_encoder_layers)
        if self.memories is not None:
            self.memories.to(device=device, dtype=dtype)
        self._surround(positions, share_embeddings, dropout, device, dtype)

    def reset_parameters(self) -> None:
        """Draw every parameter of the model anew."""
        super().reset_parameters()
        if self.memories is not None:
            self.memories.reset_parameters()  # type: ignore[operator]

    def encode(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Any:
        """What :meth:`decode` takes as memory: with ``memory="top"`` a tensor (batch, S, D), else a tuple of them.

        The arguments and errors are those of :meth:`DepthLSTMTransformer.encode`.
        """
        if self.memories is None:
            return super().encode(src, src_key_padding_mask)
        x, padding = self._embed_source(src, src_key_padding_mask)
        return self.memories(self.encoder.layer_outputs(x, src_key_padding_mask=padding))  # type: ignore[operator]

    def _search(
        self, src: Tensor, mask: Tensor | None, settings: Settings, scores: bool
    ) -> tuple[Tensor, Tensor] | None:
        return decode.search(self, src, mask, settings, scores)


NORMS = (reference.GateNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def param_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimiser: with and without weight decay.

    No decay for everything with fewer than two dimensions (biases, learned initial states), for the parameters of
    normalisations, of which the gates' are two-dimensional, (4, D), and for those that a module names in its
    ``no_weight_decay()``, as depth connections do. Frozen parameters are left out; shared ones come
    once.

    Returns:
        [{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}], usable as
        ``torch.optim.AdamW(param_groups(model))``.

    Raises:
        TypeError, ValueError: model is not a module, or weight_decay is not a finite number of at least 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    checks.check_finite("weight_decay", weight_decay, 0.0)
    # includes the parameters of a parametrisation or an adapter inside a normalisation
    normalising = {
        parameter for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    kept = normalising | _named(model)
    decays = {
        parameter: parameter.dim() > 1 and parameter not in kept
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    return [
        {"params": [parameter for parameter, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [parameter for parameter, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]


def _named(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that modules name in ``no_weight_decay()``, by names of their own."""
    found = set()
    for module in model.modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            found |= {module.get_parameter(name) for name in names()}
    return found
