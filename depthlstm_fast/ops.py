"""The operators of the extension in torch: shapes for tracing, autograd, and the eager functions around them.

In eager an autograd.Function calls the operators below the dispatcher's autograd key, which costs a third of
torch.library's own autograd; a tracer sees the operators themselves, with the autograd that is registered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .backends import load_error
from .checks import ACTIVATIONS, NORMS

NORM_CODES = {name: code for code, name in enumerate(NORMS)}
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

# Decoding steps: a product a slice reads W in two strided halves, which costs more than copying so few rows
# (D=256, two cores: 73 us against 48 us for 1 row, 744 us against 537 us for 64 rows).
FEW_ROWS = 64

Grads = tuple[Tensor | None, ...]
_SECOND_DERIVATIVE = (
    "trying to differentiate twice a function that was marked with @once_differentiable: the fused depth-wise LSTM has no "
    'second derivative; use backend="reference" (or depthlstm_fast.use_backend("reference")) for double backward'
)


def once_differentiable(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """torch's decorator of this name for ``backward(ctx, saved_tensors, *grads)``, with an error that says what to do instead."""

    def wrapper(ctx: Any, *grads: Tensor | None) -> Grads:
        saved = ctx.saved_tensors
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return outputs
        present = [output for output in outputs if output is not None]
        # the error hangs on what the gradients depend on: torch.autograd.grad runs only what leads to its inputs
        sources = [tensor for tensor in (*grads, *saved) if tensor is not None and tensor.requires_grad]
        error = torch._C._functions.DelayedError(_SECOND_DERIVATIVE.encode(), len(present) + len(sources))
        marked = iter(error(*[output.detach().requires_grad_() for output in present], *sources))
        return tuple(None if output is None else next(marked) for output in outputs)

    return wrapper


