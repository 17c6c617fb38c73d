"""Hard numbers for the C++ kernels, rows that do not see each other, and results that do not depend on threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    F16,
    F32,
    F64,
    HAS_CPP,
    KINDS,
    MAIN_TYPES,
    TINY,
    Types,
    arguments,
    assert_bound,
    assert_identical,
    check_gates,
    cotangents,
    double,
    fused,
    needs_cpp,
    normal,
    results,
)
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.backends.library import LIBRARY

pytestmark = needs_cpp


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def limited_ratios(types: Types, ratio: float) -> bool:
    return types.z != F16 or ratio <= 1e4


# E[x^2] - E[x]^2 loses every digit of fp32 at a ratio of 3e3; two passes lose ratio * eps. fp16 ends at 6.5e4.
@pytest.mark.parametrize("features", [33, 512])
@pytest.mark.parametrize("norm", ["gate", "joint"])
@pytest.mark.parametrize(
    ("types", "ratio"), [(t, r) for t in MAIN_TYPES for r in (1e2, 1e3, 1e4, 1e5, 1e6) if limited_ratios(t, r)], ids=lambda v: str(v)
)
def test_mean_far_beyond_deviation(types: Types, ratio: float, norm: str, features: int) -> None:
    tensors, options = arguments(9, features, types, norm)
    tensors["z"] = normal(9, 4 * features, dtype=types.z, shift=ratio)
    check_gates(tensors, options, condition=ratio)


# Values whose mean is exact in fp32 (0, 1), whose mean is not (0.3, 1000.3), and the largest that fp16 holds. At 41 and 300 features the
# rounding of a mean by a product with 1 / D shows, at 33 and 512 it does not.
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, 1000.3, -6.5e4])
@pytest.mark.parametrize("features", [1, 2, 33, 41, 300, 512])
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_constant_rows(norm: str, types: Types, features: int, value: float) -> None:
    """n is 0, and 1/sqrt(eps) = 1000 multiplies whatever the rounding of the mean leaves in its place."""
    tensors, options = arguments(9, features, types, norm)
    tensors["z"] = torch.full_like(tensors["z"], value)
    grads = cotangents(tensors)
    found = results(fused, tensors, grads, **options)
    eager = results(dl.reference.depth_lstm_gates, tensors, grads, **options)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    # n = 0 makes dweight 0, for which a relative bound has no scale
    weight_gradients = []
    for values in (found, eager, exact):
        weight_gradients.append(values.pop("dweight").abs().max().item())
    assert weight_gradients[0] <= 2 * weight_gradients[1] + TINY[types.affine] * torch.finfo(types.affine).eps
    assert_bound(found, eager, exact)


@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_nearly_constant_rows(norm: str, types: Types) -> None:
    """One element a little off: the variance is of the order of eps, between the two regimes of 1/sqrt(var + eps)."""
    tensors, options = arguments(9, 65, types, norm)
    tensors["z"] = torch.full_like(tensors["z"], 0.5)
    tensors["z"][:, ::65] = 0.5 + 2**-7
    check_gates(tensors, options, condition=100)


@pytest.mark.parametrize("features", [33, 512])
@pytest.mark.parametrize("types", [t for t in MAIN_TYPES if t.z in (F16, BF16)], ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_values_near_the_largest_of_fp16(norm: str, types: Types, features: int) -> None:
    """Their squares and sums are beyond fp16 by far; the results are ordinary numbers."""
    tensors, options = arguments(9, features, types, norm)
    signs = torch.randn(tensors["z"].shape).sign()
    tensors["z"] = (signs * 6.4e4 + normal(*signs.shape, scale=500)).clamp(-65504, 65504).to(types.z)
    found = check_gates(tensors, options)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_saturated_gates(kind: str, types: Types) -> None:
    """Without a norm nothing bounds a: far from zero exp overflows or underflows, and nothing may become NaN."""
    steps = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 4.3, 4.5, 5.5, 9.0, 13.0, 17.0, 38.0, 88.0, 89.0, 104.0, 200.0, 720.0, 6e4])
    if types.z == F16:
        steps = steps[:-1]  # eager's own products overflow beyond
    a = torch.cat((steps, -steps)).double()
    grid = torch.stack([x.flatten() for x in torch.meshgrid(a, a, indexing="ij")])
    tensors, options = arguments(1, grid.shape[1], types, "none", False, kind)
    # i and f run along one axis, g along the other
    tensors["z"] = torch.cat((grid[0], grid[0].flip(0), grid[1].flip(0), grid[1])).to(types.z).unsqueeze(0)
    found = check_gates(tensors, options)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
def test_subnormals(types: Types) -> None:
    """Inputs and results below the smallest normal number are kept, not flushed."""
    isa = ctypes.CDLL(str(LIBRARY)).depthlstm_cpu_isa if HAS_CPP else None
    if isa is not None:
        isa.restype = ctypes.c_char_p
        if types.z == BF16 and isa() == b"avx512_bf16":
            pytest.skip("the CPU's own bf16 conversion takes subnormals, 1e-38, for zeros")
    smallest = torch.finfo(types.c).smallest_normal
    tensors, options = arguments(3, 40, types, "none", False, "relu")
    tensors["c"] = (normal(3, 40, scale=smallest / 8)).to(types.c)
    tensors["z"] = torch.where(torch.arange(160) >= 120, -tensors["z"].abs(), tensors["z"])  # g = 0
    found = check_gates(tensors, options)
    assert (found["c_out"] != 0).float().mean() > 0.5


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("types", [MAIN_TYPES[0], MAIN_TYPES[4]], ids=str)
def test_rows_do_not_see_each_other(types: Types, norm: str, affine: bool, kind: str) -> None:
    """Changing one row, to NaN even, changes no other row, bit for bit; and a row alone gives what it gives among others."""
    tensors, options = arguments(70, 33, types, norm, affine, kind)
    grads = cotangents(tensors)
    by_row = ("h", "c_out", "dz", "dc", "dhidden")
    before = results(fused, tensors, grads, **options)
    for changed in (0, 31, 32, 69):  # the ends of the first and of the last chunk
        others = torch.arange(70) != changed
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in ("z", "c", "hidden"):
            if name in given:
                given[name][changed] = torch.nan
        after = results(fused, given, grads, **options)
        for name in by_row:
            if name in after:
                assert torch.equal(after[name][others], before[name][others]), name
                assert after[name][changed].isnan().any() or name == "dc", name
        alone = {name: tensor if name in ("weight", "bias") else tensor[changed] for name, tensor in tensors.items()}
        single = results(fused, alone, (grads[0][changed], grads[1][changed]), **options)
        for name in by_row:
            if name in single:
                assert torch.equal(single[name], before[name][changed]), name


# Each special value in each place: what comes out must be NaN or infinite exactly where the reference's is.
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@pytest.mark.parametrize("norm", ["gate", "joint", "none"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "tanh", "silu", "sigmoid"])
def test_nan_and_infinity_stay_where_they_belong(kind: str, norm: str, types: Types) -> None:
    specials = [torch.nan, torch.inf, -torch.inf]
    features = 20
    tensors, options = arguments(5 * len(specials), features, types, norm, False, kind)
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


@pytest.mark.parametrize("argument", ["dh", "dc"])
def test_nan_gradients_stay_in_their_row(argument: str) -> None:
    tensors, options = arguments(6, 20, MAIN_TYPES[0])
    grads = dict(zip(("dh", "dc"), cotangents(tensors), strict=True))
    before = results(fused, tensors, tuple(grads.values()), **options)
    grads[argument][2, 3] = torch.nan
    after = results(fused, tensors, tuple(grads.values()), **options)
    others = torch.arange(6) != 2
    for name in ("dz", "dc"):
        assert torch.equal(after[name][others], before[name][others])
        assert after[name][2].isnan().any()
    assert after["dbias"][:, 3].isnan().any()
    clean = torch.arange(20) != 3
    assert torch.equal(after["dbias"][:, clean], before["dbias"][:, clean])


# 300 rows of 512 are shared by two threads in both passes; 4096 rows of 7 give chunks of 64 rows, more than one of them to a thread
@pytest.mark.parametrize(("rows", "features"), [(300, 512), (4096, 7), (2049, 33)])
@pytest.mark.parametrize("types", [MAIN_TYPES[0], MAIN_TYPES[2]], ids=str)
@pytest.mark.usefixtures("threads")
def test_threads_change_nothing(types: Types, rows: int, features: int) -> None:
    tensors, options = arguments(rows, features, types)
    options.update(dropout_p=0.2, training=True, seed=torch.tensor([11]))
    grads = cotangents(tensors)
    torch.set_num_threads(1)
    alone = results(fused, tensors, grads, **options)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_identical(results(fused, tensors, grads, **options), alone)


@pytest.mark.usefixtures("threads")
def test_twenty_runs_are_identical() -> None:
    torch.set_num_threads(2)
    tensors, options = arguments(300, 512, MAIN_TYPES[0])
    grads = cotangents(tensors)
    first = results(fused, tensors, grads, **options)
    for _ in range(19):
        assert_identical(results(fused, tensors, grads, **options), first)


def _memory_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_more_than_2_to_the_31_elements(backward: bool) -> None:
    """z has 2^31 + 2^17 elements: an int32 offset would wrap, and read or write the first rows in place of the last ones."""
    features = 4096
    rows = 2**31 // (4 * features) + 8
    need = rows * features * 2 * (12 if backward else 7) + 2 * 2**30
    if _memory_available() < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of memory")
    # random first and last rows, and those about 2^29, 2^30 and 2^31 elements; zeros, which cost little to make, in between
    marks = [0, *(2**power // (4 * features) for power in (29, 30, 31)), rows - 4]
    chosen = torch.tensor(sorted({row for mark in marks for row in range(max(mark - 3, 0), min(mark + 4, rows))}))
    tensors, options = arguments(len(chosen), features, Types(BF16, BF16, BF16), affine=False)
    grads = cotangents(tensors)

    def scattered(x: Tensor) -> Tensor:
        whole = torch.zeros(rows, x.shape[1], dtype=x.dtype)
        whole[chosen] = x
        return whole

    z, c = (scattered(tensors[name]).requires_grad_(backward) for name in ("z", "c"))
    found = dict(zip(("h", "c_out"), fused(z, c, **options), strict=True))
    if backward:
        gradients = torch.autograd.grad(tuple(found.values()), [z, c], tuple(map(scattered, grads)))
        found.update(zip(("dz", "dc"), gradients, strict=True))
    wanted = results(fused, tensors, grads, **options)
    assert_identical({name: value.detach()[chosen] for name, value in found.items()}, {name: wanted[name] for name in found})


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_affine_of_zeros(dtype: torch.dtype) -> None:
    """gamma = 0 leaves constant gates: dz is 0, dgamma is not."""
    tensors, options = arguments(7, 33, Types(dtype, dtype, dtype))
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    found = check_gates(tensors, options)
    assert not found["dz"].any()
    assert found["dweight"].any()
