"""The operators of the backends in torch: shapes for tracing, autograd, and the eager functions around them.

A backend is a pair of operators of one schema. In eager an autograd.Function calls them below the dispatcher's autograd key, which
costs a third of torch.library's own autograd; a tracer sees the operators themselves, with the autograd that is registered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import beside, checks
from .backends import load_error, triton_limit
from .checks import ACTIVATIONS, NORMS
from .derivatives import Grads, once_differentiable
from .modes import is_direct, is_jit_tracing, is_watched

NORM_CODES = {name: code for code, name in enumerate(NORMS)}
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

# Decoding steps: a product a slice reads W in two strided halves, which costs more than copying so few rows
# (D=256, two cores: 73 us against 48 us for 1 row, 744 us against 537 us for 64 rows).
FEW_ROWS = 64

FORWARD_SCHEMA = (
    "(Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, Tensor? bias, Tensor? seed, int norm, int activation, "
    "float eps, float dropout_p) -> (Tensor h, Tensor c_out)"
)
BACKWARD_SCHEMA = (
    "(Tensor? dh, Tensor? dc, Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, Tensor? bias, Tensor? seed, "
    "int norm, int activation, float eps, float dropout_p, bool affine_gradient, bool z_bias_gradient) "
    "-> (Tensor dz, Tensor dhidden, Tensor dc_in, Tensor dweight, Tensor dbias, Tensor dz_bias)"
)


class Operators(NamedTuple):
    """The gates of one backend: functions of FORWARD_SCHEMA and BACKWARD_SCHEMA."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]


OPERATORS: dict[str, Operators] = {}
DIRECT: dict[str, Operators] = {}  # what eager runs in their stead
WRITES_INTO_BUFFER = ("triton", "cuda")  # backends whose direct forward takes h as one more argument


