"""What only norm_step has, on every path: difficult rows before each of its norms, gradients that are absent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, Types, assert_bound, double, normal
from suite import DOUBLE, FULL, HALF, HALF16, MIXED, Op, Path, cases, check, fused, make, run, three
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's overflows


def types_of(path: Path) -> list[Types]:
    return path.among(FULL, DOUBLE, HALF, HALF16, MIXED)


def before(
    number: str, op: Op, path: Path, rows: Tensor, types: Types, norm: str, a: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a call with one norm, whose input is ``rows`` exactly: a x + b y for N1 and N2, y for N3."""
    tensors, options = make(op, path, rows.shape[0], rows.shape[1], types, (number, a, "one", norm))
    hard, other = ("y", "x") if number == "3" else ("x", "y")
    if number != "3":
        tensors[other] = torch.zeros_like(tensors[other])
    tensors[hard] = rows.to(tensors[hard])
    return tensors, options


def check_rows(
    op: Op, path: Path, tensors: dict[str, Tensor], options: dict[str, Any], conditions: list[float]
) -> None:
    """Check each row against the bound with its own condition, and the sums with the largest."""
    found = three(op, path, tensors, options)
    for row, condition in enumerate(conditions):
        assert_bound(
            *({key: value[row] for key, value in values.items() if key in op.rows} for values in found), condition
        )
    assert_bound(*({key: value for key, value in values.items() if "bias" in key} for values in found), max(conditions))


@cases(
    "number, types, features",
    lambda op, path: itertools.product("123", types_of(path), (41, 1, 300) if path.native else (41,)),
    only="norm_step",
)
def test_constant_rows_of_a_step(op: Op, path: Path, number: str, types: Types, features: int) -> None:
    """Check n = 0 behind LayerNorm, where 1/sqrt(eps) = 1000 multiplies the rounding error of the mean."""
    values = torch.tensor([0.0, 1.0, 0.3, 1000.3, -6.5e4])
    rows = values.unsqueeze(1).expand(-1, features).contiguous()
    check_rows(op, path, *before(number, op, path, rows, types, "layer"), [0.0] * len(values))


@cases(
    "number, types, norm", lambda op, path: itertools.product("123", types_of(path), ("layer", "rms")), only="norm_step"
)
def test_mean_far_beyond_deviation(op: Op, path: Path, number: str, types: Types, norm: str) -> None:
    ratios = [1e2, 1e3, 1e4, 1e5, 1e6][: 3 if types.z == F16 else 5]
    rows = normal(len(ratios), 65) + torch.tensor(ratios).unsqueeze(1)
    check_rows(op, path, *before(number, op, path, rows, types, norm), ratios)


@cases("number, norm", lambda op, path: itertools.product("123", ("layer", "rms")), only="norm_step")
def test_values_near_the_largest_of_fp16(op: Op, path: Path, number: str, norm: str) -> None:
    """Check numbers whose squares and sums exceed fp16 by far; the results are ordinary numbers."""
    signs = torch.randn(5, 33).sign()
    rows = (signs * 6.4e4 + normal(5, 33, scale=500)).clamp(-65504, 65504)
    found = check(op, path, *before(number, op, path, rows, HALF16, norm))
    assert all(value.isfinite().all() for value in found.values())


@cases(
    "number, norm, eps",
    lambda op, path: itertools.product("123", ("layer", "rms"), (0.0, 1e-12, 0.5, 1e6)),
    only="norm_step",
)
def test_eps_of_a_step(op: Op, path: Path, number: str, norm: str, eps: float) -> None:
    tensors, options = make(op, path, *path.sizes, FULL, (number, 1.0, "one", norm))
    check(op, path, tensors, {**options, "eps": eps})


@cases(
    "number, norm, types",
    lambda op, path: itertools.product("123", ("layer", "rms"), types_of(path)),
    only="norm_step",
)
def test_nan_and_infinity_stay_where_they_belong(op: Op, path: Path, number: str, norm: str, types: Types) -> None:
    """Check each special value in x and in y: results are NaN or infinite exactly where the reference's are."""
    specials = [torch.nan, torch.inf, -torch.inf]
    tensors, options = make(op, path, 2 * len(specials) + 1, 19, types, (number, 1.5, "one", norm))
    for place, special in enumerate(specials):
        tensors["x"][2 * place, 3] = special
        tensors["y"][2 * place + 1, 17] = special
    found = fused(op, path, **tensors, **options)
    wanted = op.reference(**double(tensors), **options)
    for made, exact in zip(found, wanted, strict=True):
        assert torch.equal(made.isnan(), exact.isnan())
        assert torch.equal(made.double()[exact.isinf()], exact[exact.isinf()])
        assert not made[-1].isnan().any()


