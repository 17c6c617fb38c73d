"""The package's torch operators and their autograd.

registry holds every op on every backend.
"""

from . import depth_lstm, depth_lstm_autograd, norm_step, registry, siamese_step

__all__ = ["depth_lstm", "depth_lstm_autograd", "norm_step", "registry", "siamese_step"]
