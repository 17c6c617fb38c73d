"""The operators in torch.

The tests cover opcheck, torch.compile, export, double backward, torch.func, and direct calls with bad arguments.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import BF16, CALLS, F16, F32, F64, MAIN_TYPES, Types, arguments, fused, fused_cell, needs_cpp, normal
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import depthlstm_fast as dl
from depthlstm_fast.__main__ import CPU_FLAGS, cpu_info
from depthlstm_fast.checks import ACTIVATIONS, NORMS

pytestmark = needs_cpp

OPS = torch.ops.depthlstm_fast


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def raw(
    rows: Any, features: int, types: Types, norm: str, affine: bool, kind: str, z_bias: bool, seed: bool
) -> list[Any]:
    """Return the arguments of the operator gates_forward."""
    tensors, options = arguments(rows, features, types, norm, affine, kind)
    width = tensors["z"].shape[-1]
    return [
        tensors["z"],
        normal(width, dtype=types.affine) if z_bias else None,
        tensors.get("hidden"),
        tensors["c"],
        tensors.get("weight"),
        tensors.get("bias"),
        torch.tensor([3]) if seed else None,
        NORMS.index(norm),
        ACTIVATIONS.index(options["activation"]),
        1e-6,
        0.25 if seed else 0.0,
    ]


def with_gradients(inputs: list[Any]) -> list[Any]:
    return [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def backward_arguments(inputs: list[Any], dh: bool = True, dc: bool = True, wanted: bool = True) -> list[Any]:
    """Return the arguments of gates_backward beside those of gates_forward."""
    z, c = inputs[0], inputs[3]
    grads = (normal(*c.shape, dtype=z.dtype) if dh else None, normal(*c.shape, dtype=c.dtype) if dc else None)
    return [*grads, *inputs, wanted and inputs[4] is not None, wanted and inputs[1] is not None]


CHECKED = [
    (*CALLS[0], False, False),
    (*CALLS[1], True, True),
    (*CALLS[2], False, True),
    (*CALLS[3], True, False),
    (*CALLS[4], True, False),
]


@pytest.mark.parametrize("types", [Types(F32, F32, F32), Types(BF16, F32, F32)], ids=str)
@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
@pytest.mark.parametrize("rows", [(3,), (2, 3)], ids=str)
def test_opcheck_forward(
    rows: tuple[int, ...], norm: str, affine: bool, kind: str, z_bias: bool, seed: bool, types: Types
) -> None:
    inputs = with_gradients(raw(rows, 5, types, norm, affine, kind, z_bias, seed))
    torch.library.opcheck(
        OPS.gates_forward.default,
        tuple(inputs),
        rtol=1e-2 if types.z == BF16 else None,
        atol=1e-2 if types.z == BF16 else None,
    )


@pytest.mark.parametrize(("dh", "dc", "wanted"), [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
def test_opcheck_backward(
    norm: str, affine: bool, kind: str, z_bias: bool, seed: bool, dh: bool, dc: bool, wanted: bool
) -> None:
    inputs = raw((2, 3), 5, Types(F32, F32, F32), norm, affine, kind, z_bias, seed)
    torch.library.opcheck(OPS.gates_backward.default, tuple(backward_arguments(inputs, dh, dc, wanted)))


@pytest.mark.parametrize(("norm", "affine", "kind", "z_bias", "seed"), CHECKED)
def test_operator_equals_function(norm: str, affine: bool, kind: str, z_bias: bool, seed: bool) -> None:
    """Check that the autograd registered for tracers equals the autograd.Function of eager; z_bias is z + b."""
    inputs = with_gradients(raw((4,), 9, Types(F64, F64, F64), norm, affine, kind, z_bias, seed))
    z, b, hidden, c, weight, bias, key = inputs[:7]
    options = {
        "norm": norm,
        "activation": ACTIVATIONS[inputs[8]],
        "dropout_p": inputs[10],
        "training": seed,
        "seed": key,
    }
    wanted = fused(z if b is None else z + b, c, weight, bias, hidden=hidden, **options)
    found = OPS.gates_forward(*inputs)
    leaves = [x for x in inputs[:6] if x is not None]
    grads = (normal(4, 9), normal(4, 9))
    gradients = [torch.autograd.grad(outputs, leaves, grads) for outputs in (found, wanted)]
    for a, e in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


class Gates(nn.Module):
    def __init__(self, features: int, **options: Any) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(normal(4, features, dtype=F32)),
            nn.Parameter(normal(4, features, dtype=F32)),
        )
        self.options = options

    def forward(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return dl.depth_lstm_gates(z, c, self.weight, self.bias, **self.options)


class Cell(nn.Module):
    def __init__(self, features: int, **options: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(4 * features, 2 * features, dtype=F32, scale=0.3))
        self.b = nn.Parameter(normal(4 * features, dtype=F32))
        self.weight, self.bias = (
            nn.Parameter(normal(4, features, dtype=F32)),
            nn.Parameter(normal(4, features, dtype=F32)),
        )
        self.options = options

    def forward(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x, h = z.tensor_split((c.shape[-1],), -1)
        return dl.depth_lstm_cell(x, h, c, self.w, self.b, self.weight, self.bias, **self.options)


def step(module: Any, model: nn.Module, z: Tensor, c: Tensor, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return outputs and every gradient of one call."""
    z, c = z.detach().requires_grad_(), c.detach().requires_grad_()
    outputs = module(z, c)
    return [*outputs, *torch.autograd.grad(outputs, [z, c, *model.parameters()], grads)]


