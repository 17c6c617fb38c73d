"""depth_lstm_gates by the CUDA C++ kernels: on a GPU where there is one, else simulated from the PTX that nvcc makes of them.

The sizes are those beside a boundary: of a vector of 16 bytes, of the rows that a warp and a block hold, of the three forward kernels and
the two schemes of backward. test_cuda_binding.py tests the Python and C++ above the kernels, test_cuda_faults.py looks for races and for
accesses beside a buffer.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from typing import Any

import pytest
import simulated
import torch
from helpers import (
    BF16,
    CALLS,
    DEVICE,
    F16,
    F32,
    F64,
    KINDS,
    NORMS,
    TINY,
    TYPES,
    Types,
    arguments,
    assert_bound,
    assert_identical,
    check_gates,
    cotangents,
    double,
    normal,
    results,
)
from helpers import fused as fused_by
from test_dropout import SEEDS, mask_by_hand, ties, words_by_hand
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.ops.depth_lstm import ACTIVATION_CODES, NORM_CODES, Options, Tensors
from depthlstm_fast.ops.depth_lstm_autograd import gates
from depthlstm_fast.ops.registry import OPERATORS

fused = functools.partial(fused_by, backend="cuda")
FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
CUDA_TYPES = [types for types in TYPES if types.z != F64]
given = functools.partial(arguments, device=DEVICE)
# forward takes a warp a row above 4 rows a multiprocessor; a simulated GPU has two of them
FEW = 8 if DEVICE == "cpu" else 4 * torch.cuda.get_device_properties(0).multi_processor_count
MANY = FEW + 1


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        simulated.use(monkeypatch, simulated.load())
    elif not dl.backends()["cuda"].available:
        pytest.skip(dl.backends()["cuda"].detail)


def check(
    tensors: dict[str, Tensor], options: dict[str, Any], grads: tuple[Tensor, Tensor] | None = None, condition: float = 0.0
) -> dict[str, Tensor]:
    return check_gates(tensors, options, grads, condition, backend="cuda")


def dropout(seed: int = 77, p: float = 0.3) -> dict[str, Any]:
    return {"dropout_p": p, "training": True, "seed": torch.tensor([seed], device=DEVICE)}


# --- the error bound


# Rows of whole vectors, by warp and by block, and rows that are none: each norm and activation in each kernel.
@pytest.mark.parametrize(("rows", "features"), [(MANY, 24), (3, 24), (3, 7)])
@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound(kind: str, norm: str, affine: bool, types: Types, rows: int, features: int) -> None:
    check(*given(rows, features, types, norm, affine, kind))


@pytest.mark.parametrize(("rows", "features"), [(MANY, 40), (3, 40), (3, 7)])
@pytest.mark.parametrize("types", CUDA_TYPES, ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_types(norm: str, affine: bool, kind: str, types: Types, rows: int, features: int) -> None:
    tensors, options = given(rows, features, types, norm, affine, kind)
    found = check(tensors, {**options, **dropout()})
    assert (found["h"].dtype, found["c_out"].dtype) == (types.z, types.c)


SIZES = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024, 1600, 2048, 4096]
# what is beside a boundary: V vectors of a lane (128 to 1024), of a thread of a block (4096), of narrow backward (2048), of `any` (8192)
BOUNDARIES = [128, 136, 256, 264, 520, 1032, 2056, 4104, 8192, 8200]


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize("features", SIZES + BOUNDARIES)
def test_features(features: int, types: Types) -> None:
    norm, affine, kind = CALLS[(SIZES + BOUNDARIES).index(features) % len(CALLS)]
    check(*given(MANY if features <= 1032 else 2, features, types, norm, affine, kind))


@pytest.mark.parametrize("features", [1, 16, 33])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17, FEW, MANY])
def test_rows(rows: int, features: int) -> None:
    found = check(*given(rows, features, FULL))
    if rows == 0:
        assert not found["dweight"].any()
        assert not found["dbias"].any()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS[:3:2])
def test_leading_shapes(norm: str, affine: bool, kind: str, shape: tuple[int, ...]) -> None:
    found = check(*given(shape, 8, FULL, norm, affine, kind))
    assert found["h"].shape == found["c_out"].shape == (*shape, 8)


@pytest.mark.parametrize("features", [16, 33])
def test_more_rows_than_blocks(features: int) -> None:
    """Every block takes several rows, not all of them the same number; more partial sums than are added at a time on a GPU."""
    rows = 47 if DEVICE == "cpu" else 40_000
    check(*given(rows, features, FULL))


@pytest.mark.parametrize("eps", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("norm", ["gate", "joint"])
@pytest.mark.parametrize("features", [40, 41])
def test_eps(norm: str, eps: float, features: int) -> None:
    tensors, options = given(MANY, features, FULL, norm)
    check(tensors, {**options, "eps": eps})


def test_norms_and_activations_differ() -> None:
    """A name that ran another's code would pass a comparison with a reference that makes the same mistake."""
    tensors, _ = given(5, 16, FULL, affine=False)
    outputs = [fused(**tensors, norm=norm)[0] for norm in dl.checks.NORMS]
    outputs += [fused(**tensors, activation=activation)[0] for activation in dl.checks.ACTIVATIONS[1:]]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-5  # the two GELUs differ by up to 5e-4


