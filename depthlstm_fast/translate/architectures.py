"""The models of runs: one Transformer for every depth connection."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import connections, reference
from ..models import DepthLSTMTransformer, Transformer
from .tokenizer import BOS, EOS, PAD

ARCHITECTURES = connections.names()


def model_arguments(vocab_size: int, d_model: int, heads: int, layers: int) -> dict[str, Any]:
    """Return the keyword arguments of ``DepthLSTMTransformer`` that the shapes of a run's tensors follow from.

    Both languages share a vocabulary of ``vocab_size`` pieces.
    """
    return {
        "src_vocab": vocab_size,
        "tgt_vocab": vocab_size,
        "d_model": d_model,
        "nhead": heads,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
        "share_embeddings": True,
        "pad_id": PAD,
        "bos_id": BOS,
        "eos_id": EOS,
    }


def build_architecture(architecture: str, arguments: dict[str, Any], backend: str | None = None) -> nn.Module:
    """Return a new model.

    Args:
        architecture: the name of a connection. "depth-lstm" is a ``DepthLSTMTransformer``, every other one a
            ``Transformer`` around it. A feed-forward network has 4 * d_model inner features. An encoder layer then has
            12 d_model^2 matrix weights and a decoder layer 16 d_model^2, as those of the depth-wise LSTM; the
            depth-wise GRU has fewer.
        arguments: keyword arguments of ``DepthLSTMTransformer``; "forget_bias" is dropped without such a gate.
        backend: "reference" gives the depth-wise LSTM of plain PyTorch, every other value the fused one.

    Raises:
        ValueError: an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; found {architecture!r}")
    if architecture == "depth-lstm":
        made = reference.DepthLSTMTransformer if backend == "reference" else DepthLSTMTransformer
        return made(**arguments)
    kept = {name: value for name, value in arguments.items() if name != "forget_bias"}
    return Transformer(**kept, connection=architecture)
