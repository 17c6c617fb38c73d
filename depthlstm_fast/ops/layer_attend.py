"""layer_attend as torch operators, and its autograd in eager mode.

    s_l = (query * key_weight) . x_l / rms(x_l)      u = [N](sum_l softmax_l(s) x_l)

Backward keeps the arguments alone, and computes scores and the sum again.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .sources import leading, widest_dtype

NAME = "layer_attend"
NORM_CODES = {name: code for code, name in enumerate(checks.NORMALISATIONS)}


class Sources(NamedTuple):
    sources: list[Tensor]


class Parameters(NamedTuple):
    """Tensors (C,); without a weight there is no N."""

    query: Tensor
    key_weight: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Options(NamedTuple):
    """Number arguments; ``norm`` is a code of NORM_CODES."""

    norm: int
    eps: float


class Outputs(NamedTuple):
    u: Tensor


class OutputGradients(NamedTuple):
    du: Tensor


class Wanted(NamedTuple):
    """``query_gradient`` is that of query and key_weight, ``affine_gradient`` that of weight and bias."""

    source_gradients: bool
    query_gradient: bool
    affine_gradient: bool


class Gradients(NamedTuple):
    """Gradients of the tensors; an empty list and tensors without elements where they are not wanted."""

    dsources: list[Tensor]
    dquery: Tensor
    dkey_weight: Tensor
    dweight: Tensor
    dbias: Tensor


def _dense(like: Tensor | None, otherwise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if like is None:
        return otherwise.new_empty(0)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _forward_fake(sources: list[Tensor], *arguments: Any) -> Tensor:
    return _dense(sources[0], sources[0], widest_dtype(sources))


def _backward_fake(du: Tensor, sources: list[Tensor], *arguments: Any) -> tuple[Any, ...]:
    query, key_weight, weight, bias, _, _, source_gradients, query_gradient, affine_gradient = arguments
    found = [_dense(source, source) for source in sources] if source_gradients else []
    wanted = (query_gradient, query_gradient, affine_gradient, affine_gradient)
    parameters = zip((query, key_weight, weight, bias), wanted, strict=True)
    return found, *(_dense(parameter if is_wanted else None, query) for parameter, is_wanted in parameters)


def _check(backend: Backend, sources: list[Tensor], *arguments: Any) -> None:
    parameters, options = Parameters(*arguments[:4]), Options(*arguments[4:6])
    if not 0 <= options.norm < len(NORM_CODES):
        raise ValueError(f"norm must be 0 to {len(NORM_CODES) - 1}; found {options.norm}")
    checks.check_layer_attend(sources, *parameters, checks.NORMALISATIONS[options.norm], options.eps)
    reason = backend.why_not(leading(sources), NAME, sources[0].shape[-1])
    if reason is not None:
        raise ValueError(reason)


def _check_backward(backend: Backend, du: Tensor, sources: list[Tensor], *arguments: Any) -> None:
    _check(backend, sources, *arguments)
    checks.check_output_gradients("du", [du], sources[0], widest_dtype(sources))


def save(ctx: Any, arguments: tuple[Any, ...]) -> None:
    """Keep the forward arguments for :func:`tensor_gradients`."""
    sources, *others = arguments
    query, key_weight, weight, bias = others[:4]

    def needs(*tensors: Tensor | None) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    ctx.wanted = Wanted(needs(*sources), needs(query, key_weight), needs(weight, bias))
    ctx.options = Options(*others[4:])
    ctx.save_for_backward(*sources, query, key_weight, weight, bias)
    ctx.set_materialize_grads(False)


def tensor_gradients(
    ctx: Any, saved: tuple[Any, ...], kernels: Kernels, du: Tensor | None
) -> tuple[Sequence[Tensor | None], tuple[Tensor | None, ...]]:
    """Return the gradients of the sources, and of Parameters."""
    *sources, query, key_weight, weight, bias = saved
    parameters = Parameters(query, key_weight, weight, bias)
    nothing: list[Tensor | None] = [None for _ in sources]
    if du is None:
        return nothing, (None,) * len(parameters)
    found = Gradients(*kernels.backward(du, sources, *parameters, *ctx.options, *ctx.wanted))
    sums = (
        gradient if parameter is not None and gradient.numel() else None
        for gradient, parameter in zip(found[1:], parameters, strict=True)
    )
    return found.dsources if ctx.wanted.source_gradients else nothing, tuple(sums)


def _gradients(ctx: Any, saved: tuple[Any, ...], kernels: Kernels, du: Tensor | None) -> tuple[Any, ...]:
    dsources, parameters = tensor_gradients(ctx, saved, kernels, du)
    return (dsources, *parameters, *(None for _ in Options._fields))


OP = Op(
    name=NAME,
    operator=NAME,
    schemas=(
        registry.schema([Sources, Parameters, Options], Outputs),
        registry.schema([OutputGradients, Sources, Parameters, Options, Wanted], Gradients),
    ),
    fakes={"forward": _forward_fake, "backward": _backward_fake},
    checks=(_check, _check_backward),
    save=save,
    gradients=_gradients,
    layouts=None,
    direct=lambda traced, namespace, stem: None,
)
registry.add(OP)


class LayerAttendFunction(torch.autograd.Function):
    """(backend, *Options, *Parameters, *sources) -> u."""

    @staticmethod
    def forward(ctx: Any, backend: str, norm: int, eps: float, *tensors: Any) -> Tensor:
        parameters, sources = tensors[: len(Parameters._fields)], list(tensors[len(Parameters._fields) :])
        save(ctx, (sources, *parameters, norm, eps))
        ctx.backend = backend
        with below_autograd():
            return OPERATORS[NAME][backend].eager(leading(sources)).forward(sources, *parameters, norm, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], du: Tensor | None) -> Grads:
        kernels = OPERATORS[NAME][ctx.backend].eager(saved[0])
        dsources, parameters = tensor_gradients(ctx, saved, kernels, du)
        return (None, None, None, *parameters, *dsources)


def layer_attend(sources: list[Tensor], parameters: Parameters, options: Options, backend: str) -> Tensor:
    """Return u, with autograd."""
    operators = OPERATORS[NAME][backend]
    if is_traced():
        return operators.traced.forward(sources, *parameters, *options)
    tensors = (*parameters, *sources)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return LayerAttendFunction.apply(backend, *options, *tensors)
    with below_autograd():
        return operators.eager(leading(sources)).forward(sources, *parameters, *options)
