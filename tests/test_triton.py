"""depth_lstm_gates by the Triton kernels: values, gradients and memory, on a GPU where there is one, else interpreted on the CPU.

Interpreted, a program costs 10 to 50 ms whatever its size and a row of the wide scheme half a second. So the rows are few and the sizes
are those beside a boundary: of a tile (BLOCK features, ROWS rows), of the narrow scheme, of what a register file holds. All memory
that the launcher allocates is NaN between guards, and all arguments lie in NaN.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    DEVICE,
    F16,
    F32,
    F64,
    HAS_CPP,
    HAS_TRITON,
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
    needs_triton,
    normal,
    results,
)
from helpers import fused as fused_by
from test_dropout import LOW, SEEDS, kept, mask_by_hand, philox
from test_gates_layouts import expanded, expanded_once, name, strided_features, transposed
from test_ops import BAD, CHECKED, Cell, Gates, backward_arguments, raw, step, with_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import depthlstm_fast as dl
from depthlstm_fast import ops
from depthlstm_fast.reference.gates import dropout_mask

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's, of overflows

if HAS_TRITON:
    gates = importlib.import_module("depthlstm_fast.kernels.gates")
    launcher = importlib.import_module("depthlstm_fast.kernels.launch")
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    dropout_factors = importlib.import_module("depthlstm_fast.kernels.formulas").dropout_factors

    @triton.jit
    def factors_kernel(seed, out, row, first, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        rows = (row + tl.arange(0, ROWS).to(tl.int64))[:, None]
        factors = dropout_factors(tl.load(seed), rows, first, threshold, scale, ROWS, BLOCK)
        tl.store(out + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], factors)


fused = functools.partial(fused_by, backend="triton")
FULL, HALF, MIXED = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(BF16, F32, F32)
TRITON_TYPES = [types for types in TYPES if types.z != F64]
# one for each type of memory, and the mixtures in which a 16-bit z and fp32 meet: autocast's, and fp32 parameters alone
MEMORIES = [FULL, HALF, Types(F16, F16, F16), MIXED, Types(F16, F16, F32)]

GUARD = 1 << 13  # elements on either side, a multiple of every alignment
SENTINEL = 1536.0  # exact in every type


class Memory:
    """Stands for the module torch in the launcher: what it allocates is NaN between two guards of SENTINELs."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __getattr__(self, attribute: str) -> Any:
        return getattr(torch, attribute)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        buffer[GUARD : GUARD + size] = torch.nan
        self.buffers.append((buffer, size))
        return buffer.new_empty(0).set_(buffer.untyped_storage(), GUARD, shape)  # no view, as little as torch.empty's result is one

    def check_guards(self) -> None:
        for buffer, size in self.buffers:
            outside = torch.cat((buffer[:GUARD], buffer[GUARD + size :]))
            assert (outside == SENTINEL).all(), f"guard: written beside {size} elements of {buffer.dtype}"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found = Memory()
    monkeypatch.setattr(gates, "torch", found)
    yield found
    found.check_guards()