def compiled_equals_eager(kind: type[nn.Module], compiler: Any, rows: list[int], **options: Any) -> None:
    model = kind(16, **options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    for number in rows:
        z, c = normal(number, (4 if kind is Gates else 2) * 16, dtype=F32), normal(number, 16, dtype=F32)
        grads = (normal(number, 16, dtype=F32), normal(number, 16, dtype=F32))
        torch.manual_seed(1)
        found = step(compiled, model, z, c, grads)
        torch.manual_seed(1)
        wanted = step(model, model, z, c, grads)
        assert dl.last_backend() == "cpp"
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Gates, Cell])
@pytest.mark.parametrize("options", [{}, {"norm": "joint", "activation": "silu"}, {"backend": "cpp"}], ids=str)
def test_compiled_once_for_any_number_of_rows(kind: type[nn.Module], options: dict[str, Any]) -> None:
    torch._dynamo.utils.counters.clear()
    compiled_equals_eager(kind, "aot_eager", [5, 2, 3, 4, 7, 17, 33, 64, 100, 101], **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", [Gates, Cell])
def test_compiled_with_dropout(kind: type[nn.Module]) -> None:
    """Check that torch's generator draws the seed inside the graph.

    Eager and compiled then drop the same elements.
    """
    compiled_equals_eager(kind, "aot_eager", [5, 8], dropout_p=0.5, training=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gates, Cell])
def test_compiled_by_inductor(kind: type[nn.Module]) -> None:
    compiled_equals_eager(kind, "inductor", [5, 8])


def test_compiled_graph_holds_the_operator() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Gates(8)
    torch.compile(model, fullgraph=True, backend=keep)(normal(3, 32, dtype=F32), normal(3, 8, dtype=F32))
    assert [node.target for node in graphs[0].graph.nodes if "depthlstm" in str(node.target)] == [
        OPS.gates_forward.default
    ]