def _sizes_like(*tensors: Tensor | None, like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _forward_fake(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p):  # type: ignore[no-untyped-def]
    return torch.empty_like(c, dtype=z.dtype, memory_format=torch.contiguous_format), *_sizes_like(c, like=z)


def _forward_into_fake(z, z_bias, hidden, c, *rest):  # type: ignore[no-untyped-def]
    return _sizes_like(c, like=z)[0]


def _backward_fake(  # type: ignore[no-untyped-def]
    dh, dc, z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, affine_gradient, z_bias_gradient
):
    affine = (weight, bias) if affine_gradient else (None, None)
    return tuple(_sizes_like(z, hidden, c, *affine, z_bias if z_bias_gradient else None, like=z))


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _operators(backend: str, z: Tensor) -> Operators:
    """What an eager call on ``z`` runs."""
    if backend in DIRECT:
        return DIRECT[backend]
    if backend == "triton" and is_direct(z):  # past the dispatcher, which takes longer than the launch
        from .kernels import gates

        return Operators(gates.gates_forward, gates.gates_backward)
    return OPERATORS[backend]


def _gradients(ctx: Any, saved: tuple[Tensor | None, ...], operators: Operators, dh: Tensor | None, dc: Tensor | None) -> Grads:
    """Gradients of (z, z_bias, hidden, c, weight, bias), from the tensors that ``_save`` kept."""
    if dh is None and dc is None:
        return (None,) * 6
    z, z_bias, hidden, c, weight, bias, seed = saved
    needs = ctx.needs_input_grad
    affine, z_bias_gradient = (needs[4] or needs[5]) and weight is not None, needs[1] and z_bias is not None
    dz, dhidden, dc_in, dweight, dbias, dz_bias = operators.backward(
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
    """(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, backend) -> (h, c)"""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *inputs, backend = inputs  # type: ignore[assignment]
        _save(ctx, inputs)
        ctx.backend = backend
        with torch._C._AutoDispatchBelowAutograd():
            return _operators(backend, inputs[0]).forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
        return (*_gradients(ctx, saved, _operators(ctx.backend, saved[0]), dh, dc), None, None, None, None, None, None)


class CellFunction(torch.autograd.Function):
    """(w, b, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, backend, out, *slices) -> (h, c)

    ``out`` is () or (h,), a tensor that h is to be written into. ``slices`` are the parts of [x ; h'], each (rows, width): W is applied to
    them at once where they lie side by side in memory, and else to one after the other, so that nothing is concatenated. z is kept as it
    leaves the GEMM; the gates kernel adds its bias.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        w, b, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, backend, out, *slices = inputs
        with torch._C._AutoDispatchBelowAutograd():
            z = project(slices, w)
            h, c_out = _operators(backend, z).forward(z, b, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, *out)
        ctx.save_for_backward(z, b, hidden, c, weight, bias, seed, w, *slices)
        ctx.options, ctx.backend = (norm, activation, eps, dropout_p), backend
        ctx.set_materialize_grads(False)
        return h, c_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], dh: Tensor | None, dc: Tensor | None) -> Grads:
        z, b, hidden, c, weight, bias, seed, w, *slices = saved
        if dh is None and dc is None:
            return (None,) * (13 + len(slices))
        needs = ctx.needs_input_grad
        affine, b_gradient = (needs[4] or needs[5]) and weight is not None, needs[1] and b is not None
        dz, dhidden, dc_in, dweight, dbias, db = _operators(ctx.backend, z).backward(
            dh, dc, z, b, hidden, c, weight, bias, seed, *ctx.options, affine, b_gradient
        )
        widths = [part.shape[1] for part in slices]
        dslices: list[Tensor | None] = [None] * len(slices)
        if all(needs[13:]):
            # one GEMM and views of it: a GEMM a slice reads dz once more for each (113 ms against 96 ms at N=4096, D=512, fp32)
            dslices = list((dz @ w).split(widths, dim=1))
        else:
            for i, columns in enumerate(w.split(widths, dim=1)):
                dslices[i] = dz @ columns if needs[13 + i] else None
        dw = _weight_gradient(dz, slices, w) if needs[0] else None
        affine_gradients = (dweight, dbias) if affine else (None, None)
        hidden_gradient = dhidden if hidden is not None else None
        return (dw, db if b_gradient else None, hidden_gradient, dc_in, *affine_gradients, *(None,) * 7, *dslices)


def _in_place(*tensors: Tensor) -> bool:
    """Whether products of ``tensors`` may be written with ``out=``."""
    return not torch.compiler.is_compiling() and not is_watched() and all(map(is_direct, tensors))


def project(slices: list[Tensor], w: Tensor) -> Tensor:
    """[slices] W^T for slices (rows, width) of the columns of W: the first GEMM writes, the others accumulate.

    Checkpointing policies and tracers see aten.mm for the first and aten.addmm for the others.
    """
    in_place = _in_place(w, *slices)
    if len(slices) > 1 and in_place:
        slices = beside.side_by_side(slices)
    columns = w.split([part.shape[1] for part in slices], dim=1)
    z = torch.mm(slices[0], columns[0].t())
    for part, column in zip(slices[1:], columns[1:], strict=True):
        z = torch.addmm(z, part, column.t(), out=z) if in_place else torch.addmm(z, part, column.t())
    return z


def _weight_gradient(dz: Tensor, slices: list[Tensor], w: Tensor) -> Tensor:
    """The gradient of W in :func:`project`."""
    if not _in_place(dz, w, *slices):
        return torch.cat([torch.mm(dz.t(), part) for part in slices], dim=1)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    slices = beside.side_by_side(slices)
    for part, columns in zip(slices, dw.split([part.shape[1] for part in slices], dim=1), strict=True):
        torch.mm(dz.t(), part, out=columns)
    return dw


def gates(*inputs: Any, backend: str) -> tuple[Tensor, Tensor]:
    """The gates with autograd; arguments as :class:`GatesFunction`."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return OPERATORS[backend].forward(*inputs)
    if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs[:6]):
        return GatesFunction.apply(*inputs, backend)
    with torch._C._AutoDispatchBelowAutograd():
        return _operators(backend, inputs[0]).forward(*inputs)


def cell(
    slices: list[Tensor], w: Tensor, b: Tensor | None, hidden: Tensor | None, c: Tensor, *rest: Any, backend: str, left: int
) -> tuple[Tensor, Tensor]:
    """The cell with autograd: slices of [x ; h'] and c of the same leading shape; rest as :class:`CellFunction`.

    Where the backend can, h lies in a buffer with ``left`` free columns before it.
    """
    shape, features = c.shape, c.shape[-1]
    if c.dim() != 2:
        slices = [piece.reshape(-1, piece.shape[-1]) for piece in slices]
        hidden = None if hidden is None else hidden.reshape(-1, features)
        c = c.reshape(-1, features)
    if torch.compiler.is_compiling() or is_jit_tracing():
        # traced as plain GEMMs, which inductor plans better than an opaque operator
        h, c = OPERATORS[backend].forward(project(slices, w), b, hidden, c, *rest)
        return (h, c) if len(shape) == 2 else (h.view(shape), c.view(shape))
    buffer, out = None, ()
    if left and backend in WRITES_INTO_BUFFER and is_direct(w):
        buffer, *out = beside.reserve(c.shape[0], left, features, like=w)  # type: ignore[assignment]
    if torch.is_grad_enabled():
        h, c = CellFunction.apply(w, b, hidden, c, *rest, backend, out, *slices)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            slices = beside.side_by_side(slices)
            few, more = c.shape[0] <= FEW_ROWS and len(slices) > 1, dict[str, Tensor]()
            if few and backend == "cuda":  # the gates' own pass adds the last product up
                *slices, last = slices
                first, columns = w.tensor_split((w.shape[1] - last.shape[1],), dim=1)
                z, more = project(slices, first), {"z_more": last @ columns.t()}
            elif few:
                z = torch.nn.functional.linear(torch.cat(slices, dim=1), w)
            else:
                z = project(slices, w)
            h, c = _operators(backend, z).forward(z, b, hidden, c, *rest, *out, **more)
    if len(shape) != 2:
        h, c = h.view(shape), c.view(shape)
    if buffer is not None:
        beside.mark(h, buffer)
    return h, c


def _register(prefix: str, library: str = "depthlstm_fast") -> Operators:
    forward, backward = f"{library}::{prefix}gates_forward", f"{library}::{prefix}gates_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    namespace = getattr(torch.ops, library)
    operators = Operators(getattr(namespace, f"{prefix}gates_forward").default, getattr(namespace, f"{prefix}gates_backward").default)
    torch.library.register_autograd(
        forward,
        lambda ctx, dh, dc: (*_gradients(ctx, ctx.saved_tensors, operators, dh, dc), None, None, None, None, None),
        setup_context=lambda ctx, inputs, output: _save(ctx, inputs),
    )
    return operators


def register_cuda(library: str = "depthlstm_fast") -> tuple[Operators, Operators]:
    """The operators of the CUDA kernels for tracers, and for eager: that forward takes h and z_more, too, as csrc/cuda_ops.cpp has them."""
    torch.library.register_fake(f"{library}::cuda_gates_forward_into", _forward_into_fake)
    operators, into = _register("cuda_", library), getattr(torch.ops, library).cuda_gates_forward_into.default

    def forward(  # type: ignore[no-untyped-def]
        z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p, h=None, z_more=None
    ):
        inputs = (z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p)
        if h is None and z_more is None:
            return operators.forward(*inputs)
        if h is None:
            h = torch.empty(c.shape, dtype=z.dtype, device=z.device)
        return h, into(*inputs, z_more, h)

    return operators, Operators(forward, operators.backward)


def _check_operator(
    z: Tensor,
    z_bias: Tensor | None,
    hidden: Tensor | None,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    norm: int,
    activation: int,
    eps: float,
    dropout_p: float,
) -> None:
    """An operator can be called past the public functions, and wrong arguments would then be wrong memory accesses."""
    for argument, code, names in (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS)):
        if not 0 <= code < len(names):
            raise ValueError(f"{argument} must be 0 to {len(names) - 1}; found {code}")
    checks.check_eps("eps", eps)
    checks.check_probability("dropout_p", dropout_p)
    checks.check_gates(z, c, weight, bias, hidden, NORMS[norm], seed)
    if z_bias is not None:
        checks.check_companion("z_bias", z_bias, "z", z)
        checks.check_shape("z_bias", z_bias, (z.shape[-1],))
    limit = triton_limit(z, c.shape[-1])
    if limit is not None:
        raise ValueError(limit)


