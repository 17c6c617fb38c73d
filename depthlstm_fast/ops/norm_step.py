"""norm_step as torch operators, and its autograd in eager mode.

    x' = [N1](a x + b [N3] y)      u = [N2] x'

A backward pass keeps what it reads: x and y with N1, y with N3 or a learned b, and else x' alone. x' is an output,
which the next step keeps anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import checks
from ..backends.record import Backend
from ..modes import is_traced
from ..reference.normalise import accumulation_dtype
from ..sharding import Layout
from ..torch_private import below_autograd
from . import registry
from .once_differentiable import Grads, once_differentiable
from .registry import OPERATORS, Kernels, Op

NAME = "norm_step"
NORM_CODES = {name: code for code, name in enumerate(checks.NORMALISATIONS)}


class Parameters(NamedTuple):
    """A learned b, () or (C,), and the affines of N1, N2 and N3. Without a weight there is no norm."""

    scale: Tensor | None = None
    weight1: Tensor | None = None
    bias1: Tensor | None = None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    weight3: Tensor | None = None
    bias3: Tensor | None = None


class Streams(NamedTuple):
    x: Tensor
    y: Tensor


class Options(NamedTuple):
    """Number arguments; ``norm`` is a code of NORM_CODES, and b is not used beside a scale."""

    a: float
    b: float
    norm: int
    eps: float


class Outputs(NamedTuple):
    """x' and u; u has no elements without N2."""

    x_out: Tensor
    u: Tensor


class OutputGradients(NamedTuple):
    """Gradients of x' and u; None stands for zeros. du belongs to N2: without N2 it is None, beside N2 a tensor."""

    dx_out: Tensor | None
    du: Tensor | None


class Kept(NamedTuple):
    """What backward reads: see :func:`kept`."""

    x: Tensor | None
    y: Tensor | None
    x_out: Tensor | None


class Wanted(NamedTuple):
    parameter_gradients: bool


class Gradients(NamedTuple):
    """A gradient without elements has no tensor or is not wanted; dy has none where it equals dx."""

    dx: Tensor
    dy: Tensor
    dscale: Tensor
    dweight1: Tensor
    dbias1: Tensor
    dweight2: Tensor
    dbias2: Tensor
    dweight3: Tensor
    dbias3: Tensor


_PARAMETERS, _OPTIONS = len(Parameters._fields), len(Options._fields)
# what x' depends on, by its place among the arguments: everything but N2
_OF_X_OUT = [i for i, name in enumerate(Streams._fields + Parameters._fields) if name not in ("weight2", "bias2")]


def _split(arguments: tuple[Any, ...]) -> tuple[Parameters, Options, tuple[Any, ...]]:
    """Split what follows the tensors with rows: parameters, options and the rest."""
    numbers, rest = arguments[_PARAMETERS : _PARAMETERS + _OPTIONS], arguments[_PARAMETERS + _OPTIONS :]
    return Parameters(*arguments[:_PARAMETERS]), Options(*numbers), rest


def kept(x: Tensor | None, y: Tensor | None, x_out: Tensor | None, parameters: Parameters) -> Kept:
    """Choose what the backward pass of these parameters reads."""
    first = parameters.weight1 is not None
    reads_y = first or parameters.weight3 is not None or parameters.scale is not None
    reads_x_out = parameters.weight2 is not None and not first
    return Kept(x if first else None, y if reads_y else None, x_out if reads_x_out else None)


def is_shared(parameters: Parameters, options: Options, x: torch.dtype, y: torch.dtype) -> bool:
    """Return whether the gradients of x and y are equal, so that backward makes one of them."""
    plain = parameters.scale is None and parameters.weight3 is None and options.a == options.b == 1
    return plain and x == y


