"""The whole package in plain PyTorch: oracle, fallback and benchmark baseline."""

from .attention import CrossAttention, DecoderCache, SelfAttention, attention_mask
from .cell import DepthLSTMCell, GateNorm
from .depth_lstm import depth_lstm_cell, depth_lstm_gates, depth_lstm_gates_backward, dropout_mask
from .layers import DepthLSTMDecoderLayer, DepthLSTMEncoderLayer
from .models import DepthLSTMTransformer
from .stacks import DepthLSTMDecoder, DepthLSTMEncoder

__all__ = [
    "depth_lstm_gates",
    "depth_lstm_cell",
    "depth_lstm_gates_backward",
    "dropout_mask",
    "DepthLSTMCell",
    "GateNorm",
    "SelfAttention",
    "CrossAttention",
    "attention_mask",
    "DecoderCache",
    "DepthLSTMEncoderLayer",
    "DepthLSTMDecoderLayer",
    "DepthLSTMEncoder",
    "DepthLSTMDecoder",
    "DepthLSTMTransformer",
]
