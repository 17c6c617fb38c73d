"""The language model around any depth connection."""

from __future__ import annotations

from . import reference
from .stacks import CausalStack


class LanguageModel(reference.LanguageModel):
    __doc__ = reference.LanguageModel.__doc__
    stack_class = CausalStack
