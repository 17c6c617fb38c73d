"""[x | h]: buffers in which the input and the state of a cell lie side by side, so that one product reads both and
    nothing is concatenated.

A cell that knows the width of the next cell's input makes a buffer (rows, width + D) and its gates kernel writes h into
the right part (``reserve``); the projection before the next cell writes x into the left part (``linear_into``); the
product then finds the two beside each other (``side_by_side``). Two slices of W in their stead, the second
accumulating, read and write z once more: 8D elements a token, where everything after the product moves 7D.

Which buffer an h belongs to is an attribute of that very tensor object, taken by the first who writes. Whatever makes a
new tensor of h (a hook, a wrapper, a residual of the user's own) loses it, which costs speed and nothing else. The
parts are tensors of their own over
one storage, not views: writing x must not look like a change of h, which attention has saved for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modes import is_direct, is_watched
from .once_differentiable import once_differentiable

_ATTRIBUTE = "_depthlstm_buffer"


def part(buffer: Tensor, first: int, width: int) -> Tensor:
    """Columns first .. first + width - 1 of a contiguous matrix, as a tensor that shares no version counter with other
    parts.
    """
    empty = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), first, (buffer.shape[0], width), (buffer.shape[1], 1))


def reserve(rows: int, left: int, features: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(buffer, h): a matrix (rows, left + features) and its right part, dtype and device of ``like``."""
    buffer = torch.empty((rows, left + features), dtype=like.dtype, device=like.device)
    return buffer, part(buffer, left, features)


def mark(h: Tensor, buffer: Tensor) -> None:
    """Note that the columns of ``buffer`` left of h are free."""
    setattr(h, _ATTRIBUTE, buffer)


def pass_on(source: Tensor, view: Tensor) -> Tensor:
    """``view``, with the free columns of ``source`` where it is a view of all of it; they are then source's no more."""
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
    """The buffer of h, if ``left`` columns beside it are free, which then they are no more: two users of one h must not
    write to one place.

    None where something watches, see :func:`is_watched`: recomputed by activation checkpointing, h would have no free
    columns.
    """
    buffer = getattr(h, _ATTRIBUTE, None)
    if buffer is None or buffer.shape != (h.numel() // h.shape[-1], left + h.shape[-1]):
        return None
    if is_watched():
        return None
    delattr(h, _ATTRIBUTE)
    return buffer


def side_by_side(slices: list[Tensor]) -> list[Tensor]:
    """The slices (rows, width) as one matrix where each begins in memory where the one before it ends, else as they
    are.

    A subclass of Tensor has no memory of its own to look at.
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
    """(x, weight, bias, base, (out,)) -> base + x W^T + b, for matrices, written into ``out``; bias and base may be
    None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor | None, holder: tuple[Tensor]
    ) -> Tensor:
        (out,) = holder  # in a tuple autograd does not see it: what it held before has no gradient
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
    """base + x W^T + b in columns ``first`` and following of ``buffer``; x (..., I), base and the result (..., R)."""
    out = part(buffer, first, weight.shape[0])
    bases = None if base is None else base.reshape(out.shape)
    written = LinearInto.apply(x.reshape(out.shape[0], weight.shape[1]), weight, bias, bases, (out,))
    return written.view(*x.shape[:-1], weight.shape[0])
