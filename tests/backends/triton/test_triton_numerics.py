"""The Triton kernels on difficult rows: NaN, far means, constant rows, the largest numbers; rows are independent, runs identical."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    CALLS,
    DEVICE,
    F16,
    F32,
    KINDS,
    TINY,
    Types,
    assert_bound,
    assert_identical,
    cotangents,
    double,
    needs_triton,
    normal,
    results,
)
from torch import Tensor
from triton_helpers import FULL, HALF, MEMORIES, among_nan, check, dropout, fused, given, memory, programs, small_wide  # noqa: F401, fixtures

import depthlstm_fast as dl

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's, of overflows


# --- rows and numbers


@pytest.mark.parametrize(("features", "rows", "changed"), [(7, 33, (0, 15, 32)), (20, 5, (1,))], ids=["narrow", "wide"])
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_rows_do_not_see_each_other(
    norm: str, affine: bool, kind: str, features: int, rows: int, changed: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    """Changing some rows, to NaN even, changes no other row, bit for bit; and a row alone gives what it gives among others."""
    if features == 20:
        request.getfixturevalue("small_wide")
    tensors, options = given(rows, features, FULL, norm, affine, kind)
    grads = cotangents(tensors)
    by_row = [key for key in ("h", "c_out", "dz", "dc", "dhidden") if key != "dhidden" or kind == "given"]
    before = results(fused, tensors, grads, **options)
    others = torch.ones(rows, dtype=torch.bool)
    others[list(changed)] = False
    spoilt = {key: tensor.clone() for key, tensor in tensors.items()}
    for key in {"z", "c", "hidden"} & spoilt.keys():
        spoilt[key][list(changed)] = torch.nan
    after = results(fused, spoilt, grads, **options)
    for key in by_row:
        assert torch.equal(after[key][others], before[key][others]), key
        assert after[key][~others].isnan().any(-1).all() or key == "dc", key
    row = changed[-1]
    alone = {key: tensor if key in ("weight", "bias") else tensor[row] for key, tensor in tensors.items()}
    single = results(fused, alone, (grads[0][row], grads[1][row]), **options)
    for key in by_row:
        assert torch.equal(single[key], before[key][row]), key


# Each special value in each place: what comes out must be NaN or infinite exactly where the reference's is.
@pytest.mark.parametrize("types", [FULL, HALF], ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint", "none"])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_nan_and_infinity_stay_where_they_belong(kind: str, norm: str, types: Types) -> None:
    specials = [torch.nan, torch.inf, -torch.inf]
    features = 14
    tensors, options = given(5 * len(specials), features, types, norm, False, kind)
    for number, special in enumerate(specials):
        for gate in range(4):
            tensors["z"][5 * number + gate, gate * features + 3] = special
        tensors["c"][5 * number + 4, 3] = special
    found = fused(**tensors, **options)
    wanted = dl.reference.depth_lstm_gates(**double(tensors), **options)
    for a, b in zip(found, wanted, strict=True):
        if norm == "none" and kind in ("gelu", "gelu_tanh", "silu"):
            # a cdf(a) at -infinity is 0 in the limit and NaN in IEEE arithmetic; torch's own kernels give either
            rows = torch.arange(len(a)) != 5 * 2 + 3
            a, b = a[rows], b[rows]
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.double()[b.isinf()], b[b.isinf()])


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
@pytest.mark.parametrize("argument", ["dh", "dc"])
def test_nan_gradients_stay_in_their_row(argument: str, scheme: str, request: pytest.FixtureRequest) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(4, 20, FULL)
    grads = dict(zip(("dh", "dc"), cotangents(tensors), strict=True))
    before = results(fused, tensors, tuple(grads.values()), **options)
    grads[argument][2, 3] = torch.nan
    after = results(fused, tensors, tuple(grads.values()), **options)
    others, clean = torch.arange(4) != 2, torch.arange(20) != 3
    for key in ("dz", "dc"):
        assert torch.equal(after[key][others], before[key][others])
        assert after[key][2].isnan().any()
    for key in ("dweight", "dbias"):
        assert after[key][:, 3].isnan().any()
        assert torch.equal(after[key][:, clean], before[key][:, clean])


def split_rows(found: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row] for key, value in found.items() if key not in ("dweight", "dbias")}


def check_each_row(tensors: dict[str, Tensor], options: dict[str, Any], conditions: list[float]) -> tuple[dict[str, Tensor], ...]:
    """Each row keeps the bound by itself, with the ``condition`` of its own; returns the results of the kernel, eager and fp64."""
    grads = cotangents(tensors)
    found = results(fused, {key: among_nan(tensor) for key, tensor in tensors.items()}, grads, **options)
    eager = results(dl.reference.depth_lstm_gates, tensors, grads, **options)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    for row, condition in enumerate(conditions):
        assert_bound(*(split_rows(values, row) for values in (found, eager, exact)), condition)
    return found, eager, exact


# E[x^2] - E[x]^2 loses every digit of fp32 at a ratio of 3e3; two passes lose ratio * eps. fp16 ends at 6.5e4.
@pytest.mark.parametrize(
    ("scheme", "types", "features"),
    [("narrow", types, 33) for types in MEMORIES] + [("narrow", FULL, 512), ("wide", FULL, 33)],
    ids=str,
)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_mean_far_beyond_deviation(norm: str, scheme: str, types: Types, features: int, request: pytest.FixtureRequest) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    ratios = [1e2, 1e3, 1e4, 1e5, 1e6][: 3 if types.z == F16 else 5]
    tensors, options = given(len(ratios), features, types, norm)
    tensors["z"] = (normal(len(ratios), 4 * features) + torch.tensor(ratios).unsqueeze(1)).to(types.z).to(DEVICE)
    three = check_each_row(tensors, options, ratios)
    assert_bound(*({key: values[key] for key in ("dweight", "dbias")} for values in three), ratios[-1])


# Sums of 41 and of 164 equal numbers times 1/41 and 1/164 are, in fp32, not those numbers but for 0; of 2^n or 33 they mostly are.
@pytest.mark.parametrize(
    ("scheme", "types", "features"),
    [("narrow", types, features) for types in MEMORIES for features in (1, 41)]
    + [("narrow", FULL, 2), ("narrow", FULL, 300), ("wide", FULL, 41)],
    ids=str,
)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_constant_rows(norm: str, scheme: str, types: Types, features: int, request: pytest.FixtureRequest) -> None:
    """n is 0, and 1/sqrt(eps) = 1000 multiplies whatever the rounding of the mean leaves in its place."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    values = [0.0, 1.0, 0.3, 1000.3, -6.5e4]
    tensors, options = given(len(values), features, types, norm)
    tensors["z"] = torch.tensor(values).unsqueeze(1).expand(-1, 4 * features).to(types.z).to(DEVICE)
    found, eager, exact = check_each_row(tensors, options, [0.0] * len(values))
    assert_bound(*({"dbias": results["dbias"]} for results in (found, eager, exact)))
    # n = 0 makes dweight 0, for which a relative bound has no scale
    largest = [results["dweight"].abs().max().item() for results in (found, eager)]
    assert largest[0] <= 2 * largest[1] + TINY[types.affine] * torch.finfo(types.affine).eps


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_columns_and_rows_that_are_not_there(norm: str, kind: str) -> None:
    """Beyond the last column n would be -mean / sqrt(eps), whose powers overflow fp32, and beyond the last row 1 / 0 with eps = 0."""
    tensors, options = given(3, 7, FULL, norm, False, kind)
    tensors["z"] = torch.full_like(tensors["z"], 2.0**60)
    check(tensors, options)
    tensors["z"] = normal(3, 28, dtype=F32).to(DEVICE)
    check(tensors, {**options, "eps": 0.0})


