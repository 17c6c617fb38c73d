"""depth_lstm_gates by the Triton kernels: values, gradients and memory, on a GPU or interpreted on the CPU.

An interpreted program costs 10 to 50 ms at every size, and a row of the wide scheme half a second. The rows are
therefore few, and the sizes lie beside a boundary: of a tile (BLOCK features, ROWS rows), of the narrow scheme, of a
register file. All memory that the launcher allocates is NaN between guards, and all arguments lie in NaN.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Callable
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
    Types,
    assert_bound,
    cotangents,
    double,
    needs_triton,
    normal,
    results,
)
from test_ops import BAD, backward_arguments, raw
from torch import Tensor
from triton_helpers import (  # noqa: F401, fixtures
    FULL,
    HALF,
    MIXED,
    TRITON_TYPES,
    among_nan,
    check,
    dropout,
    fused,
    gates,
    given,
    memory,
    on_device,
    programs,
    small_wide,
)

import depthlstm_fast as dl
from depthlstm_fast.ops import depth_lstm_autograd
from depthlstm_fast.ops.depth_lstm import ACTIVATION_CODES, NORM_CODES, Options

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's overflows


# --- the error bound


@pytest.mark.parametrize("features", [16, 256, 512])
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_features_that_fill_a_block(norm: str, affine: bool, kind: str, features: int) -> None:
    """Check sizes without masked columns; with 512 features there are no masked rows and no masks at all."""
    check(*given(2, features, FULL, norm, affine, kind))


# the last size of the narrow scheme, the first of the wide one, whole blocks of it, and the most that a program holds
@pytest.mark.parametrize(
    ("features", "rows", "types"),
    [
        (2048, 2, FULL),
        (2049, 2, FULL),
        (2048, 1, MIXED),
        (4096, 1, MIXED),
        (8191, 1, FULL),
        (8192, 1, Types(F16, F16, F16)),
    ],
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


@pytest.mark.parametrize("features", [1, 33])
@pytest.mark.parametrize("beside", [-1, 0, 1])
@pytest.mark.parametrize("scheme", ["forward", "backward"])
def test_rows_that_fill_a_tile(scheme: str, beside: int, features: int) -> None:
    plans = gates.forward_plans(features) if scheme == "forward" else gates.narrow_plans(features, 2, 4)
    assert plans[0].constants["ROWS"] > 1
    check(*given(plans[0].constants["ROWS"] + beside, features, FULL))


# Programs that take several tiles, not all of them equally many. The partial sums come from one program, or from more
# programs than are added at a time.
@pytest.mark.parametrize(
    ("count", "rows", "features"), [(1, 9, 33), (2, 18, 33), (3, 9, 65), (18, 273, 1), (4, 9, 512), (4, 5, 1024)]
)
def test_more_rows_than_programs(count: int, rows: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, count)
    check(*given(rows, features, FULL))


@pytest.mark.parametrize("features", [33, 512])
def test_every_plan(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the plans used only by tuning are right, too; interpreted, the number of stages changes nothing."""
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


# --- the bias of the GEMM


@pytest.mark.parametrize("features", [1024, 1025])
def test_z_bias_of_both_schemes(features: int) -> None:
    """Check the sums of one more gradient, which leave less room for rows than test_features_of_both_schemes has."""
    assert bool(gates.narrow_plans(features, 3, 4)) == (features <= 1024)
    check_z_bias(2, features, FULL, "gate", True, "gelu")


