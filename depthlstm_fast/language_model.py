"""The language model around any depth connection."""

from __future__ import annotations

from torch import Tensor

from . import decode, reference
from .reference.generation import Settings
from .reference.sampling import Sampler
from .stacks import CausalStack


class LanguageModel(reference.LanguageModel):
    __doc__ = reference.LanguageModel.__doc__
    stack_class = CausalStack

    def _search(
        self, ids: Tensor, real: Tensor | None, settings: Settings, sampler: Sampler, scores: bool
    ) -> tuple[Tensor, Tensor] | None:
        return decode.go_on(self, ids, real, settings, sampler, scores)
