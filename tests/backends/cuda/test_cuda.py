"""depth_lstm_gates by the CUDA C++ kernels, on a GPU or simulated from their PTX.

The sizes lie beside a boundary: of a vector of 16 bytes, of the rows that a warp and a block hold, of the three forward
kernels, and of the two schemes of backward. test_cuda_binding.py tests the Python and C++ above the kernels.
test_cuda_faults.py looks for races and for accesses beside a buffer.
"""

from __future__ import annotations

import functools
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
    TYPES,
    Types,
    arguments,
    assert_bound,
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
from depthlstm_fast.ops.depth_lstm import ACTIVATION_CODES, NORM_CODES, Options
from depthlstm_fast.ops.depth_lstm_autograd import gates
from depthlstm_fast.ops.registry import OPERATORS

fused = functools.partial(fused_by, backend="cuda")
FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
CUDA_TYPES = [types for types in TYPES if types.z != F64]
given = functools.partial(arguments, device=DEVICE)
# forward gives a row a warp above 4 rows a multiprocessor; a simulated GPU has two multiprocessors
FEW = 8 if DEVICE == "cpu" else 4 * torch.cuda.get_device_properties(0).multi_processor_count
MANY = FEW + 1


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        simulated.use(monkeypatch, simulated.load())
    elif not dl.backends()["cuda"].available:
        pytest.skip(dl.backends()["cuda"].detail)


def check(
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor] | None = None,
    condition: float = 0.0,
) -> dict[str, Tensor]:
    return check_gates(tensors, options, grads, condition, backend="cuda")


def dropout(seed: int = 77, p: float = 0.3) -> dict[str, Any]:
    return {"dropout_p": p, "training": True, "seed": torch.tensor([seed], device=DEVICE)}


# --- the error bound


@pytest.mark.parametrize("features", [16, 33])
def test_more_rows_than_blocks(features: int) -> None:
    """Check blocks that take several rows, not all of them equally many.

    On a GPU there are more partial sums than are added at a time.
    """
    rows = 47 if DEVICE == "cpu" else 40_000
    check(*given(rows, features, FULL))


# --- difficult rows


# --- the bias of the GEMM, a second partial product, dropout


# several vectors of a lane and of a thread, several warps, two blocks of columns; the first has the smallest row of
# each
@pytest.mark.parametrize("types", [FULL, HALF], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS[:3:2])
@pytest.mark.parametrize(
    ("rows", "features"),
    [(MANY, 136), (MANY, 264), (MANY, 520), (2, 264), (2, 520), (2, 2048), (2, 2056), (1, 4104), (3, 259)],
)
def test_z_bias_of_longer_rows(rows: int, features: int, norm: str, affine: bool, kind: str, types: Types) -> None:
    check_z_bias(*given(rows, features, types, norm, affine, kind), types.affine)


def check_z_bias(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, shift: float = 0.0) -> None:
    norm, kind = options["norm"], options["activation"]
    tensors["z_bias"] = normal(tensors["z"].shape[-1], dtype=dtype, shift=shift).to(DEVICE)
    grads = cotangents(tensors)
    codes = Options(NORM_CODES[norm], ACTIVATION_CODES[kind], 1e-6, 0.0)

    def with_bias(
        z: Tensor, c: Tensor, z_bias: Tensor, weight: Any = None, bias: Any = None, hidden: Any = None
    ) -> tuple[Tensor, Tensor]:
        return gates(z, z_bias, hidden, c, weight, bias, None, codes, "cuda")

    def plain(z: Tensor, c: Tensor, z_bias: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        return dl.reference.depth_lstm_gates(z + z_bias.to(z.dtype), c, **others, **options)

    exact = results(plain, double(tensors), (grads[0].double(), grads[1].double()))
    assert_bound(results(with_bias, tensors, grads), results(plain, tensors, grads), exact, shift)


@pytest.mark.parametrize("types", [FULL, MIXED, Types(F16, F16, F16)], ids=str)
@pytest.mark.parametrize("features", [16, 33, 520, 4104])
@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize("with_bias", [False, True])
def test_two_products(with_bias: bool, rows: int, features: int, types: Types) -> None:
    """Check a decoding step: z is the sum of two partial products, which is not rounded in between.

    h lies in a buffer of other columns.
    """
    tensors, _ = given(rows, features, types)
    more = normal(rows, 4 * features, dtype=types.z).to(DEVICE)
    buffer = torch.full((rows, 2 * features), torch.nan, dtype=types.z, device=DEVICE)
    h = buffer[:, features:]
    direct = OPERATORS["depth_lstm"]["cuda"].direct
    z, c, weight, bias = (tensors[name] for name in ("z", "c", "weight", "bias"))
    z_bias = normal(4 * features, dtype=types.affine).to(DEVICE) if with_bias else None
    added = torch.zeros(4 * features, dtype=types.affine, device=DEVICE) if z_bias is None else z_bias
    found_h, found_c = direct.forward(z, z_bias, None, c, weight, bias, None, 0, 0, 1e-6, 0.0, h, z_more=more)
    exact = dl.reference.depth_lstm_gates(
        z.double() + more.double() + added.double(), c.double(), weight.double(), bias.double()
    )
    eager = dl.reference.depth_lstm_gates(z + more + added.to(z.dtype), c, weight, bias)
    assert_bound(*({"h": h, "c": c} for h, c in ((found_h, found_c), eager, exact)))
    assert found_h.data_ptr() == h.data_ptr()
    assert buffer[:, :features].isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("features", [8, 33, 520])
@pytest.mark.parametrize("rows", [3, MANY])
def test_dropout_mask(rows: int, features: int, seed: int) -> None:
    """Compare the dropped elements, forward and backward, with an independent Philox."""
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
    """Check that p 2^32 is truncated, and that an element whose word is that number is kept.

    Kept elements are divided by 1 - p, however small it is.
    """
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


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py has tensors of more than 2^31 elements")
@pytest.mark.parametrize("features", [16, 33])
def test_offsets_beyond_2_to_the_31(features: int) -> None:
    """Check three rows at offsets 0, 2^30 and 2^31 elements, in memory that exists where it is touched."""
    tensors, options = given(3, features, HALF)
    dh, dc = cotangents(tensors)
    rows = {key: x for key, x in {**tensors, "dh": dh, "dc": dc}.items() if key not in ("weight", "bias")}
    room = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 8192)), dtype=BF16)
    far = {
        key: room.as_strided(x.shape, (2**30, 1), 512 * number).copy_(x) for number, (key, x) in enumerate(rows.items())
    }
    check({**tensors, **{key: far[key] for key in ("z", "c")}}, options, (far["dh"], far["dc"]))
