"""The package's torch operators and their autograd.

registry holds every op on every backend.
"""

from . import depth_gru_gates, depth_lstm, depth_lstm_autograd, registry

__all__ = ["depth_gru_gates", "depth_lstm", "depth_lstm_autograd", "registry"]
