"""Going on from prompts: checks of the arguments, and the steps of the search in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from .generation import Settings, check_penalty
from .sampling import Sampler
from .token_checks import check_mask


def settings_for(
    ids: Tensor,
    max_len: int,
    max_new_tokens: Any,
    beam_size: Any,
    length_penalty: Any,
    eos_id: int | None,
    pad_id: int,
    sampler: Sampler,
) -> Settings:
    """The settings of a search from ids; raises TypeError or ValueError naming the argument that is not one of it."""
    left = max_len - ids.shape[1]
    if left < 1:
        raise ValueError(f"ids must leave room for a token before max_len, {max_len}; found {ids.shape[1]}")
    max_new_tokens = left if max_new_tokens is None else max_new_tokens
    checks.check_size("max_new_tokens", max_new_tokens)
    if max_new_tokens > left:
        raise ValueError(f"max_new_tokens must be at most {left}, what ids leave of max_len; found {max_new_tokens}")
    checks.check_size("beam_size", beam_size)
    check_penalty(length_penalty, max_new_tokens)
    sampler.check(beam_size, ids.device)
    eos_id = -1 if eos_id is None else eos_id
    return Settings(ids.shape[0], beam_size, max_new_tokens, length_penalty, 0, eos_id, pad_id, ids.device)


def check_left_padding(attention_mask: Any, ids: Tensor) -> Tensor | None:
    """The mask as bool; raises TypeError or ValueError unless its zeros are on the left of prompts."""
    if attention_mask is None:
        return None
    real = check_mask(attention_mask, ids)
    if bool((~real).all(1).any()):
        raise ValueError("attention_mask must have a real token in each row; found a row of padding")
    if bool((~real[:, -1]).any() | (real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention_mask must be 0 on the left of a prompt alone; found padding behind a token")
    return real


class Decoding:
    """The next token's logits for batch * beams rows, everything computed anew at every step."""

    def __init__(self, model: Any, prompt: Tensor, real: Tensor | None, beams: int) -> None:
        self.model = model
        self.prompt = prompt.repeat_interleave(beams, 0)
        self.real = None if real is None else real.repeat_interleave(beams, 0)

    def next_logits(self, ids: Tensor) -> Tensor:
        """(rows, vocab) after the prompts and ids (rows, n), whose first column stands for the prompt."""
        new = ids[:, 1:]
        real = None if self.real is None else torch.cat((self.real, torch.ones_like(new, dtype=torch.bool)), 1)
        hidden = self.model(torch.cat((self.prompt, new), 1), real, return_hidden=True)
        return self.model.output(hidden[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row ``rows[i]``: the beams of a prompt share it, so there is nothing to do."""


class CachedDecoding:
    """The next token's logits for batch * beams rows, from the last token and what the cache keeps."""

    def __init__(self, model: Any, prompt: Tensor, real: Tensor | None, beams: int) -> None:
        self.model, self.prompt, self.real, self.beams = model, prompt, real, beams
        self.cache = model.new_cache()

    def next_logits(self, ids: Tensor) -> Tensor:
        """(rows, vocab) after the prompts and ids (rows, n), of which all but the last token have been seen."""
        is_first = ids.shape[1] == 1
        step, real = (self.prompt, self.real) if is_first else (ids[:, -1:], None)
        hidden = self.model(step, real, cache=self.cache, return_hidden=True)
        if is_first and self.beams > 1:
            rows = torch.arange(self.prompt.shape[0], device=ids.device).repeat_interleave(self.beams)
            self.cache.reorder(rows)
            hidden = hidden.index_select(0, rows)
        return self.model.output(hidden[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row ``rows[i]``."""
        self.cache.reorder(rows)