@pytest.fixture
def small_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide scheme for any D, in blocks of 16 and tiles of two rows: what costs seconds at 2049 features, in less."""
    monkeypatch.setattr(gates, "narrow_plans", lambda *_: [])
    monkeypatch.setattr(gates, "WIDE_PLANS", [launcher.Launch(1, {"ROWS": 2, "BLOCK": 16, "STAGES": 2})])
    monkeypatch.setattr(gates, "ROW_SUMS_PLAN", launcher.Launch(1, {"BLOCK": 16}))


def among_nan(x: Tensor, apart: int = 0) -> Tensor:
    """x in the middle of NaN, its rows ``apart`` elements further from each other."""
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    room = torch.full((rows * (width + apart) + 2 * GUARD,), torch.nan, dtype=x.dtype, device=x.device)
    inner = room[GUARD:-GUARD].view(*x.shape[:-1], width + apart)[..., :width]
    return inner.copy_(x).detach()


def given(*positional: Any, **named: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return arguments(*positional, **named, device=DEVICE)


def on_device(inputs: list[Any]) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs]


def check(
    tensors: dict[str, Tensor], options: dict[str, Any], grads: tuple[Tensor, Tensor] | None = None, condition: float = 0.0
) -> dict[str, Tensor]:
    """check_gates with every argument and gradient among NaN."""
    dh, dc = cotangents(tensors) if grads is None else grads
    surrounded = {key: among_nan(tensor) for key, tensor in tensors.items()}
    return check_gates(surrounded, options, (among_nan(dh), among_nan(dc)), condition, backend="triton")


def dropout(seed: int = 77, p: float = 0.3) -> dict[str, Any]:
    return {"dropout_p": p, "training": True, "seed": torch.tensor([seed], device=DEVICE)}


# --- the error bound


# A full cross product on purpose: each is a kernel of its own, with the formulas of fp32 and with those of 16-bit results. D = 7 leaves
# more than half of a tile's columns and rows to the masks.
@pytest.mark.parametrize("types", [FULL, HALF], ids=str)
@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound(kind: str, norm: str, affine: bool, types: Types) -> None:
    check(*given(5, 7, types, norm, affine, kind))


# Types only decide how memory is read and written, so that every shape of call is enough.
@pytest.mark.parametrize("types", [types for types in TRITON_TYPES if types not in (FULL, HALF)], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_types(norm: str, affine: bool, kind: str, types: Types) -> None:
    tensors, options = given(3, 7, types, norm, affine, kind)
    found = check(tensors, {**options, **dropout()})
    assert (found["h"].dtype, found["c_out"].dtype) == (types.z, types.c)


# BLOCK = D and one column beside it (masked and not), one row a tile and several, and rows that are not a power of two. The shape
# of the call rotates, so that neighbouring sizes differ in it.
SIZES = [1, 2, 3, 7, 31, 33, 63, 65, 127, 129, 511, 512, 768, 1000, 1024]


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize("features", SIZES)
def test_features(features: int, types: Types) -> None:
    norm, affine, kind = CALLS[0] if types == FULL else CALLS[SIZES.index(features) % len(CALLS)]
    check(*given(3, features, types, norm, affine, kind))


@pytest.mark.parametrize("features", [16, 256, 512])
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_features_that_fill_a_block(norm: str, affine: bool, kind: str, features: int) -> None:
    """No column is masked; with 512 of them no row is either, and loads and stores have no mask at all."""
    check(*given(2, features, FULL, norm, affine, kind))


# The last of the narrow scheme, the first of the wide one, whole blocks of it, and the most that a program holds
@pytest.mark.parametrize(
    ("features", "rows", "types"),
    [(2048, 2, FULL), (2049, 2, FULL), (2048, 1, MIXED), (4096, 1, MIXED), (8191, 1, FULL), (8192, 1, Types(F16, F16, F16))],
    ids=str,
)
def test_features_of_both_schemes(features: int, rows: int, types: Types) -> None:
    assert bool(gates.narrow_plans(features, 2, 4)) == (features <= 2048)
    check(*given(rows, features, types))


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("features", [20, 32])
@pytest.mark.usefixtures("small_wide")
def test_wide(features: int, norm: str, affine: bool, kind: str, types: Types) -> None:
    check(*given(3, features, types, norm, affine, kind))


@pytest.mark.usefixtures("small_wide")
def test_wide_with_many_rows() -> None:
    """One program goes through three tiles, the last of them half empty."""
    check(*given(5, 20, FULL))


@pytest.mark.parametrize("features", [1, 33])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17, 40])
def test_rows(rows: int, features: int) -> None:
    found = check(*given(rows, features, FULL))
    if rows == 0:
        assert not found["dweight"].any()
        assert not found["dbias"].any()


@pytest.mark.parametrize("features", [1, 33])
@pytest.mark.parametrize("beside", [-1, 0, 1])
@pytest.mark.parametrize("scheme", ["forward", "backward"])
def test_rows_that_fill_a_tile(scheme: str, beside: int, features: int) -> None:
    plans = gates.forward_plans(features) if scheme == "forward" else gates.narrow_plans(features, 2, 4)
    assert plans[0].constants["ROWS"] > 1
    check(*given(plans[0].constants["ROWS"] + beside, features, FULL))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS[:3:2])
def test_leading_shapes(norm: str, affine: bool, kind: str, shape: tuple[int, ...]) -> None:
    found = check(*given(shape, 9, FULL, norm, affine, kind))
    assert found["h"].shape == found["c_out"].shape == (*shape, 9)


def programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As on a GPU that holds ``count`` programs of one warp."""
    monkeypatch.setattr(gates, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(gates, "WARPS", count)


# Programs that take several tiles, not all of them the same number; partial sums of one program, and of more than are added at a time
@pytest.mark.parametrize(("count", "rows", "features"), [(1, 9, 33), (2, 18, 33), (3, 9, 65), (18, 273, 1), (4, 9, 512), (4, 5, 1024)])
def test_more_rows_than_programs(count: int, rows: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, count)
    check(*given(rows, features, FULL))


@pytest.mark.parametrize("features", [33, 512])
def test_every_plan(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans that only tuning takes are as right as the first; interpreted, the number of stages changes nothing."""
    tensors, options = given(3, features, FULL)
    forward, narrow = gates.forward_plans(features), gates.narrow_plans(features, 2, 4)
    seen = set()
    for plans in itertools.zip_longest(forward, narrow, fillvalue=forward[0]):
        sizes = [(plan.constants["ROWS"], plan.constants["BLOCK"]) for plan in plans]
        if DEVICE == "cpu" and sizes[1] in seen:
            continue
        seen.add(sizes[1])
        monkeypatch.setattr(gates, "forward_plans", lambda *_, plan=plans[0]: [plan])
        monkeypatch.setattr(gates, "narrow_plans", lambda *_, plan=plans[1]: [plan])
        check(tensors, options)


def test_every_wide_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = given(1, 2060, FULL)
    for plan in gates.WIDE_PLANS[1:]:
        monkeypatch.setattr(gates, "WIDE_PLANS", [plan])
        if DEVICE == "cuda" or plan.constants["BLOCK"] != 512:
            check(tensors, options)


@pytest.mark.parametrize("eps", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("norm", ["gate", "joint"])
def test_eps(norm: str, eps: float) -> None:
    tensors, options = given(3, 40, FULL, norm)
    check(tensors, {**options, "eps": eps})


def test_norms_and_activations_differ() -> None:
    """A name that ran another's code would pass a comparison with a reference that makes the same mistake."""
    tensors, _ = given(5, 16, FULL, affine=False)
    outputs = [fused(**tensors, norm=norm)[0] for norm in dl.checks.NORMS]
    outputs += [fused(**tensors, activation=activation)[0] for activation in dl.checks.ACTIVATIONS[1:]]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-5  # the two GELUs differ by up to 5e-4


@pytest.mark.parametrize("types", [types for types in TRITON_TYPES if types.z != F32 and F32 in types], ids=str)
def test_fp32_results_beside_16_bit_ones(types: Types) -> None:
    """What is given and returned in fp32 has the accuracy of fp32, which eager's own errors in 16 bits would not ask for."""
    tensors, options = given(4, 64, types)
    grads = cotangents(tensors)
    exact = results(dl.reference.depth_lstm_gates, double(tensors), (grads[0].double(), grads[1].double()), **options)
    for key, value in results(fused, tensors, grads, **options).items():
        if value.dtype == F32:
            error = (value - exact[key]).abs().max() / exact[key].abs().max()
            assert error < 1e-5, f"{key}: {error:.2g}"  # a rounding to fp16 is 5e-4, the formulas for 16-bit results are 5e-5


# --- the bias of the GEMM


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_z_bias(scheme: str, norm: str, affine: bool, kind: str, types: Types, request: pytest.FixtureRequest) -> None:
    """The operator with z_bias is the function of z + z_bias, and the bias's gradient is the sum of z's over the rows."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    check_z_bias(3, 20, types, norm, affine, kind)


@pytest.mark.parametrize("features", [1024, 1025])
def test_z_bias_of_both_schemes(features: int) -> None:
    """The sums of one more gradient leave less room for rows than test_features_of_both_schemes has."""
    assert bool(gates.narrow_plans(features, 3, 4)) == (features <= 1024)
    check_z_bias(2, features, FULL, "gate", True, "gelu")


def check_z_bias(rows: int, features: int, types: Types, norm: str, affine: bool, kind: str) -> None:
    tensors, options = given(rows, features, types, norm, affine, kind)
    tensors["z_bias"] = normal(tensors["z"].shape[1], dtype=types.affine).to(DEVICE)
    fixed = (ops.NORM_CODES[norm], ops.ACTIVATION_CODES[options["activation"]], 1e-6, 0.0)

    def by_operator(z: Tensor, c: Tensor, z_bias: Tensor, weight: Any = None, bias: Any = None, hidden: Any = None) -> Any:
        return ops.gates(z, z_bias, hidden, c, weight, bias, None, *fixed, backend="triton")

    def by_reference(z: Tensor, z_bias: Tensor, **rest: Any) -> Any:
        h, c = dl.reference.depth_lstm_gates(z.double() + z_bias.double(), **{key: x.double() for key, x in rest.items()}, **options)
        return h, c

    def eager(z: Tensor, z_bias: Tensor, **rest: Any) -> Any:
        return dl.reference.depth_lstm_gates((z + z_bias).to(z.dtype), **rest, **options)

    grads = cotangents(tensors)
    surrounded = {key: among_nan(tensor) for key, tensor in tensors.items()}
    exact = results(by_reference, double(tensors), (grads[0].double(), grads[1].double()))
    assert_bound(results(by_operator, surrounded, grads), results(eager, tensors, grads), exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_cell(kind: str, autocast: bool) -> None:
    """The product, its bias and the gates as one node; under autocast in bf16 with c, the bias and the affine in fp32."""
    counts = 3 if kind == "given" else 4
    shapes = {"x": (5, 6), "h": (5, 9), "c": (5, 9), "w": (counts * 9, 15), "b": (counts * 9,), "weight": (counts, 9), "bias": (counts, 9)}
    if kind == "given":
        shapes["hidden"] = (5, 9)
    tensors = {key: normal(*shape, dtype=F32, scale=0.5).to(DEVICE) for key, shape in shapes.items()}
    half = BF16 if autocast else F32
    grads = (normal(5, 9, dtype=half).to(DEVICE), normal(5, 9, dtype=F32).to(DEVICE))

    def run(cell: Callable, **named: Any) -> Any:
        with torch.autocast(DEVICE, BF16, enabled=autocast):
            return cell(**named, **dropout())

    def eager_cell(**named: Any) -> Any:
        if kind == "given":
            named["hidden"] = named["hidden"].to(half)  # as the product before it gives it
        return dl.reference.depth_lstm_cell(**named)

    found = results(functools.partial(run, dl.depth_lstm_cell, backend="triton"), tensors, grads)
    assert dl.last_backend() == "triton"
    assert found["h"].dtype == half
    eager = results(functools.partial(run, eager_cell), tensors, grads)
    autocast = False
    exact = results(functools.partial(run, dl.reference.depth_lstm_cell), double(tensors), (grads[0].double(), grads[1].double()))
    assert_bound(found, eager, exact)


# --- what cannot run


@pytest.mark.parametrize(
    ("features", "dtype", "limit"),
    [(8193, F32, "the Triton kernels take D up to 8192; found 8193"), (4, F64, "the Triton kernels take float32, .*; found float64")],
    ids=["D", "float64"],
)
def test_limits(features: int, dtype: torch.dtype, limit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By name a ValueError that says what the limit is, by "auto" one line and the reference."""
    z, c = torch.zeros(1, 4 * features, dtype=dtype, device=DEVICE), torch.zeros(1, features, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"backend='triton' cannot run this call: {limit}"):
        dl.depth_lstm_gates(z, c, backend="triton")
    backends = sys.modules["depthlstm_fast.backends"]
    monkeypatch.setattr(backends, "_strict", False)
    monkeypatch.setattr(backends, "_logged", set())
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    with caplog.at_level(logging.WARNING, "depthlstm_fast"):
        assert backends.choose("auto", on_gpu, features) == "reference"
    assert len(caplog.records) == 1
    monkeypatch.setattr(backends, "_strict", True)
    with pytest.raises(RuntimeError, match=limit):
        backends.choose("auto", on_gpu, features)


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_raw_operators_refuse_bad_arguments(what: str, backward: bool) -> None:
    """Below the checks of the public functions nothing may read or write out of bounds."""
    inputs = on_device(raw((3,), 8, FULL, "gate", True, "gelu", True, True))
    more = on_device(backward_arguments(inputs))
    position, value = BAD[what]
    inputs[position] = value.to(DEVICE) if isinstance(value, Tensor) else value
    operator = torch.ops.depthlstm_fast.triton_gates_backward if backward else torch.ops.depthlstm_fast.triton_gates_forward
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        operator(*([*more[:2], *inputs, *more[-2:]] if backward else inputs))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    "value",
    [torch.randn(3, 7), torch.randn(4, 8), torch.randn(3, 8, dtype=F64), torch.tensor(1.0)],
    ids=["features", "rows", "dtype", "dimensions"],
)
def test_raw_backward_refuses_gradients_that_do_not_fit(position: int, value: Tensor) -> None:
    inputs = on_device(backward_arguments(raw((3,), 8, FULL, "gate", True, "gelu", False, False)))
    inputs[position] = value.to(DEVICE)
    with pytest.raises((ValueError, TypeError), match=("dh", "dc")[position]):
        torch.ops.depthlstm_fast.triton_gates_backward(*inputs)


# --- dropout


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_mask(seed: int, scheme: str, request: pytest.FixtureRequest) -> None:
    """What forward drops, and what backward drops, are the elements that the paper's Philox names; the other backends drop the same."""
    features = 37 if scheme == "wide" else 21
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    key = torch.tensor([seed], device=DEVICE)
    wanted = torch.from_numpy(mask_by_hand(seed, 5, features, 0.35)).to(DEVICE)
    tensors, options = given(5, features, FULL, "none", False, "given")
    tensors["hidden"] = torch.ones_like(tensors["hidden"])
    found = results(fused, tensors, cotangents(tensors), **options, **dropout(seed, 0.35))
    assert torch.equal(found["dhidden"] != 0, wanted)
    others = [dl.reference.depth_lstm_gates, *([functools.partial(fused_by, backend="cpp")] if HAS_CPP else [])]
    for function in others:
        assert torch.equal(kept(function, (5,), features, 0.35, key.cpu()) != 0, wanted.cpu())
    on_device = functools.partial(by_device, fused)
    factors = kept(on_device, (5,), features, 0.35, key)
    assert torch.equal(factors != 0, wanted)
    torch.testing.assert_close(factors[wanted], torch.full_like(factors[wanted], 1 / 0.65))


def by_device(function: Callable, *positional: Tensor, hidden: Tensor, **named: Any) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in function(*(x.to(DEVICE) for x in positional), hidden=hidden.to(DEVICE), **named))