def _sizes_like(*tensors: Tensor | None, like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _forward_fake(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p):  # type: ignore[no-untyped-def]
    return torch.empty_like(c, dtype=z.dtype, memory_format=torch.contiguous_format), *_sizes_like(c, like=z)


def _backward_fake(  # type: ignore[no-untyped-def]
    dh, dc, z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, affine_gradient, z_bias_gradient
):
    affine = (weight, bias) if affine_gradient else (None, None)
    return tuple(_sizes_like(z, hidden, c, *affine, z_bias if z_bias_gradient else None, like=z))


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, saved: tuple[Tensor | None, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
    """Gradients of (z, z_bias, hidden, c, weight, bias), from the tensors that ``_save`` kept."""
    if dh is None and dc is None:
        return (None,) * 6
    z, z_bias, hidden, c, weight, bias, seed = saved
    needs = ctx.needs_input_grad
    affine, z_bias_gradient = (needs[4] or needs[5]) and weight is not None, needs[1] and z_bias is not None
    dz, dhidden, dc_in, dweight, dbias, dz_bias = gates_backward(
        dh, dc, z, z_bias, hidden, c, weight, bias, seed, *ctx.options, affine, z_bias_gradient
    )
    return (
        dz,
        dz_bias if z_bias_gradient else None,
        dhidden if hidden is not None else None,
        dc_in,
        dweight if affine else None,
        dbias if affine else None,
    )


class GatesFunction(torch.autograd.Function):
    """(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p) -> (h, c)"""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Any) -> tuple[Tensor, Tensor]:
        _save(ctx, inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return gates_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor | None, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
        return (*_gradients(ctx, saved, dh, dc), None, None, None, None, None)


class CellFunction(torch.autograd.Function):
    """(w, b, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, *slices) -> (h, c)

    ``slices`` are the parts of [x ; h'], each (rows, width): W is applied to them one after the other, so that nothing is
    concatenated, and z is kept as it leaves the GEMM; its bias is added by the gates kernel.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        w, b, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, *slices = inputs
        with torch._C._AutoDispatchBelowAutograd():
            z = project(slices, w)
            h, c_out = gates_forward(z, b, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p)
        ctx.save_for_backward(z, b, hidden, c, weight, bias, seed, w, *slices)
        ctx.options = (norm, activation, eps, dropout_p)
        ctx.set_materialize_grads(False)
        return h, c_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
        z, b, hidden, c, weight, bias, seed, w, *slices = saved
        if dh is None and dc is None:
            return (None,) * (11 + len(slices))
        needs = ctx.needs_input_grad
        affine, b_gradient = (needs[4] or needs[5]) and weight is not None, needs[1] and b is not None
        dz, dhidden, dc_in, dweight, dbias, db = gates_backward(
            dh, dc, z, b, hidden, c, weight, bias, seed, *ctx.options, affine, b_gradient
        )
        widths = [part.shape[1] for part in slices]
        dslices: list[Tensor | None] = [None] * len(slices)
        if all(needs[11:]):
            # one GEMM and views of it: a GEMM a slice reads dz once more for each (113 ms against 96 ms at N=4096, D=512, fp32)
            dslices = list((dz @ w).split(widths, dim=1))
        else:
            for i, columns in enumerate(w.split(widths, dim=1)):
                dslices[i] = dz @ columns if needs[11 + i] else None
        dw = None
        if needs[0]:
            dw = torch.empty_like(w, memory_format=torch.contiguous_format)
            for part, columns in zip(slices, dw.split(widths, dim=1), strict=True):
                torch.mm(dz.t(), part, out=columns)
        affine_gradients = (dweight, dbias) if affine else (None, None)
        hidden_gradient = dhidden if hidden is not None else None
        return (dw, db if b_gradient else None, hidden_gradient, dc_in, *affine_gradients, None, None, None, None, None, *dslices)


def project(slices: list[Tensor], w: Tensor) -> Tensor:
    """[slices] W^T for slices (rows, width) of the columns of W: the first GEMM writes, the others accumulate."""
    columns = w.split([part.shape[1] for part in slices], dim=1)
    z = slices[0] @ columns[0].t()
    for part, column in zip(slices[1:], columns[1:], strict=True):
        z = torch.addmm(z, part, column.t()) if torch.compiler.is_compiling() else torch.addmm(z, part, column.t(), out=z)
    return z


def gates(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The gates with autograd; arguments as :class:`GatesFunction`."""
    if torch.compiler.is_compiling():
        return gates_forward(*inputs)
    if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs[:6]):
        return GatesFunction.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return gates_forward(*inputs)


def cell(slices: list[Tensor], w: Tensor, b: Tensor | None, hidden: Tensor | None, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The cell with autograd: slices of [x ; h'] and c of the same leading shape; rest as :class:`CellFunction`."""
    shape, features = c.shape, c.shape[-1]
    if c.dim() != 2:
        slices = [part.reshape(-1, part.shape[-1]) for part in slices]
        hidden = None if hidden is None else hidden.reshape(-1, features)
        c = c.reshape(-1, features)
    if torch.compiler.is_compiling():
        # traced as plain GEMMs, which inductor plans better than an opaque operator
        h, c = gates_forward(project(slices, w), b, hidden, c, *rest)
    elif torch.is_grad_enabled():
        h, c = CellFunction.apply(w, b, hidden, c, *rest, *slices)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            few = c.shape[0] <= FEW_ROWS
            h, c = gates_forward(
                torch.nn.functional.linear(torch.cat(slices, dim=1), w) if few else project(slices, w), b, hidden, c, *rest
            )
    return (h, c) if len(shape) == 2 else (h.view(shape), c.view(shape))


def _register() -> tuple[Callable[..., Any], Callable[..., Any]]:
    name = "depthlstm_fast::gates_forward"
    torch.library.register_fake(name, _forward_fake)
    torch.library.register_fake("depthlstm_fast::gates_backward", _backward_fake)
    torch.library.register_autograd(
        name,
        lambda ctx, dh, dc: (*_gradients(ctx, ctx.saved_tensors, dh, dc), None, None, None, None, None),
        setup_context=lambda ctx, inputs, output: _save(ctx, inputs),
    )
    return torch.ops.depthlstm_fast.gates_forward.default, torch.ops.depthlstm_fast.gates_backward.default


if load_error is None:
    gates_forward, gates_backward = _register()
