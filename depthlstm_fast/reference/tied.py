"""An output layer whose weight may be an embedding's, and stays so when a model is moved or loaded; plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class TiedModel(nn.Module):
    """A model with an ``output`` layer, whose weight is that of an embedding with ``tie_output``."""

    tie_output: bool
    output: nn.Module
    _embedding_name = "embedding"  # of the module whose weight the output layer may have
    _ties_after_load = _output_alone_is_loaded = False

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_tie_after_load)

    @property
    def _embedding(self) -> nn.Module:
        return getattr(self, self._embedding_name)

    def _is_tied(self) -> bool:
        return getattr(self.output, "weight", None) is getattr(self._embedding, "weight", self)

    def tie_weights(self) -> None:
        """With ``tie_output=True`` make the output layer's weight the embedding's again; nothing otherwise.

        ``to_empty()`` and ``load_state_dict(assign=True)`` of a tied model, and ``reset_parameters()``, call it. Call
        it yourself after anything else that gave the two a parameter each. Where one of them is on the meta device the
        other's weight is taken. A layer that is no nn.Linear or nn.Embedding any more, and weights of different types,
        are left as they are.
        """
        if not self.tie_output or self._is_tied():
            return
        if not isinstance(self.output, nn.Linear) or not isinstance(self._embedding, nn.Embedding):
            return
        own, embedded = self.output._parameters.get("weight"), self._embedding._parameters.get("weight")
        if own is None or embedded is None or type(own) is not type(embedded) or own.shape != embedded.shape:
            return
        if (embedded.is_meta and not own.is_meta) or self._output_alone_is_loaded:
            self._embedding.weight = own
        else:
            self.output.weight = embedded

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        tied = self._is_tied()
        super()._apply(fn, recurse)
        if tied:
            self.tie_weights()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own, embedded = (state_dict.get(f"{prefix}{name}.weight") for name in ("output", self._embedding_name))
        on_meta = any(
            getattr(module.weight, "is_meta", False)
            for module in (self.output, self._embedding)
            if hasattr(module, "weight")
        )
        # a tie that loading breaks is made again, as is one that was lost before there was anything to load into; two
        # weights that differ belong to a head of the user's own
        self._ties_after_load = self._is_tied() or (
            on_meta and (own is None or embedded is None or _are_equal(own, embedded))
        )
        self._output_alone_is_loaded = own is not None and embedded is None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode, in which nothing changes the weights; each module's mode comes back."""
        trained = [module for module in self.modules() if module.training]
        for module in trained:
            module.training = False
        try:
            yield
        finally:
            for module in trained:
                module.training = True


def _tie_after_load(model: TiedModel, incompatible_keys: Any) -> None:
    if model._ties_after_load:
        model.tie_weights()
    model._output_alone_is_loaded = False


def _are_equal(a: Any, b: Any) -> bool:
    """Whether two entries of a state_dict hold the same numbers, as far as that can be told."""
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.is_meta or b.is_meta:
        return True
    return (
        type(a) is type(b)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
    )