@pytest.mark.parametrize("types", [types for types in CUDA_TYPES if types.z != F32 and F32 in types], ids=str)
@pytest.mark.parametrize(("rows", "features"), [(MANY, 64), (4, 64), (4, 65)])
def test_fp32_results_beside_16_bit_ones(rows: int, features: int, types: Types) -> None:
    """What is given and returned in fp32 has the accuracy of fp32, which eager's own errors in 16 bits would not ask for."""
    tensors, options = given(rows, features, types)
    grads = cotangents(tensors)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    for key, value in results(fused, tensors, grads, **options).items():
        if value.dtype == F32:
            error = (value - exact[key]).abs().max() / exact[key].abs().max()
            assert error < 1e-5, f"{key}: {error:.2g}"  # a rounding to fp16 is 5e-4


@pytest.mark.parametrize("features", [16, 15])
def test_slope_of_relu_at_zero(features: int) -> None:
    """0, as torch has it: exact zeros are common in what ReLU is given."""
    tensors, options = given(3, features, FULL, "none", False, "relu")
    tensors["z"][:, 3 * features :] = 0
    assert not check(tensors, options)["dz"][:, 3 * features :].any()


# --- difficult rows


@pytest.mark.parametrize("types", [FULL, MIXED, Types(F16, F16, F32)], ids=str)
@pytest.mark.parametrize("features", [41, 304, 2056])  # the sizes of each kernel at which the rounding of a mean shows
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4])
def test_constant_rows(value: float, features: int, types: Types) -> None:
    """n is 0 whatever the rounding error of the mean, which r = 1 / sqrt(eps) would blow up."""
    tensors, options = given(3, features, types)
    tensors["z"] = torch.full_like(tensors["z"], value)
    grads = cotangents(tensors)
    found = results(fused, tensors, grads, **options)
    eager = results(dl.reference.depth_lstm_gates, tensors, grads, **options)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    # n = 0 makes dweight 0, for which a relative bound has no scale
    weight_gradients = [values.pop("dweight").abs().max().item() for values in (found, eager, exact)]
    assert weight_gradients[0] <= 2 * weight_gradients[1] + TINY[types.affine] * torch.finfo(types.affine).eps
    assert_bound(found, eager, exact)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("features", [40, 41, 512])
def test_large_means(features: int, ratio: float) -> None:
    """Two passes: E[z^2] - E[z]^2 would have no digit left."""
    tensors, options = given(3, features, FULL)
    tensors["z"] = (normal(3, 4 * features, shift=ratio)).to(F32).to(DEVICE)
    check(tensors, options, condition=ratio)


@pytest.mark.parametrize("features", [40, 41])
def test_fp16_near_its_largest(features: int) -> None:
    tensors, options = given(3, features, Types(F16, F16, F16))
    tensors["z"] = normal(3, 4 * features, scale=2e4).clamp(-6e4, 6e4).to(F16).to(DEVICE)
    assert all(value.isfinite().all() for value in check(tensors, options).values())


@pytest.mark.parametrize("features", [40, 41])
def test_gradients_that_are_beyond_fp16_on_the_way(features: int) -> None:
    """Those of the pre-activations, which r makes small again; eager in fp16 has no digit of them, and the bound would allow anything."""
    tensors, options = given(3, features, Types(F16, F16, F32))
    tensors["z"] = normal(3, 4 * features, scale=2e4).clamp(-6e4, 6e4).to(F16).to(DEVICE)
    tensors["c"] *= 1000
    dh, dc = (5e3 * x for x in cotangents(tensors))
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (dh.double(), dc.double()), **options)
    assert exact["dbias"].abs().max() > 3 * torch.finfo(F16).max
    for key, value in results(fused, tensors, (dh, dc), **options).items():
        assert (value - exact[key]).abs().max() <= 1e-3 * exact[key].abs().max(), key


