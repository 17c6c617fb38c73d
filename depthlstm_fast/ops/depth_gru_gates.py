"""What follows the products of a depth-wise GRU, as torch operators, and its autograd in eager mode.

    h' = (1 - u) n + u h        r, u = sigmoid(a_r), sigmoid(a_u)        n = tanh(a_n + r a_m)

a is z, or each gate of z normalised. Backward keeps the arguments and computes the gates again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.record import Backend
from ..modes import is_traced
from ..sharding import Layout
from ..torch_private import below_autograd
from . import registry
from .once_differentiable import Grads, once_differentiable
from .registry import OPERATORS, Kernels, Op

NAME = "depth_gru_gates"
RESET_BEFORE = (
    "no backend has kernels for depth_gru_gates with reset_weight, which has a matrix product between its gates"
)


class Tensors(NamedTuple):
    """z holds r, u, n, m. The affine is that of a LayerNorm on each gate; without one there is no LayerNorm."""

    z: Tensor
    h: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Options(NamedTuple):
    eps: float


class Outputs(NamedTuple):
    h_out: Tensor


class OutputGradients(NamedTuple):
    dh_out: Tensor


class Wanted(NamedTuple):
    affine_gradient: bool


class Gradients(NamedTuple):
    """Gradients of the tensors; a gradient without elements has no tensor or is not wanted."""

    dz: Tensor
    dh: Tensor
    dweight: Tensor
    dbias: Tensor


def _dense(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _forward_fake(z: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _dense(h)


def _backward_fake(
    dh_out: Tensor,
    z: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    affine_gradient: bool,
) -> tuple[Tensor, ...]:
    affine = (weight, bias) if affine_gradient else (None, None)
    return _dense(z), _dense(h), *(z.new_empty(0) if tensor is None else _dense(tensor) for tensor in affine)


def _check(
    backend: Backend, z: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *_: bool
) -> None:
    checks.check_depth_gru_gates(z, h, weight, bias, None, eps)
    reason = backend.why_not(z, NAME, h.shape[-1])
    if reason is not None:
        raise ValueError(reason)


def _check_backward(backend: Backend, dh_out: Tensor, *arguments: Any) -> None:
    _check(backend, *arguments)
    h = arguments[1]
    checks.check_companion("dh_out", dh_out, "h", h, mixed=False)
    checks.check_shape("dh_out", dh_out, tuple(h.shape))


def save(ctx: Any, arguments: tuple[Any, ...]) -> None:
    """Keep the forward arguments for :func:`tensor_gradients`."""
    *tensors, eps = arguments
    ctx.save_for_backward(*tensors)
    ctx.eps = eps
    ctx.set_materialize_grads(False)


def tensor_gradients(
    kernels: Kernels, saved: tuple[Any, ...], eps: float, affine_gradient: bool, dh_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of :class:`Tensors`."""
    if dh_out is None:
        return (None,) * len(Tensors._fields)
    affine_gradient = affine_gradient and Tensors(*saved).weight is not None
    found = Gradients(*kernels.backward(dh_out, *saved, eps, affine_gradient))
    return (found.dz, found.dh, *((found.dweight, found.dbias) if affine_gradient else (None, None)))


def _gradients(ctx: Any, saved: tuple[Any, ...], kernels: Kernels, dh_out: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*tensor_gradients(kernels, saved, ctx.eps, any(ctx.needs_input_grad[2:4]), dh_out), None)


_TENSORS = "rrff"  # one letter for each of Tensors: rows or features
OP = Op(
    name=NAME,
    operator=NAME,
    schemas=(
        registry.schema([Tensors, Options], Outputs),
        registry.schema([OutputGradients, Tensors, Options, Wanted], Gradients),
    ),
    fakes={"forward": _forward_fake, "backward": _backward_fake},
    checks=(_check, _check_backward),
    save=save,
    gradients=_gradients,
    layouts=(
        Layout(_TENSORS + "-", lambda inputs: "r", lambda inputs: False),
        Layout(
            "r" + _TENSORS + "--",
            lambda inputs: "rr" + ("ss" if inputs[-1] and inputs[3] is not None else "ff"),
            lambda inputs: False,
        ),
    ),
    direct=lambda traced, namespace, stem: None,
)
registry.add(OP)


class DepthGRUGatesFunction(torch.autograd.Function):
    """(*Tensors, eps, backend) -> h'."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, backend = arguments
        save(ctx, tuple(inputs))
        ctx.backend = backend
        with below_autograd():
            found: Tensor = OPERATORS[NAME][backend].eager(inputs[0]).forward(*inputs)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dh_out: Tensor | None) -> Grads:
        kernels = OPERATORS[NAME][ctx.backend].eager(saved[0])
        return (*tensor_gradients(kernels, saved, ctx.eps, any(ctx.needs_input_grad[2:4]), dh_out), None, None)


def depth_gru_gates(
    z: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> Tensor:
    """Return h', with autograd."""
    operators, tensors = OPERATORS[NAME][backend], (z, h, weight, bias)
    if is_traced():
        return operators.traced.forward(*tensors, eps)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return DepthGRUGatesFunction.apply(*tensors, eps, backend)
    with below_autograd():
        return operators.eager(z).forward(*tensors, eps)
