"""Bad arguments of the two functions, one by one.

The error names the argument, what was wanted and what was found.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, F64, needs_cpp

import depthlstm_fast as dl
from depthlstm_fast.checks import MAX_FEATURES

D, I, N = 4, 3, 2
NAN, INF = float("nan"), float("inf")

GATES: dict[str, Any] = {
    "z": torch.randn(N, 4 * D),
    "c": torch.randn(N, D),
    "weight": torch.randn(4, D),
    "bias": torch.randn(4, D),
}
GIVEN: dict[str, Any] = {
    "z": torch.randn(N, 3 * D),
    "c": torch.randn(N, D),
    "weight": torch.randn(3, D),
    "bias": torch.randn(3, D),
    "hidden": torch.randn(N, D),
}
CELL: dict[str, Any] = {
    "x": torch.randn(N, I),
    "h": torch.randn(N, D),
    "c": torch.randn(N, D),
    "w": torch.randn(4 * D, I + D),
    "b": torch.randn(4 * D),
    "weight": torch.randn(4, D),
    "bias": torch.randn(4, D),
}

META = {"device": "meta"}
Case = tuple[dict[str, Any], dict[str, Any], type[Exception], str]

# Options and small tensors, the same in both functions: (the change, error, text)
COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"c": torch.randn(N, D + 1)},
        ValueError,
        r"(z|c|weight) must have shape",
    ),  # any of them may be the wrong one
    ({"c": torch.randn(N, D, dtype=F64)}, TypeError, r"c must be float32 beside a float32 [zh]; found float64"),
    ({"c": torch.randn(N, D, dtype=BF16)}, TypeError, r"c must be float32 beside a float32 [zh]; found bfloat16"),
    (
        {"c": torch.ones(N, D, dtype=torch.int32)},
        TypeError,
        r"c must be float32, float64, bfloat16 or float16; found torch\.int32",
    ),
    ({"c": torch.randn(N, D, dtype=torch.complex64)}, TypeError, r"c must be .*; found torch\.complex64"),
    ({"c": torch.randn(N, D, **META)}, ValueError, r"c must be on the device of [zh], cpu; found meta"),
    ({"c": None}, TypeError, r"c must be a torch\.Tensor; found NoneType"),
    ({"c": [1.0]}, TypeError, r"c must be a torch\.Tensor; found list"),
    ({"weight": torch.randn(3, D)}, ValueError, r"weight must have shape \(4, 4\); found \(3, 4\)"),
    ({"weight": torch.randn(4 * D)}, ValueError, r"weight must have shape \(4, 4\); found \(16,\)"),
    (
        {"weight": torch.randn(4, D, dtype=F16)},
        TypeError,
        r"weight must be float32 beside a float32 [zh]; found float16",
    ),
    ({"weight": torch.ones(4, D, dtype=torch.int64)}, TypeError, r"weight must be .*; found torch\.int64"),
    ({"weight": torch.randn(4, D, **META)}, ValueError, r"weight must be on the device of [zh], cpu; found meta"),
    ({"weight": 1.0}, TypeError, r"weight must be a torch\.Tensor; found float"),
    ({"weight": None}, ValueError, r"weight must be given with bias, or both be None; found weight=None"),
    ({"bias": torch.randn(4, D + 1)}, ValueError, r"bias must have shape \(4, 4\); found \(4, 5\)"),
    ({"bias": torch.randn(4, D, dtype=F64)}, TypeError, r"bias must be float32 beside a float32 [zh]; found float64"),
    ({"bias": torch.randn(4, D, **META)}, ValueError, r"bias must be on the device of [zh], cpu; found meta"),
    ({"bias": None}, ValueError, r"bias must be given with weight, or both be None; found bias=None"),
    ({"norm": "none"}, ValueError, r'weight and bias must be None with norm="none"; found a tensor'),
    ({"norm": "layer"}, ValueError, r"norm must be one of 'gate', 'joint', 'none'; found 'layer'"),
    ({"norm": None}, ValueError, r"norm must be one of .*; found None"),
    ({"norm": ["gate"]}, ValueError, r"norm must be one of .*; found \['gate'\]"),
    (
        {"activation": "swish"},
        ValueError,
        r"activation must be one of 'gelu', 'gelu_tanh', 'relu', 'tanh', 'silu', 'sigmoid'; found 'swish'",
    ),
    ({"activation": torch.relu}, ValueError, r"activation must be one of"),
    (
        {"backend": "gpu"},
        ValueError,
        r"backend must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton'; found 'gpu'",
    ),
    ({"backend": 3}, ValueError, r"backend must be one of .*; found 3"),
    ({"backend": "cuda"}, ValueError, r"backend='cuda' cannot run this call: .*"),
    ({"eps": -1e-6}, ValueError, r"eps must be finite and not negative; found -1e-06"),
    ({"eps": NAN}, ValueError, r"eps must be finite and not negative; found nan"),
    ({"eps": INF}, ValueError, r"eps must be finite and not negative; found inf"),
    ({"eps": "1e-6"}, TypeError, r"eps must be a float; found str"),
    ({"eps": None}, TypeError, r"eps must be a float; found NoneType"),
    ({"eps": torch.tensor(1e-6)}, TypeError, r"eps must be a float; found Tensor"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); found 1.0"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\); found 1.5"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\); found -0.1"),
    ({"dropout_p": NAN}, ValueError, r"dropout_p must be in \[0, 1\); found nan"),
    ({"dropout_p": True}, TypeError, r"dropout_p must be a float; found bool"),
    ({"dropout_p": "half"}, TypeError, r"dropout_p must be a float; found str"),
    ({"seed": 3}, TypeError, r"seed must be an int64 tensor; found int"),
    ({"seed": torch.tensor([3], dtype=torch.int32)}, TypeError, r"seed must be an int64 tensor; found torch\.int32"),
    ({"seed": torch.tensor([3.0])}, TypeError, r"seed must be an int64 tensor; found torch\.float32"),
    ({"seed": torch.tensor(3)}, ValueError, r"seed must have shape \(1,\); found \(\)"),
    ({"seed": torch.tensor([3, 4])}, ValueError, r"seed must have shape \(1,\); found \(2,\)"),
    (
        {"seed": torch.ones(1, dtype=torch.int64, **META)},
        ValueError,
        r"seed must be on the device of [zh], cpu; found meta",
    ),
]

OF_GATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"z": torch.randn(N, 3 * D)}, ValueError, r"z must have shape \(2, 16\); found \(2, 12\)"),
    ({"z": torch.randn(N + 1, 4 * D)}, ValueError, r"z must have shape \(2, 16\); found \(3, 16\)"),
    ({"z": torch.randn(1, 4 * D)}, ValueError, r"z must have shape \(2, 16\); found \(1, 16\)"),  # no broadcasting
    ({"z": torch.randn(4 * D)}, ValueError, r"z must have shape \(2, 16\); found \(16,\)"),
    ({"z": torch.randn(N, 4, D)}, ValueError, r"z must have shape \(2, 16\); found \(2, 4, 4\)"),
    ({"z": torch.tensor(1.0)}, ValueError, r"z must have shape \(2, 16\); found \(\)"),
    ({"z": torch.randn(N, 4 * D, dtype=F64)}, TypeError, r"c must be float64 beside a float64 z; found float32"),
    (
        {"z": torch.ones(N, 4 * D, dtype=torch.int64)},
        TypeError,
        r"z must be float32, float64, bfloat16 or float16; found torch\.int64",
    ),
    ({"z": torch.ones(N, 4 * D, dtype=torch.bool)}, TypeError, r"z must be .*; found torch\.bool"),
    ({"z": torch.randn(N, 4 * D, dtype=torch.complex64)}, TypeError, r"z must be .*; found torch\.complex64"),
    ({"z": torch.randn(N, 4 * D).to(torch.float8_e4m3fn)}, TypeError, r"z must be .*; found torch\.float8_e4m3fn"),
    ({"z": [[1.0] * 16] * 2}, TypeError, r"z must be a torch\.Tensor; found list"),
    ({"z": None}, TypeError, r"z must be a torch\.Tensor; found NoneType"),
    ({"z": torch.randn(N, 4 * D, **META)}, ValueError, r"c must be on the device of z, meta; found cpu"),
    ({"c": torch.tensor(1.0)}, ValueError, r"c must have shape \(\.\.\., D\) with D >= 1; found \(\)"),
    ({"c": torch.randn(N, 0)}, ValueError, r"c must have shape \(\.\.\., D\) with D >= 1; found \(2, 0\)"),
    (
        {"c": torch.randn(1, MAX_FEATURES + 1)},
        ValueError,
        rf"c must have at most {MAX_FEATURES} features; found {MAX_FEATURES + 1}",
    ),
    ({"hidden": torch.randn(N, D)}, ValueError, r"weight must have shape \(3, 4\); found \(4, 4\)"),
]

OF_GIVEN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": None}, ValueError, r"weight must have shape \(4, 4\); found \(3, 4\)"),
    ({"hidden": torch.randn(N, D + 1)}, ValueError, r"hidden must have shape \(2, 4\); found \(2, 5\)"),
    ({"hidden": torch.randn(D)}, ValueError, r"hidden must have shape \(2, 4\); found \(4,\)"),
    ({"hidden": torch.randn(N, D, dtype=F64)}, TypeError, r"hidden must be float32 beside a float32 z; found float64"),
    ({"hidden": torch.ones(N, D, dtype=torch.int64)}, TypeError, r"hidden must be .*; found torch\.int64"),
    ({"hidden": torch.randn(N, D, **META)}, ValueError, r"hidden must be on the device of z, cpu; found meta"),
    ({"hidden": 0.0}, TypeError, r"hidden must be a torch\.Tensor; found float"),
    ({"z": torch.randn(N, 4 * D)}, ValueError, r"z must have shape \(2, 12\); found \(2, 16\)"),
]

OF_CELL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(N + 1, I)}, ValueError, r"x must have shape \(2, 'I'\); found \(3, 3\)"),
    ({"x": torch.randn(I)}, ValueError, r"x must have shape \(2, 'I'\); found \(3,\)"),
    ({"x": torch.randn(N, I + 1)}, ValueError, r"w must have shape \(16, 8\); found \(16, 7\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape"),
    ({"x": ()}, ValueError, r"x must be a tensor or a tuple of at least one; found an empty tuple"),
    ({"x": (torch.randn(N, 1), torch.randn(N + 1, 2))}, ValueError, r"x must have shape \(2, 'I'\); found \(3, 2\)"),
    ({"x": (torch.randn(N, 1), None)}, TypeError, r"x must be a torch\.Tensor; found NoneType"),
    ({"x": torch.randn(N, I, dtype=F64)}, TypeError, r"x must be float32 beside a float32 h; found float64"),
    ({"x": torch.ones(N, I, dtype=torch.int64)}, TypeError, r"x must be .*; found torch\.int64"),
    ({"x": torch.randn(N, I, **META)}, ValueError, r"x must be on the device of h, cpu; found meta"),
    ({"x": None}, TypeError, r"x must be a torch\.Tensor; found NoneType"),
    ({"h": torch.tensor(1.0)}, ValueError, r"h must have shape \(\.\.\., D\); found \(\)"),
    ({"h": torch.randn(N, D + 1)}, ValueError, r"c must have shape \(2, 5\); found \(2, 4\)|weight must have shape"),
    ({"h": torch.ones(N, D, dtype=torch.int64)}, TypeError, r"h must be .*; found torch\.int64"),
    ({"h": None}, TypeError, r"h must be a torch\.Tensor; found NoneType"),
    ({"w": torch.randn(4 * D, I + D + 1)}, ValueError, r"w must have shape \(16, 7\); found \(16, 8\)"),
    ({"w": torch.randn(3 * D, I + D)}, ValueError, r"w must have shape \(16, 7\); found \(12, 7\)"),
    ({"w": torch.randn(I + D, 4 * D)}, ValueError, r"w must have shape \(16, 7\); found \(7, 16\)"),
    ({"w": torch.randn(4 * D, I + D, dtype=BF16)}, TypeError, r"w must be float32 beside a float32 h; found bfloat16"),
    ({"w": torch.randn(4 * D, I + D, **META)}, ValueError, r"w must be on the device of h, cpu; found meta"),
    ({"w": None}, TypeError, r"w must be a torch\.Tensor; found NoneType"),
    ({"b": torch.randn(4 * D + 1)}, ValueError, r"b must have shape \(16,\); found \(17,\)"),
    ({"b": torch.randn(4, D)}, ValueError, r"b must have shape \(16,\); found \(4, 4\)"),
    ({"b": torch.randn(4 * D, dtype=F64)}, TypeError, r"b must be float32 beside a float32 h; found float64"),
    ({"b": torch.randn(4 * D, **META)}, ValueError, r"b must be on the device of h, cpu; found meta"),
    ({"b": 0.0}, TypeError, r"b must be a torch\.Tensor; found float"),
    (
        {"hidden": torch.randn(N, D), "weight": None, "bias": None},
        ValueError,
        r"w must have shape \(12, 7\); found \(16, 7\)",
    ),
]


def label(value: Any) -> str | None:
    if not isinstance(value, dict):
        return ""
    text = [
        f"{k}={tuple(v.shape)}{str(v.dtype)[5:]}{v.device.type}" if isinstance(v, torch.Tensor) else f"{k}={v!r:.20}"
        for k, v in value.items()
    ]
    return "-".join(text)


@pytest.mark.parametrize(("change", "error", "text"), [*COMMON, *OF_GATES], ids=label)
def test_gates(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {**GATES, "training": True, **change}
    with pytest.raises(error, match=text):
        dl.depth_lstm_gates(**arguments)


@pytest.mark.parametrize(("change", "error", "text"), OF_GIVEN, ids=label)
def test_gates_with_hidden(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dl.depth_lstm_gates(**{**GIVEN, **change})


@pytest.mark.parametrize(("change", "error", "text"), [*COMMON, *OF_CELL], ids=label)
def test_cell(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {**CELL, "training": True, **change}
    with pytest.raises(error, match=text):
        dl.depth_lstm_cell(**arguments)


@pytest.mark.parametrize(("change", "error", "text"), [*COMMON, *OF_GATES], ids=label)
def test_gates_of_the_reference(change: dict[str, Any], error: type[Exception], text: str) -> None:
    """Check that the twins refuse the same calls with the same words."""
    if "backend" in change:
        pytest.skip("the reference has no such argument")
    with pytest.raises(error, match=text):
        dl.reference.depth_lstm_gates(**{**GATES, "training": True, **change})


@pytest.mark.parametrize(("change", "error", "text"), [*COMMON, *OF_CELL], ids=label)
def test_cell_of_the_reference(change: dict[str, Any], error: type[Exception], text: str) -> None:
    if "backend" in change:
        pytest.skip("the reference has no such argument")
    with pytest.raises(error, match=text):
        dl.reference.depth_lstm_cell(**{**CELL, "training": True, **change})


def test_gradients_that_do_not_fit() -> None:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in GATES.items()}
    h, c = dl.depth_lstm_gates(**leaves)
    with pytest.raises(RuntimeError, match=r"Mismatch in shape"):
        torch.autograd.grad((h, c), list(leaves.values()), (torch.randn(N, D + 1), None))


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        dl.depth_lstm_gates(**GATES, gamma=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@needs_cpp
def test_largest_size_runs(dtype: torch.dtype) -> None:
    h, _ = dl.depth_lstm_gates(
        torch.randn(1, 4 * MAX_FEATURES, dtype=dtype), torch.randn(1, MAX_FEATURES, dtype=dtype), backend="cpp"
    )
    assert h.isfinite().all()


def test_integers_where_floats_are_wanted() -> None:
    """Check that eps=0 and dropout_p=0 work as integers."""
    wanted = dl.depth_lstm_gates(**GATES, eps=0.0, dropout_p=0.0, training=True)
    for a, e in zip(dl.depth_lstm_gates(**GATES, eps=0, dropout_p=0, training=True), wanted, strict=True):
        assert torch.equal(a, e)
