"""The operators of "cuda" on a stand-in for the kernels, and the Python above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simulated
import torch
from helpers import BF16, CALLS, F16, F32, F64, TYPES, Types, arguments, check_gates, excess, needs_cpp, normal
from test_ops import BAD, CHECKED, backward_arguments, raw, with_gradients
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.ops.depth_lstm_autograd import FEW_ROWS
from depthlstm_fast.ops.registry import OPERATORS

ROOT = Path(__file__).resolve().parents[3]
CUDA_TYPES = [types for types in TYPES if types.z != F64]


# the operators on a stand-in for the kernels


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the operators' namespace; they are the backend "cuda" for CPU tensors."""
    simulated.use(monkeypatch, simulated.stand_in())
    return torch.ops.depthlstm_fast_stand_in


CHECKED_CALLS = pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)


@CHECKED_CALLS
@pytest.mark.parametrize("types", [Types(F32, F32, F32), Types(BF16, F32, F32)], ids=str)
def test_opcheck_forward(
    stand_in: Any, norm: str, affine: bool, kind: str, z_bias: bool, seed: bool, types: Types
) -> None:
    inputs = with_gradients(raw((2, 3), 5, types, norm, affine, kind, z_bias, seed))
    close = {"rtol": 1e-2, "atol": 1e-2} if types.z == BF16 else {}
    torch.library.opcheck(stand_in.cuda_gates_forward.default, tuple(inputs), **close)


@CHECKED_CALLS
@pytest.mark.parametrize(("dh", "dc", "wanted"), [(True, True, True), (False, True, True), (True, False, False)])
def test_opcheck_backward(
    stand_in: Any, norm: str, affine: bool, kind: str, z_bias: bool, seed: bool, dh: bool, dc: bool, wanted: bool
) -> None:
    inputs = raw((2, 3), 5, Types(F32, F32, F32), norm, affine, kind, z_bias, seed)
    torch.library.opcheck(stand_in.cuda_gates_backward.default, tuple(backward_arguments(inputs, dh, dc, wanted)))


@pytest.mark.parametrize("more", [False, True])
def test_opcheck_forward_into(stand_in: Any, more: bool) -> None:
    inputs = raw((3,), 5, Types(F32, F32, F32), "gate", True, "gelu", True, True)
    h = torch.zeros(3, 9)[:, 4:]
    torch.library.opcheck(stand_in.cuda_gates_forward_into.default, (*inputs, torch.randn(3, 20) if more else None, h))


