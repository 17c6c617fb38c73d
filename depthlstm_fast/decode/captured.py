"""Decoding on a GPU by a step that is captured once as a CUDA graph.

A step of `generate()` launches some 600 kernels, which take longer to launch than to run. The captured step reads and
writes memory that stays where it is: the last tokens, their place, keys and values of a fixed number of positions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import choice
from ..modes import autocast_dtype
from ..reference import generation
from ..reference.caches import DecoderCache, KeyValueCache
from ..reference.causal import Places
from ..reference.continuation import CachedDecoding as CausalDecoding
from ..reference.decoder_attention import MergedAttention, MultiscaleAttention
from ..reference.generation import Settings
from ..reference.translation import CachedDecoding, TranslationModel

POSITIONS = 64  # capacities are multiples of it, so that lengths share graphs
SOURCE_POSITIONS = 16  # so are lengths of sources
MOST_STEPS = 8  # captured at once; each has memory of its own
WARM_UPS = 3  # libraries choose kernels and take memory at their first calls


@dataclass
class FixedCache(DecoderCache):
    """A decoder layer's cache whose memory stays where it is; ``place`` (1,) int64 is the position that is written."""

    place: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return _write(self, keys, values)


@dataclass
class FixedKeyValueCache(KeyValueCache):
    """The same for a language model's layer."""

    place: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return _write(self, keys, values)


