"""Difficult numbers on every path.

The rows have far means, constant values, the largest and smallest numbers, and NaN. Rows are independent, and runs are
identical.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import simulated
import torch
from helpers import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    TINY,
    Types,
    assert_bound,
    assert_identical,
    double,
    normal,
)
from suite import FULL, HALF, MIXED16, Op, Path, cases, check, dropout, fused, make, plain, run, three
from torch import Tensor

from depthlstm_fast.backends.library import LIBRARY
from depthlstm_fast.checks import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's overflows
NORMALISED = ["gate", "joint"]


def each_row(
    op: Op, path: Path, tensors: dict[str, Tensor], options: dict[str, Any], conditions: list[float]
) -> tuple[dict[str, Tensor], ...]:
    """Check each row separately against the bound, with its own ``condition``.

    Returns the results of the kernel, eager and fp64.
    """
    found = three(op, path, tensors, options)
    for row, condition in enumerate(conditions):
        assert_bound(
            *({key: value[row] for key, value in values.items() if key in op.rows} for values in found), condition
        )
    return found


def few_types(path: Path) -> list[Types]:
    """Return few types, because they only decide how memory is read.

    An interpreted row of Triton's wide scheme takes a second.
    """
    return path.main[:1] if path.name == "wide" else path.main


def widths(op: Op, path: Path) -> list[tuple[str, Types, int]]:
    """Return widths at which sums of equal numbers round.

    Sums of 41 and of 164 equal numbers times 1/41 and 1/164 differ, in fp32, from those numbers except for 0. For 2^n
    or 33 they mostly do not.
    """
    own = path.sizes[1] if path.name == "block" else 41
    more = [1, 2, 300, 512] if path.name in ("", "narrow", "any") else [own]
    return list(itertools.product(NORMALISED, few_types(path), dict.fromkeys([own, *more])))


@cases("norm, types, features", widths, only="depth_lstm")
def test_constant_rows(op: Op, path: Path, norm: str, types: Types, features: int) -> None:
    """Check n = 0, where 1/sqrt(eps) = 1000 multiplies the rounding error of the mean."""
    values = [0.0, 1.0, 0.3, 1000.3, -6.5e4] * (2 if path.name == "warp" else 1)
    tensors, options = make(op, path, len(values), features, types, (norm, True, "gelu"))
    z = torch.tensor(values).unsqueeze(1).expand(-1, 4 * features)
    tensors["z"] = z.to(types.z).contiguous().to(tensors["z"].device)
    found, eager, exact = each_row(op, path, tensors, options, [0.0] * len(values))
    assert_bound(*({"dbias": values["dbias"]} for values in (found, eager, exact)))
    # n = 0 makes dweight 0, for which a relative bound has no scale
    largest = [values["dweight"].abs().max().item() for values in (found, eager)]
    assert largest[0] <= 2 * largest[1] + TINY[types.affine] * torch.finfo(types.affine).eps


@cases("norm, types", lambda op, path: itertools.product(NORMALISED, few_types(path)), only="depth_lstm")
def test_nearly_constant_rows(op: Op, path: Path, norm: str, types: Types) -> None:
    """Check one element a little off.

    The variance is of the order of eps, between both regimes of 1/sqrt(var + eps).
    """
    rows, features = path.sizes
    tensors, options = make(op, path, rows, features, types, (norm, True, "gelu"))
    tensors["z"] = torch.full_like(tensors["z"], 0.5)
    tensors["z"][:, ::features] = 0.5 + 2**-7
    check(op, path, tensors, options, condition=100)


# E[x^2] - E[x]^2 loses every digit of fp32 at a ratio of 3e3; two passes lose ratio * eps. fp16 ends at 6.5e4.
@cases(
    "norm, types, features",
    lambda op, path: [
        (n, t, d)
        for n in NORMALISED
        for t in path.main
        for d in (path.sizes[1], 512)
        if path.name in ("", "narrow", "any") or d != 512
    ],
    only="depth_lstm",
)
def test_mean_far_beyond_deviation(op: Op, path: Path, norm: str, types: Types, features: int) -> None:
    ratios = [1e2, 1e3, 1e4, 1e5, 1e6][: 3 if types.z == F16 else 5] * (2 if path.name == "warp" else 1)
    tensors, options = make(op, path, len(ratios), features, types, (norm, True, "gelu"))
    tensors["z"] = (
        (normal(len(ratios), 4 * features) + torch.tensor(ratios).unsqueeze(1)).to(types.z).to(tensors["z"].device)
    )
    found = each_row(op, path, tensors, options, ratios)
    assert_bound(*({key: values[key] for key in op.sums} for values in found), max(ratios))


@cases(
    "norm, types",
    lambda op, path: itertools.product(NORMALISED, [types for types in path.main if types.z in (F16, BF16)]),
    only="depth_lstm",
)
def test_values_near_the_largest_of_fp16(op: Op, path: Path, norm: str, types: Types) -> None:
    """Check numbers whose squares and sums exceed fp16 by far; the results are ordinary numbers."""
    rows, features = path.sizes
    tensors, options = make(op, path, rows, features, types, (norm, True, "gelu"))
    signs = torch.randn(tensors["z"].shape).sign()
    tensors["z"] = (
        (signs * 6.4e4 + normal(*signs.shape, scale=500)).clamp(-65504, 65504).to(types.z).to(tensors["z"].device)
    )
    found = check(op, path, tensors, options)
    assert all(value.isfinite().all() for value in found.values())


@cases(only="depth_lstm")
def test_gradients_that_are_beyond_fp16_on_the_way(op: Op, path: Path) -> None:
    """Check gradients of the pre-activations that exceed fp16; r makes them small again.

    Eager in fp16 has no digit of them, and its bound would allow anything.
    """
    rows, features = path.sizes
    tensors, options = make(op, path, rows, features, MIXED16, op.variants[0])
    tensors["z"] = normal(rows, 4 * features, scale=2e4).clamp(-6e4, 6e4).to(F16).to(tensors["z"].device)
    tensors["c"] *= 1000
    dh, dc = (5e3 * x for x in op.cotangents(tensors))
    exact = plain(op, tensors, (dh, dc), exact=True, **options)
    assert exact["dbias"].abs().max() > 3 * torch.finfo(F16).max
    for key, value in run(op, path, tensors, (dh, dc), **options).items():
        assert (value - exact[key]).abs().max() <= 1e-3 * exact[key].abs().max(), key


@cases(
    "types, kind",
    lambda op, path: itertools.product(path.main if path.native else path.main[:3], ACTIVATIONS),
    one_path=True,
    only="depth_lstm",
)
def test_saturated_gates(op: Op, path: Path, types: Types, kind: str) -> None:
    """Check gates without a norm: far from zero exp overflows or underflows, and no result may be NaN."""
    steps = torch.tensor(
        [0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 4.3, 4.5, 5.5, 9.0, 13.0, 17.0, 38.0, 88.0, 89.0, 104.0, 200.0, 720.0, 6e4]
    )
    if types.z == F16:
        steps = steps[:-1]  # eager's own products overflow beyond this
    a = torch.cat((steps, -steps)).double()
    grid = torch.stack([x.flatten() for x in torch.meshgrid(a, a, indexing="ij")])
    tensors, options = make(op, path, 1, grid.shape[1], types, ("none", False, kind))
    # i and f run along one axis, g along the other
    z = torch.cat((grid[0], grid[0].flip(0), grid[1].flip(0), grid[1])).to(types.z).unsqueeze(0)
    tensors["z"] = z.to(tensors["z"].device)
    found = check(op, path, tensors, options)
    assert all(value.isfinite().all() for value in found.values())


# a GPU's one-instruction exponentials flush subnormals
@cases("types", lambda op, path: path.main if path.native else [], only="depth_lstm")
def test_subnormals(op: Op, path: Path, types: Types) -> None:
    """Check that inputs and results below the smallest normal number are kept, not flushed."""
    isa = ctypes.CDLL(str(LIBRARY)).depthlstm_cpu_isa
    isa.restype = ctypes.c_char_p
    if types.z == BF16 and isa() == b"avx512_bf16":
        pytest.skip("the CPU's own bf16 conversion takes subnormals, 1e-38, for zeros")
    smallest = torch.finfo(types.c).smallest_normal
    tensors, options = make(op, path, 3, 40, types, ("none", False, "relu"))
    tensors["c"] = (normal(3, 40, scale=smallest / 8)).to(types.c)
    tensors["z"] = torch.where(torch.arange(160) >= 120, -tensors["z"].abs(), tensors["z"])  # g = 0
    found = check(op, path, tensors, options)
    assert (found["c_out"] != 0).float().mean() > 0.5


def changed_rows(op: Op, path: Path) -> list[Any]:
    types = [FULL, path.main[-1]] if path.native else [FULL]
    return [(t, variant) for t in types for variant in op.variants]


@cases("types, variant", changed_rows)
def test_rows_do_not_see_each_other(op: Op, path: Path, types: Types, variant: Any) -> None:
    """Check that a change of one row, even to NaN, changes no other row, bit for bit.

    A single row gives the same results as among others.
    """
    rows = path.row_group
    changed = sorted({0, 31, 32, rows - 1} & set(range(rows)))
    tensors, options = make(op, path, rows, path.sizes[1], types, variant)
    grads = op.cotangents(tensors)
    before = run(op, path, tensors, grads, **options)
    by_row = [key for key in op.rows if key in before]
    others = torch.ones(rows, dtype=torch.bool)
    others[changed] = False
    spoilt = {key: tensor.clone() for key, tensor in tensors.items()}
    for key in tensors.keys() - op.parameters:
        spoilt[key][changed] = torch.nan
    after = run(op, path, spoilt, grads, **options)
    for key in by_row:
        assert torch.equal(after[key][others], before[key][others]), key
        assert after[key][~others].isnan().any(-1).all() or key in op.linear_in, key
    # NaN is passed on, not lost in a comparison
    assert all(after[key].isnan().any() for key in set(op.sums) & after.keys() - op.linear_in)
    if path.name == "warp":
        return  # a block takes a single row, and its sums have another order
    row = changed[-1]
    alone = {key: tensor if key in op.parameters else tensor[row] for key, tensor in tensors.items()}
    single = run(op, path, alone, tuple(grad[row] for grad in grads), **options)
    for key in by_row:
        assert torch.equal(single[key], before[key][row]), key


@cases(
    "types, norm",
    lambda op, path: itertools.product(path.main if path.native else [FULL, HALF], [*NORMALISED, "none"]),
    only="depth_lstm",
)
def test_nan_and_infinity_stay_where_they_belong(op: Op, path: Path, types: Types, norm: str) -> None:
    """Check each special value in each place: results are NaN or infinite exactly where the reference's are."""
    specials = [torch.nan, torch.inf, -torch.inf]
    features = path.sizes[1]
    for kind in ACTIVATIONS:
        tensors, options = make(op, path, 5 * len(specials), features, types, (norm, False, kind))
        for number, special in enumerate(specials):
            for gate in range(4):
                tensors["z"][5 * number + gate, gate * features + 3] = special
            tensors["c"][5 * number + 4, 3] = special
        found = fused(op, path, **tensors, **options)
        wanted = op.reference(**double(tensors), **options)
        for a, b in zip(found, wanted, strict=True):
            if norm == "none" and kind in ("gelu", "gelu_tanh", "silu"):
                # a cdf(a) at -infinity is 0 in the limit and NaN in IEEE arithmetic; torch's own kernels give either
                known = torch.arange(len(a)) != 5 * 2 + 3
                a, b = a[known], b[known]
            assert torch.equal(a.isnan(), b.isnan()), kind
            assert torch.equal(a.double()[b.isinf()], b[b.isinf()]), kind


