"""Autograd of the depth-wise LSTM's gates and cell in eager mode.

An autograd.Function calls the operators below the dispatcher's autograd key. torch.library's own autograd costs three
times that. Tracers see the operators themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice import RECORDS
from ..modes import is_direct
from ..torch_private import below_autograd, is_jit_tracing
from . import shared_buffer
from .depth_lstm import NAME, Options, TensorGradients, Tensors, tensor_gradients
from .once_differentiable import Grads, once_differentiable
from .projection import project, slice_gradients, weight_gradient
from .registry import OPERATORS

# Decoding steps: one product per slice reads W in two strided halves. Copying so few rows costs less (D=256, two cores:
# 73 us against 48 us for 1 row, 744 us against 537 us for 64 rows).
FEW_ROWS = 64

_operators = OPERATORS[NAME]


class GatesFunction(torch.autograd.Function):
    """(*Tensors, options, backend) -> (h, c).

    The options are one argument, because torch looks at each argument of a Function: three more are 2 us a call.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, options, backend = arguments
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        with below_autograd():
            return _operators[backend].eager(tensors[0]).forward(*tensors, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
        tensors, needs = Tensors(*saved), TensorGradients(*ctx.needs_input_grad[: len(saved)])
        found = tensor_gradients(_operators[ctx.backend].eager(tensors.z), tensors, ctx.options, needs, dh, dc)
        return (*found, None, None)


class CellArguments(NamedTuple):
    """Arguments of :class:`CellFunction` before the slices; ``out`` is () or (h,), a tensor that receives h."""

    w: Tensor | None = None
    b: Tensor | None = None
    hidden: Tensor | None = None
    c: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None
    options: Options | None = None
    backend: str | None = None
    out: tuple[Tensor, ...] | None = None


class CellFunction(torch.autograd.Function):
    """(*CellArguments, *slices) -> (h, c).

    ``slices`` are the parts of [x ; h'], each (N, width); nothing is concatenated. Slices that lie side by side in
    memory take one product with W, other slices one product each. z is kept as the GEMM leaves it, and the gates kernel
    adds its bias.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        count = len(CellArguments._fields)
        (w, b, hidden, c, weight, bias, seed, options, backend, out), slices = (
            arguments[:count],
            list(arguments[count:]),
        )
        with below_autograd():
            z = project(slices, w)
            tensors = Tensors(z, b, hidden, c, weight, bias, seed)
            h, c_out = _operators[backend].eager(z).forward(*tensors, *options, *out)
        ctx.save_for_backward(*tensors, w, *slices)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return h, c_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
        count = len(Tensors._fields)
        tensors, w, slices = Tensors(*saved[:count]), saved[count], list(saved[count + 1 :])
        if dh is None and dc is None:
            return (None,) * (len(CellArguments._fields) + len(slices))
        count = len(CellArguments._fields)
        needs, slices_need = CellArguments(*ctx.needs_input_grad[:count]), ctx.needs_input_grad[count:]
        wanted = TensorGradients(z_bias=needs.b, weight=needs.weight, bias=needs.bias)
        found = tensor_gradients(_operators[ctx.backend].eager(tensors.z), tensors, ctx.options, wanted, dh, dc)
        gradients = CellArguments(
            w=weight_gradient(found.z, slices, w) if needs.w else None,  # type: ignore[arg-type]
            b=found.z_bias,
            hidden=found.hidden,
            c=found.c,
            weight=found.weight,
            bias=found.bias,
        )
        widths = [part.shape[1] for part in slices]
        return (*gradients, *slice_gradients(found.z, w, widths, slices_need))  # type: ignore[arg-type]


def gates(
    z: Tensor,
    z_bias: Tensor | None,
    hidden: Tensor | None,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return h and c of the gates, with autograd; the tensors are those of :class:`Tensors`."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return _operators[backend].traced.forward(z, z_bias, hidden, c, weight, bias, seed, *options)
    given = (z, z_bias, hidden, c, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        return GatesFunction.apply(*given, seed, options, backend)
    with below_autograd():
        return _operators[backend].eager(z).forward(z, z_bias, hidden, c, weight, bias, seed, *options)


def cell(
    slices: list[Tensor],
    w: Tensor,
    b: Tensor | None,
    hidden: Tensor | None,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
    backend: str,
    left: int,
) -> tuple[Tensor, Tensor]:
    """Return h and c of the cell, with autograd.

    The slices of [x ; h'] and c have the same leading shape. Where the backend can, h lies in a buffer with ``left``
    free columns before it.
    """
    shape, features = c.shape, c.shape[-1]
    if c.dim() != 2:
        slices = [piece.reshape(-1, piece.shape[-1]) for piece in slices]
        hidden = None if hidden is None else hidden.reshape(-1, features)
        c = c.reshape(-1, features)
    if torch.compiler.is_compiling() or is_jit_tracing():
        # traced as plain GEMMs, which inductor plans better than an opaque operator
        h, c = _operators[backend].traced.forward(project(slices, w), b, hidden, c, weight, bias, seed, *options)
        return (h, c) if len(shape) == 2 else (h.view(shape), c.view(shape))
    record = RECORDS[backend]
    buffer, out = None, ()
    if left and record.writes_into_buffer and is_direct(w):
        buffer, *out = shared_buffer.reserve(c.shape[0], left, features, like=w)  # type: ignore[assignment]
    if torch.is_grad_enabled():
        h, c = CellFunction.apply(w, b, hidden, c, weight, bias, seed, options, backend, out, *slices)
    else:
        with below_autograd():
            slices, more = shared_buffer.side_by_side(slices), {}
            few = c.shape[0] <= FEW_ROWS and len(slices) > 1
            if few and record.adds_second_product and is_direct(w):  # the gates kernel adds the last product
                *slices, last = slices
                first, columns = w.tensor_split((w.shape[1] - last.shape[1],), dim=1)
                z, more = project(slices, first), {"z_more": last @ columns.t()}
            elif few:
                z = torch.nn.functional.linear(torch.cat(slices, dim=1), w)
            else:
                z = project(slices, w)
            operators = _operators[backend].eager(z)
            h, c = operators.forward(z, b, hidden, c, weight, bias, seed, *options, *out, **more)
    if len(shape) != 2:
        h, c = h.view(shape), c.view(shape)
    if buffer is not None:
        shared_buffer.mark(h, buffer)
    return h, c