def _dense(like: Tensor | None, otherwise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if like is None:
        return otherwise.new_empty(0)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _forward_fake(x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    parameters, _, _ = _split(arguments)
    return _dense(x, y), _dense(None if parameters.weight2 is None else y, y)


def types_of(dx_out: Tensor | None, du: Tensor | None, found: Kept) -> tuple[Tensor, torch.dtype]:
    """Return a tensor like dy, and the dtype of dx: not all of them are kept."""
    like = cast(Tensor, du if found.y is None else found.y)  # y is left out only beside a du
    x_like = next(tensor for tensor in (found.x, found.x_out, dx_out) if tensor is not None)
    return like, x_like.dtype


def _backward_fake(
    dx_out: Tensor | None, du: Tensor | None, x: Tensor | None, y: Tensor | None, x_out: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    parameters, options, (wanted,) = _split(arguments)
    like, x_dtype = types_of(dx_out, du, Kept(x, y, x_out))
    shared = is_shared(parameters, options, x_dtype, like.dtype)
    sums = [_dense(parameter if wanted else None, like) for parameter in parameters]
    return _dense(like, like, x_dtype), _dense(None if shared else like, like), *sums


def _check_parameters(x: Tensor, y: Tensor, parameters: Parameters, options: Options) -> None:
    if not 0 <= options.norm < len(NORM_CODES):
        raise ValueError(f"norm must be 0 to {len(NORM_CODES) - 1}; found {options.norm}")
    scale, *affine = parameters
    affines = tuple((str(i + 1), affine[2 * i], affine[2 * i + 1]) for i in range(3))
    b = options.b if scale is None else scale
    checks.check_norm_step(x, y, options.a, b, affines, checks.NORMALISATIONS[options.norm], options.eps)


def _check(backend: Backend, x: Tensor, y: Tensor, *arguments: Any) -> None:
    parameters, options, _ = _split(arguments)
    _check_parameters(x, y, parameters, options)
    reason = backend.why_not(y, NAME, y.shape[-1])
    if reason is not None:
        raise ValueError(reason)


def _check_backward(
    backend: Backend,
    dx_out: Tensor | None,
    du: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    x_out: Tensor | None,
    *arguments: Any,
) -> None:
    parameters, options, _ = _split(arguments)
    if all(parameters[i] is None for i in (0, 1, 3, 5)):
        raise ValueError("weight1, weight2, weight3 or scale must be given; found None")
    if (du is None) != (parameters.weight2 is None):
        raise ValueError(
            f"du must be given with weight2, and None without it; found {du if du is None else 'a tensor'}"
        )
    if dx_out is None and du is None:
        raise ValueError("dx_out or du must be given; found None")
    found = kept(x, y, x_out, parameters)
    any_rows = torch.empty(0)
    for name, needed in zip(Kept._fields, kept(any_rows, any_rows, any_rows, parameters), strict=True):
        if needed is not None and getattr(found, name) is None:
            raise ValueError(f"{name} must be given beside these parameters; found None")
    like, x_dtype = types_of(dx_out, du, found)
    for name, tensor in zip((*OutputGradients._fields, *Kept._fields), (dx_out, du, *found), strict=True):
        if tensor is None:
            continue
        checks.check_float_tensor(name, tensor)
        checks.check_shape(name, tensor, tuple(like.shape))
        wanted = x_dtype if name in ("dx_out", "x", "x_out") else like.dtype
        if tensor.dtype != wanted or tensor.device != like.device:
            raise TypeError(f"{name} must be {wanted} on {like.device}; found {tensor.dtype} on {tensor.device}")
    _check_parameters(like.new_empty(1, dtype=x_dtype).expand(like.shape), like, parameters, options)
    reason = backend.why_not(like, NAME, like.shape[-1])
    if reason is not None:
        raise ValueError(reason)


def save(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    """Keep what :func:`tensor_gradients` needs of the forward operator's arguments and outputs."""
    if not any(ctx.needs_input_grad[i] for i in _OF_X_OUT):
        ctx.mark_non_differentiable(outputs[0])  # as in PyTorch, where only N2 is trained
    x, y, *others = arguments
    parameters, options, _ = _split(tuple(others))
    ctx.save_for_backward(*kept(x, y, outputs[0], parameters), *parameters)
    ctx.options, ctx.dtypes = options, (x.dtype, y.dtype)
    ctx.set_materialize_grads(False)


def tensor_gradients(
    ctx: Any, saved: tuple[Any, ...], kernels: Kernels, dx_out: Tensor | None, du: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of Streams and Parameters."""
    none = (None,) * _PARAMETERS
    if dx_out is None and du is None:
        return None, None, *none
    found, parameters, options = Kept(*saved[:3]), Parameters(*saved[3:]), ctx.options
    if du is None and parameters.weight2 is not None:  # u is not used
        parameters = parameters._replace(weight2=None, bias2=None)
        found = kept(*found, parameters)
    if parameters.weight2 is None:
        du = None
    x_dtype, y_dtype = ctx.dtypes
    if dx_out is not None and all(parameters[i] is None for i in (0, 1, 3, 5)):  # x' = a x + b y
        wide = dx_out.to(accumulation_dtype(dx_out))
        dx = dx_out if options.a == 1 else (options.a * wide).to(x_dtype)
        return dx, (dx_out if options.b == 1 else options.b * wide).to(y_dtype), *none
    wanted = any(ctx.needs_input_grad[2 : 2 + _PARAMETERS])
    made = Gradients(*kernels.backward(dx_out, du, *found, *parameters, *options, wanted))
    dy = made.dx if is_shared(parameters, options, x_dtype, y_dtype) else made.dy
    sums = (
        gradient if wanted and parameter is not None else None
        for gradient, parameter in zip(made[2:], parameters, strict=True)
    )
    return made.dx, dy, *sums


def _gradients(
    ctx: Any, saved: tuple[Any, ...], kernels: Kernels, dx_out: Tensor | None, du: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (*tensor_gradients(ctx, saved, kernels, dx_out, du), *(None for _ in Options._fields))


def _gradient_letters(arguments: tuple[Any, ...]) -> str:
    dx_out, du, x, y, x_out, *others = arguments
    parameters, options, (wanted,) = _split(tuple(others))
    like, x_dtype = types_of(dx_out, du, Kept(x, y, x_out))
    shared = is_shared(parameters, options, x_dtype, like.dtype)
    return "r" + ("f" if shared else "r") + "".join("s" if wanted and p is not None else "f" for p in parameters)


def _is_numbered(arguments: tuple[Any, ...]) -> bool:
    return False


_LETTERS = "f" * _PARAMETERS + "-" * _OPTIONS
OP = Op(
    name=NAME,
    operator=NAME,
    schemas=(
        registry.schema([Streams, Parameters, Options], Outputs),
        registry.schema([OutputGradients, Kept, Parameters, Options, Wanted], Gradients),
    ),
    fakes={"forward": _forward_fake, "backward": _backward_fake},
    checks=(_check, _check_backward),
    save=save,
    gradients=_gradients,
    layouts=(
        Layout("rr" + _LETTERS, lambda inputs: "rf" if _split(inputs[2:])[0].weight2 is None else "rr", _is_numbered),
        Layout("rr" + "rrr" + _LETTERS + "-", _gradient_letters, _is_numbered),
    ),
    direct=lambda traced, namespace, stem: None,
    saves_outputs=True,
)
registry.add(OP)


class NormStepFunction(torch.autograd.Function):
    """(*Streams, *Parameters, *Options, backend) -> (x', u)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, backend = arguments
        with below_autograd():
            outputs = OPERATORS[NAME][backend].eager(inputs[1]).forward(*inputs)
        save(ctx, tuple(inputs), outputs)
        ctx.backend = backend
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dx_out: Tensor | None, du: Tensor | None) -> Grads:
        like = dx_out if du is None else du
        if like is None:
            return (None,) * (len(Streams._fields) + _PARAMETERS + _OPTIONS + 1)
        kernels = OPERATORS[NAME][ctx.backend].eager(like)
        return (*_gradients(ctx, saved, kernels, dx_out, du), None)


def norm_step(x: Tensor, y: Tensor, parameters: Parameters, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """Return x' and u, with autograd; without N2 u is x' itself."""
    if is_traced():
        outputs = OPERATORS[NAME][backend].traced.forward(x, y, *parameters, *options)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, *parameters)):
        outputs = NormStepFunction.apply(x, y, *parameters, *options, backend)
    else:
        with below_autograd():
            outputs = OPERATORS[NAME][backend].eager(y).forward(x, y, *parameters, *options)
    x_out, u = outputs
    return (x_out, x_out) if parameters.weight2 is None else (x_out, u)
