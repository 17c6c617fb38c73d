"""The whole package in plain PyTorch: oracle, fallback and benchmark baseline."""

from .attention import CrossAttention, DecoderCache, SelfAttention, attention_mask
from .cell import DepthLSTMCell, GateNorm
from .decoder_attention import MergedAttention, MultiscaleAttention
from .depth_gru import depth_gru_gates
from .depth_lstm import depth_lstm_cell, depth_lstm_gates, depth_lstm_gates_backward, dropout_mask
from .encoder import Encoder
from .language_model import LanguageModel
from .layer_attend import layer_attend
from .layer_mix import layer_mix
from .layers import DepthLSTMDecoderLayer, DepthLSTMEncoderLayer
from .models import DepthLSTMTransformer
from .norm_step import norm_step
from .siamese_step import siamese_step
from .stacks import DepthLSTMDecoder, DepthLSTMEncoder
from .translation import TranslationModel

__all__ = [
    "depth_lstm_gates",
    "depth_lstm_cell",
    "depth_lstm_gates_backward",
    "dropout_mask",
    "norm_step",
    "siamese_step",
    "depth_gru_gates",
    "layer_mix",
    "layer_attend",
    "DepthLSTMCell",
    "GateNorm",
    "SelfAttention",
    "CrossAttention",
    "MergedAttention",
    "MultiscaleAttention",
    "attention_mask",
    "DecoderCache",
    "DepthLSTMEncoderLayer",
    "DepthLSTMDecoderLayer",
    "DepthLSTMEncoder",
    "DepthLSTMDecoder",
    "DepthLSTMTransformer",
    "Encoder",
    "TranslationModel",
    "LanguageModel",
]
