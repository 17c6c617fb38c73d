"""The gates of the depth-wise LSTM as torch operators.

This file has arguments, schemas, shapes for tracers, gradients and sharding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.record import Backend
from ..sharding import Layout
from . import registry
from .registry import Kernels, Op

NAME = "depth_lstm"
NORM_CODES = {name: code for code, name in enumerate(checks.NORMS)}
ACTIVATION_CODES = {name: code for code, name in enumerate(checks.ACTIVATIONS)}


class Tensors(NamedTuple):
    """Inputs of the gates: z without its bias, g before dropout or None, the cell below, the affine, dropout's key."""

    z: Tensor
    z_bias: Tensor | None
    hidden: Tensor | None
    c: Tensor
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    """Number arguments of the gates; ``norm`` and ``activation`` are codes of NORM_CODES and ACTIVATION_CODES."""

    norm: int
    activation: int
    eps: float
    dropout_p: float


class Outputs(NamedTuple):
    h: Tensor
    c_out: Tensor


class OutputGradients(NamedTuple):
    """Gradients of h and c_out; None stands for zeros."""

    dh: Tensor | None
    dc: Tensor | None


class Wanted(NamedTuple):
    """Which of the gradients that are sums over rows are computed."""

    affine_gradient: bool
    z_bias_gradient: bool


class Gradients(NamedTuple):
    """Gradients of the tensors; a gradient without elements has no tensor or is not wanted."""

    dz: Tensor
    dhidden: Tensor
    dc_in: Tensor
    dweight: Tensor
    dbias: Tensor
    dz_bias: Tensor


def split(arguments: tuple[Any, ...]) -> tuple[Tensors, Options]:
    """Split the forward operator's arguments into tensors and options, by name."""
    count = len(Tensors._fields)
    return Tensors(*arguments[:count]), Options(*arguments[count : count + len(Options._fields)])


def _sizes_like(*tensors: Tensor | None, like: Tensor) -> list[Tensor]:
    return [
        like.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in tensors
    ]


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, _ = split(arguments)
    return torch.empty_like(tensors.c, dtype=tensors.z.dtype, memory_format=torch.contiguous_format), *_sizes_like(
        tensors.c, like=tensors.z
    )


def _forward_into_fake(*arguments: Any) -> Tensor:
    tensors, _ = split(arguments)
    return _sizes_like(tensors.c, like=tensors.z)[0]


def _backward_fake(dh: Tensor | None, dc: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    (z, z_bias, hidden, c, weight, bias, _), _ = split(arguments)
    affine_gradient, z_bias_gradient = arguments[-2:]
    affine = (weight, bias) if affine_gradient else (None, None)
    return tuple(_sizes_like(z, hidden, c, *affine, z_bias if z_bias_gradient else None, like=z))


def _check(backend: Backend, *arguments: Any) -> None:
    (z, z_bias, hidden, c, weight, bias, seed), options = split(arguments)
    for argument, code, names in (
        ("norm", options.norm, checks.NORMS),
        ("activation", options.activation, checks.ACTIVATIONS),
    ):
        if not 0 <= code < len(names):
            raise ValueError(f"{argument} must be 0 to {len(names) - 1}; found {code}")
    checks.check_eps("eps", options.eps)
    checks.check_probability("dropout_p", options.dropout_p)
    checks.check_gates(z, c, weight, bias, hidden, checks.NORMS[options.norm], seed)
    if z_bias is not None:
        checks.check_companion("z_bias", z_bias, "z", z)
        checks.check_shape("z_bias", z_bias, (z.shape[-1],))
    reason = backend.why_not(z, NAME, c.shape[-1])
    if reason is not None:
        raise ValueError(reason)


def _check_backward(backend: Backend, dh: Tensor | None, dc: Tensor | None, *arguments: Any) -> None:
    _check(backend, *arguments)
    tensors, _ = split(arguments)
    for argument, gradient, name, like in (("dh", dh, "z", tensors.z), ("dc", dc, "c", tensors.c)):
        if gradient is not None:
            checks.check_companion(argument, gradient, name, like, mixed=False)
            checks.check_shape(argument, gradient, tuple(tensors.c.shape))


def save(ctx: Any, arguments: tuple[Any, ...]) -> None:
    """Keep the forward arguments for :func:`gradients`."""
    tensors, options = split(arguments)
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)


