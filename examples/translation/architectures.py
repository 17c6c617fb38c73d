"""The models of the example: one Transformer for every depth connection."""

from __future__ import annotations

from typing import Any

from torch import nn

import depthlstm_fast as dl

ARCHITECTURES = dl.connections.names()


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
        return (dl.reference if backend == "reference" else dl).DepthLSTMTransformer(**arguments)
    kept = {name: value for name, value in arguments.items() if name != "forget_bias"}
    return dl.Transformer(**kept, connection=architecture)
