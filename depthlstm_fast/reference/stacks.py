"""Stacks of depth-wise LSTM layers in plain PyTorch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from .attention import DecoderCache, new_cache
from .cell import DepthLSTMCell
from .layers import DepthLSTMDecoderLayer, DepthLSTMEncoderLayer, check_caches

INIT_CELLS = ("zeros", "learned")
CELLS = ("cell", "cross_cell", "ffn_cell")


class _Stack(nn.Module):
    """``num_layers`` copies of a layer, each initialised anew; the states (h, c) run through them."""

    layer_class: type[DepthLSTMEncoderLayer] | type[DepthLSTMDecoderLayer]

    def __init__(
        self,
        layer: DepthLSTMEncoderLayer | DepthLSTMDecoderLayer,
        num_layers: int,
        norm: nn.Module | None,
        share_cell: bool,
        init_cell: str,
    ) -> None:
        super().__init__()
        if not isinstance(layer, self.layer_class):
            raise TypeError(
                f"layer must be a {self.layer_class.__name__}, whose forward "
                f"returns (h, c); found {type(layer).__name__}"
            )
        checks.check_size("num_layers", num_layers)
        checks.check_name("init_cell", init_cell, INIT_CELLS)
        checks.check_flags(share_cell=share_cell)
        if norm is not None and not isinstance(norm, nn.Module):
            raise TypeError(f"norm must be a torch.nn.Module or None; found {type(norm).__name__}")
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])
        self.num_layers, self.norm, self.share_cell, self.init_cell = num_layers, norm, share_cell, init_cell
        self.d_model, self.batch_first = layer.d_model, layer.batch_first
        self.gradient_checkpointing = False
        for copied in self.layers:
            copied.reset_parameters()  # type: ignore[operator]
            if share_cell:
                for name in CELLS:
                    if isinstance(getattr(copied, name, None), DepthLSTMCell):
                        setattr(copied, name, getattr(self.layers[0], name))
        self._connect()
        if init_cell == "learned":
            like = next(layer.parameters())
            self.initial_cell: Tensor | None = nn.Parameter(
                torch.zeros(layer.d_model, device=like.device, dtype=like.dtype)
            )
        else:
            self.register_parameter("initial_cell", None)

    def reset_parameters(self) -> None:
        """Draw every parameter of the stack anew; the learned initial cell goes back to zero."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]
        if self.norm is not None and hasattr(self.norm, "reset_parameters"):
            self.norm.reset_parameters()  # type: ignore[operator]
        if self.initial_cell is not None:
            nn.init.zeros_(self.initial_cell)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, share_cell={self.share_cell}, init_cell={self.init_cell!r}"

    def _connect(self) -> None:
        """Let fused cells prepare memory for the next cell; does nothing here."""

    def _initial_cell(self, h: Tensor) -> Tensor | None:
        return None if self.initial_cell is None else self.initial_cell.expand_as(h)

    def _through_layers(self, h: Tensor, arguments: tuple, options: dict) -> Tensor:
        c = self._initial_cell(h)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                h, c = checkpoint(layer, h, *arguments, c, use_reentrant=False, **options)
            else:
                h, c = layer(h, *arguments, c, **options)
        return h if self.norm is None else self.norm(h)


