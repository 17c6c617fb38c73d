"""Depth growing: a trained model gets a second stack on top of each of its own."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, nn

from . import checks
from .models import Transformer
from .reference.attention import DecoderCache
from .reference.layers import check_caches
from .stacks import Decoder, Encoder


class _Grown(nn.Module):
    """Two stacks, and the norm through which the second one sees the embedded input."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        weight = next(first.layers.parameters())
        self.first, self.second = first, second
        self.norm = nn.LayerNorm(first.d_model, 1e-6, device=weight.device, dtype=weight.dtype)

    @property
    def gradient_checkpointing(self) -> bool:
        return self.second.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.first.gradient_checkpointing = self.second.gradient_checkpointing = enabled

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in (self.first, self.second, self.norm):
            module.reset_parameters()


class GrownEncoder(_Grown):
    """h1 = first(x), h2 = second(N(x) + h1); called as :class:`depthlstm_fast.Encoder`, it returns (h1, h2)."""

    def forward(self, src: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        h1 = self.first(src, **options)
        # a sum of its own: h1 is what the first decoder sees
        return h1, self.second(self.norm(src) + h1, **options)


class DeeperEncoder(GrownEncoder):
    """second(N(x) + first(x)) of an encoder on its own; called as :class:`depthlstm_fast.Encoder`, it returns h2."""

    def forward(self, src: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        return super().forward(src, **options)[1]


class GrownDecoder(_Grown):
    """s1 = first(y, h1), s2 = second(N(y) + s1, h2); called as :class:`depthlstm_fast.Decoder` with memory (h1, h2)."""

    def forward(
        self, tgt: Tensor, memory: tuple[Tensor, Tensor], caches: list[DecoderCache] | None = None, **options: Any
    ) -> Tensor:
        if caches is not None:
            return self.step(tgt, caches)
        s1 = self.first(tgt, memory[0], **options)
        return self.second(self.norm(tgt) + s1, memory[1], **options)

    def new_caches(
        self, memory: tuple[Tensor, Tensor], memory_key_padding_mask: Tensor | None = None
    ) -> list[DecoderCache]:
        """See :meth:`depthlstm_fast.Decoder.new_caches`: those of the first stack, then those of the second."""
        h1, h2 = memory
        return [
            *self.first.new_caches(h1, memory_key_padding_mask),
            *self.second.new_caches(h2, memory_key_padding_mask),
        ]

    def step(self, tgt: Tensor, caches: list[DecoderCache]) -> Tensor:
        """See :meth:`depthlstm_fast.Decoder.step`."""
        check_caches(caches, self.first.num_layers + self.second.num_layers)
        s1 = self.first.step(tgt, caches[: self.first.num_layers])
        return self.second.step(self.norm(tgt) + s1, caches[self.first.num_layers :])

    def takes_caches(self) -> bool:
        """See :meth:`depthlstm_fast.Decoder.takes_caches`."""
        return self.first.takes_caches() and self.second.takes_caches()


@overload
def grow(model: Transformer, layers: int, freeze: bool = ..., copy: bool = ...) -> Transformer: ...
@overload
def grow(model: Encoder, layers: int, freeze: bool = ..., copy: bool = ...) -> DeeperEncoder: ...
def grow(
    model: Transformer | Encoder, layers: int, freeze: bool = True, copy: bool = False
) -> Transformer | DeeperEncoder:
    """Put ``layers`` more layers on each stack of a trained model: Wu et al., ACL 2019.

        h1 = enc1(x), h2 = enc2(N(x) + h1);  s1 = dec1(y, h1), s2 = dec2(N(y) + s1, h2)

    x and y are the embedded inputs. The new stacks are of the old ones' kind; every connection can be grown, since the
    old stacks stay as they are. A translation model is grown in place. An encoder on its own is not: what comes back
    holds it, and is called as it is.

    Args:
        model: with ``memory="top"``, and not grown before. Its ``encoder`` and ``decoder`` become pairs, with the
            parameters ``first.*`` (the old ones), ``second.*`` and ``norm.*``. Or an :class:`Encoder`.
        layers: of each new stack.
        freeze: only the new stacks and their norms train; everything else, the embeddings and the output layer among
            it, has ``requires_grad=False``. False: everything trains.
        copy: the new layers, and what the connection holds for each branch, start as copies of the old stack's top
            ones, in turn where there are fewer of those. False: they are drawn anew.

    Returns:
        The model, or a module that gives h2 for x and has the encoder as ``first``.

    Raises:
        TypeError: model is neither, layers is no int, or freeze or copy no bool.
        ValueError: the model was grown before, has another memory, or layers is below 1.
    """
    if not isinstance(model, (Transformer, Encoder)):
        raise TypeError(f"model must be a Transformer or an Encoder; found {type(model).__name__}")
    checks.check_size("layers", layers)
    checks.check_flags(freeze=freeze, copy=copy)
    if isinstance(model, Transformer):
        if not isinstance(model.encoder, Encoder) or not isinstance(model.decoder, Decoder):
            raise ValueError(f"model must not have been grown before; found a {type(model.encoder).__name__}")
        if model.memory != "top":
            raise ValueError(
                f'model must have memory="top", of which a second stack has one more; found {model.memory!r}'
            )
    if freeze:
        model.requires_grad_(False)
    if isinstance(model, Encoder):
        return DeeperEncoder(model, _second(model, layers, copy)).train(model.training)
    encoder, decoder = _second(model.encoder, layers, copy), _second(model.decoder, layers, copy)
    model.encoder = GrownEncoder(model.encoder, encoder).train(model.training)
    model.decoder = GrownDecoder(model.decoder, decoder).train(model.training)
    return model


def _second(first: Any, layers: int, copy: bool) -> Any:
    """A new stack like ``first``."""
    second = first.like(layers)
    if copy:
        _copy_top(first, second)
    return second


def _copy_top(first: Any, second: Any) -> None:
    """Copy the top layers of ``first`` to ``second``, and of its connection what there is one of for each branch."""
    pairs = [(first.layers, second.layers)]
    for name, theirs in first.connection.named_children():
        if isinstance(theirs, nn.ModuleList) and len(theirs) == first.connection.num_branches:
            pairs.append((theirs, getattr(second.connection, name)))
    for old, new in pairs:
        for index, module in enumerate(new):
            module.load_state_dict(old[(len(old) - len(new) + index) % len(old)].state_dict())
