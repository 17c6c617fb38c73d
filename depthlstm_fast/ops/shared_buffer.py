"""[x | h]: buffers that hold a cell's input and state side by side.

One product then reads both, and nothing is concatenated:

- A cell that knows the width of the next cell's input makes a buffer (rows, width + D) (``reserve``). Its gates kernel
  writes h into the right part.
- The projection before the next cell writes x into the left part (``linear_into``).
- The product finds the two beside each other (``side_by_side``).

Two products with slices of W, the second accumulating, read and write z once more: 8D elements a token. Everything
after the product moves 7D.

The tensor object h has its buffer as an attribute, and the first writer takes it. A new tensor made of h (by a hook, a
wrapper or the user's own residual) has no buffer, which costs speed only. The parts are separate tensors over one
storage and not views. Writing x must not look like a change of h, which attention has saved for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modes import is_direct, is_watched
from .once_differentiable import once_differentiable

_ATTRIBUTE = "_depthlstm_buffer"


def part(buffer: Tensor, first: int, width: int) -> Tensor:
    """Return columns first .. first + width - 1 of a contiguous matrix, without copying.

    The result shares no version counter with other parts.
    """
    empty = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), first, (buffer.shape[0], width), (buffer.shape[1], 1))


def reserve(rows: int, left: int, features: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (buffer, h): a matrix (rows, left + features) and its right part, dtype and device of ``like``."""
    buffer = torch.empty((rows, left + features), dtype=like.dtype, device=like.device)
    return buffer, part(buffer, left, features)


def mark(h: Tensor, buffer: Tensor) -> None:
    """Note that the columns of ``buffer`` left of h are free."""
    setattr(h, _ATTRIBUTE, buffer)


def pass_on(source: Tensor, view: Tensor) -> Tensor:
    """Return ``view``; a view of all of ``source`` takes over its free columns."""
    buffer = getattr(source, _ATTRIBUTE, None)
    if (
        buffer is not None
        and view is not source
        and view.data_ptr() == source.data_ptr()
        and view.numel() == source.numel()
    ):
        delattr(source, _ATTRIBUTE)
        mark(view, buffer)
    return view


def take(h: Tensor, left: int) -> Tensor | None:
    """Take the buffer of h if ``left`` columns beside h are free; None otherwise.

    The columns are then no longer free, because two users of one h must not write to one place. The result is also None
    where :func:`is_watched`: an h recomputed by activation checkpointing has no free columns.
    """
    buffer = getattr(h, _ATTRIBUTE, None)
    if buffer is None or buffer.shape != (h.numel() // h.shape[-1], left + h.shape[-1]):
        return None
    if is_watched():
        return None
    delattr(h, _ATTRIBUTE)
    return buffer


def side_by_side(slices: list[Tensor]) -> list[Tensor]:
    """Return the slices (rows, width) as one matrix if they follow each other in memory, else unchanged.

    Subclasses of Tensor are left unchanged, because they have no memory of their own to compare.
    """
    if not all(map(is_direct, slices)):
        return slices
    first, stride, width = slices[0], slices[0].stride(0), 0
    for piece in slices:
        beside = piece.data_ptr() == first.data_ptr() + width * first.itemsize and piece.stride() == (stride, 1)
        if not beside or piece.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return slices
        width += piece.shape[1]
    return [first.as_strided((first.shape[0], width), (stride, 1))] if len(slices) > 1 and width <= stride else slices


class LinearInto(torch.autograd.Function):
    """(x, weight, bias, base, (out,)) -> base + x W^T + b for matrices, written into ``out``.

    bias and base may be None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor | None, holder: tuple[Tensor]
    ) -> Tensor:
        (out,) = holder  # the tuple hides out from autograd: its old contents have no gradient
        if base is not None:
            if bias is not None:
                torch.add(base, bias, out=out)
            else:
                out.copy_(base)
            out.addmm_(x, weight.t())
        elif bias is not None:
            torch.addmm(bias, x, weight.t(), out=out)
        else:
            torch.mm(x, weight.t(), out=out)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = saved
        needs = ctx.needs_input_grad
        return (
            grad @ weight if needs[0] else None,
            grad.t() @ x if needs[1] else None,
            grad.sum(0) if needs[2] else None,
            grad if needs[3] else None,
            None,
        )


def linear_into(
    buffer: Tensor, first: int, x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor | None = None
) -> Tensor:
    """Return base + x W^T + b in the columns of ``buffer`` from ``first`` on; x (..., I), base and result (..., R)."""
    out = part(buffer, first, weight.shape[0])
    bases = None if base is None else base.reshape(out.shape)
    written = LinearInto.apply(x.reshape(out.shape[0], weight.shape[1]), weight, bias, bases, (out,))
    return written.view(*x.shape[:-1], weight.shape[0])