def test_dropout_mask_of_real_blocks() -> None:
    """In the wide scheme as it is run, beyond the first of its blocks of 512 and 1024 features."""
    tensors, options = given(1, 2049, FULL, "gate", False, "given")
    tensors["hidden"] = torch.ones_like(tensors["hidden"])
    found = results(fused, tensors, cotangents(tensors), **options, **dropout(5, 0.5))
    assert torch.equal(found["dhidden"] != 0, dropout_mask(torch.tensor([5], device=DEVICE), 1, 2049, 0.5))


@pytest.mark.parametrize("row", [0, 2**31 - 2, 2**32 - 2, 2**40 + 5])
@pytest.mark.parametrize("first", [0, 512])
@pytest.mark.parametrize("seed", [5, -1])
def test_dropout_of_far_rows(seed: int, first: int, row: int) -> None:
    """Rows beyond 2^32, of which no test could hold the elements: the formula by itself."""
    found = torch.empty(4, 32, device=DEVICE)
    plan = launcher.Launch(1, {"ROWS": 4, "BLOCK": 32})
    key = torch.tensor([seed], device=DEVICE)
    launcher.launch(factors_kernel, (1,), (key, found, row, first, int(0.35 * 2**32), 3.0), {}, plan, False)
    words = [
        [philox([d // 4, n & LOW, n >> 32, 0], [seed & LOW, (seed >> 32) & LOW])[d % 4] for d in range(first, first + 32)]
        for n in range(row, row + 4)
    ]
    assert found.tolist() == [[3.0 * (word >= int(0.35 * 2**32)) for word in line] for line in words]


@pytest.mark.parametrize("p", [1e-10, 0.5, 0.999999])
def test_dropout_probabilities(p: float) -> None:
    key = torch.tensor([3], device=DEVICE)
    found = kept(functools.partial(by_device, fused), (20,), 250, p, key)
    assert torch.equal(found != 0, dropout_mask(key, 20, 250, p))
    torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 1 / (1 - p)))


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_error_bound_with_dropout(scheme: str, norm: str, affine: bool, kind: str, request: pytest.FixtureRequest) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(2, 20, FULL, norm, affine, kind)
    check(tensors, {**options, **dropout()})


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """The seed that is drawn in forward is drawn again when it is recomputed."""
    tensors, options = given(5, 9, FULL)
    options.update(dropout_p=0.5, training=True)
    grads = cotangents(tensors)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return fused(**dict(zip(names, values, strict=True)), **options)

    found = []
    for wrapped in (function, lambda *values: checkpoint(function, *values, use_reentrant=reentrant)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        torch.manual_seed(5)
        outputs = wrapped(*leaves)
        torch.autograd.backward(outputs, grads)
        found.append({"h": outputs[0].detach(), **{key: leaf.grad for key, leaf in zip(names, leaves, strict=True)}})
    assert_identical(found[1], found[0])


# --- memory


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_every_element_is_written(norm: str, affine: bool, kind: str, scheme: str, memory: Memory, request: pytest.FixtureRequest) -> None:
    """Outputs, partial sums and statistics: nothing of what the launcher allocates stays as it was."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    inputs = on_device(raw((5,), 20, FULL, norm, affine, kind, True, True))
    found = (*gates.gates_forward(*inputs), *gates.gates_backward(*on_device(backward_arguments(inputs))))
    storages = {buffer.untyped_storage().data_ptr() for buffer, _ in memory.buffers}
    assert {x.untyped_storage().data_ptr() for x in found} < storages  # and there is scratch beside the results
    for buffer, size in memory.buffers:
        inner = buffer[GUARD : GUARD + size]
        if size == 5 * gates.STATISTICS.value and kind == "given":
            inner = inner.view(5, -1)[:, : 5 * 3]  # three gates leave a quarter of the statistics' room
        assert not inner.isnan().any(), size


def test_h_may_be_written_beside_something_else() -> None:
    """Into every row of a wider matrix, and nothing else of it."""
    inputs = on_device(raw((9,), 33, FULL, "gate", True, "gelu", False, False))
    wanted, _ = gates.gates_forward(*inputs)
    for left, right in ((0, 0), (0, 7), (7, 0), (31, 64)):
        room = torch.full((9, left + 33 + right), SENTINEL, device=DEVICE)
        h, _ = gates.gates_forward(*inputs, room[:, left : left + 33])
        assert torch.equal(h, wanted)
        assert torch.equal(room[:, left : left + 33], wanted)
        assert (room[:, :left] == SENTINEL).all()
        assert (room[:, left + 33 :] == SENTINEL).all()


def rows_apart(x: Tensor) -> Tensor:
    return among_nan(x, 5)


LAYOUTS = [rows_apart, transposed, strided_features, expanded, expanded_once]


# Inputs and gradients of different layouts on a batch of (2, 3, 2) rows, where a single row stride may not exist: each layout meets
# each in one of the two roles.
@pytest.mark.parametrize("shift", range(len(LAYOUTS)))
@pytest.mark.parametrize("inputs", LAYOUTS, ids=name)
def test_layouts(inputs: Callable, shift: int) -> None:
    gradients = LAYOUTS[(LAYOUTS.index(inputs) + shift) % len(LAYOUTS)]
    tensors, options = given((2, 3, 2), 5, MEMORIES[shift], kind="given")
    dh, dc = (gradients(gradient) for gradient in cotangents(tensors))
    check_gates({key: inputs(tensor) for key, tensor in tensors.items()}, options, (dh, dc), backend="triton")


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_each_argument_has_its_own_row_stride(scheme: str, request: pytest.FixtureRequest) -> None:
    """No stride can stand in for another, and the parameters are no views of rows."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(3, 20, FULL, kind="given")
    dh, dc = cotangents(tensors)
    apart = {key: among_nan(tensor, number) for number, (key, tensor) in enumerate(tensors.items(), 3)}
    check_gates(apart, options, (among_nan(dh, 11), among_nan(dc, 13)), backend="triton")


def test_row_strides() -> None:
    """The stride that the launcher finds reads the rows that the tensor has; where it finds none there is none."""
    whole = torch.arange(2 * 3 * 4 * 30).view(2, 3, 4, 30)
    views = [whole, whole.transpose(0, 1), whole.transpose(1, 2), whole[..., 2:7], whole[1:, ::2], whole[..., :1], whole[..., ::2]]
    views += [whole[:, :1], whole[:, :, :1], whole[0, 0, 0], whole[:1, :1, :1]]
    views += [whole[:, :1].expand(2, 3, 4, 30), whole[:1, :1, :1].expand(2, 3, 4, 30)]
    found = 0
    for x in views:
        stride = launcher.row_stride(x)
        rows = x.reshape(-1, x.shape[-1])
        steps = {b - a for a, b in itertools.pairwise(rows[:, 0].tolist())}
        dense = x.shape[-1] == 1 or x.stride(-1) == 1
        assert (stride is not None) == (dense and len(steps) <= 1)
        if stride is not None:
            found += 1
            assert torch.equal(x.as_strided(rows.shape, (stride, 1)), rows)
    assert found >= 6


def test_alignment() -> None:
    """Aligned means that every row of every tensor begins at a multiple of 16 bytes."""
    for dtype, offset, stride in itertools.product((F32, BF16), range(9), range(1, 18)):
        room = torch.empty(200, dtype=dtype)
        x = room[(-room.data_ptr() // room.itemsize) % 16 + offset :]
        wanted = all(x[row * stride :].data_ptr() % 16 == 0 for row in range(4))
        assert launcher.is_aligned((None, x), (1, stride)) == wanted
        assert launcher.is_aligned((room[:0], x), (16, stride)) == (wanted and room.data_ptr() % 16 == 0)


def lazy_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory that is not there before it is touched; on a GPU it has to be."""
    size = elements * dtype.itemsize
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < size + 2**30:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of the GPU's memory")
        return torch.zeros(elements, dtype=dtype, device=DEVICE)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which mmap names from Python 3.13 on
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"{size / 2**30:.0f} GiB of address space: {error}")
    return torch.frombuffer(pages, dtype=dtype)


@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_rows_more_than_2_to_the_31_elements_apart(scheme: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Three rows whose offsets are 0, 2^30 and 2^31: an int32 would wrap to -2^31, where zeros are read in the last row's place."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(3, 20, HALF, kind=kind)
    dh, dc = cotangents(tensors)
    by_row = {key: x for key, x in {**tensors, "dh": dh, "dc": dc}.items() if key not in ("weight", "bias")}
    room = lazy_memory(2**31 + 2**31 + 4096, BF16)
    far = {}
    for number, (key, x) in enumerate(by_row.items()):
        far[key] = room.as_strided(x.shape, (2**30, 1), 2**31 + 512 * number)
        far[key].copy_(x)
    check_gates({**tensors, **{key: far[key] for key in tensors if key in far}}, options, (far["dh"], far["dc"]), backend="triton")


@pytest.mark.parametrize("features", [64, 4096] if DEVICE == "cuda" else [64])
@pytest.mark.usefixtures("real_memory")
def test_more_than_2_to_the_31_elements(features: int) -> None:
    """On a GPU; interpreted, the same with a few, and test_triton_interpreter.py runs the last programs of as many."""
    elements = 2**31 if DEVICE == "cuda" else 4 * features * 5
    rows = elements // (4 * features) + 3
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < rows * features * 2 * 20:
        pytest.skip(f"needs {rows * features * 40 / 2**30:.0f} GiB of the GPU's memory")
    # the first and last rows, and those about 2^29, 2^30 and 2^31 elements, are random; the others zeros
    marks = [0, *(elements // divisor // (4 * features) for divisor in (4, 2, 1)), rows - 2]
    chosen = torch.tensor(sorted({row for mark in marks for row in range(max(mark - 1, 0), min(mark + 2, rows))}))
    tensors, options = given(len(chosen), features, HALF, affine=False)
    grads = cotangents(tensors)

    def scattered(x: Tensor) -> Tensor:
        whole = torch.zeros(rows, x.shape[1], dtype=x.dtype, device=DEVICE)
        whole[chosen] = x
        return whole

    found = results(fused, {key: scattered(x) for key, x in tensors.items()}, (scattered(grads[0]), scattered(grads[1])), **options)
    assert_identical({key: value[chosen] for key, value in found.items()}, results(fused, tensors, grads, **options))


# --- autograd


@pytest.mark.parametrize("types", [FULL, MIXED], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_nothing_given_is_written(kind: str, types: Types) -> None:
    tensors, options = given(5, 9, types, kind=kind)
    options.update(dropout())
    grads = cotangents(tensors)
    everything = {**tensors, "seed": options["seed"], "dh": grads[0], "dc": grads[1]}
    before = {key: tensor.clone() for key, tensor in everything.items()}
    versions = {key: tensor._version for key, tensor in everything.items()}
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    first = [output.detach().clone() for output in outputs]
    torch.autograd.grad(outputs, list(leaves.values()), grads)
    assert {key: tensor._version for key, tensor in everything.items()} == versions
    assert_identical({key: tensor.detach() for key, tensor in everything.items()}, before)
    assert_identical(dict(zip("hc", [output.detach() for output in outputs], strict=True)), dict(zip("hc", first, strict=True)))


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_backward_twice_gives_twice_the_gradient(norm: str, affine: bool, kind: str) -> None:
    tensors, options = given(5, 9, FULL, norm, affine, kind)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    outputs = fused(**leaves, **options)
    grads = cotangents(tensors)
    torch.autograd.backward(outputs, grads, retain_graph=True)
    once = {key: tensor.grad.clone() for key, tensor in leaves.items()}
    torch.autograd.backward(outputs, grads)
    assert_identical({key: tensor.grad for key, tensor in leaves.items()}, {key: 2 * gradient for key, gradient in once.items()})


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_every_subset_of_gradients(kind: str) -> None:
    tensors, options = given(3, 7, FULL, kind=kind)
    grads = cotangents(tensors)
    every = results(fused, tensors, grads, **options)
    for size in range(len(tensors)):
        for wanted in itertools.combinations(tensors, size):
            leaves = {key: tensor.detach().requires_grad_(key in wanted) for key, tensor in tensors.items()}
            outputs = fused(**leaves, **options)
            assert all(output.requires_grad == bool(wanted) for output in outputs)
            if wanted:
                torch.autograd.backward(outputs, grads)
            for key, leaf in leaves.items():
                assert (leaf.grad is not None) == (key in wanted), (wanted, key)
                assert leaf.grad is None or torch.equal(leaf.grad, every[f"d{key}"]), (wanted, key)


@pytest.mark.parametrize(
    ("scheme", "norm", "affine", "kind"), [("narrow", *call) for call in CALLS] + [("wide", *call) for call in (CALLS[0], CALLS[4])]
)
@pytest.mark.parametrize("used", ["h", "c"])
def test_undefined_gradients_are_zeros(used: str, scheme: str, norm: str, affine: bool, kind: str, request: pytest.FixtureRequest) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(2, 17, FULL, norm, affine, kind)
    dh, dc = cotangents(tensors)
    dh, dc = (dh, torch.zeros_like(dc)) if used == "h" else (torch.zeros_like(dh), dc)
    wanted = results(fused, tensors, (dh, dc), **options)
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    h, c = fused(**leaves, **options)
    torch.autograd.backward([h] if used == "h" else [c], [dh] if used == "h" else [dc])
    for key, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted[f"d{key}"]), key


def test_neither_gradient() -> None:
    """An output can be in the graph and yet get no gradient: nothing may crash on it."""
    tensors, options = given(5, 17, FULL)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    h, c = fused(**leaves, **options)
    extra = normal(3).requires_grad_()
    gradients = torch.autograd.grad((extra * 2).sum(), [extra, h, c, *leaves.values()], allow_unused=True)
    assert gradients[1:] == (None,) * (len(leaves) + 2)


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_kept_for_backward(kind: str) -> None:
    """Only what was given is kept, no copy and nothing derived; and without gradients there is no graph."""
    tensors, options = given(5, 17, FULL, kind=kind)
    options.update(dropout())
    stored: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tensor) or tensor, lambda tensor: tensor):
        leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
        fused(**leaves, **options)
        assert {tensor.data_ptr() for tensor in stored} == {tensor.data_ptr() for tensor in (*tensors.values(), options["seed"])}
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not fused(**leaves, **options)[0].requires_grad


@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_double_backward_is_refused_with_a_hint(kind: str) -> None:
    tensors, options = given(3, 8, FULL, kind=kind)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    outputs = fused(**tensors, **options)
    gradients = torch.autograd.grad(outputs, leaves, cotangents(tensors), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r'no second derivative; use backend="reference"'):
            torch.autograd.grad(gradient, leaves, torch.randn_like(gradient), retain_graph=True, allow_unused=True)


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


# --- torch


@pytest.fixture
def real_memory(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    """Outputs begin where their memory begins, as the shapes that tracing is told say."""
    monkeypatch.setattr(memory, "empty", torch.empty)


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
@pytest.mark.usefixtures("real_memory")
def test_opcheck_forward(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    inputs = with_gradients(on_device(raw((2, 2), 5, FULL, norm, affine, kind, z_bias, seed)))
    torch.library.opcheck(torch.ops.depthlstm_fast.triton_gates_forward.default, tuple(inputs))


@pytest.mark.parametrize(
    ("call", "dh", "dc", "wanted"), [(CHECKED[0], True, True, True), (CHECKED[1], False, True, True), (CHECKED[3], True, False, False)]
)
@pytest.mark.usefixtures("real_memory")
def test_opcheck_backward(call: tuple, dh: bool, dc: bool, wanted: bool) -> None:
    norm, affine, kind, z_bias, seed = call
    inputs = on_device(backward_arguments(raw((2, 2), 5, FULL, norm, affine, kind, z_bias, seed), dh, dc, wanted))
    torch.library.opcheck(torch.ops.depthlstm_fast.triton_gates_backward.default, tuple(inputs))


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
def test_operator_equals_function(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    """The autograd that is registered for tracers gives what the autograd.Function of eager gives."""
    inputs = with_gradients(on_device(raw((4,), 9, FULL, norm, affine, kind, z_bias, seed)))
    leaves = [x for x in inputs[:6] if x is not None]
    grads = (normal(4, 9, dtype=F32).to(DEVICE), normal(4, 9, dtype=F32).to(DEVICE))
    both = []
    for outputs in (torch.ops.depthlstm_fast.triton_gates_forward(*inputs), ops.gates(*inputs, backend="triton")):
        both.append((*outputs, *torch.autograd.grad(outputs, leaves, grads)))
    for a, e in zip(*both, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("kind", [Gates, Cell])
def test_compiled_once_for_any_number_of_rows(kind: type[torch.nn.Module]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"dropout_p": 0.5, "training": True}
    model, reference = kind(5, backend="triton", **options).to(DEVICE), kind(5, backend="reference", **options).to(DEVICE)
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (7, 2, 3, 4, 5, 9, 16, 17, 20, 33):
        inputs = [normal(number, (4 if kind is Gates else 2) * 5, dtype=F32).to(DEVICE), normal(number, 5, dtype=F32).to(DEVICE)]
        grads = (normal(number, 5, dtype=F32).to(DEVICE), normal(number, 5, dtype=F32).to(DEVICE))
        torch.manual_seed(1)
        wanted = step(reference, reference, *inputs, grads)
        torch.manual_seed(1)
        found = step(compiled, model, *inputs, grads)
        assert dl.last_backend() == "triton" or number != 7  # noted when the call is traced
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- from outside


TRAINING = """
import torch
import depthlstm_fast as dl

device = "cuda" if torch.cuda.is_available() else "cpu"


def weights_after_a_step():
    torch.manual_seed(0)
    model = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(64, 4, dropout=0.1), 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    h = model(torch.randn(5, 2, 64, device=device))
    h.backward(torch.randn_like(h))
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


found = weights_after_a_step()
assert dl.last_backend() == "triton", dl.last_backend()
with dl.use_backend("reference"):
    wanted = weights_after_a_step()
    assert dl.last_backend() == "reference"
for name in wanted:
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
torch.manual_seed(0)
start = dict(dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(64, 4, dropout=0.1), 2).named_parameters())
print(sum(not torch.equal(found[name], start[name].to(device)) for name in found) == len(found))
"""


def test_training_step_by_environment(tmp_path: Path) -> None:
    """As a user has it: the backend named by a variable, a model trained for a step, the weights those of the reference."""
    environment = {**os.environ, "DEPTHLSTM_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    if DEVICE == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", TRAINING]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"  # every parameter moved
