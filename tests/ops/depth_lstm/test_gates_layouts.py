"""Layouts of every tensor argument and gradient, and unwritten memory."""

from __future__ import annotations

from collections.abc import Callable

import poisoned_malloc
import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    F16,
    F32,
    MAIN_TYPES,
    Types,
    arguments,
    assert_identical,
    check_gates,
    cotangents,
    fused,
    needs_cpp,
    results,
)
from torch import Tensor

pytestmark = needs_cpp


def row_slice(x: Tensor) -> Tensor:
    """Return rows that are parts of wider ones, as chunks of a projection are; the rest of the row is NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def transposed(x: Tensor) -> Tensor:
    """Swap the two leading dimensions in memory: (length, batch) beside (batch, length).

    Features stay dense.
    """
    if x.dim() < 3:
        return x.t().contiguous().t()
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def strided_features(x: Tensor) -> Tensor:
    """Return every second element of rows, which kernels cannot read and must copy."""
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    """Return one row for all: stride 0 in the leading dimensions."""
    return x[(0,) * (x.dim() - 1)].expand(x.shape)


def expanded_once(x: Tensor) -> Tensor:
    """Return stride 0 in the last leading dimension only, as a mean over positions has."""
    return x[..., :1, :].expand(x.shape)


LAYOUTS = [row_slice, transposed, strided_features, expanded, expanded_once]


def name(layout: Callable) -> str:
    return layout.__name__


# 5 layouts of inputs x 5 of gradients x 3 types, on a batch of (2, 3, 2) rows, where a single row stride may not exist
@pytest.mark.parametrize("types", [Types(F32, F32, F32), Types(BF16, F32, F32), Types(F16, F16, F16)], ids=str)
@pytest.mark.parametrize("gradients", LAYOUTS, ids=name)
@pytest.mark.parametrize("inputs", LAYOUTS, ids=name)
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_layouts(inputs: Callable, gradients: Callable, types: Types, kind: str) -> None:
    tensors, options = arguments((2, 3, 2), 33, types, kind=kind)
    tensors = {name: inputs(tensor) for name, tensor in tensors.items()}
    dh, dc = (gradients(gradient) for gradient in cotangents(tensors))
    found = check_gates(tensors, options, (dh, dc))
    dense = results(
        fused,
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        (dh.contiguous(), dc.contiguous()),
        **options,
    )
    assert_identical(found, dense)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("argument", ["z", "c", "weight", "bias", "hidden", "dh", "dc"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_one_argument_strided(layout: Callable, argument: str, shape: tuple[int, ...]) -> None:
    """Check one strided argument beside dense ones, so that no argument's stride can stand in for another's."""
    tensors, options = arguments(shape, 17, MAIN_TYPES[0], kind="given")
    dh, dc = cotangents(tensors)
    given = {**tensors, "dh": dh, "dc": dc}
    given[argument] = layout(given[argument])

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return results(fused, {key: values[key] for key in tensors}, (values["dh"], values["dc"]), **options)

    assert_identical(run(given), run({key: value.contiguous() for key, value in given.items()}))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_size_one_dimensions_have_any_stride(dim: int) -> None:
    """Check that the arbitrary stride of a size-1 dimension is not taken for the row stride."""
    tensors, options = arguments((2, 3, 2), 9, MAIN_TYPES[0])
    odd = {
        key: torch.as_strided(x.unsqueeze(dim), *_odd_stride(x, dim)) if x.dim() > 2 else x
        for key, x in tensors.items()
    }
    found = fused(**odd, **options)
    wanted = fused(**{key: x.unsqueeze(dim) if x.dim() > 2 else x for key, x in tensors.items()}, **options)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def _odd_stride(x: Tensor, dim: int) -> tuple[list[int], list[int]]:
    sizes, strides = list(x.shape), list(x.stride())
    sizes.insert(dim, 1)
    strides.insert(dim, 987654321)
    return sizes, strides


def test_outputs_are_dense_and_apart() -> None:
    tensors, options = arguments((4, 3), 17, MAIN_TYPES[0])
    found = results(fused, {key: transposed(tensor) for key, tensor in tensors.items()}, cotangents(tensors), **options)
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(found)


@pytest.mark.parametrize("offset", [1, 3, 7])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_that_is_not_aligned(dtype: torch.dtype, offset: int) -> None:
    tensors, options = arguments(5, 33, Types(dtype, dtype, dtype))

    def shifted(x: Tensor) -> Tensor:
        room = torch.full((x.numel() + offset,), torch.nan, dtype=x.dtype)
        room[offset:] = x.flatten()
        return room[offset:].view(x.shape)

    dh, dc = cotangents(tensors)
    found = results(
        fused, {key: shifted(tensor) for key, tensor in tensors.items()}, (shifted(dh), shifted(dc)), **options
    )
    assert_identical(found, results(fused, tensors, (dh, dc), **options))


@pytest.mark.skipif(not poisoned_malloc.POISONED, reason="the poison is glibc's")
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize(("rows", "features"), [(1, 3), (3, 7), (40, 33), (70, 512)])
def test_memory_that_nobody_wrote(rows: int, features: int, norm: str, affine: bool, kind: str, types: Types) -> None:
    """Check that no result depends on unwritten memory, bit for bit.

    Heap and stack are full of NaN, and of zeros, before forward and before backward.
    """
    internals = pytest.importorskip("_internals", reason="tests/_internals is not built (make internals)")
    tensors, options = arguments(rows, features, types, norm, affine, kind)
    options.update(dropout_p=0.2, training=True, seed=torch.tensor([5]))
    grads = cotangents(tensors)
    found = []
    for fill in (0xFF, 0):  # of the bytes
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        try:
            poisoned_malloc.poison_malloc(0x1FF - fill)
            internals.dirty_stack(1 << 18, fill)
            outputs = fused(**leaves, **options)
            # runs right before the kernel's backward
            outputs[0].register_hook(lambda _, fill=fill: internals.dirty_stack(1 << 18, fill))
            gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
        finally:
            poisoned_malloc.poison_malloc()
        found.append(
            {"h": outputs[0].detach(), "c_out": outputs[1].detach(), **dict(zip(leaves, gradients, strict=True))}
        )
    assert all(value.isfinite().all() for value in found[0].values())
    assert_identical(found[0], found[1])


def test_the_poison_works() -> None:
    if poisoned_malloc.POISONED:
        assert torch.empty(1 << 14).isnan().all()
