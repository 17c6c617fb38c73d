"""Packs models for the engine, keeps the copies true, and runs searches.

``generate()`` calls :func:`search`. A model is packed at its first call, and again whenever a bit of its weights has
changed: every call reads all weights once for their sum, because ``parameter.data``, fused optimisers and other
processes change weights without a version counter.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import choice, library
from ..modes import autocast_dtype, is_direct, is_traced
from ..reference.generation import Settings, nan_error, token_search
from ..reference.language_model import LanguageModel
from ..reference.sampling import Sampler
from ..torch_private import has_forward_gradients, is_transformed
from .causal_plan import CausalPlan
from .plan import HEAD_BLOCK, CannotRun, Plan
from .translation_plan import TranslationPlan

logger = logging.getLogger("depthlstm_fast")

MOST_BEAMS = 4096  # as decode_start of csrc/decode/cpu_op.cpp takes them
# Caches of a search take so much address space at most; a larger batch is searched in several parts. Pages that no
# step reaches take no memory.
CACHE_BYTES = 2 << 30
_logged: set[str] = set()


class Packed(NamedTuple):
    """A packed model, and what it was packed from."""

    blob: Tensor
    numbers: list[int]
    reals: list[float]
    fingerprint: int
    position_bytes: int  # of the caches, for each position of a sequence
    is_causal: bool  # a language model's


_packed: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def operators() -> Any:
    return torch.ops.depthlstm_fast


def make_plan(model: Any, dtype: str = "float32", output_dtype: str | None = None) -> tuple[Plan, list[Tensor]]:
    """The plan of a model and its tensors. Raises CannotRun."""
    plan_class = CausalPlan if isinstance(model, LanguageModel) else TranslationPlan
    plan = plan_class(model, dtype, output_dtype or dtype)
    sources = plan.sources()
    for tensor in sources:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            kind = f"{tensor.dtype} on {tensor.device}".removeprefix("torch.")
            raise CannotRun(f"a parameter is {type(tensor).__name__} of {kind}, and not float32 on the CPU")
    return plan, sources


def pack(plan: Plan, sources: list[Tensor]) -> Packed:
    numbers, reals = plan.numbers(), plan.reals()
    fingerprint = operators().decode_fingerprint(sources)
    blob = operators().decode_pack(torch.tensor(numbers), torch.tensor(reals, dtype=torch.float64), plan.weights())
    return Packed(blob, numbers, reals, fingerprint, plan.position_bytes(), isinstance(plan, CausalPlan))


def packed_for(model: Any) -> Packed:
    """The packed model, made anew if anything in the model has changed. Raises CannotRun."""
    plan, sources = make_plan(model)
    found = _packed.get(model)
    if (
        found is None
        or found.numbers != plan.numbers()
        or found.reals != plan.reals()
        or found.fingerprint != operators().decode_fingerprint(sources)
    ):
        _packed.pop(model, None)  # the old copy first: never two
        found = None
        found = _packed[model] = pack(plan, sources)
        logger.info("packed %s for decoding: a copy of %d bytes", type(model).__name__, found.blob.numel())
    return found


def additive_mask(mask: Tensor | None, src: Tensor, pad_id: int) -> Tensor | None:
    """The mask of padded positions, added to scores: 0 and -inf for one of bool."""
    padded = src == pad_id if mask is None else mask
    if padded.dtype == torch.bool:
        if not padded.any():
            return None
        return torch.zeros(padded.shape).masked_fill_(padded, -torch.inf)
    return padded.to(torch.float32).contiguous()


def _pieces(packed: Packed, ids: Tensor, settings: Settings) -> list[slice]:
    """The rows of searches whose caches are not too large."""
    length = settings.max_length + HEAD_BLOCK + (ids.shape[1] if packed.is_causal else 0)
    size = max(1, CACHE_BYTES // (settings.beams * packed.position_bytes * length))
    return [slice(first, first + size) for first in range(0, ids.shape[0], size)]


def run(packed: Packed, src: Tensor, mask: Tensor | None, settings: Settings, scores: bool) -> tuple[Tensor, Tensor]:
    """Tokens (batch, n) and scores (batch,) of a search, in parts where its caches would be too large."""
    pieces = _pieces(packed, src, settings)
    parts = [
        _run_part(packed.blob, src[rows], None if mask is None else mask[rows], settings, scores, rows.start)
        for rows in pieces
    ]
    if len(parts) == 1:
        return parts[0]
    longest = max(tokens.shape[1] for tokens, _ in parts)
    padded = [nn.functional.pad(t, (0, longest - t.shape[1]), value=settings.pad_id) for t, _ in parts]
    return torch.cat(padded), torch.cat([score for _, score in parts])


def _start(blob: Tensor, src: Tensor, mask: Tensor | None, settings: Settings, scores: bool) -> Tensor:
    options = (settings.beams, settings.max_length, float(settings.length_penalty), scores, torch.get_num_threads())
    src = src.contiguous()
    state = operators().decode_start(blob, src, mask, *options)
    while operators().decode_read(blob, state, src, mask):
        pass  # Python looks for Ctrl-C between calls
    return state


def sample(
    packed: Packed, ids: Tensor, mask: Tensor | None, settings: Settings, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """Tokens and scores of a sample: the engine makes the logits, and the search in PyTorch draws."""
    pieces = _pieces(packed, ids, settings)
    states = [_start(packed.blob, ids[rows], None if mask is None else mask[rows], settings, False) for rows in pieces]

    def next_logits(said: Tensor) -> Tensor:
        last = None if said.shape[1] == 1 else said[:, -1].contiguous()
        steps = [
            operators().decode_step(packed.blob, state, None if last is None else last[rows])
            for state, rows in zip(states, pieces, strict=True)
        ]
        return steps[0] if len(steps) == 1 else torch.cat(steps)

    return token_search(next_logits, sampler.draw, settings)


def next_steps(steps: int, seconds: float) -> int:
    """How many steps a call takes some 0.05 s for, between which Python looks for Ctrl-C."""
    return max(1, min(4 * steps, 4096, int(steps * 0.05 / max(seconds, 1e-6))))


def _run_part(
    blob: Tensor, src: Tensor, mask: Tensor | None, settings: Settings, scores: bool, first: int
) -> tuple[Tensor, Tensor]:
    ops = operators()
    state = _start(blob, src, mask, settings, scores)
    steps = 1
    while True:
        began = time.monotonic()
        left, bad_source, bad_token = ops.decode_advance(blob, state, steps).tolist()
        steps = next_steps(steps, time.monotonic() - began)
        if bad_source >= 0:
            bad_source += first
            raise nan_error(bad_source, bad_token)
        if left == 0:
            return ops.decode_finish(blob, state)


def _takes(src: Tensor, mask: Tensor | None) -> bool:
    """Whether these arguments are plain and right; others take the path in PyTorch, which names what is wrong."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or not is_direct(mask) or mask.shape != src.shape or mask.device != src.device:
        return False
    return mask.dtype == torch.bool or (mask.dtype == torch.float32 and bool((mask < torch.inf).all()))