@pytest.mark.parametrize("kind", [Gates, Cell])
def test_export_takes_the_decomposition(kind: type[nn.Module]) -> None:
    """Check that an exported program needs no operator of this package.

    It runs elsewhere (ONNX, another runtime).
    """
    model = kind(8).eval()
    inputs = (normal(5, 32 if kind is Gates else 16, dtype=F32), normal(5, 8, dtype=F32))
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: rows}, {0: rows}))
    assert "depthlstm" not in str(program.graph)
    for number in (5, 9):
        inputs = (normal(number, inputs[0].shape[1], dtype=F32), normal(number, 8, dtype=F32))
        for a, e in zip(program.module()(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    assert dl.last_backend() == "cpp"


def test_make_fx() -> None:
    """Check that a tracer of ATen operators sees this operator and can run it, forward and backward."""
    tensors, options = arguments(5, 8, Types(F32, F32, F32))

    def function(z: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused(z, c, weight, bias, **options)[0]

    graph = make_fx(function, tracing_mode="fake")(*tensors.values())
    torch.testing.assert_close(graph(*tensors.values()), function(*tensors.values()))


def test_double_backward_of_the_cell_is_refused_with_a_hint() -> None:
    x, h, c, w = (normal(*shape).requires_grad_() for shape in ((3, 2), (3, 4), (3, 4), (16, 6)))
    (gradient,) = torch.autograd.grad(fused_cell(x, h, c, w)[0].square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative"):
        gradient.sum().backward()


def test_functorch_takes_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["depthlstm_fast.backends.choice"], "_strict", False)
    tensors, options = arguments((4, 5), 8, MAIN_TYPES[1])
    z, c, weight, bias = tensors.values()

    def energy(z: Tensor, c: Tensor) -> Tensor:
        h, new_c = dl.depth_lstm_gates(z, c, weight, bias, **options)
        return (h * new_c).sum()

    wanted = torch.autograd.grad(energy(z.requires_grad_(), c), z)[0]
    assert dl.last_backend() == "cpp"
    z = z.detach()
    torch.testing.assert_close(torch.func.grad(energy)(z, c), wanted)
    assert dl.last_backend() == "reference"
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(energy))(z, c), wanted)
    torch.testing.assert_close(torch.func.jvp(lambda x: energy(x, c), (z,), (torch.ones_like(z),))[1], wanted.sum())
    with pytest.raises(ValueError, match=r"backend='cpp' cannot run this call: torch\.func"):
        torch.func.grad(lambda x: dl.depth_lstm_gates(x, c, weight, bias, backend="cpp")[0].sum())(z)


# (position in gates_forward, the replacement)
BAD = {
    "z too narrow": (0, torch.randn(3, 31)),
    "z of other rows": (0, torch.randn(4, 32)),
    "z without dimensions": (0, torch.tensor(1.0)),
    "z of integers": (0, torch.ones(3, 32, dtype=torch.int64)),
    "z_bias too short": (1, torch.randn(31)),
    "z_bias of another type": (1, torch.randn(32, dtype=F64)),
    "hidden of other rows": (2, torch.randn(2, 8)),
    "c without dimensions": (3, torch.tensor(1.0)),
    "c without features": (3, torch.randn(3, 0)),
    "c of another type": (3, torch.randn(3, 8, dtype=F16)),
    "weight too short": (4, torch.randn(4, 7)),
    "weight of another type": (4, torch.randn(4, 8, dtype=F16)),
    "weight alone": (5, None),
    "bias alone": (4, None),
    "seed of two": (6, torch.tensor([1, 2])),
    "seed of another type": (6, torch.tensor([1.0])),
    "norm unknown": (7, 3),
    "norm negative": (7, -1),
    "norm none with affine": (7, 2),
    "activation unknown": (8, 6),
    "activation negative": (8, -1),
    "eps negative": (9, -1e-6),
    "eps NaN": (9, float("nan")),
    "dropout of 1": (10, 1.0),
    "dropout negative": (10, -0.1),
    "dropout NaN": (10, float("nan")),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_raw_operators_refuse_bad_arguments(what: str, backward: bool) -> None:
    """Check that raw operators, below the public functions' checks, cannot read or write out of bounds."""
    inputs = raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", True, True)
    more = backward_arguments(inputs)
    position, value = BAD[what]
    inputs[position] = value
    operator, arguments = (
        (OPS.gates_backward, [*more[:2], *inputs, *more[-2:]]) if backward else (OPS.gates_forward, inputs)
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        operator(*arguments)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    "value", [torch.randn(3, 7), torch.randn(4, 8), torch.randn(3, 8, dtype=F64), torch.tensor(1.0)], ids=str
)
def test_raw_backward_refuses_gradients_that_do_not_fit(position: int, value: Tensor) -> None:
    inputs = backward_arguments(raw((3,), 8, Types(F32, F32, F32), "gate", True, "gelu", False, False))
    inputs[position] = value
    with pytest.raises(RuntimeError, match=("dh", "dc")[position]):
        OPS.gates_backward(*inputs)


ISA_SCRIPT = """
import sys
sys.path[:0] = {path!r}
from helpers import CALLS, KINDS, NORMS, TYPES, arguments, check_gates
import torch

for types in TYPES:
    for norm, affine, kind in (*CALLS, *((norm, affine, kind) for norm, affine in NORMS[:1] for kind in KINDS)):
        for rows, features in ((3, 1), (5, 33), (3, 130)):
            torch.manual_seed(0)
            tensors, options = arguments(rows, features, types, norm, affine, kind)
            check_gates(tensors, {{**options, "dropout_p": 0.2, "training": True, "seed": torch.tensor([5])}})
import ctypes
from depthlstm_fast.backends.library import LIBRARY
name = ctypes.CDLL(str(LIBRARY)).depthlstm_cpu_isa
name.restype = ctypes.c_char_p
print(name().decode())
"""


def cpu_has(isa: str) -> bool:
    return isa == "generic" or CPU_FLAGS[isa] <= set(cpu_info().get("flags", "").split())


@pytest.mark.parametrize("isa", ["generic", *CPU_FLAGS])
def test_each_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("DEPTHLSTM_CPU_ISA", isa)
    run = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT.format(path=sys.path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == isa


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPTHLSTM_CPU_ISA", "avx3")
    script = "import torch, depthlstm_fast as dl; dl.depth_lstm_gates(torch.ones(1, 4), torch.ones(1, 1))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16" in run.stderr
    assert "found avx3" in run.stderr


@needs_cpp
def test_forward_mode_takes_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    # this test is about the fallback
    monkeypatch.setattr(sys.modules["depthlstm_fast.backends.choice"], "_strict", False)
    z, tangent, c = normal(2, 12), normal(2, 12), normal(2, 3)
    results = []
    for function in (dl.depth_lstm_gates, dl.reference.depth_lstm_gates):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, tangent)
            results.append(torch.autograd.forward_ad.unpack_dual(function(dual, c)[0]).tangent)
    assert results[0] is not None
    torch.testing.assert_close(results[0], results[1])