def _write(cache: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    cache.keys.index_copy_(2, cache.place, keys)
    cache.values.index_copy_(2, cache.place, values)
    return cache.keys, cache.values


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return what repeats ``run`` on the same memory, after running it some times; without a GPU ``run`` itself."""
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay


class CapturedStep:
    """One token of ``rows`` rows: from ``token`` (rows, 1) at ``place`` to ``logits`` (rows, vocab)."""

    logits: Tensor

    def __init__(self, model: Any, rows: int, layers: int, heads: int, capacity: int, like: Tensor) -> None:
        """``like`` is a tensor of keys, (..., size)."""
        self.model = model
        self.replay: Callable[[], None] | None = None
        with torch.inference_mode(False):
            self.token = torch.zeros(rows, 1, dtype=torch.int64, device=like.device)
            self.place = torch.zeros(1, dtype=torch.int64, device=like.device)
            self.all_places = torch.arange(capacity, device=like.device)
            # keys and values of all layers, which beams move by one copy
            self.kept = like.new_zeros(2 * layers, rows, heads, capacity, like.shape[-1])

    def keep(self, layers: list[Any]) -> None:
        """Take over what the layers' caches hold. Everything else is 0: what a mask leaves out must not be NaN."""
        self.kept.zero_()
        for layer, cache in enumerate(layers):
            for part, each in enumerate((cache.keys, cache.values)):
                self.kept[2 * layer + part, :, :, : cache.length].copy_(each[:, :, : cache.length])

    def advance(self, token: Tensor, place: int) -> Tensor:
        """The next logits; they are overwritten by the next call."""
        self.token.copy_(token)
        self.place.fill_(place)
        if self.replay is None:
            self.replay = capture(self.run, token.device)
        self.replay()
        return self.logits

    def reorder(self, rows: Tensor) -> None:
        self.kept.copy_(self.kept.index_select(1, rows))

    def run(self) -> None:
        raise NotImplementedError


class TranslationStep(CapturedStep):
    """The step of a decoder that attends to ``sources`` sources of at most ``length`` positions."""

    def __init__(self, model: TranslationModel, caches: list[DecoderCache], rows: int, capacity: int) -> None:
        first: Any = caches[0]
        heads, size = first.keys.shape[1], first.keys.shape[3]
        super().__init__(model, rows, len(caches), heads, capacity, first.keys)
        sources, length = first.memory.shape[0], _padded(first.memory.shape[1])
        self.caches = []
        with torch.inference_mode(False):
            mask = first.memory_mask
            self.mask = mask.new_zeros(sources, 1, 1, length)
            cross = first.keys.new_zeros(len(caches), 2, sources, heads, length, size)
            for layer in range(len(caches)):
                # keys and values stand for the memory, of which only the shape is asked
                memory = first.memory.new_zeros(1).expand(sources, length, first.memory.shape[2])
                keys, values = self.kept[2 * layer], self.kept[2 * layer + 1]
                cache = FixedCache(memory, self.mask, (cross[layer, 0], cross[layer, 1]), keys, values)
                cache.place = self.place
                self.caches.append(cache)
        self.cross = cross

    def start(self, caches: list[Any]) -> None:
        """Take over the caches of a first step."""
        self.keep(caches)
        length = caches[0].memory.shape[1]
        mask = caches[0].memory_mask
        self.mask.fill_(False if mask.dtype == torch.bool else -torch.inf)
        self.mask[..., :length].copy_(mask)
        for layer, cache in enumerate(caches):  # what an earlier source left behind is finite, and masked
            for part, each in enumerate(cache.memory_keys_values):
                self.cross[layer, part, :, :, :length].copy_(each)

    def run(self) -> None:
        model, seen = self.model, (self.all_places <= self.place)[None, None, None]
        for cache in self.caches:
            cache.mask = seen
        embedded = model._embed(self.token, model.tgt_embedding, model.tgt_positions, self.place[None])
        self.logits = model.output(model.decoder.step(embedded, self.caches)[:, 0])


class CausalStep(CapturedStep):
    """The step of a language model."""

    def __init__(self, model: reference.LanguageModel, layers: list[Any], rows: int, capacity: int) -> None:
        super().__init__(model, rows, len(layers), layers[0].keys.shape[1], capacity, layers[0].keys)
        self.caches = []
        with torch.inference_mode(False):
            self.real = torch.ones(rows, capacity, dtype=torch.bool, device=self.token.device)
            self.positions = torch.zeros_like(self.token)
        for layer in range(len(layers)):
            cache = FixedKeyValueCache(self.kept[2 * layer], self.kept[2 * layer + 1])
            cache.place = self.place
            self.caches.append(cache)

    def start(self, layers: list[Any], real: Tensor | None) -> None:
        """Take over the caches of a prompt; ``real`` (rows, length) says which of its tokens are."""
        self.keep(layers)
        self.real.fill_(True)
        if real is not None:
            self.real[:, : real.shape[1]].copy_(real)

    def run(self) -> None:
        seen = self.real & (self.all_places <= self.place)
        self.positions.copy_(seen.sum(1, keepdim=True) - 1)
        places = Places(self.positions, seen[:, None, None], False)
        hidden = self.model._through_layers(self.model.embedding(self.token), places, self.caches)
        self.logits = self.model.output(hidden[:, 0])


class CapturedDecoding:
    """The next token's logits: the first by the model as it is, the others by a captured step."""

    step: Any = None

    def __init__(self, first: Any, make: Callable[[int], Any], settings: Settings, past: int) -> None:
        """``make`` gives the step for a number of positions; ``past`` are those before the first new token."""
        self.first, self.make, self.past = first, make, past
        self.capacity = past + settings.max_length

    def next_logits(self, ids: Tensor) -> Tensor:
        """(rows, vocab) after ids (rows, n), whose first column has been given to the first step."""
        count = ids.shape[1]
        if count == 1:
            return self.first.next_logits(ids)
        if self.step is None:
            self.step, self.first = self.make(self.capacity), None
        return self.step.advance(ids[:, -1:], self.past + count - 2)

    def reorder(self, rows: Tensor) -> None:
        (self.first if self.step is None else self.step).reorder(rows)


class CapturedDecoder:
    """A model on a GPU whose decoding steps are CUDA graphs; :func:`compile_decoder` makes it.

    It keeps the model, and sees changes of its weights. A model on a CPU decodes by the same steps without a graph.

    Raises:
        TypeError: model is no translation model and no language model of this package.
        ValueError: a step of this model cannot be captured.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, (TranslationModel, reference.LanguageModel)):
            raise TypeError(
                f"model must be a DepthLSTMTransformer, a Transformer or a LanguageModel; found {type(model).__name__}"
            )
        _check(model)
        self.model: Any = model
        self._steps: OrderedDict[Any, Any] = OrderedDict()
        self._weights: list[Any] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return CapturedDecoder, (self.model,)  # a graph is captured anew

    def __repr__(self) -> str:
        return f"CapturedDecoder({type(self.model).__name__}, steps={len(self._steps)}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """The size of the memory that the captured steps keep for keys and values."""
        return sum(
            each.nbytes for step in self._steps.values() for each in (step.kept, getattr(step, "cross", step.token))
        )

    def generate(self, *arguments: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The model's ``generate()``, with its arguments but for ``use_cache``; one call at a time.

        The first call with a batch size, number of beams, and length of source and result (in steps of 16 and 64)
        captures a step, and later ones repeat it. The last 8 are kept.

        Raises:
            TypeError, ValueError: those of the model's ``generate()``; autocast is on.
        """
        if "use_cache" in options:
            raise TypeError("use_cache must be left out: a captured step is nothing without a cache; found it given")
        if autocast_dtype(next(self.model.parameters()).device.type) is not None:
            raise ValueError("autocast must be off for a captured decoder; found it on: convert the model instead")
        _check(self.model)
        with self._lock:
            self._forget_if_changed()
            begin = self._begin_causal if isinstance(self.model, reference.LanguageModel) else self._begin
            token = generation.own_decoding.set(begin)
            try:
                return self.model.generate(*arguments, **options)
            finally:
                generation.own_decoding.reset(token)

    def _forget_if_changed(self) -> None:
        """Drop every step if a parameter lies elsewhere: a graph reads the memory that it was captured with."""
        weights = [(each.data_ptr(), each.dtype, each.shape) for each in self.model.parameters()]
        if weights != self._weights:
            self._steps.clear()
            self._weights = weights

    def _step_for(self, key: Any, make: Callable[[], Any]) -> Any:
        key = choice.wanted(), key
        step = self._steps.get(key)
        if step is None:
            while len(self._steps) >= MOST_STEPS:
                self._steps.popitem(last=False)
            step = self._steps[key] = make()
        self._steps.move_to_end(key)
        return step

    def _begin(self, memory: Any, padding: Tensor, settings: Settings) -> CapturedDecoding:
        model, rows = self.model, settings.batch * settings.beams
        first = CachedDecoding(model, memory, padding, settings.beams)

        def make(positions: int) -> TranslationStep:
            caches, capacity = _check_kept(first.caches), _padded(positions, POSITIONS)
            length = _padded(caches[0].memory.shape[1])
            key = (settings.batch, settings.beams, length, capacity, caches[0].memory_mask.dtype)
            step = self._step_for(key, lambda: TranslationStep(model, caches, rows, capacity))
            step.start(caches)
            return step

        return CapturedDecoding(first, make, settings, 1)

    def _begin_causal(self, ids: Tensor, real: Tensor | None, settings: Settings) -> CapturedDecoding:
        model, beams = self.model, settings.beams
        first = CausalDecoding(model, ids, real, beams)

        def make(positions: int) -> CausalStep:
            layers, capacity = _check_kept(first.cache.layers), _padded(positions, POSITIONS)
            rows = settings.batch * beams
            step = self._step_for((rows, capacity), lambda: CausalStep(model, layers, rows, capacity))
            step.start(layers, first.cache.real)
            return step

        return CapturedDecoding(first, make, settings, ids.shape[1])


def _padded(length: int, to: int = SOURCE_POSITIONS) -> int:
    return -(-length // to) * to


def _check(model: Any) -> None:
    """Raise ValueError unless a step of the model can be captured."""
    if next(model.parameters()).is_meta:
        raise ValueError("model must be on a GPU or a CPU; found meta")
    for name, module in model.named_modules():
        if getattr(module, "folds_output_projection", False):
            raise ValueError(
                "model must not fold output projections, whose comparison waits for the GPU; "
                f"found it on in {name}: call fold_output_projection(False)"
            )
        if isinstance(module, (MergedAttention, MultiscaleAttention)):
            raise ValueError(
                f"model must have self- and cross-attention alone; found {type(module).__name__} in {name}"
            )
    if isinstance(model, TranslationModel):
        takes = getattr(model.decoder, "takes_caches", None)
        if takes is None or not takes():
            raise ValueError("model must have attentions that take caches; found replaced ones")


def _check_kept(caches: list[Any]) -> list[Any]:
    """Return the caches, whose layers have all given them keys, or raise ValueError."""
    for index, cache in enumerate(caches):
        if cache.keys is None:
            raise ValueError(f"model must have an attention in every layer; found none in layer {index}")
    return caches
