"""How gradients and activations run through the layers of a model, at initialisation or later."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.choice import use_backend
from .language_model import LanguageModel
from .reference import DepthLSTMDecoder, DepthLSTMEncoder, TranslationModel
from .stacks import CausalStack, Decoder, Encoder

STACKS = (Encoder, Decoder, CausalStack, DepthLSTMEncoder, DepthLSTMDecoder)


class Probe(NamedTuple):
    """What :func:`probe_gradients` finds in one stack.

    gradients: for each layer the norm of the loss's gradient at the state that the layer leaves: at those of its
        tensors that the layer made, all together.
    gains: for each layer the root mean square of the state it leaves over that of the state it was given.
    """

    gradients: tuple[float, ...]
    gains: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The gradient at the first layer over that at the last; NaN where the last has none."""
        return self.gradients[0] / self.gradients[-1] if self.gradients[-1] else math.nan


def probe_gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Probe]:
    """Run ``model`` once forward and backward, in plain PyTorch, and look at each of its stacks.

    The loss of a translation model and of a language model is the cross entropy of the next token, without padding. Of
    anything else it is the output's product with a fixed random direction. Parameters, their ``grad`` and torch's
    generator are left alone, but for what dropout draws in training mode.

    Args:
        model: holds stacks: :class:`Encoder`, :class:`Decoder`, a language model's, or the depth-wise LSTM's.
        batch: the model's arguments, for a translation model (src, tgt) with tgt from bos_id to eos_id, for a
            language model (ids,) or (ids, attention_mask).

    Returns:
        A :class:`Probe` for each stack, by its name in the model ("" for the model itself).

    Raises:
        TypeError: model is no module, or batch no tuple.
        ValueError: there is no such stack in the model, or batch is no pair for a translation model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    if not isinstance(batch, tuple):
        raise TypeError(f"batch must be a tuple of the model's arguments; found {type(batch).__name__}")
    if isinstance(model, TranslationModel) and len(batch) != 2:
        raise ValueError(f"batch must be a pair (src, tgt) for a translation model; found {len(batch)} parts")
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, STACKS)}
    if not stacks:
        raise ValueError("model must hold an Encoder or a Decoder; found none")
    # a fused step gives the state and the next input at once: the way through the input is then no part of the state's
    # gradient
    with use_backend("reference"):
        with contextlib.ExitStack() as watched, torch.enable_grad():
            states = {name: watched.enter_context(_watch(stack)) for name, stack in stacks.items()}
            loss = _loss(model, batch)
        made = {
            name: [
                [each for each in after if each.requires_grad and not any(each is old for old in before)]
                for before, after in found
            ]
            for name, found in states.items()
        }
        tensors = [each for layers in made.values() for layer in layers for each in layer]
        found = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
    probes = {}
    for name, layers in made.items():
        gradients = tuple(_norm([next(found) for _ in layer]) for layer in layers)
        probes[name] = Probe(gradients, tuple(_size(after) / _size(before) for before, after in states[name]))
    return probes


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    if isinstance(model, TranslationModel):
        src, tgt = batch
        logits = model(src, tgt[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tgt[:, 1:].flatten(), ignore_index=model.pad_id)
    if isinstance(model, LanguageModel):
        ids, *mask = batch
        return model(ids, *mask, labels=ids)[0]
    output = model(*batch)
    output = output[0] if isinstance(output, tuple) else output
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output * direction.to(output.device, output.dtype)).sum()


@contextlib.contextmanager
def _watch(stack: Any) -> Iterator[list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]]:
    """(the state before, the state after) of each layer, as the stack runs."""
    found: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    if isinstance(stack, (DepthLSTMEncoder, DepthLSTMDecoder)):

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            # (h, c) or (h, memory, c); the first layer's c may be None
            before = (inputs[0], inputs[-1]) if isinstance(inputs[-1], Tensor) else inputs[:1]
            found.append((before, output))

        hooks = [layer.register_forward_hook(keep) for layer in stack.layers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
        return
    run: Callable[..., tuple[Tensor, ...]] = stack._layer

    def watched(index: int, options: dict[str, Any], u: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        outputs = run(index, options, u, *state)
        found.append((state, outputs[1:]))
        return outputs

    stack._layer = watched
    try:
        yield found
    finally:
        del stack._layer


def _norm(gradients: list[Tensor | None]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in gradients if each is not None))


def _size(state: tuple[Tensor, ...]) -> float:
    """Root mean square of a state, 1 for one of zeros."""
    squares = sum(float(each.detach().double().square().sum()) for each in state)
    return math.sqrt(squares / sum(each.numel() for each in state)) or 1.0