def _applies(embedding: Any, src: Tensor, mask: Tensor | None, settings: Settings) -> bool:
    """Whether the engine is what runs this kind of call: float32 on a CPU, by kernels, and not traced or watched."""
    weight = getattr(embedding, "weight", None)
    return (
        library.load_error is None
        and isinstance(weight, Tensor)
        and weight.device.type == src.device.type == "cpu"
        and weight.dtype == torch.float32
        and choice.wanted() in ("auto", "cpp")
        and settings.beams <= MOST_BEAMS
        and autocast_dtype("cpu") is None
        and not is_traced()
        and is_direct(src)
        and not is_transformed()
        and not has_forward_gradients()
        and math.isfinite(settings.length_penalty)
        and _takes(src, mask)
    )


def search(
    model: Any, src: Tensor, mask: Tensor | None, settings: Settings, scores: bool
) -> tuple[Tensor, Tensor] | None:
    """Tokens and scores of ``generate()``, or None where PyTorch has to run it.

    Raises:
        ValueError: logits are NaN.
    """
    packed = _packed_or_none(model) if _applies(model.src_embedding, src, mask, settings) else None
    if packed is None:
        return None
    return run(packed, src, additive_mask(mask, src, model.pad_id), settings, scores)


def go_on(
    model: Any, ids: Tensor, real: Tensor | None, settings: Settings, sampler: Sampler, scores: bool
) -> tuple[Tensor, Tensor] | None:
    """:func:`search` for a language model: its prompts, and a bool mask that is True for their tokens or None."""
    packed = _packed_or_none(model) if _applies(model.embedding, ids, real, settings) else None
    return None if packed is None else run_prompts(packed, ids, real, settings, sampler, scores)


def run_prompts(
    packed: Packed, ids: Tensor, real: Tensor | None, settings: Settings, sampler: Sampler, scores: bool
) -> tuple[Tensor, Tensor]:
    """:func:`run`, or with a temperature :func:`sample`."""
    mask = None if real is None else additive_mask(~real, ids, settings.pad_id)
    if sampler.temperature:
        return sample(packed, ids, mask, settings, sampler)
    return run(packed, ids, mask, settings, scores)


def _packed_or_none(model: Any) -> Packed | None:
    try:
        packed = packed_for(model)
    except CannotRun as reason:
        report(str(reason))
        return None
    choice.note("cpp")
    return packed


def report(reason: str) -> None:
    """Say once why PyTorch runs a model.

    DEPTHLSTM_STRICT=1 does not forbid it: the fused cells still run, and no kernel that exists is passed by. Strict
    programs would have no hooks and no adapters otherwise. compile_decoder is the call that demands the engine.
    """
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("generate() runs in PyTorch, not in the decode engine: %s", reason)
