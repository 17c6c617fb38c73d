"""The decode engine: a whole search in C++ on packed weights. docs/decoding.md is its page."""

from .captured import CapturedDecoder
from .compiled import CompiledDecoder, CompiledLanguageModel, compile_decoder
from .engine import go_on, search

__all__ = ["CapturedDecoder", "CompiledDecoder", "CompiledLanguageModel", "compile_decoder", "go_on", "search"]
