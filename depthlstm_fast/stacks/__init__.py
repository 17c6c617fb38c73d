"""Encoders and decoders around any depth connection."""

from .causal import CausalStack
from .decoder import Decoder
from .encoder import Encoder

__all__ = ["Encoder", "Decoder", "CausalStack"]