@pytest.mark.parametrize("types", CUDA_TYPES, ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_values(stand_in: Any, norm: str, affine: bool, kind: str, types: Types) -> None:
    tensors, options = arguments((4, 3), 33, types, norm, affine, kind)
    check_gates(tensors, {**options, "dropout_p": 0.25, "training": True, "seed": torch.tensor([7])}, backend="cuda")


def test_strided_rows_and_expanded_gradients(stand_in: Any) -> None:
    tensors, options = arguments(6, 5, Types(F32, F32, F32), kind="given")
    apart = {name: torch.cat((t, t), dim=-1).narrow(-1, 0, t.shape[-1]) for name, t in tensors.items()}
    apart["c"] = tensors["c"].t().contiguous().t()  # no single row stride, so it is copied
    for grads in (
        (torch.randn(()).expand(6, 5), torch.randn(5).expand(6, 5)),
        (torch.randn(6, 10)[:, ::2], torch.randn(6, 1).expand(6, 5)),
    ):
        check_gates(apart, options, grads, backend="cuda")


def test_one_gradient_is_enough(stand_in: Any) -> None:
    z, c = torch.randn(3, 8, requires_grad=True), torch.randn(3, 2)
    for place in range(2):
        found, wanted = (
            torch.autograd.grad(dl.depth_lstm_gates(z, c, norm="none", backend=backend)[place].square().sum(), z)[0]
            for backend in ("cuda", "reference")
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_rows(stand_in: Any, shape: tuple[int, ...]) -> None:
    """Check that nothing is launched: an error set for the next launch is still there afterwards."""
    simulated.fail_once(1)
    tensors, options = arguments(shape, 5, Types(BF16, F32, F32))
    found = check_gates(tensors, options, backend="cuda")
    assert not found["dweight"].any()
    assert not found["dbias"].any()
    *_, dz_bias = stand_in.cuda_gates_backward(
        *backward_arguments(raw(shape, 5, Types(F32, F32, F32), "gate", True, "gelu", True, False))
    )
    assert dz_bias.shape == (20,)
    assert not dz_bias.any()
    with pytest.raises(RuntimeError, match="as it was told"):
        dl.depth_lstm_gates(torch.randn(1, 8), torch.randn(1, 2), backend="cuda")


def test_h_in_a_buffer_and_two_products(stand_in: Any) -> None:
    inputs = raw((3,), 5, Types(F32, F32, F32), "gate", True, "gelu", True, True)
    more, buffer = torch.randn(3, 40)[:, 3:23], torch.zeros(3, 9)
    c_out = stand_in.cuda_gates_forward_into(*inputs, more, buffer[:, 4:])
    wanted = stand_in.cuda_gates_forward(inputs[0] + more, *inputs[1:])
    for a, e in zip((buffer[:, 4:], c_out), wanted, strict=True):
        assert torch.equal(a, e)
    assert not buffer[:, :4].any()


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("operator", ["forward", "forward_into", "backward"])
def test_operators_refuse_bad_arguments(stand_in: Any, what: str, operator: str) -> None:
    inputs = raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", True, True)
    more = backward_arguments(inputs)
    position, value = BAD[what]
    inputs[position] = value
    passed = {
        "forward": inputs,
        "forward_into": [*inputs, None, torch.empty(3, 8)],
        "backward": [*more[:2], *inputs, *more[-2:]],
    }
    with pytest.raises(RuntimeError):
        getattr(stand_in, f"cuda_gates_{operator}")(*passed[operator])


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [
        (11, torch.randn(3, 31), "z_more must have the leading shape of c and a last dimension of 32"),
        (11, torch.randn(2, 32), "z_more must have the leading shape of c"),
        (11, torch.randn(3, 32, dtype=BF16), "z_more has another dtype"),
        (12, torch.empty(3, 7), "h must have the leading shape of c and a last dimension of 8"),
        (12, torch.empty(3, 8, dtype=F16), "h has another dtype"),
        (12, torch.empty(8, 3).t(), "h must have rows that lie one stride apart and do not overlap"),
        (12, torch.empty(8).expand(3, 8), "h must have rows that lie one stride apart and do not overlap"),
    ],
    ids=str,
)
def test_forward_into_refuses_bad_arguments(stand_in: Any, position: int, value: Tensor, text: str) -> None:
    inputs = [*raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", True, True), None, torch.empty(3, 8)]
    inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        stand_in.cuda_gates_forward_into(*inputs)


def test_float64_is_refused(stand_in: Any) -> None:
    inputs = raw((3,), 8, Types(F64, F64, F64), "gate", True, "gelu", False, False)
    with pytest.raises(RuntimeError, match="z must be float32, bfloat16 or float16: the CUDA kernels have no float64"):
        stand_in.cuda_gates_forward(*inputs)
    with pytest.raises(RuntimeError, match="the CUDA kernels have no float64"):
        stand_in.cuda_gates_backward(*backward_arguments(inputs))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("code", [98, 209, 222, 700, 2])
def test_errors_of_cuda(stand_in: Any, code: int, backward: bool) -> None:
    inputs = raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", False, False)
    name = "cuda_gates_backward" if backward else "cuda_gates_forward"
    simulated.fail_once(code)
    with pytest.raises(RuntimeError, match=rf"{name}: as it was told \(CUDA error {code}\)") as caught:
        getattr(stand_in, name)(*(backward_arguments(inputs) if backward else inputs))
    advice = (
        "This library holds code for a simulated GPU; for another GPU, or a "
        "driver too old for its PTX, build it from source with "
    )
    assert (advice + "DEPTHLSTM_CUDA_ARCHS set" in str(caught.value)) == (code in (98, 209, 222))


def test_error_in_place_of_a_workspace(stand_in: Any) -> None:
    simulated.fail_once(-209)
    with pytest.raises(
        RuntimeError, match=r"cuda_gates_backward: as it was told \(CUDA error 209\)\. This library holds"
    ):
        stand_in.cuda_gates_backward(
            *backward_arguments(raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", False, False))
        )


@needs_cpp
def test_the_operators_take_cuda_tensors_only() -> None:
    if "cuda" not in OPERATORS["depth_lstm"]:
        pytest.skip("the library was built without CUDA")
    inputs = raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", False, False)
    with pytest.raises(NotImplementedError, match="from the 'CPU' backend"):
        torch.ops.depthlstm_fast.cuda_gates_forward(*inputs)
    h, c = torch.ops.depthlstm_fast.cuda_gates_forward(*(x.to("meta") if isinstance(x, Tensor) else x for x in inputs))
    assert h.shape == c.shape == (3, 8)


# the Python above them


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> list[bool]:
    """Return, for each call of the forward operator in eager, whether it got a second product."""
    found: list[bool] = []
    operators = OPERATORS["depth_lstm"]["cuda"]
    assert operators.direct is not None
    forward = operators.direct.forward

    def spy(*inputs: Any, **named: Any) -> Any:
        found.append(named.get("z_more") is not None)
        return forward(*inputs, **named)

    spied = operators._replace(direct=operators.direct._replace(forward=spy))
    monkeypatch.setitem(OPERATORS["depth_lstm"], "cuda", spied)
    return found


def cell_arguments(rows: int, slices: int) -> list[Any]:
    x = tuple(normal(rows, 3 + i, dtype=F32) for i in range(slices))
    w = normal(24, 6 + sum(part.shape[1] for part in x), dtype=F32, scale=0.3)
    return [
        x,
        normal(rows, 6, dtype=F32),
        normal(rows, 6, dtype=F32),
        w,
        *(normal(*shape, dtype=F32) for shape in ((24,), (4, 6), (4, 6))),
    ]


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("left", [0, 4])
def test_few_rows_are_two_products_that_the_gates_add_up(products: list[bool], slices: int, left: int) -> None:
    inputs = cell_arguments(5, slices)
    with torch.no_grad():
        h, c = dl.depth_lstm_cell(*inputs, left=left, backend="cuda")
    assert products == [True]
    assert h.stride(0) == 6 + left
    for a, e in zip((h, c), dl.depth_lstm_cell(*inputs, backend="reference"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_one_product_where_one_is_enough(products: list[bool]) -> None:
    many = cell_arguments(FEW_ROWS + 1, 1)
    inputs = cell_arguments(5, 1)
    (x,), h = inputs[:2]
    beside = torch.cat((x, h), dim=1).tensor_split((3,), dim=1)
    with torch.no_grad():
        dl.depth_lstm_cell(*many, backend="cuda")
        dl.depth_lstm_cell(*beside, *inputs[2:], backend="cuda")
    dl.depth_lstm_cell((x.requires_grad_(),), *inputs[1:], backend="cuda")
    assert products == [False] * 3


@pytest.mark.parametrize("grad", [False, True])
def test_stack_writes_into_buffers(products: list[bool], grad: bool) -> None:
    encoder = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(16, 2, batch_first=True, dropout=0.0), 3)
    source = torch.randn(2, 4, 16)
    results = []
    for backend in ("cuda", "reference"):
        with dl.use_backend(backend), torch.set_grad_enabled(grad):
            output = encoder(source)
            assert dl.last_backend() == backend
            results.append(
                [output, *(torch.autograd.grad(output.square().sum(), list(encoder.parameters())) if grad else ())]
            )
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    # the first cell's h comes from outside, without room beside it
    assert products == ([False] * 3 if grad else [True, False, False])


def test_compiled_graph_holds_the_operator(stand_in: Any) -> None:
    torch._dynamo.reset()
    targets: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if "depthlstm" in str(node.target))
        return graph.forward

    z, c = torch.randn(3, 8), torch.randn(3, 2)
    compiled = torch.compile(lambda z, c: dl.depth_lstm_gates(z, c, backend="cuda"), fullgraph=True, backend=keep)
    for a, e in zip(compiled(z, c), dl.depth_lstm_gates(z, c, backend="cuda"), strict=True):
        assert torch.equal(a, e)
    assert targets == [stand_in.cuda_gates_forward.default]


# the whole cell above the CUDA kernels, simulated


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_simulated_kernels_add_two_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.use(monkeypatch, simulated.load())
    ((x,), *others) = cell_arguments(5, 1)
    inputs = [tensor.to(dtype) for tensor in (x, *others)]
    eager = dl.reference.depth_lstm_cell(*inputs)
    exact = dl.reference.depth_lstm_cell(*(tensor.double() for tensor in inputs))
    for left in (0, 4):
        with torch.no_grad():
            found = dl.depth_lstm_cell(*inputs, left=left, backend="cuda")
        assert found[0].stride(0) == 6 + left
        for place in range(2):
            error, allowed = excess(found[place], eager[place], exact[place])
            assert error <= allowed