class DepthLSTMEncoder(_Stack):
    """A stack of encoder layers: h at depth 0 is the input; c at depth 0 is zeros, or a learned vector.

    Args:
        layer: copied ``num_layers`` times; each copy is initialised anew.
        num_layers: number of layers.
        norm: applied to the output, as in nn.TransformerEncoder; None for nothing.
        share_cell: all layers share the cells of the first.
        init_cell: "zeros", or "learned": a parameter ``initial_cell`` (D,) that starts at zero.

    Set ``gradient_checkpointing = True`` on the stack to recompute each layer in the backward pass instead of keeping
    its activations.

    Raises:
        TypeError, ValueError: layer is of another kind, or a size or name is invalid.
    """

    layer_class = DepthLSTMEncoderLayer

    def __init__(
        self,
        layer: DepthLSTMEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        share_cell: bool = False,
        init_cell: str = "zeros",
    ) -> None:
        super().__init__(layer, num_layers, norm, share_cell, init_cell)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return h of the top layer, in src's shape; src and the masks as in :class:`DepthLSTMEncoderLayer`.

        ``is_causal=None`` means False: the mask is used as it is, and not examined (torch looks whether it is causal).
        """
        options = {
            "src_mask": mask,
            "src_key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal is not None and is_causal,
        }
        return self._through_layers(src, (), options)


class DepthLSTMDecoder(_Stack):
    """A stack of decoder layers; the arguments are those of :class:`DepthLSTMEncoder`."""

    layer_class = DepthLSTMDecoderLayer

    def __init__(
        self,
        layer: DepthLSTMDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        share_cell: bool = False,
        init_cell: str = "zeros",
    ) -> None:
        super().__init__(layer, num_layers, norm, share_cell, init_cell)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        caches: list[DecoderCache] | None = None,
    ) -> Tensor:
        """Return h of the top layer, in tgt's shape.

        tgt, memory and the masks are as in :class:`DepthLSTMDecoderLayer`. ``tgt_is_causal=None`` means False: the mask
        is used as it is, and not examined (torch looks whether it is causal). ``caches`` (of :meth:`new_caches`) is for
        incremental decoding: see ``cache`` in :meth:`DepthLSTMDecoderLayer.forward`.
        """
        checks.check_float_tensor("memory", memory)
        if caches is not None:
            check_caches(caches, len(self.layers))
            h, c = tgt, self._initial_cell(tgt)
            for layer, cache in zip(self.layers, caches, strict=True):
                h, c = layer(h, memory, c, cache=cache)
            return h if self.norm is None else self.norm(h)
        if memory.dim() == 3 and not self.batch_first:
            memory = memory.transpose(0, 1).contiguous().transpose(0, 1)  # one copy here instead of one in every layer
        options = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": tgt_is_causal is not None and tgt_is_causal,
            "memory_is_causal": memory_is_causal,
        }
        return self._through_layers(tgt, (memory,), options)

    def new_caches(self, memory: Tensor, memory_key_padding_mask: Tensor | None = None) -> list[DecoderCache]:
        """Start incremental decoding: one cache a layer for memory (batch, S, D), always batch first."""
        first = new_cache(memory, memory_key_padding_mask, self.d_model, self.layers[0])
        return [first, *(DecoderCache(memory, first.memory_mask) for _ in self.layers[1:])]

    def step(self, tgt: Tensor, caches: list[DecoderCache]) -> Tensor:
        """Run :meth:`forward` with ``caches``; tgt and the result are (rows, 1, D), always batch first."""
        if not isinstance(caches, list) or not caches or not isinstance(caches[0], DecoderCache):
            raise TypeError(f"caches must be a list, as new_caches makes it; found {type(caches).__name__}")
        memory = caches[0].memory
        if self.batch_first:
            return self(tgt, memory, caches=caches)
        return self(tgt.transpose(0, 1), memory.transpose(0, 1), caches=caches).transpose(0, 1)

    def takes_caches(self) -> bool:
        """Return whether this stack's forward and each layer's take the cache of a decoding step.

        The user may have replaced either.
        """
        parts = [getattr(layer, name, None) for layer in self.layers for name in ("self_attn", "cross_attn")]
        inside = all(takes(part, "cache") for part in parts if isinstance(part, nn.Module))
        return takes(self, "caches") and inside and all(takes(layer, "cache") for layer in self.layers)


def takes(module: nn.Module, argument: str) -> bool:
    """Whether ``module`` can be called with this keyword argument."""
    return _accepts(module.forward if "forward" in module.__dict__ else type(module).forward, argument)


# inspect.signature takes as long as a layer's decoding step
@functools.lru_cache(maxsize=64)
def _accepts(function: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(function).parameters
    return argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
