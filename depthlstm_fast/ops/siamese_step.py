"""siamese_step as torch operators, and its autograd in eager mode.

    X' = N_x(X + o / c)      Y' = Y + o      u = [N](X' + N_y Y')

A backward pass keeps the inputs and computes the rest again.
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

NAME = "siamese_step"
NORM_CODES = {name: code for code, name in enumerate(checks.NORMALISATIONS)}


class Tensors(NamedTuple):
    """The streams, the branch's output, and the affines of N_x, N_y and N. Without ``weight`` there is no N."""

    x: Tensor
    y: Tensor
    o: Tensor
    weight_x: Tensor
    bias_x: Tensor | None
    weight_y: Tensor
    bias_y: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Options(NamedTuple):
    """Number arguments; ``norm`` is a code of NORM_CODES."""

    c: float
    norm: int
    eps: float


class Outputs(NamedTuple):
    x_out: Tensor
    y_out: Tensor
    u: Tensor


class OutputGradients(NamedTuple):
    """Gradients of the outputs; None stands for zeros."""

    dx_out: Tensor | None
    dy_out: Tensor | None
    du: Tensor | None


class Wanted(NamedTuple):
    parameter_gradients: bool


class Gradients(NamedTuple):
    """Gradients of the tensors; a gradient without elements has no tensor or is not wanted."""

    dx: Tensor
    dy: Tensor
    do: Tensor
    dweight_x: Tensor
    dbias_x: Tensor
    dweight_y: Tensor
    dbias_y: Tensor
    dweight: Tensor
    dbias: Tensor


_TENSORS, _OPTIONS = len(Tensors._fields), len(Options._fields)
# what X' and Y' depend on, by its place among the arguments; u depends on everything
_OF_STREAMS = [
    [Tensors._fields.index(name) for name in names] for names in (("x", "o", "weight_x", "bias_x"), ("y", "o"))
]


def _split(arguments: tuple[Any, ...]) -> tuple[Tensors, Options]:
    """Split the forward operator's arguments into tensors and options, by name."""
    return Tensors(*arguments[:_TENSORS]), Options(*arguments[_TENSORS : _TENSORS + _OPTIONS])


def _dense(like: Tensor | None, otherwise: Tensor) -> Tensor:
    if like is None:
        return otherwise.new_empty(0)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, _ = _split(arguments)
    return tuple(_dense(tensor, tensors.o) for tensor in tensors[:3])


def _backward_fake(dx_out: Tensor | None, dy_out: Tensor | None, du: Tensor | None, *arguments: Any) -> Any:
    tensors, _ = _split(arguments)
    parameters = tensors[3:] if arguments[-1] else (None,) * 6
    return tuple(_dense(tensor, tensors.o) for tensor in (*tensors[:3], *parameters))


def why_not(x: Tensor, y: Tensor) -> str | None:
    """Say why no kernels take these streams; None where they do."""
    if x.dtype == y.dtype:
        return None
    return f"siamese_step's kernels take x and y of one dtype; found {x.dtype} and {y.dtype}"


def _check(backend: Backend, *arguments: Any) -> None:
    tensors, options = _split(arguments)
    if not 0 <= options.norm < len(NORM_CODES):
        raise ValueError(f"norm must be 0 to {len(NORM_CODES) - 1}; found {options.norm}")
    x, y, o, *affine = tensors
    affines = (("_x", *affine[:2]), ("_y", *affine[2:4]), ("", *affine[4:]))
    norm = checks.NORMALISATIONS[options.norm]
    checks.check_siamese_step(x, y, o, options.c, affines, norm, options.eps)  # type: ignore[arg-type]
    reason = why_not(x, y) or backend.why_not(o, NAME, o.shape[-1])
    if reason is not None:
        raise ValueError(reason)


def _check_backward(
    backend: Backend, dx_out: Tensor | None, dy_out: Tensor | None, du: Tensor | None, *arguments: Any
) -> None:
    _check(backend, *arguments)
    tensors, _ = _split(arguments)
    for argument, gradient, name, like in (
        ("dx_out", dx_out, "x", tensors.x),
        ("dy_out", dy_out, "y", tensors.y),
        ("du", du, "o", tensors.o),
    ):
        if gradient is not None:
            checks.check_companion(argument, gradient, name, like, mixed=False)
            checks.check_shape(argument, gradient, tuple(tensors.o.shape))


def save(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keep the forward arguments for :func:`tensor_gradients`."""
    needs = ctx.needs_input_grad
    # as in PyTorch, a stream that no trained tensor enters needs no gradient
    constant = [
        output for output, places in zip(outputs, _OF_STREAMS, strict=False) if not any(needs[i] for i in places)
    ]
    ctx.mark_non_differentiable(*constant)
    tensors, options = _split(arguments)
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)


def tensor_gradients(
    ctx: Any, saved: tuple[Any, ...], kernels: Kernels, dx_out: Tensor | None, dy_out: Tensor | None, du: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of Tensors."""
    tensors = Tensors(*saved)
    if dx_out is None and dy_out is None and du is None:
        return (None,) * _TENSORS
    wanted = any(ctx.needs_input_grad[3:_TENSORS])
    if du is None:  # N is not used, and adds nothing
        tensors = tensors._replace(weight=None, bias=None)
    made = Gradients(*kernels.backward(dx_out, dy_out, du, *tensors, *ctx.options, wanted))
    # as in PyTorch, a norm without a gradient of its output has none for its affine
    used = (du is not None or dx_out is not None,) * 2 + (du is not None,) * 4
    sums = (
        gradient if wanted and has_output and parameter is not None else None
        for gradient, parameter, has_output in zip(made[3:], tensors[3:], used, strict=True)
    )
    return (*made[:3], *sums)


def _gradients(ctx: Any, saved: tuple[Any, ...], kernels: Kernels, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*tensor_gradients(ctx, saved, kernels, *grads), *(None for _ in Options._fields))


def _gradient_letters(arguments: tuple[Any, ...]) -> str:
    tensors, _ = _split(arguments[3:])
    return "rrr" + "".join("s" if arguments[-1] and tensor is not None else "f" for tensor in tensors[3:])


def _is_numbered(arguments: tuple[Any, ...]) -> bool:
    return False


_LETTERS = "rrr" + "f" * 6 + "-" * _OPTIONS
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
        Layout(_LETTERS, lambda inputs: "rrr", _is_numbered),
        Layout("rrr" + _LETTERS + "-", _gradient_letters, _is_numbered),
    ),
    direct=lambda traced, namespace, stem: None,
    saves_outputs=True,
)
registry.add(OP)


class SiameseStepFunction(torch.autograd.Function):
    """(*Tensors, *Options, backend) -> (X', Y', u)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, backend = arguments
        with below_autograd():
            outputs = OPERATORS[NAME][backend].eager(inputs[0]).forward(*inputs)
        save(ctx, tuple(inputs), outputs)
        ctx.backend = backend
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor | None) -> Grads:
        kernels = OPERATORS[NAME][ctx.backend].eager(saved[0])
        return (*_gradients(ctx, saved, kernels, *grads), None)


def siamese_step(tensors: Tensors, options: Options, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return X', Y' and u, with autograd."""
    if is_traced():
        return OPERATORS[NAME][backend].traced.forward(*tensors, *options)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return SiameseStepFunction.apply(*tensors, *options, backend)
    with below_autograd():
        return OPERATORS[NAME][backend].eager(tensors.o).forward(*tensors, *options)