def check_z_bias(
    rows: int, features: int, types: Types, norm: str, affine: bool, kind: str, shift: float = 0.0
) -> None:
    tensors, options = given(rows, features, types, norm, affine, kind)
    tensors["z_bias"] = normal(tensors["z"].shape[1], dtype=types.affine, shift=shift).to(DEVICE)
    fixed = Options(NORM_CODES[norm], ACTIVATION_CODES[options["activation"]], 1e-6, 0.0)

    def by_operator(
        z: Tensor, c: Tensor, z_bias: Tensor, weight: Any = None, bias: Any = None, hidden: Any = None
    ) -> Any:
        return depth_lstm_autograd.gates(z, z_bias, hidden, c, weight, bias, None, fixed, "triton")

    def by_reference(z: Tensor, z_bias: Tensor, **rest: Any) -> Any:
        h, c = dl.reference.depth_lstm_gates(
            z.double() + z_bias.double(), **{key: x.double() for key, x in rest.items()}, **options
        )
        return h, c

    def eager(z: Tensor, z_bias: Tensor, **rest: Any) -> Any:
        return dl.reference.depth_lstm_gates((z + z_bias).to(z.dtype), **rest, **options)

    grads = cotangents(tensors)
    surrounded = {key: among_nan(tensor) for key, tensor in tensors.items()}
    exact = results(by_reference, double(tensors), (grads[0].double(), grads[1].double()))
    assert_bound(results(by_operator, surrounded, grads), results(eager, tensors, grads), exact, shift)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "given"])
def test_cell(kind: str, autocast: bool) -> None:
    """Check the product, its bias and the gates as one node.

    Autocast is in bf16, with c, the bias and the affine in fp32.
    """
    counts = 3 if kind == "given" else 4
    shapes = {
        "x": (5, 6),
        "h": (5, 9),
        "c": (5, 9),
        "w": (counts * 9, 15),
        "b": (counts * 9,),
        "weight": (counts, 9),
        "bias": (counts, 9),
    }
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
            named["hidden"] = named["hidden"].to(half)  # in the dtype of the product before it
        return dl.reference.depth_lstm_cell(**named)

    found = results(functools.partial(run, dl.depth_lstm_cell, backend="triton"), tensors, grads)
    assert dl.last_backend() == "triton"
    assert found["h"].dtype == half
    eager = results(functools.partial(run, eager_cell), tensors, grads)
    autocast = False
    exact = results(
        functools.partial(run, dl.reference.depth_lstm_cell), double(tensors), (grads[0].double(), grads[1].double())
    )
    assert_bound(found, eager, exact)


# --- refused calls


@pytest.mark.parametrize(
    ("features", "dtype", "limit"),
    [
        (8193, F32, "the Triton kernels take D up to 8192; found 8193"),
        (4, F64, "the Triton kernels take float32, .*; found float64"),
    ],
    ids=["D", "float64"],
)
def test_limits(
    features: int, dtype: torch.dtype, limit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Check the limits of the backend.

    By name it raises ValueError with the limit. "auto" logs one line and takes the reference.
    """
    z, c = (
        torch.zeros(1, 4 * features, dtype=dtype, device=DEVICE),
        torch.zeros(1, features, dtype=dtype, device=DEVICE),
    )
    with pytest.raises(ValueError, match=f"backend='triton' cannot run this call: {limit}"):
        dl.depth_lstm_gates(z, c, backend="triton")
    backends = sys.modules["depthlstm_fast.backends.choice"]
    monkeypatch.setattr(backends, "_strict", False)
    monkeypatch.setattr(backends, "_logged", set())
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    with caplog.at_level(logging.WARNING, "depthlstm_fast"):
        assert backends.choose("auto", on_gpu, "depth_lstm", features) == "reference"
    assert len(caplog.records) == 1
    monkeypatch.setattr(backends, "_strict", True)
    with pytest.raises(RuntimeError, match=limit):
        backends.choose("auto", on_gpu, "depth_lstm", features)


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_raw_operators_refuse_bad_arguments(what: str, backward: bool) -> None:
    """Check that raw operators, below the public functions' checks, cannot read or write out of bounds."""
    inputs = on_device(raw((3,), 8, FULL, "gate", True, "gelu", True, True))
    more = on_device(backward_arguments(inputs))
    position, value = BAD[what]
    inputs[position] = value.to(DEVICE) if isinstance(value, Tensor) else value
    operator = (
        torch.ops.depthlstm_fast.triton_gates_backward if backward else torch.ops.depthlstm_fast.triton_gates_forward
    )
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
