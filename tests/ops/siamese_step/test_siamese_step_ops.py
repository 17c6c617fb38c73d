"""The operators of siamese_step in torch: opcheck, torch.compile, and direct calls with bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, Types, needs_cpp, normal
from op_siamese_step import arguments
from suite import FULL, MIXED
from torch import Tensor

import depthlstm_fast as dl

pytestmark = needs_cpp

OPS = torch.ops.depthlstm_fast
VARIANTS = [("layer", True), ("rms", False)]


def raw(rows: Any, features: int, types: Types, norm: str, normed: bool) -> list[Any]:
    """Return the arguments of the operator siamese_step_forward."""
    tensors, options = arguments(rows, features, types, norm, normed)
    names = ("x", "y", "o", "weight_x", "bias_x", "weight_y", "bias_y", "weight", "bias")
    return [*(tensors.get(name) for name in names), options["c"], dl.checks.NORMALISATIONS.index(norm), 1e-6]


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize(("norm", "normed"), VARIANTS)
def test_opcheck(norm: str, normed: bool, types: Types) -> None:
    inputs = raw((2, 3), 5, types, norm, normed)
    torch.library.opcheck(
        OPS.siamese_step_forward, [x.requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    )


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("norm", "normed"), VARIANTS)
def test_opcheck_backward(norm: str, normed: bool, wanted: bool) -> None:
    gradients = [normal(2, 3, 5, dtype=F32), None, normal(2, 3, 5, dtype=F32)]
    torch.library.opcheck(OPS.siamese_step_backward, [*gradients, *raw((2, 3), 5, FULL, norm, normed), wanted])


@pytest.mark.parametrize(("norm", "normed"), VARIANTS)
def test_compiled_for_every_number_of_rows(norm: str, normed: bool) -> None:
    torch._dynamo.reset()
    tensors, options = arguments(4, 8, FULL, norm, normed)
    named = {
        "bias_x": None,
        "bias_y": None,
        **{key: t.requires_grad_() for key, t in tensors.items() if key not in "xyo"},
    }
    parameters = [value for value in named.values() if value is not None]

    def step(x: Tensor, y: Tensor, o: Tensor) -> tuple[Tensor, ...]:
        return dl.siamese_step(x * 1, y * 1, o * 1, **named, **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 7, 30):
        inputs = [normal(rows, 8, dtype=F32).requires_grad_() for _ in range(3)]
        grads = [normal(rows, 8, dtype=F32) for _ in range(3)]
        found, wanted = compiled(*inputs), step(*inputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        leaves = [*inputs, *parameters]
        for a, b in zip(*(torch.autograd.grad(o, leaves, grads) for o in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("trained", "needs"), [("x", (True, False)), ("y", (False, True)), ("weight_y", (False, False))]
)
def test_compiled_outputs_need_a_gradient_where_eager_ones_do(trained: str, needs: tuple[bool, bool]) -> None:
    tensors, options = arguments((2, 3), 5, FULL, "layer", True)
    tensors[trained].requires_grad_()
    torch._dynamo.reset()
    x_out, y_out, u = torch.compile(dl.siamese_step, backend="aot_eager", fullgraph=True)(**tensors, **options)
    assert (x_out.requires_grad, y_out.requires_grad, u.requires_grad) == (*needs, True)
    u.sum().backward()
    assert tensors[trained].grad is not None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(3, 5), "x must have the shape of o"),
        (0, torch.randn(2, 5, dtype=BF16), "x must have the dtype of o"),
        (1, torch.randn(2, 5, dtype=F64), "y has another dtype"),
        (2, torch.tensor(1.0), r"o must have shape \(..., C\)"),
        (3, torch.randn(4), "weight_x must have 5 elements; found 4"),
        (7, None, "weight must be given with bias"),
        (9, 0.0, "c must be above 0"),
        (10, -1, "norm must be 0 or 1; found -1"),
        (11, -1.0, "eps must not be negative"),
    ],
)
def test_direct_calls_with_wrong_arguments(place: int, value: Any, message: str) -> None:
    inputs = raw(2, 5, FULL, "layer", True)
    inputs[place] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.siamese_step_forward(*inputs)


def test_direct_backward_calls_with_wrong_gradients() -> None:
    inputs = raw(2, 5, FULL, "layer", True)
    good = torch.randn(2, 5)
    with pytest.raises(RuntimeError, match="du must have the shape of o"):
        OPS.siamese_step_backward(good, good, torch.randn(2, 4), *inputs, True)
    with pytest.raises(RuntimeError, match="dx_out has another dtype"):
        OPS.siamese_step_backward(good.double(), good, good, *inputs, True)
