"""The package's torch operators and their autograd.

registry holds every op on every backend. Each op has two files.
"""

from . import depth_lstm, depth_lstm_autograd, registry

__all__ = ["depth_lstm", "depth_lstm_autograd", "registry"]
