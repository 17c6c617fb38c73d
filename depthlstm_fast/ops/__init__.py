"""The package's torch operators and their autograd.

registry holds every op on every backend. Each op has one file, and the depth-wise LSTM two.
"""

from . import (
    depth_gru_gates,
    depth_lstm,
    depth_lstm_autograd,
    layer_attend,
    layer_mix,
    norm_step,
    registry,
    siamese_step,
)

__all__ = [
    "depth_gru_gates",
    "depth_lstm",
    "depth_lstm_autograd",
    "layer_attend",
    "layer_mix",
    "norm_step",
    "registry",
    "siamese_step",
]
