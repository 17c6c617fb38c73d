"""z = [x | h] W^T for slices that are not concatenated, and the gradient of W."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import POOLED_BYTES, empty_matrix
from ..modes import is_direct, is_watched
from .shared_buffer import side_by_side


def _in_place(*tensors: Tensor) -> bool:
    """Return whether products of ``tensors`` may be written with ``out=``."""
    return not torch.compiler.is_compiling() and not is_watched() and all(map(is_direct, tensors))


def project(slices: list[Tensor], w: Tensor) -> Tensor:
    """Return [slices] W^T for slices (N, width) of the columns of W.

    The first GEMM writes, the others accumulate. Checkpointing policies and tracers see aten.mm for the first GEMM and
    aten.addmm for the others.
    """
    in_place = _in_place(w, *slices)
    if len(slices) > 1 and in_place:
        slices = side_by_side(slices)
    columns = w.split([part.shape[1] for part in slices], dim=1)
    z = _product(slices[0], columns[0].t(), in_place)
    for part, column in zip(slices[1:], columns[1:], strict=True):
        z = torch.addmm(z, part, column.t(), out=z) if in_place else torch.addmm(z, part, column.t())
    return z


def _product(a: Tensor, b: Tensor, in_place: bool) -> Tensor:
    """a b, in memory of the pool where it is large."""
    if in_place and a.shape[0] * b.shape[1] * a.itemsize >= POOLED_BYTES:
        return torch.mm(a, b, out=empty_matrix(a, a.shape[0], b.shape[1]))
    return torch.mm(a, b)


def slice_gradients(dz: Tensor, w: Tensor, widths: list[int], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the gradients of the slices in :func:`project`, None for those that are not needed."""
    in_place = _in_place(dz, w)
    if all(needs):
        # One GEMM and views of it: a GEMM for each slice would read dz again (113 ms against 96 ms at N=4096, D=512,
        # fp32).
        return list(_product(dz, w, in_place).split(widths, dim=1))
    columns = w.split(widths, dim=1)
    return [_product(dz, part, in_place) if needed else None for part, needed in zip(columns, needs, strict=True)]


def weight_gradient(dz: Tensor, slices: list[Tensor], w: Tensor) -> Tensor:
    """Return the gradient of W in :func:`project`."""
    if not _in_place(dz, w, *slices):
        return torch.cat([torch.mm(dz.t(), part) for part in slices], dim=1)
    dw = empty_matrix(w, *w.shape)
    slices = side_by_side(slices)
    for part, columns in zip(slices, dw.split([part.shape[1] for part in slices], dim=1), strict=True):
        torch.mm(dz.t(), part, out=columns)
    return dw
