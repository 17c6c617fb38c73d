"""Agreement between the package's parts.

The tests compare the schemas of every backend, the activations of every language, and the records of the backends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
import torch
from helpers import DEVICE, F32, needs_cpp, needs_triton
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast import checks
from depthlstm_fast.activations import ACTIVATIONS, FUNCTIONS
from depthlstm_fast.backends.choice import RECORDS
from depthlstm_fast.backends.library import LIBRARY
from depthlstm_fast.ops import registry
from depthlstm_fast.ops.depth_lstm import ACTIVATION_CODES, OP, OutputGradients, TensorGradients, Tensors
from depthlstm_fast.ops.registry import OPERATORS, OPS


@pytest.mark.parametrize("op", OPERATORS)
def test_backends_share_the_schemas(op: str) -> None:
    assert "triton" in OPERATORS[op]
    for name, operators in OPERATORS[op].items():
        for operator, wanted in zip(operators.traced, OPS[op].schemas, strict=True):
            text, parsed = str(operator._schema), str(torch._C.parse_schema(f"op{wanted}"))  # a single output has no ()
            assert text[text.index("(") :] == parsed[parsed.index("(") :], name


def test_names_of_tuples() -> None:
    """Check the order of the tuples' fields, because positions are unpacked where torch needs a flat schema."""
    assert TensorGradients._fields == Tensors._fields
    assert [f"d{name}" for name in ("h", "c")] == list(OutputGradients._fields)


def test_codes_of_activations() -> None:
    assert checks.ACTIVATIONS == ACTIVATIONS == tuple(FUNCTIONS)
    assert list(ACTIVATION_CODES.values()) == list(range(len(FUNCTIONS)))


@needs_cpp
def test_activations_of_the_library() -> None:
    """Check that the list in csrc/common/activations.h has the same names in the same order.

    The enum, switches and errors are made of this list.
    """
    ask = ctypes.CDLL(str(LIBRARY)).depthlstm_activations
    ask.restype = ctypes.c_char_p
    assert ask().decode().split() == list(ACTIVATIONS)


@needs_cpp
@pytest.mark.parametrize("code", [-1, len(FUNCTIONS), len(FUNCTIONS) + 1])
def test_operators_take_no_other_code(code: int) -> None:
    """Check the code after the last: it is the C++ enum's `given`, which stands for `hidden` and has no public code."""
    z, c = torch.randn(2, 32), torch.randn(2, 8)
    with pytest.raises(
        RuntimeError, match=f"activation must be the code of one of {' '.join(ACTIVATIONS)}; found {code}"
    ):
        torch.ops.depthlstm_fast.gates_forward(z, None, None, c, None, None, None, 0, code, 1e-6, 0.0)


def test_slopes_of_activations() -> None:
    a = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
    for name, function in FUNCTIONS.items():
        (slope,) = torch.autograd.grad(function.value(a).sum(), a)
        torch.testing.assert_close(function.slope(a.detach()), slope, msg=name)


@needs_triton
def test_triton_computes_no_activation_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a name added only to the dict fails, instead of running another activation."""
    from depthlstm_fast.kernels import depth_lstm as kernels

    monkeypatch.setattr(kernels, "ACTIVATIONS", ("softsign",))
    kernels._options.cache_clear()
    z, c = torch.randn(2, 32, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    try:
        with pytest.raises(Exception, match="lacks an activation"):
            kernels.gates_forward(z, None, None, c, None, None, None, 0, 0, 1e-6, 0.0)
    finally:
        kernels._options.cache_clear()


def test_the_reference_computes_no_activation_that_it_lacks() -> None:
    with pytest.raises(KeyError):
        dl.reference.depth_lstm.activate(torch.zeros(3), "softsign")


def on(device: str) -> Tensor:
    return torch.empty(2, 8, device=device)


@needs_cpp
def test_an_op_that_an_older_library_lacks_is_no_op_of_its(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that is newer than its compiled library falls back, and does not end in a KeyError."""
    record = dataclasses.replace(RECORDS["cpp"], widest={"later": None}, absent=set())
    monkeypatch.setitem(RECORDS, "cpp", record)
    monkeypatch.setattr(registry, "add_backend", lambda op, backend: None)
    monkeypatch.setitem(OPERATORS, "later", {})
    registry.add(OP._replace(name="later"))
    wanted = "the library that is loaded was built before it had later: build it again"
    assert record.why_not(torch.empty(2, 8), "later", 8) == wanted


def test_a_record_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    record = dataclasses.replace(
        RECORDS["cuda"], why_not_here=lambda: None, device_types=("cpu",), widest={"depth_lstm": 512, "other": None}
    )
    assert record.why_not(on("cpu"), "depth_lstm", 512) != record.why_not(on("cpu"), "depth_lstm", 513)
    assert record.why_not(on("cpu"), "depth_lstm", 513) == "the CUDA kernels take D up to 512; found 513"
    assert record.why_not(on("cpu"), "layer_mix", 8) == "the CUDA kernels have no layer_mix"
    assert record.why_not(on("meta"), "other", 8) == "the CUDA kernels take CUDA tensors; found meta"
    monkeypatch.setitem(RECORDS, "cuda", record)
    with pytest.raises(
        ValueError, match=re.escape("backend='cuda' cannot run this call: the CUDA kernels take D up to 512; found 513")
    ):
        dl.depth_lstm_gates(torch.randn(1, 4 * 513, dtype=F32), torch.randn(1, 513), backend="cuda")
