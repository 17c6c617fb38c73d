"""depth_lstm_gates by the C++ kernels: values and gradients against fp64, and how they behave in autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    KINDS,
    MAIN_TYPES,
    NORMS,
    TYPES,
    Types,
    arguments,
    assert_identical,
    check_gates,
    cotangents,
    fused,
    needs_cpp,
    normal,
    results,
)
from torch import Tensor

import depthlstm_fast as dl

pytestmark = needs_cpp

SIZES = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024, 1600, 2048, 4096]


# A full cross product on purpose: (types, activation) is one compiled kernel, and norm and affine are branches in each.
# D = 33 is two vectors of 16 lanes and one element; N = 17 is small and no multiple of anything.
@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_error_bound(types: Types, kind: str, norm: str, affine: bool) -> None:
    check_gates(*arguments(17, 33, types, norm, affine, kind))


# Beside, on and beyond every vector width (2 to 16 lanes), a Philox block (4) and a group of them (64), and model widths up to
# 4096, whose rows are powers of two apart. Each shape of call at each size; fp32 and the mixture that autocast makes.
@pytest.mark.parametrize("types", [MAIN_TYPES[0], MAIN_TYPES[4]], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("features", SIZES)
def test_features(features: int, norm: str, affine: bool, kind: str, types: Types) -> None:
    check_gates(*arguments(17, features, types, norm, affine, kind))


# The other memory types load and store their last, partial vector by code of their own.
@pytest.mark.parametrize("types", MAIN_TYPES[1:4], ids=str)
@pytest.mark.parametrize("features", [1, 2, 3, 7, 31, 33, 65, 129, 512, 1000])
def test_features_of_other_types(features: int, types: Types) -> None:
    check_gates(*arguments(5, features, types))


ROWS = [0, 1, 2, 3, 17, 31, 32, 33, 64, 65, 1000, 2047, 2048, 2049]


# Parameter gradients are summed by chunks of at least 32 rows and at most 64 of them: beside and on both limits. D = 1 makes the
# row count the only size there is, 512 lets 33 rows be shared by threads; test_kernels_memory.py has thousands of rows of 512.
@pytest.mark.parametrize(
    ("rows", "features"), [(rows, features) for rows in ROWS for features in (1, 5, 33, 512) if features != 512 or rows <= 1000]
)
def test_rows(rows: int, features: int) -> None:
    check_gates(*arguments(rows, features, MAIN_TYPES[0]))


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3), (2, 1, 3), (1, 2, 1, 2)], ids=str)
def test_leading_shapes(shape: tuple[int, ...], norm: str, affine: bool, kind: str) -> None:
    found = check_gates(*arguments(shape, 9, MAIN_TYPES[0], norm, affine, kind))
    assert found["h"].shape == found["c_out"].shape == (*shape, 9)
    if 0 in shape and affine:
        assert not found["dweight"].any()
        assert not found["dbias"].any()


# eps that matters (0.5 beside a variance of 2), eps that is nothing, and eps beyond what fp16 can hold
@pytest.mark.parametrize("types", [MAIN_TYPES[0], MAIN_TYPES[3]], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5, 1e6])
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_eps(norm: str, eps: float, types: Types) -> None:
    tensors, options = arguments(9, 40, types, norm)
    check_gates(tensors, {**options, "eps": eps})


def test_norms_and_activations_differ() -> None:
    """A name that ran another's code would pass a comparison with a reference that makes the same mistake."""
    tensors, _ = arguments(5, 16, MAIN_TYPES[1], affine=False)
    outputs = [fused(**tensors, norm=norm)[0] for norm in dl.checks.NORMS]
    outputs += [fused(**tensors, activation=name)[0] for name in dl.checks.ACTIVATIONS[1:]]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-5  # the two GELUs differ by up to 5e-4