@cases("argument", lambda op, path: ["dh", "dc", "c", "hidden"], only="depth_lstm")
def test_nan_gradients_stay_in_their_row(op: Op, path: Path, argument: str) -> None:
    """Check that NaN also stays in its column of the parameters' gradients."""
    rows, features = max(path.sizes[0], 4), path.sizes[1]
    tensors, options = make(op, path, rows, features, FULL, ("gate", True, "given"))
    every = {**tensors, **dict(zip(("dh", "dc"), op.cotangents(tensors), strict=True))}
    before = run(op, path, tensors, (every["dh"], every["dc"]), **options)
    every[argument] = every[argument].clone()
    every[argument][2, 3] = torch.nan
    after = run(op, path, {key: every[key] for key in tensors}, (every["dh"], every["dc"]), **options)
    others, clean = torch.arange(rows) != 2, torch.arange(features) != 3
    for key in ("dz", "dc"):
        assert torch.equal(after[key][others], before[key][others])
    assert after["dz"][2].isnan().any()
    for key in op.sums:
        assert after[key][:, 3].isnan().any()
        assert torch.equal(after[key][:, clean], before[key][:, clean])


@cases("dtype", lambda op, path: [F32, F64] if path.native else [F32], only="depth_lstm")
def test_affine_of_zeros(op: Op, path: Path, dtype: torch.dtype) -> None:
    """Check that gamma = 0 leaves constant gates: dz is 0, dgamma is not."""
    tensors, options = make(op, path, *path.sizes, Types(dtype, dtype, dtype), op.variants[0])
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    found = check(op, path, tensors, options)
    assert not found["dz"].any()
    assert found["dweight"].any()


@cases()
def test_runs_are_identical(op: Op, path: Path) -> None:
    """Check for the same bits in every run, in any order of threads and blocks."""
    rows = 47 if DEVICE == "cpu" and path.backend == "cuda" else path.sizes[0] if DEVICE == "cpu" else 40_000
    tensors, options = make(op, path, rows, path.sizes[1], path.main[-1], op.variants[0])
    options.update(dropout(op, path))
    grads = op.cotangents(tensors)
    first = run(op, path, tensors, grads, **options)
    for seed in range(1, 4):
        if path.backend == "cuda" and DEVICE == "cpu":
            ctypes.CDLL(str(simulated.kernels())).ptx_seed(ctypes.c_uint64(seed))
        assert_identical(run(op, path, tensors, grads, **options), first)
