"""The decode engine: a whole search in C++ on packed weights. docs/decoding.md is its page."""

from .captured import CapturedDecoder
from .compiled import CompiledDecoder, compile_decoder
from .engine import search

__all__ = ["CapturedDecoder", "CompiledDecoder", "compile_decoder", "search"]
