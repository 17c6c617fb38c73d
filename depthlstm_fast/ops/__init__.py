"""The operators in torch and their autograd: registry (every op, every backend), and two files an op."""

from . import depth_lstm, depth_lstm_autograd, registry

__all__ = ["depth_lstm", "depth_lstm_autograd", "registry"]