@pytest.mark.parametrize("features", [40, 41])
@pytest.mark.parametrize("rows", [5, MANY])
def test_rows_are_independent(rows: int, features: int) -> None:
    """A row of NaN and infinity changes no other row, bit for bit."""
    tensors, options = given(rows, features, FULL)
    grads = cotangents(tensors)
    before = results(fused, tensors, grads, **options)
    tensors["z"][2], tensors["z"][2, 0] = torch.nan, torch.inf
    after = results(fused, tensors, grads, **options)
    others = [row for row in range(rows) if row != 2]
    for key in ("h", "c_out", "dz", "dc"):
        torch.testing.assert_close(after[key][others], before[key][others], rtol=0, atol=0)
        assert after[key][2].isnan().any()
    assert after["dweight"].isnan().any()  # NaN is passed on, not lost in a comparison


# Each special value in each place: what comes out must be NaN or infinite exactly where the reference's is.
@pytest.mark.parametrize("types", [FULL, HALF], ids=str)
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", ["gate", "joint", "none"])
@pytest.mark.parametrize(("rows", "features"), [(10, 16), (5, 16), (5, 15)])
def test_nan_and_infinity_stay_where_they_belong(rows: int, features: int, norm: str, special: float, types: Types) -> None:
    for kind in KINDS[:-1]:
        tensors, options = given(rows, features, types, norm, False, kind)
        for gate in range(4):
            tensors["z"][gate, gate * features + 3] = special
        tensors["c"][4, 3] = special
        found = fused(**tensors, **options)
        wanted = dl.reference.depth_lstm_gates(**double(tensors), **options)
        # a cdf(a) at -infinity is 0 in the limit and NaN in IEEE arithmetic; torch's own kernels give either
        either = norm == "none" and special == -torch.inf and kind in ("gelu", "gelu_tanh", "silu")
        for a, b in zip(found, wanted, strict=True):
            known = torch.arange(rows, device=DEVICE) != (3 if either else rows)
            assert torch.equal(a.isnan()[known], b.isnan()[known]), kind
            assert torch.equal(a.double()[known][b.isinf()[known]], b[known][b.isinf()[known]]), kind


@pytest.mark.parametrize("features", [16, 15])
@pytest.mark.parametrize("argument", ["dh", "dc", "c", "hidden"])
def test_nan_gradients_stay_in_their_row(argument: str, features: int) -> None:
    """And in their column of the parameters' gradients."""
    tensors, options = given(5, features, FULL, kind="given")
    every = {**tensors, **dict(zip(("dh", "dc"), cotangents(tensors), strict=True))}
    before = results(fused, tensors, (every["dh"], every["dc"]), **options)
    every[argument][2, 3] = torch.nan
    after = results(fused, tensors, (every["dh"], every["dc"]), **options)
    others, clean = torch.arange(5) != 2, torch.arange(features) != 3
    for key in ("dz", "dc"):
        assert torch.equal(after[key][others], before[key][others])
    assert after["dz"][2].isnan().any()
    for key in ("dweight", "dbias"):
        assert after[key][:, 3].isnan().any()
        assert torch.equal(after[key][:, clean], before[key][:, clean])


@pytest.mark.parametrize("features", [16, 33])
def test_repeatable(features: int) -> None:
    """The same bits every time, whichever thread and block come first."""
    rows = 47 if DEVICE == "cpu" else 40_000
    tensors, options = given(rows, features, MIXED)
    grads = cotangents(tensors)
    first = results(fused, tensors, grads, **options)
    for seed in range(1, 4) if DEVICE == "cpu" else range(20):
        if DEVICE == "cpu":
            ctypes.CDLL(str(simulated.kernels())).ptx_seed(ctypes.c_uint64(seed))
        assert_identical(results(fused, tensors, grads, **options), first)


# --- the bias of the GEMM, a second partial product, dropout


