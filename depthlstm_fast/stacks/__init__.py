"""Encoders and decoders around any depth connection."""

from .decoder import Decoder
from .encoder import Encoder

__all__ = ["Encoder", "Decoder"]
