"""The operators of norm_step in torch: opcheck, torch.compile, and direct calls with bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, Types, needs_cpp, normal
from op_norm_step import arguments
from suite import FULL, MIXED
from torch import Tensor

import depthlstm_fast as dl

pytestmark = needs_cpp

OPS = torch.ops.depthlstm_fast
RAW = [
    ("13", 1.7, "features", "layer"),
    ("2", 1.0, "one", "layer"),
    ("123", 1.3, "scalar", "rms"),
    ("", 1.0, "one", "rms"),
]


def raw(rows: Any, features: int, types: Types, variant: Any) -> list[Any]:
    """Return the arguments of the operator norm_step_forward."""
    tensors, options = arguments(rows, features, types, *variant)
    names = ("b", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3")
    code = dl.checks.NORMALISATIONS.index(options["norm"])
    return [tensors["x"], tensors["y"], *(tensors.get(name) for name in names), options["a"], 1.0, code, 1e-6]


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize("variant", RAW, ids=lambda variant: "-".join(map(str, variant)))
def test_opcheck(variant: Any, types: Types) -> None:
    inputs = raw((2, 3), 5, types, variant)
    leaves = [x.requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    torch.library.opcheck(OPS.norm_step_forward, leaves)


@pytest.mark.parametrize("variant", RAW[:3], ids=lambda variant: "-".join(map(str, variant)))
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck_backward(variant: Any, wanted: bool) -> None:
    x, y, *others = raw((2, 3), 5, FULL, variant)
    gradients = [normal(2, 3, 5, dtype=F32), normal(2, 3, 5, dtype=F32) if others[3] is not None else None]
    torch.library.opcheck(OPS.norm_step_backward, [*gradients, x, y, x + y, *others, wanted])


@pytest.mark.parametrize("variant", RAW, ids=lambda variant: "-".join(map(str, variant)))
def test_compiled_for_every_number_of_rows(variant: Any) -> None:
    torch._dynamo.reset()
    tensors, options = arguments(4, 8, FULL, *variant)
    parameters = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in ("x", "y")}

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return dl.norm_step(x * 1, y * 1, **parameters, **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for rows in (4, 7, 30):
            x, y = (normal(rows, 8, dtype=F32).requires_grad_() for _ in range(2))
            grads = (normal(rows, 8, dtype=F32), normal(rows, 8, dtype=F32))
            inputs = [x, y, *parameters.values()]
            found, wanted = compiled(x, y), step(x, y)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(*(torch.autograd.grad(o, inputs, grads) for o in (found, wanted)), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", ["x", "weight2"])
def test_compiled_outputs_need_a_gradient_where_eager_ones_do(trained: str) -> None:
    tensors, options = arguments((2, 3), 5, FULL, "2")
    tensors[trained].requires_grad_()
    torch._dynamo.reset()
    x_out, u = torch.compile(dl.norm_step, backend="aot_eager", fullgraph=True)(**tensors, **options)
    assert (x_out.requires_grad, u.requires_grad) == (trained == "x", True)
    u.sum().backward()
    assert tensors[trained].grad is not None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(3, 5), "x must have the shape of y"),
        (0, torch.randn(2, 4), "x must have the shape of y"),
        (0, torch.randn(2, 5, dtype=F64), "x must have the dtype of y"),
        (0, torch.randn(2, 5, dtype=BF16), "x must have the dtype of y"),
        (1, torch.tensor(1.0), r"y must have shape \(..., C\)"),
        (2, torch.randn(4), "scale must have 5 elements; found 4"),
        (3, torch.randn(6), "weight1 must have 5 elements; found 6"),
        (3, None, "weight1 must be given with bias1"),
        (4, torch.randn(5, dtype=F64), "bias1 must have the dtype of y"),
        (11, 2, "norm must be 0 or 1; found 2"),
        (12, -1.0, "eps must not be negative"),
    ],
)
def test_direct_calls_with_wrong_arguments(place: int, value: Any, message: str) -> None:
    inputs = raw(2, 5, FULL, ("123", 1.3, "features", "layer"))
    inputs[place] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.norm_step_forward(*inputs)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (RAW[0], {0: torch.randn(2, 4)}, "dx_out must have the shape of y"),
        (RAW[0], {2: None}, "x and y must be given with weight1"),
        (RAW[0], {1: torch.randn(2, 5)}, "du must be given with weight2, and None without it"),
        (RAW[1], {1: None}, "du must be given with weight2, and None without it"),
        (RAW[1], {4: None}, "x_out must be given with weight2 and without weight1"),
        (RAW[1], {4: torch.randn(2, 6), 3: None}, "x_out must have the shape of du"),
        (RAW[1], {0: torch.randn(2, 5).bfloat16()}, "dx_out has another dtype"),
        (RAW[3], {}, "weight1, weight2, weight3 or scale must be given"),
    ],
)
def test_direct_backward_calls_with_wrong_arguments(variant: Any, changes: dict[int, Any], message: str) -> None:
    x, y, *others = raw(2, 5, FULL, variant)
    inputs = [torch.randn(2, 5), torch.randn(2, 5) if others[3] is not None else None, x, y, x + y, *others, True]
    for place, value in changes.items():
        inputs[place] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.norm_step_backward(*inputs)