@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_kernel(kind: str, norm: str, affine: bool) -> None:
    tensors, options = arguments((2, 2), 5, MAIN_TYPES[1], norm, affine, kind)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return fused(**dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_gradcheck_with_dropout() -> None:
    tensors, options = arguments((3,), 6, MAIN_TYPES[1])
    options.update(dropout_p=0.4, training=True, seed=torch.tensor([7]))
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return fused(**dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_nothing_given_is_written(kind: str, types: Types) -> None:
    tensors, options = arguments(40, 33, types, kind=kind)
    options.update(dropout_p=0.3, training=True, seed=torch.tensor([3]))
    grads = cotangents(tensors)
    given = {**tensors, "seed": options["seed"], "dh": grads[0], "dc": grads[1]}
    before = {name: tensor.clone() for name, tensor in given.items()}
    versions = {name: tensor._version for name, tensor in given.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    kept = [output.detach().clone() for output in outputs]
    torch.autograd.grad(outputs, list(leaves.values()), grads)
    assert {name: tensor._version for name, tensor in given.items()} == versions
    assert_identical({name: tensor.detach() for name, tensor in given.items()}, before)
    assert_identical(dict(zip("hc", [output.detach() for output in outputs], strict=True)), dict(zip("hc", kept, strict=True)))
    for output in outputs:
        for name, tensor in given.items():
            assert output.data_ptr() != tensor.data_ptr(), name


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_backward_twice_gives_twice_the_gradient(norm: str, affine: bool, kind: str) -> None:
    tensors, options = arguments(40, 33, MAIN_TYPES[0], norm, affine, kind)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    grads = cotangents(tensors)
    torch.autograd.backward(outputs, grads, retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in leaves.items()}
    torch.autograd.backward(outputs, grads)
    assert_identical({name: tensor.grad for name, tensor in leaves.items()}, {name: 2 * gradient for name, gradient in once.items()})


def _subsets(names: list[str]) -> list[tuple[str, ...]]:
    return [subset for size in range(len(names) + 1) for subset in itertools.combinations(names, size)]


@pytest.mark.parametrize("wanted", _subsets(["z", "c", "weight", "bias", "hidden"]), ids="-".join)
def test_every_subset_of_gradients(wanted: tuple[str, ...]) -> None:
    kind = "given" if "hidden" in wanted else "gelu"
    tensors, options = arguments(5, 17, MAIN_TYPES[0], kind=kind)
    grads = cotangents(tensors)
    every = results(fused, tensors, grads, **options)
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    assert all(output.requires_grad == bool(wanted) for output in outputs)
    if wanted:
        torch.autograd.backward(outputs, grads)
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, every[f"d{name}"]), name
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("types", [MAIN_TYPES[0], MAIN_TYPES[1], MAIN_TYPES[4]], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("used", ["h", "c"])
def test_undefined_gradients_are_zeros(used: str, norm: str, affine: bool, kind: str, types: Types) -> None:
    tensors, options = arguments(5, 17, types, norm, affine, kind)
    dh, dc = cotangents(tensors)
    dh, dc = (dh, torch.zeros_like(dc)) if used == "h" else (torch.zeros_like(dh), dc)
    wanted = results(fused, tensors, (dh, dc), **options)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    h, c = fused(**leaves, **options)
    torch.autograd.backward([h] if used == "h" else [c], [dh] if used == "h" else [dc])
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted[f"d{name}"]), name


def test_neither_gradient() -> None:
    """An output can be in the graph and yet get no gradient: nothing may crash on it."""
    tensors, options = arguments(5, 17, MAIN_TYPES[0])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    h, c = fused(**leaves, **options)
    extra = normal(3).requires_grad_()
    gradients = torch.autograd.grad((extra * 2).sum(), [extra, h, c, *leaves.values()], allow_unused=True)
    assert gradients[1:] == (None,) * (len(leaves) + 2)


def test_no_graph_without_gradients() -> None:
    tensors, options = arguments(5, 17, MAIN_TYPES[0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not fused(**tensors, **options)[0].requires_grad
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with torch.no_grad():
        assert not fused(**leaves, **options)[0].requires_grad


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_kept_for_backward(kind: str) -> None:
    """Only what was given is kept: z, c', the affine, hidden and the seed, no copy and nothing derived."""
    tensors, options = arguments(5, 17, MAIN_TYPES[0], kind=kind)
    options.update(dropout_p=0.5, training=True, seed=torch.tensor([3]))
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused(**{name: tensor.requires_grad_() for name, tensor in tensors.items()}, **options)
    given = {tensor.data_ptr() for tensor in (*tensors.values(), options["seed"])}
    assert {tensor.data_ptr() for tensor in kept} == given


def test_saved_tensors_must_not_change() -> None:
    tensors, options = arguments(5, 17, MAIN_TYPES[0])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    z = leaves["z"] * 1
    h, _ = fused(**{**leaves, "z": z}, **options)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.backward(normal(*h.shape, dtype=F32))


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_result_types(types: Types) -> None:
    """h takes z's type and c keeps its own: a cell given in fp32 stays in fp32 over depth."""
    tensors, options = arguments(3, 8, types)
    h, c = fused(**tensors, **options)
    assert (h.dtype, c.dtype) == (types.z, types.c)


def test_fp32_cell_beside_16_bit_is_no_rounded_one() -> None:
    for half in (BF16, F16):
        tensors, options = arguments(4, 64, Types(half, F32, F32))
        exact = dl.reference.depth_lstm_gates(**{name: tensor.to(F64) for name, tensor in tensors.items()}, **options)[1]
        error = (fused(**tensors, **options)[1].double() - exact).abs().max()
        assert error < 1e-5  # a rounding to fp16 alone would be 2e-3