class TensorGradients(NamedTuple):
    """Gradients in the order of :class:`Tensors`; None where there is none."""

    z: Tensor | None = None
    z_bias: Tensor | None = None
    hidden: Tensor | None = None
    c: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    seed: None = None


def tensor_gradients(
    kernels: Kernels, tensors: Tensors, options: Options, needs: TensorGradients, dh: Tensor | None, dc: Tensor | None
) -> TensorGradients:
    """Run the backward pass of the gates; ``needs`` has True for each wanted gradient."""
    if dh is None and dc is None:
        return TensorGradients()
    affine = bool(needs.weight or needs.bias) and tensors.weight is not None
    z_bias = bool(needs.z_bias) and tensors.z_bias is not None
    found = Gradients(*kernels.backward(dh, dc, *tensors, *options, affine, z_bias))
    return TensorGradients(
        z=found.dz,
        z_bias=found.dz_bias if z_bias else None,
        hidden=found.dhidden if tensors.hidden is not None else None,
        c=found.dc_in,
        weight=found.dweight if affine else None,
        bias=found.dbias if affine else None,
    )


def _gradients(
    ctx: Any, saved: tuple[Any, ...], kernels: Kernels, dh: Tensor | None, dc: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = TensorGradients(*ctx.needs_input_grad[: len(Tensors._fields)])
    found = tensor_gradients(kernels, Tensors(*saved), ctx.options, needs, dh, dc)
    return (*found, *(None for _ in Options._fields))


def _direct(traced: Kernels, namespace: Any, stem: str) -> Kernels | None:
    """Return the library's forward that also takes h and ``z_more``, where the library can write into a buffer.

    csrc/depth_lstm/cuda_op.cpp defines these operators.
    """
    if not hasattr(namespace, f"{stem}_forward_into"):
        return None
    into = getattr(namespace, f"{stem}_forward_into").default

    count = len(Tensors._fields) + len(Options._fields)

    def forward(*arguments: Any, z_more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        arguments, given = arguments[:count], arguments[count:]
        if not given and z_more is None:
            return traced.forward(*arguments)
        tensors, _ = split(arguments)
        h = given[0] if given else torch.empty(tensors.c.shape, dtype=tensors.z.dtype, device=tensors.c.device)
        return h, into(*arguments, z_more, h)

    return Kernels(forward, traced.backward)


def _gradient_letters(arguments: tuple[Any, ...]) -> str:
    (_, _, hidden, *_), _ = split(arguments[2:])
    affine, z_bias = arguments[-2:]
    sums = "s" if affine else "f"
    return "r" + ("r" if hidden is not None else "f") + "r" + 2 * sums + ("s" if z_bias else "f")


_TENSORS = "rfrrfff"  # one letter for each of Tensors: rows or features
_OPTIONS = "-" * len(Options._fields)
OP = Op(
    name=NAME,
    operator="gates",
    schemas=(
        registry.schema([Tensors, Options], Outputs),
        registry.schema([OutputGradients, Tensors, Options, Wanted], Gradients),
    ),
    fakes={"forward": _forward_fake, "forward_into": _forward_into_fake, "backward": _backward_fake},
    checks=(_check, _check_backward),
    save=save,
    gradients=_gradients,
    layouts=(
        Layout(_TENSORS + _OPTIONS, lambda inputs: "rr", lambda inputs: split(inputs)[1].dropout_p != 0),
        Layout(
            "rr" + _TENSORS + _OPTIONS + "--", _gradient_letters, lambda inputs: split(inputs[2:])[1].dropout_p != 0
        ),
    ),
    direct=_direct,
)
registry.add(OP)