def _triton_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check_operator(*inputs)
    from .kernels import gates

    return gates.gates_forward(*inputs)


def _triton_backward(dh: Tensor | None, dc: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    _check_operator(*inputs[:11])
    z, c = inputs[0], inputs[3]
    for argument, gradient, like in (("dh", dh, z), ("dc", dc, c)):
        if gradient is not None:
            checks.check_companion(argument, gradient, "z" if like is z else "c", like, mixed=False)
            checks.check_shape(argument, gradient, tuple(c.shape))
    from .kernels import gates

    return gates.gates_backward(dh, dc, *inputs)


if load_error is None:  # the library defines and implements its operators, for the CPU
    OPERATORS["cpp"] = _register("")
    if hasattr(torch.ops.depthlstm_fast, "cuda_gates_forward"):
        OPERATORS["cuda"], DIRECT["cuda"] = register_cuda()
_triton_library = torch.library.Library("depthlstm_fast", "FRAGMENT")
_triton_library.define("triton_gates_forward" + FORWARD_SCHEMA)
_triton_library.define("triton_gates_backward" + BACKWARD_SCHEMA)
# one implementation for every device: Triton is imported when it first runs; interpreted, it takes CPU tensors
_triton_library.impl("triton_gates_forward", _triton_forward, "CompositeExplicitAutograd")
_triton_library.impl("triton_gates_backward", _triton_backward, "CompositeExplicitAutograd")
OPERATORS["triton"] = _register("triton_")