@cases("used, variant", lambda op, path: itertools.product([0, 1], op.variants), one_path=True, only="norm_step")
def test_an_output_without_a_gradient(op: Op, path: Path, used: int, variant: Any) -> None:
    """Check that it is as a gradient of zeros; a norm of which nothing is used has no gradient, as in PyTorch."""
    tensors, options = make(op, path, *path.sizes, FULL, variant)
    grads = op.cotangents(tensors)
    has_n2 = "weight2" in tensors
    zeros = [grad if place == used or not has_n2 else torch.zeros_like(grad) for place, grad in enumerate(grads)]
    wanted = run(op, path, tensors, tuple(zeros), **options)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = fused(op, path, **leaves, **options)
    torch.autograd.backward([outputs[used]] if has_n2 else list(outputs), [grads[used]] if has_n2 else list(grads))
    for name, leaf in leaves.items():
        if used == 0 and name in ("weight2", "bias2"):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, wanted[f"d{name}"], rtol=1e-6, atol=1e-6, msg=name)


@cases(one_path=True, only="norm_step")
def test_every_subset_of_gradients(op: Op, path: Path) -> None:
    tensors, options = make(op, path, *path.sizes, FULL, ("123", 1.3, "features", "layer"))
    grads = op.cotangents(tensors)
    every = run(op, path, tensors, grads, **options)
    subsets = [{name} for name in tensors] + [tensors.keys() - {name} for name in tensors] + [{"x", "y"}]
    for wanted in subsets:
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        outputs = fused(op, path, **leaves, **options)
        # x' comes before N2, and needs no gradient where N2 alone is trained
        assert [output.requires_grad for output in outputs] == [not wanted <= {"weight2", "bias2"}, True]
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name not in wanted), name
            if name in wanted:
                assert torch.equal(leaf.grad, every[f"d{name}"]), name


@cases(one_path=True, only="norm_step")
def test_equal_gradients_are_two_tensors_for_the_caller(op: Op, path: Path) -> None:
    """Check that the one tensor of backward is no accumulated gradient twice: the next step would add to both."""
    tensors, options = make(op, path, *path.sizes, FULL, ("2", 1.0, "one", "layer"))
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    torch.autograd.backward(fused(op, path, **leaves, **options), op.cotangents(tensors))
    assert torch.equal(leaves["x"].grad, leaves["y"].grad)
    leaves["x"].grad.zero_()
    assert leaves["y"].grad.any()


@cases("types", lambda op, path: [Types(z, F32, F32) for z in (BF16, F16)], only="norm_step")
def test_a_wide_stream_is_exact_behind_every_norm(op: Op, path: Path, types: Types) -> None:
    """Check that fp32 results beside a 16-bit y have the accuracy of fp32: the stream is rounded nowhere."""
    tensors, options = make(op, path, *path.sizes, types, ("123", 1.3, "features", "layer"))
    grads = op.cotangents(tensors)
    found, _, exact = three(op, path, tensors, options, grads)
    for key, value in found.items():
        if value.dtype == F32:
            assert (value - exact[key]).abs().max() < 1e-5 * exact[key].abs().max(), key


@cases(
    "types, norms",
    lambda op, path: itertools.product([Types(z, z, F32) for z in (BF16, F16)], ("", "1", "3", "13")),
    only="norm_step",
)
def test_a_single_fp32_b_beside_16_bits(op: Op, path: Path, types: Types, norms: str) -> None:
    tensors, options = make(op, path, *path.sizes, types, (norms, 1.3, "scalar", "layer"))
    tensors["b"] = tensors["b"].float()
    found, _, exact = three(op, path, tensors, options)
    assert found["db"].dtype == F32
    assert (found["db"] - exact["db"]).abs() < 1e-5 * exact["db"].abs()


@cases(one_path=True, only="norm_step")
def test_strided_rows(op: Op, path: Path) -> None:
    """Check a column block of a wider matrix, transposed leading dimensions, and expanded gradients."""
    tensors, options = make(op, path, (6, 4), 9, FULL, ("12", 1.3, "features", "layer"))
    dense = run(op, path, tensors, op.cotangents(tensors), **options)
    views = dict(tensors)
    views["x"] = torch.cat([torch.full_like(tensors["x"], torch.nan), tensors["x"]], -1)[..., 9:]
    views["y"] = tensors["y"].transpose(0, 1).contiguous().transpose(0, 1)
    views["weight1"] = torch.stack([tensors["weight1"]] * 2, 1)[:, 0]
    found = fused(op, path, **views, **options)
    assert torch.equal(found[0], dense["x_out"])
    assert torch.equal(found[1], dense["u"])
    row = normal(9, dtype=F32).to(tensors["x"].device)
    grads = (row.expand(6, 4, 9), row.expand(6, 4, 9))
    solid = tuple(grad.contiguous() for grad in grads)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    spread = torch.autograd.grad(fused(op, path, **tensors, **options), leaves, grads)
    wanted = torch.autograd.grad(fused(op, path, **tensors, **options), leaves, solid)
    assert all(torch.equal(a, b) for a, b in zip(spread, wanted, strict=True))
