"""What only siamese_step has, on every path: difficult rows before its norms, gradients that are absent, two dtypes."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import F16, F32, Types, assert_bound, normal
from suite import DOUBLE, FULL, HALF, HALF16, MIXED, Op, Path, cases, fused, make, run, three
from torch import Tensor

import depthlstm_fast as dl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's overflows


def types_of(path: Path) -> list[Types]:
    return path.among(FULL, DOUBLE, HALF, HALF16, MIXED)


def check_rows(op: Op, path: Path, stream: str, rows: Tensor, types: Types, norm: str, conditions: list[float]) -> None:
    """Check each row against the bound; ``rows`` are those that the norm of ``stream`` sees."""
    tensors, options = make(op, path, rows.shape[0], rows.shape[1], types, (norm, False))
    tensors["o"] = torch.zeros_like(tensors["o"])
    tensors[stream] = rows.to(tensors[stream])
    found = three(op, path, tensors, options)
    for row, condition in enumerate(conditions):
        assert_bound(
            *({key: value[row] for key, value in values.items() if key in op.rows} for values in found), condition
        )


@cases("stream, types", lambda op, path: itertools.product("xy", types_of(path)), only="siamese_step")
def test_constant_rows_of_a_step(op: Op, path: Path, stream: str, types: Types) -> None:
    """Check n = 0, where 1/sqrt(eps) = 1000 multiplies the rounding error of the mean."""
    values = torch.tensor([0.0, 1.0, 0.3, 1000.3, -6.5e4])
    check_rows(op, path, stream, values.unsqueeze(1).expand(-1, 41).contiguous(), types, "layer", [0.0] * len(values))


@cases(
    "stream, types, norm",
    lambda op, path: itertools.product("xy", types_of(path), ("layer", "rms")),
    only="siamese_step",
)
def test_mean_far_beyond_deviation(op: Op, path: Path, stream: str, types: Types, norm: str) -> None:
    ratios = [1e2, 1e3, 1e4, 1e5, 1e6][: 3 if types.z == F16 else 5]
    rows = normal(len(ratios), 65) + torch.tensor(ratios).unsqueeze(1)
    check_rows(op, path, stream, rows, types, norm, ratios)


@cases("used, variant", lambda op, path: itertools.product(range(3), op.variants), one_path=True, only="siamese_step")
def test_an_output_with_the_only_gradient(op: Op, path: Path, used: int, variant: tuple[str, bool]) -> None:
    """Check that the others are as gradients of zeros, and that a norm of which nothing is used has no gradient."""
    tensors, options = make(op, path, *path.sizes, FULL, variant)
    grads = [grad if place == used else torch.zeros_like(grad) for place, grad in enumerate(op.cotangents(tensors))]
    wanted = run(op, path, tensors, tuple(grads), **options)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    plain = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    fused(op, path, **leaves, **options)[used].backward(grads[used])
    op.reference(**plain, **options)[used].backward(grads[used])
    for name, leaf in leaves.items():
        if name in ("x", "y", "o"):
            torch.testing.assert_close(leaf.grad, wanted[f"d{name}"], rtol=1e-6, atol=1e-6, msg=name)
        else:
            assert (leaf.grad is None) == (plain[name].grad is None), name
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, wanted[f"d{name}"], rtol=1e-6, atol=1e-6, msg=name)


@cases(one_path=True, only="siamese_step")
def test_streams_of_two_dtypes_are_refused(op: Op, path: Path) -> None:
    tensors, options = make(op, path, 3, 8, HALF, ("layer", True))
    tensors["y"] = tensors["y"].float()
    wanted = "siamese_step's kernels take x and y of one dtype; found torch.bfloat16 and torch.float32"
    with pytest.raises(ValueError, match=wanted):
        op.function(**tensors, **options, backend=path.backend)
    outputs = op.function(**tensors, **options, backend="reference")
    assert [output.dtype for output in outputs] == [tensors[name].dtype for name in "xyo"]
    assert outputs[1].dtype == F32
    assert dl.last_backend() == "reference"
