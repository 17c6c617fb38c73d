"""The fused translation Transformer, and parameter groups for an optimiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import reference
from .layers import DepthLSTMDecoder, DepthLSTMDecoderLayer, DepthLSTMEncoder, DepthLSTMEncoderLayer, trusted_folds


class DepthLSTMTransformer(reference.DepthLSTMTransformer):
    __doc__ = reference.DepthLSTMTransformer.__doc__
    encoder_layer_class = DepthLSTMEncoderLayer
    decoder_layer_class = DepthLSTMDecoderLayer
    encoder_class = DepthLSTMEncoder
    decoder_class = DepthLSTMDecoder

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        with super()._inference(), trusted_folds(self):
            yield


NORMS = (reference.GateNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def param_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimiser: with and without weight decay.

    Parameters with fewer than two dimensions (biases, learned initial states) do not decay. Parameters of
    normalisations do not decay either; the gates' are two-dimensional, (4, D). Frozen parameters are left out, and
    shared parameters appear once.

    Returns:
        [{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}], usable as
        ``torch.optim.AdamW(param_groups(model))``.

    Raises:
        TypeError, ValueError: model is not a module, or weight_decay is not a finite number of at least 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)):
        raise TypeError(f"weight_decay must be a float; found {type(weight_decay).__name__}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and not negative; found {weight_decay}")
    # includes the parameters of a parametrisation or an adapter inside a normalisation
    normalising = {
        parameter for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    decays = {
        parameter: parameter.dim() > 1 and parameter not in normalising
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    return [
        {"params": [parameter for parameter, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [parameter for parameter, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]
