"""layer_mix as torch operators, and its autograd in eager mode.

    u_v = sum_l w_vl x_l        dx_l = sum_v w_vl du_v        dw_vl = <x_l, du_v>

Backward keeps the weights, and the sources only where the weights have a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.record import Backend
from ..modes import is_traced
from ..torch_private import below_autograd
from . import registry
from .once_differentiable import Grads, once_differentiable
from .registry import OPERATORS, Kernels, Op
from .sources import leading, stand_ins, widest_dtype

NAME = "layer_mix"


class Tensors(NamedTuple):
    sources: list[Tensor]
    weights: Tensor


class Outputs(NamedTuple):
    outputs: list[Tensor]


class OutputGradients(NamedTuple):
    """Gradients of the outputs; None stands for zeros."""

    du: list[Tensor | None]


class Wanted(NamedTuple):
    """Without ``weight_gradient`` backward reads no source's values."""

    source_gradients: bool
    weight_gradient: bool


class Gradients(NamedTuple):
    """Gradients of the tensors; an empty list and a tensor without elements where they are not wanted."""

    dsources: list[Tensor]
    dweights: Tensor


def _dense(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _forward_fake(sources: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [_dense(sources[0], widest_dtype(sources)) for _ in range(weights.shape[0])]


def _backward_fake(
    du: list[Tensor | None], sources: list[Tensor], weights: Tensor, source_gradients: bool, weight_gradient: bool
) -> tuple[list[Tensor], Tensor]:
    dsources = [_dense(source) for source in sources] if source_gradients else []
    return dsources, _dense(weights) if weight_gradient else weights.new_empty(0)


def _check(backend: Backend, sources: list[Tensor], weights: Tensor) -> None:
    checks.check_layer_mix(sources, weights)
    reason = backend.why_not(leading(sources), NAME, sources[0].shape[-1])
    if reason is not None:
        raise ValueError(reason)


def _check_backward(
    backend: Backend, du: list[Tensor | None], sources: list[Tensor], weights: Tensor, *wanted: bool
) -> None:
    _check(backend, sources, weights)
    if len(du) != weights.shape[0]:
        raise ValueError(f"du must hold {weights.shape[0]} gradients, one for each row of weights; found {len(du)}")
    checks.check_output_gradients("du", du, sources[0], widest_dtype(sources))


def save(ctx: Any, arguments: tuple[Any, ...]) -> None:
    """Keep of the forward arguments what :func:`tensor_gradients` needs."""
    sources, weights = arguments
    ctx.keeps = weights.requires_grad, any(source.requires_grad for source in sources)
    ctx.dtypes = [source.dtype for source in sources]
    ctx.save_for_backward(*(sources if ctx.keeps[0] else ()), weights)
    ctx.set_materialize_grads(False)


def tensor_gradients(
    ctx: Any, saved: tuple[Any, ...], kernels: Kernels, du: list[Tensor | None]
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the gradients of the sources and of the weights."""
    nothing: list[Tensor | None] = [None for _ in ctx.dtypes]
    given = next((gradient for gradient in du if gradient is not None), None)
    if given is None:
        return nothing, None
    *sources, weights = saved
    weight_gradient, source_gradients = ctx.keeps
    sources = sources if weight_gradient else stand_ins(ctx.dtypes, given)
    dsources, dweights = kernels.backward(du, sources, weights, source_gradients, weight_gradient)
    return dsources if source_gradients else nothing, dweights if weight_gradient else None


OP = Op(
    name=NAME,
    operator=NAME,
    schemas=(
        registry.schema([Tensors], Outputs),
        registry.schema([OutputGradients, Tensors, Wanted], Gradients),
    ),
    fakes={"forward": _forward_fake, "backward": _backward_fake},
    checks=(_check, _check_backward),
    save=save,
    gradients=tensor_gradients,
    layouts=None,
    direct=lambda traced, namespace, stem: None,
)
registry.add(OP)


class LayerMixFunction(torch.autograd.Function):
    """(backend, weights, *sources) -> the outputs."""

    @staticmethod
    def forward(ctx: Any, backend: str, weights: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        save(ctx, (sources, weights))
        ctx.backend = backend
        with below_autograd():
            return tuple(OPERATORS[NAME][backend].eager(leading(sources)).forward(list(sources), weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], *du: Tensor | None) -> Grads:
        kernels = OPERATORS[NAME][ctx.backend].eager(saved[-1])
        dsources, dweights = tensor_gradients(ctx, saved, kernels, list(du))
        return (None, dweights, *dsources)


def layer_mix(sources: list[Tensor], weights: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Return the outputs, with autograd."""
    operators = OPERATORS[NAME][backend]
    if is_traced():
        return tuple(operators.traced.forward(sources, weights))
    if torch.is_grad_enabled() and (weights.requires_grad or any(source.requires_grad for source in sources)):
        return LayerMixFunction.apply(backend, weights, *sources)
    with below_autograd():
        return tuple(operators.eager(leading(sources)).forward(sources, weights))
