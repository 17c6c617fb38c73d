"""depth_lstm_cell against eager PyTorch and fp64.

The product with slices of [x ; h'] and the gates are one autograd node.
"""

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
    assert_bound,
    assert_identical,
    double,
    fused_cell,
    needs_cpp,
    normal,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import depthlstm_fast as dl

pytestmark = needs_cpp

# dtype of x, h, w, hidden; of c, b and the affine
TYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]


def arguments(
    shape: tuple[int, ...],
    widths: tuple[int, ...],
    features: int,
    types: tuple[torch.dtype, torch.dtype] = (F64, F64),
    norm: str = "gate",
    affine: bool = True,
    kind: str = "gelu",
    bias: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random tensors by name (x0, x1, ... for the slices of x) and the options."""
    wide, narrow = types[1], types[0]
    gates = 3 if kind == "given" else 4
    columns = sum(widths) + features
    tensors = {f"x{i}": normal(*shape, width, dtype=narrow) for i, width in enumerate(widths)}
    tensors["h"] = normal(*shape, features, dtype=narrow)
    tensors["c"] = normal(*shape, features, dtype=wide)
    tensors["w"] = normal(gates * features, columns, dtype=narrow, scale=columns**-0.5)
    if bias:
        tensors["b"] = normal(gates * features, dtype=wide)
    if affine:
        tensors["weight"] = normal(gates, features, dtype=wide, scale=0.3, shift=1.0)
        tensors["bias"] = normal(gates, features, dtype=wide, scale=0.5)
    if kind == "given":
        tensors["hidden"] = normal(*shape, features, dtype=narrow)
    return tensors, {"norm": norm, "activation": "gelu" if kind == "given" else kind}


def call(function: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x = tuple(tensor for name, tensor in tensors.items() if name[0] == "x")
    rest = {name: tensor for name, tensor in tensors.items() if name[0] != "x"}
    return function(x if len(x) > 1 else x[0], **rest, **options)


def results(
    function: Any, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    h, c = call(function, leaves, options)
    found = torch.autograd.grad((h, c), list(leaves.values()), grads)
    return {"h": h.detach(), "c_out": c.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


def cotangents(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return normal(*tensors["c"].shape, dtype=tensors["h"].dtype), normal(*tensors["c"].shape, dtype=tensors["c"].dtype)


def check(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    grads = cotangents(tensors)
    found = results(fused_cell, tensors, grads, options)
    eager = results(dl.reference.depth_lstm_cell, tensors, grads, options)
    exact = results(dl.reference.depth_lstm_cell, double(tensors), (grads[0].double(), grads[1].double()), options)
    assert_bound(found, eager, exact)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("widths", [(24,), (5, 13), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_error_bound(
    norm: str, affine: bool, kind: str, widths: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]
) -> None:
    check(*arguments((4, 9), widths, 33, types, norm, affine, kind))


# one feature; less than, exactly and more than a vector; a model's width
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("types", [TYPES[0], TYPES[4]], ids=str)
@pytest.mark.parametrize("features", [1, 3, 16, 65, 512])
def test_features(features: int, types: tuple[torch.dtype, torch.dtype], bias: bool) -> None:
    check(*arguments((17,), (features,), features, types, bias=bias))


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_shapes(shape: tuple[int, ...], norm: str, affine: bool, kind: str) -> None:
    check(*arguments(shape, (4,), 6, (F64, F64), norm, affine, kind))


@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)], ids=str)
def test_no_rows(shape: tuple[int, ...], kind: str) -> None:
    """Check for an empty dx and a zero dw."""
    tensors, options = arguments(shape, (4, 2), 6, (F32, F32), kind=kind)
    found = results(fused_cell, tensors, cotangents(tensors), options)
    for name, tensor in tensors.items():
        assert found[f"d{name}"].shape == tensor.shape
        assert not found[f"d{name}"].any()


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_gradcheck(norm: str, affine: bool, kind: str) -> None:
    tensors, options = arguments((2, 2), (2, 1), 3, (F64, F64), norm, affine, kind)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return call(fused_cell, dict(zip(names, values, strict=True)), {**options, "eps": 1e-3})

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("argument", ["x0", "h", "c", "w", "b", "hidden", "dh", "dc"])
@pytest.mark.parametrize("layout", ["slice", "transposed", "features", "expanded"])
def test_layouts(layout: str, argument: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    tensors, options = arguments((3, 4), (5,), 9, types, kind="given")
    dh, dc = cotangents(tensors)
    given = {**tensors, "dh": dh, "dc": dc}
    x = given[argument]
    if layout == "slice":
        given[argument] = torch.cat((torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)), -1)[
            ..., x.shape[-1] : -x.shape[-1]
        ]
    elif layout == "transposed" and x.dim() > 1:
        given[argument] = transposed(x)
    elif layout == "features":
        given[argument] = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    elif x.dim() > 1:
        given[argument] = x[:1].expand(x.shape)
    found = results(fused_cell, {name: given[name] for name in tensors}, (given["dh"], given["dc"]), options)
    dense = {name: tensor.contiguous() for name, tensor in given.items()}
    wanted = results(fused_cell, {name: dense[name] for name in tensors}, (dense["dh"], dense["dc"]), options)
    tolerance = 1e-5 if types[0] == F32 else 2e-2  # a GEMM may choose another order of summation for another layout
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance)


def test_slices_of_one_buffer() -> None:
    """Check x and h' as the halves of one buffer, as a layer writes them for the next one."""
    tensors, options = arguments((6,), (8,), 8, (F32, F32))
    buffer = torch.cat((tensors["x0"], tensors["h"]), -1)
    halves = {**tensors, "x0": buffer[:, :8], "h": buffer[:, 8:]}
    grads = cotangents(tensors)
    found, wanted = (results(fused_cell, given, grads, options) for given in (halves, tensors))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


NAMES = ["x0", "h", "c", "w", "b", "weight", "bias", "hidden"]


@pytest.mark.parametrize(
    "wanted", [*[(name,) for name in NAMES], *itertools.combinations(["x0", "w", "b", "weight"], 2), ()], ids="-".join
)
def test_subsets_of_gradients(wanted: tuple[str, ...]) -> None:
    tensors, options = arguments((5,), (4,), 9, (F32, F32), kind="given" if "hidden" in wanted else "gelu")
    grads = cotangents(tensors)
    every = results(fused_cell, tensors, grads, options)
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    outputs = call(fused_cell, leaves, options)
    if wanted:
        torch.autograd.backward(outputs, grads)
    for name, leaf in leaves.items():
        if name in wanted:
            # not bit for bit: the number of wanted gradients decides the number of products
            torch.testing.assert_close(leaf.grad, every[f"d{name}"], rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("used", ["h", "c"])
def test_undefined_gradients_are_zeros(used: str) -> None:
    tensors, options = arguments((5,), (4,), 9, (F32, F32))
    dh, dc = cotangents(tensors)
    zeroed = (dh, torch.zeros_like(dc)) if used == "h" else (torch.zeros_like(dh), dc)
    wanted = results(fused_cell, tensors, zeroed, options)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    h, c = call(fused_cell, leaves, options)
    torch.autograd.backward([h] if used == "h" else [c], [dh] if used == "h" else [dc])
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted[f"d{name}"]), name


def test_nothing_given_is_written_and_backward_runs_twice() -> None:
    tensors, options = arguments((3, 5), (4, 2), 9, (BF16, F32), kind="given")
    grads = cotangents(tensors)
    given = {**tensors, "dh": grads[0], "dc": grads[1]}
    before = {name: tensor.clone() for name, tensor in given.items()}
    versions = {name: tensor._version for name, tensor in given.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = call(fused_cell, leaves, options)
    torch.autograd.backward(outputs, grads, retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    torch.autograd.backward(outputs, grads)
    assert_identical(
        {name: leaf.grad for name, leaf in leaves.items()}, {name: 2 * gradient for name, gradient in once.items()}
    )
    assert {name: tensor._version for name, tensor in given.items()} == versions
    assert_identical({name: tensor.detach() for name, tensor in given.items()}, before)


def test_kept_for_backward() -> None:
    """Check that only z is kept beside the arguments: no [x ; h'], no statistics, no gates."""
    tensors, options = arguments((6,), (8,), 8, (F32, F32))
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = call(fused_cell, leaves, options)
    assert outputs[0].grad_fn is outputs[1].grad_fn
    given = {tensor.data_ptr() for tensor in tensors.values()}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in given] == [(6, 32)]


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_autocast(kind: str, half: torch.dtype) -> None:
    """fp32 arguments under autocast: x, h, w and hidden are cast, c stays fp32, gradients come back in fp32."""
    tensors, options = arguments((4, 5), (7,), 33, (F32, F32), kind=kind)
    dh, dc = normal(4, 5, 33, dtype=half), normal(4, 5, 33, dtype=F32)

    def under_autocast(function: Any) -> dict[str, Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with torch.autocast("cpu", dtype=half):
            h, c = call(function, leaves, options)
        assert (h.dtype, c.dtype) == (half, F32)
        found = torch.autograd.grad((h, c), list(leaves.values()), (dh, dc))
        return {"h": h.detach(), "c_out": c.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}

    exact = results(dl.reference.depth_lstm_cell, double(tensors), (dh.double(), dc.double()), options)
    found, eager = under_autocast(fused_cell), under_autocast(dl.reference.depth_lstm_cell)
    # gradients of fp32 leaves pass through the 16-bit product, whose rounding is their unit, too
    for name, value in found.items():
        assert value.dtype == eager[name].dtype == (half if name == "h" else F32), name
        error = (value.double() - exact[name]).abs().max().item()
        allowed = 2 * (eager[name].double() - exact[name]).abs().max() + torch.finfo(half).eps * exact[name].abs().max()
        assert error <= allowed, name


def test_autocast_leaves_fp64_alone() -> None:
    tensors, options = arguments((5,), (4,), 9)
    with torch.autocast("cpu", dtype=BF16):
        h, c = call(fused_cell, tensors, options)
    assert h.dtype == c.dtype == F64


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout(reentrant: bool) -> None:
    """Check that the recomputation draws the same seed, because the generator state is saved."""
    tensors, options = arguments((40,), (4,), 9, (F32, F32))
    options.update(dropout_p=0.5, training=True)
    grads = cotangents(tensors)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return call(fused_cell, dict(zip(names, values, strict=True)), options)

    found = []
    for wrapped in (function, lambda *values: checkpoint(function, *values, use_reentrant=reentrant)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        torch.manual_seed(5)
        outputs = wrapped(*leaves)
        torch.autograd.backward(outputs, grads)
        found.append({"h": outputs[0].detach(), **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}})
    assert_identical(found[1], found[0])


@pytest.mark.parametrize("types", [TYPES[0], TYPES[1], TYPES[4]], ids=str)
@pytest.mark.parametrize("widths", [(24,), (5, 13)], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_without_gradients(
    norm: str, affine: bool, kind: str, widths: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]
) -> None:
    """Check few rows, which compute z in another way; the results equal the same call with gradients."""
    for rows in (1, 3, 64, 65):
        tensors, options = arguments((rows,), widths, 33, types, norm, affine, kind)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        wanted = call(fused_cell, leaves, options)
        assert wanted[0].requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = call(fused_cell, leaves, options)
            tolerance = 16 * torch.finfo(types[0]).eps  # another order of summation in z
            for a, b in zip(found, wanted, strict=True):
                assert not a.requires_grad
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
