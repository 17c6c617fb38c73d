"""What this package's models for transformers share: drawing, loading, ties and caches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..reference.token_checks import can_look
from .attention import set_products


class LayerOfCache:
    """One layer of transformers' cache, with the method that this package's attention calls.

    ``append`` gives all keys and values of the layer; a static cache's include positions that the mask leaves out.
    """

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(keys, values, self.index)


def past_of(cache: Cache | None) -> int | Tensor:
    """How many tokens a cache has seen; a tensor where reading its number would stall a device, or end a graph."""
    past = 0 if cache is None else cache.get_seq_length()
    return int(past) if isinstance(past, Tensor) and can_look(past) else past


def check_tensors(**found: Any) -> None:
    """Raise TypeError where an argument is neither a tensor nor None."""
    for argument, each in found.items():
        if each is not None and not isinstance(each, Tensor):
            raise TypeError(f"{argument} must be a torch.Tensor; found {type(each).__name__}")


class DepthLSTMPreTrainedModel(PreTrainedModel):
    """A model of this package, which is ``model``, made from the configuration's ``model_arguments()``."""

    model_class: Any
    embedding_name: ClassVar[str]  # of the module whose weight the output layer may have
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(**config.model_arguments())
        set_products(self.model, config)
        self.loss_type = "ForCausalLM"  # of the next token, in both kinds of model
        self._tied_weights_keys = _shared_parameters(self)
        if config.tie_word_embeddings:  # accelerate's init_empty_weights makes two parameters of the tied one
            held = f"model.{self.embedding_name}.weight"
            self._tied_weights_keys["model.output.weight"] = self._tied_weights_keys.get(held, held)
        for parameter in self.parameters():
            # what the model has drawn stays; what has no numbers yet is loaded, or drawn by _init_weights
            if not parameter.is_meta:
                parameter._is_hf_initialized = True
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which parameter is which other: a tied output layer's, and those of cells that layers share."""
        return dict(self._tied_weights_keys)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a file did not have as the model draws it, and leave everything else."""
        missing = [
            name
            for name, parameter in module.named_parameters(recurse=False)
            if not getattr(parameter, "_is_hf_initialized", False)
        ]
        if not missing:
            return
        prefix = next(name for name, each in self.model.named_modules() if each is module)
        with torch.device("cpu"):
            drawn = self.model_class(**self.config.model_arguments()).get_submodule(prefix)
        for name in missing:
            module.get_parameter(name).copy_(drawn.get_parameter(name))

    def _check_length(self, argument: str, found: int, cached: str = " with those of the cache") -> None:
        """Raise ValueError where tokens would stand behind the last position of a table."""
        most = self.config.max_position_embeddings
        if found > most:
            raise ValueError(
                f"{argument} must have at most max_position_embeddings, {most}, tokens{cached}; found {found}"
            )

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.model, self.embedding_name)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.output = new_embeddings


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Each further name of a parameter, with its first one."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(each)] for name, each in names if first.setdefault(id(each), name) != name}
