"""Fused kernels for the depth-wise LSTM."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import connections, reference
from .backends import last_backend, set_backend, use_backend
from .decode import CapturedDecoder, CompiledDecoder, CompiledLanguageModel, compile_decoder
from .functional import (
    depth_gru_gates,
    depth_lstm_cell,
    depth_lstm_gates,
    layer_attend,
    layer_mix,
    norm_step,
    siamese_step,
)
from .growth import grow
from .language_model import LanguageModel
from .language_model_step import LanguageModelStep
from .layers import (
    DepthLSTMCell,
    DepthLSTMDecoder,
    DepthLSTMDecoderLayer,
    DepthLSTMEncoder,
    DepthLSTMEncoderLayer,
    fold_output_projections,
)
from .linearisation import Linearised, linearise
from .memory import empty_cache, keep_memory, memory_stats
from .models import DepthLSTMTransformer, Transformer, param_groups
from .probes import Probe, probe_gradients
from .stacks import Decoder, Encoder
from .swap import SwapReport, swap_rnmt_cell, unswap

if _TYPE_CHECKING:
    from .backends import backends
    from .swap import swap
else:  # both modules can be called as the function of their name
    from . import backends, swap  # type: ignore[assignment]

__version__ = "0.1.0"
__all__ = [
    "depth_lstm_cell",
    "depth_lstm_gates",
    "norm_step",
    "siamese_step",
    "depth_gru_gates",
    "layer_mix",
    "layer_attend",
    "DepthLSTMCell",
    "DepthLSTMEncoderLayer",
    "DepthLSTMDecoderLayer",
    "DepthLSTMEncoder",
    "DepthLSTMDecoder",
    "DepthLSTMTransformer",
    "Encoder",
    "Decoder",
    "Transformer",
    "LanguageModel",
    "LanguageModelStep",
    "compile_decoder",
    "CapturedDecoder",
    "CompiledDecoder",
    "CompiledLanguageModel",
    "param_groups",
    "probe_gradients",
    "grow",
    "linearise",
    "Linearised",
    "Probe",
    "fold_output_projections",
    "swap",
    "unswap",
    "swap_rnmt_cell",
    "SwapReport",
    "backends",
    "last_backend",
    "set_backend",
    "use_backend",
    "keep_memory",
    "memory_stats",
    "empty_cache",
    "connections",
    "reference",
]