@pytest.mark.parametrize("types", MEMORIES, ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_nearly_constant_rows(norm: str, types: Types) -> None:
    """One element a little off: the variance is of the order of eps, between the two regimes of 1/sqrt(var + eps)."""
    tensors, options = given(3, 65, types, norm)
    tensors["z"] = torch.full_like(tensors["z"], 0.5)
    tensors["z"][:, ::65] = 0.5 + 2**-7
    check(tensors, options, condition=100)


@pytest.mark.parametrize("types", MEMORIES[1:], ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_values_near_the_largest_of_fp16(norm: str, types: Types) -> None:
    """Their squares and sums are beyond fp16 by far; the results are ordinary numbers."""
    tensors, options = given(2, 300, types, norm)
    signs = torch.randn(tensors["z"].shape).sign()
    tensors["z"] = (signs * 6.4e4 + normal(*signs.shape, scale=500)).clamp(-65504, 65504).to(types.z).to(DEVICE)
    found = check(tensors, options)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_gradients_that_are_beyond_fp16_on_the_way(scheme: str, request: pytest.FixtureRequest) -> None:
    """Those of the pre-activations, which r makes small again; eager in fp16 has no digit of them, and the bound would allow anything."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(3, 40, Types(F16, F16, F32))
    tensors["z"] = normal(3, 160, scale=2e4).clamp(-6e4, 6e4).to(F16).to(DEVICE)
    tensors["c"] *= 1000
    dh, dc = (5e3 * x for x in cotangents(tensors))
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (dh.double(), dc.double()), **options)
    assert exact["dbias"].abs().max() > 3 * torch.finfo(F16).max
    for key, value in results(fused, tensors, (dh, dc), **options).items():
        assert (value - exact[key]).abs().max() <= 1e-3 * exact[key].abs().max(), key


@pytest.mark.parametrize("types", MEMORIES[:3], ids=str)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_saturated_gates(kind: str, types: Types) -> None:
    """Without a norm nothing bounds a: far from zero exp overflows or underflows, and nothing may become NaN."""
    steps = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 4.3, 4.5, 5.5, 9.0, 13.0, 17.0, 38.0, 88.0, 89.0, 104.0, 200.0, 720.0, 6e4])
    if types.z == F16:
        steps = steps[:-1]  # eager's own products overflow beyond
    a = torch.cat((steps, -steps)).double()
    grid = torch.stack([x.flatten() for x in torch.meshgrid(a, a, indexing="ij")])
    tensors, options = given(1, grid.shape[1], types, "none", False, kind)
    # i and f run along one axis, g along the other
    tensors["z"] = torch.cat((grid[0], grid[0].flip(0), grid[1].flip(0), grid[1])).to(types.z).unsqueeze(0).to(DEVICE)
    found = check(tensors, options)
    assert all(value.isfinite().all() for value in found.values())


def test_affine_of_zeros() -> None:
    """gamma = 0 leaves constant gates: dz is 0, dgamma is not."""
    tensors, options = given(3, 33, FULL)
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    found = check(tensors, options)
    assert not found["dz"].any()
    assert found["dweight"].any()


@pytest.mark.parametrize(("rows", "features", "count"), [(9, 65, 3), (1, 2049, 1)])
def test_runs_are_identical(rows: int, features: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        rows = 1000
    else:
        programs(monkeypatch, count)
    tensors, options = given(rows, features, FULL)
    options.update(dropout())
    grads = cotangents(tensors)
    first = results(fused, tensors, grads, **options)
    for _ in range(19 if DEVICE == "cuda" else 2):
        assert_identical(results(fused, tensors, grads, **options), first)