@pytest.mark.parametrize("types", [FULL, MIXED, HALF], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize(("rows", "features"), [(MANY, 40), (3, 40), (3, 41)])
def test_z_bias(rows: int, features: int, norm: str, affine: bool, kind: str, types: Types) -> None:
    """The operator with z_bias is the function of z + z_bias, and the bias's gradient is the sum of z's over the rows."""
    check_z_bias(*given(rows, features, types, norm, affine, kind), types.affine)


# several vectors of a lane and of a thread, several warps, two blocks of columns: the first has the smallest row of each
@pytest.mark.parametrize("types", [FULL, HALF], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS[:3:2])
@pytest.mark.parametrize(
    ("rows", "features"), [(MANY, 136), (MANY, 264), (MANY, 520), (2, 264), (2, 520), (2, 2048), (2, 2056), (1, 4104), (3, 259)]
)
def test_z_bias_of_longer_rows(rows: int, features: int, norm: str, affine: bool, kind: str, types: Types) -> None:
    check_z_bias(*given(rows, features, types, norm, affine, kind), types.affine)


@pytest.mark.parametrize(
    ("types", "dtype"), [(MIXED, BF16), (Types(BF16, F32, BF16), F32), (Types(F16, F16, F32), F16), (Types(F16, F16, F16), F32)], ids=str
)
@pytest.mark.parametrize(("rows", "features"), [(MANY, 40), (3, 40), (3, 41)])
def test_z_bias_of_another_type_than_the_affine(rows: int, features: int, types: Types, dtype: torch.dtype) -> None:
    check_z_bias(*given(rows, features, types), dtype)


@pytest.mark.parametrize("norm", ["gate", "joint"])
@pytest.mark.parametrize(("rows", "features"), [(MANY, 40), (3, 40), (3, 41)])
def test_large_z_bias(rows: int, features: int, norm: str) -> None:
    """The mean is one of z + z_bias: what the shift takes out is its rounding error, no more."""
    check_z_bias(*given(rows, features, FULL, norm), F32, shift=1e4)


def check_z_bias(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, shift: float = 0.0) -> None:
    norm, kind = options["norm"], options["activation"]
    tensors["z_bias"] = normal(tensors["z"].shape[-1], dtype=dtype, shift=shift).to(DEVICE)
    grads = cotangents(tensors)
    codes = Options(NORM_CODES[norm], ACTIVATION_CODES[kind], 1e-6, 0.0)

    def with_bias(z: Tensor, c: Tensor, z_bias: Tensor, weight: Any = None, bias: Any = None, hidden: Any = None) -> tuple[Tensor, Tensor]:
        return gates(Tensors(z, z_bias, hidden, c, weight, bias, None), codes, "cuda")

    def plain(z: Tensor, c: Tensor, z_bias: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        return dl.reference.depth_lstm_gates(z + z_bias.to(z.dtype), c, **others, **options)

    exact = results(plain, double(tensors), (grads[0].double(), grads[1].double()))
    assert_bound(results(with_bias, tensors, grads), results(plain, tensors, grads), exact, shift)


@pytest.mark.parametrize("types", [FULL, MIXED, Types(F16, F16, F16)], ids=str)
@pytest.mark.parametrize("features", [16, 33, 520, 4104])
@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize("with_bias", [False, True])
def test_two_products(with_bias: bool, rows: int, features: int, types: Types) -> None:
    """A decoding step: z is the sum of two partial products, which is not rounded in between; h lies in a buffer of other columns."""
    tensors, _ = given(rows, features, types)
    more = normal(rows, 4 * features, dtype=types.z).to(DEVICE)
    buffer = torch.full((rows, 2 * features), torch.nan, dtype=types.z, device=DEVICE)
    h = buffer[:, features:]
    direct = OPERATORS["depth_lstm"]["cuda"].direct
    z, c, weight, bias = (tensors[name] for name in ("z", "c", "weight", "bias"))
    z_bias = normal(4 * features, dtype=types.affine).to(DEVICE) if with_bias else None
    added = torch.zeros(4 * features, dtype=types.affine, device=DEVICE) if z_bias is None else z_bias
    found_h, found_c = direct.forward(z, z_bias, None, c, weight, bias, None, 0, 0, 1e-6, 0.0, h, z_more=more)
    exact = dl.reference.depth_lstm_gates(z.double() + more.double() + added.double(), c.double(), weight.double(), bias.double())
    eager = dl.reference.depth_lstm_gates(z + more + added.to(z.dtype), c, weight, bias)
    assert_bound(*({"h": h, "c": c} for h, c in ((found_h, found_c), eager, exact)))
    assert found_h.data_ptr() == h.data_ptr()
    assert buffer[:, :features].isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("features", [8, 33, 520])
@pytest.mark.parametrize("rows", [3, MANY])
def test_dropout_mask(rows: int, features: int, seed: int) -> None:
    """The elements that an independent Philox drops, forward and backward."""
    tensors, options = given(rows, features, FULL, kind="given")
    tensors["hidden"] = torch.ones_like(tensors["hidden"])
    tensors["c"] = torch.zeros_like(tensors["c"])
    grads = (torch.zeros_like(tensors["c"]), torch.ones_like(tensors["c"]))
    found = results(fused, tensors, grads, **options, **dropout(seed, 0.4))
    mask = torch.from_numpy(mask_by_hand(seed, rows, features, 0.4))
    assert torch.equal(found["c_out"].cpu() != 0, mask)
    assert torch.equal(found["dhidden"].cpu() != 0, mask)


@pytest.mark.parametrize("types", [FULL, HALF], ids=str)
@pytest.mark.parametrize(("rows", "features"), [(MANY, 16), (3, 16), (3, 33)])
def test_dropout_at_a_word(rows: int, features: int, types: Types) -> None:
    """p 2^32 is cut off, and an element whose word is that number is kept; what is kept is divided by 1 - p, however small that is."""
    tensors, options = given(rows, features, types, kind="given")
    tensors["hidden"], tensors["c"] = torch.ones_like(tensors["hidden"]), torch.zeros_like(tensors["c"])
    grads = (torch.zeros_like(tensors["c"]), torch.ones_like(tensors["c"]))
    everything = fused(**tensors, **options)[1].double()
    words = words_by_hand(5, rows, features)
    for p in ties(words):
        found = results(fused, tensors, grads, **options, **dropout(5, p))
        mask = torch.from_numpy(words >= int(p * 2**32)).to(DEVICE)
        assert torch.equal(found["c_out"] != 0, mask), p
        assert torch.equal(found["dhidden"] != 0, mask), p
        tolerance = 8 * torch.finfo(types.c).eps
        torch.testing.assert_close(found["c_out"].double()[mask], everything[mask] / (1 - p), rtol=tolerance, atol=0)


# --- memory


@pytest.mark.parametrize("features", [40, 41])
@pytest.mark.parametrize("apart", [8, 3])  # whole vectors, and rows that are not aligned
def test_strided_rows_and_expanded_gradients(features: int, apart: int) -> None:
    tensors, options = given(MANY, features, MIXED)
    for key in ("z", "c"):
        room = torch.full((MANY, tensors[key].shape[1] + apart), torch.nan, dtype=tensors[key].dtype, device=DEVICE)
        tensors[key] = room[:, : tensors[key].shape[1]].copy_(tensors[key])
    dh, dc = cotangents(tensors)
    check(tensors, options, (dh[:1].expand_as(dh), dc[:1].expand_as(dc)))


@pytest.mark.parametrize("offset", [1, 8])
def test_tensors_that_start_anywhere(offset: int) -> None:
    tensors, options = given(3, 40, HALF)
    shifted = {}
    for key, x in tensors.items():
        room = torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype, device=DEVICE)
        shifted[key] = room[offset : offset + x.numel()].view(x.shape).copy_(x)
    check(shifted, options)


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("features", [40, 41])
def test_one_gradient(features: int, absent: int) -> None:
    tensors, options = given(3, features, FULL)
    grads = cotangents(tensors)
    zeros = tuple(torch.zeros_like(x) if i == absent else x for i, x in enumerate(grads))

    def one(function: Any) -> dict[str, Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        output = function(**leaves, **options)[1 - absent]
        return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grads[1 - absent]), strict=True))

    exact = results(dl.reference.depth_lstm_gates, double(tensors), (zeros[0].double(), zeros[1].double()), **options)
    eager = results(dl.reference.depth_lstm_gates, tensors, zeros, **options)
    names = tuple(tensors)
    assert_bound(one(fused), {name: eager[f"d{name}"] for name in names}, {name: exact[f"d{name}"] for name in names})


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py has tensors of more than 2^31 elements")
@pytest.mark.parametrize("features", [16, 33])
def test_offsets_beyond_2_to_the_31(features: int) -> None:
    """Three rows whose offsets are 0, 2^30 and 2^31 elements, in memory that is there where it is touched."""
    tensors, options = given(3, features, HALF)
    dh, dc = cotangents(tensors)
    rows = {key: x for key, x in {**tensors, "dh": dh, "dc": dc}.items() if key not in ("weight", "bias")}
    room = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 8192)), dtype=BF16)
    far = {key: room.as_strided(x.shape, (2**30, 1), 512 * number).copy_(x) for number, (key, x) in enumerate(rows.items())}
    check({**tensors, **{key: far[key] for key in ("z", "c")}}, options, (far["dh"], far["dc"]))
