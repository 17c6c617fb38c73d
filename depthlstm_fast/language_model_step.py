"""A language model's step with its cache as tensors, for programs that hold no Python objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, reference
from .modes import autocast_dtype
from .reference.caches import KeyValueCache
from .reference.causal import CausalCache


class _Grown(KeyValueCache):
    """A cache that makes new tensors: an exported program writes into none of its inputs."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        return keys, values


class LanguageModelStep(nn.Module):
    """The next logits of a :class:`LanguageModel`, with what it has seen as two tensors.

    It is what torch.export, AOTInductor and ONNX take: tensors in, tensors out. The model's parameters are shared, not
    copied.

    Args:
        model: a :class:`LanguageModel` or its reference twin, in eval mode where dropout is not wanted.

    Raises:
        TypeError: model is no language model of this package.
    """

    def __init__(self, model: reference.LanguageModel) -> None:
        super().__init__()
        if not isinstance(model, reference.LanguageModel):
            raise TypeError(f"model must be a LanguageModel; found {type(model).__name__}")
        self.model = model

    def forward(
        self, ids: Tensor, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the last token of ids, and the keys and values with those of ids behind them.

        Args:
            ids: (batch, L) int64, tokens that follow those of the cache.
            keys, values: (num_layers, batch, kv_heads, S, d_model / nhead), the cache of S tokens; None at first.

        Returns:
            (batch, vocab_size), and both tensors with S + L tokens.

        Raises:
            TypeError, ValueError: a shape or dtype is not the model's; those of :class:`LanguageModel`.
        """
        cache = self._cache(ids, keys, values)
        hidden = self.model(ids, cache=cache, return_hidden=True)
        kept: Any = [(layer.keys, layer.values) for layer in cache.layers]
        return self.model.output(hidden[:, -1]), torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept])

    def _cache(self, ids: Tensor, keys: Tensor | None, values: Tensor | None) -> CausalCache:
        model = self.model
        model._check_ids(ids, 0, False, False)  # forward looks at the numbers
        cache = model.new_cache()
        cache.layers = [_Grown() for _ in cache.layers]
        if keys is None and values is None:
            return cache
        if keys is None or values is None:
            missing, given = ("keys", "values") if keys is None else ("values", "keys")
            raise ValueError(f"{missing} must be given with {given}, or both be None; found {missing}=None")
        weight = model.embedding.weight
        if autocast_dtype(weight.device.type) is None:
            checks.check_companion("keys", keys, "model", weight, mixed=False)
        else:
            checks.check_float_tensor("keys", keys)
        if keys.dim() != 5:
            raise ValueError(f"keys must have shape (layers, batch, kv_heads, S, size); found {tuple(keys.shape)}")
        layers, size = model.num_layers, model.d_model // model.nhead
        checks.check_shape("keys", keys, (layers, ids.shape[0], model.kv_heads, keys.shape[3], size))
        checks.check_companion("values", values, "keys", keys, mixed=False)
        checks.check_shape("values", values, tuple(keys.shape))
        for layer, own_keys, own_values in zip(cache.layers, keys.unbind(), values.unbind(), strict=True):
            layer.keys, layer.values, layer.length = own_keys, own_values, keys.shape[3]
        cache.length, cache.rows = keys.shape[3], ids.shape[0]
        return cache
