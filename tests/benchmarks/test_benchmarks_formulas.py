"""The benchmark suite's bytes, FLOPs, operator calls and memory, each against an independent count."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench.measure import call_cost, matrix_products  # noqa: E402
from depthlstm_fast.bench.measure.calls import forward_and_backward  # noqa: E402
from depthlstm_fast.bench.subjects import cell, decoding, gates, layer, model  # noqa: E402

sys.path.remove(str(ROOT))

needs_cpp = pytest.mark.skipif(not dl.backends()["cpp"].available, reason="the C++ extension is not built")
BATCH, LENGTH, FEATURES, HEADS, LAYERS, VOCABULARY = 2, 7, 32, 4, 2, 50


def counted(run: object) -> int:
    """Return FLOPs by torch's counter, with attention as plain products.

    The counter counts recomputed products of the fused attention kernels twice.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_the_gates_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    rows, features = 6, 10
    z, c, weight, bias = gates.make_inputs(rows, features, dtype)
    leaves = [tensor.requires_grad_() for tensor in (z, c, weight, bias)]
    cotangents = [torch.randn_like(c), torch.randn_like(c)]
    h, c_out, dz, dc, *_ = forward_and_backward(dl.reference.depth_lstm_gates, leaves, cotangents)
    forward = sum(tensor.nbytes for tensor in (z, c, h, c_out))
    backward = sum(tensor.nbytes for tensor in (z, c, *cotangents, dz, dc))
    assert gates.moved_bytes(rows, features, dtype, gates.FORWARD_ELEMENTS) == forward
    assert gates.moved_bytes(rows, features, dtype, gates.BACKWARD_ELEMENTS) == backward


class Counted:
    """A number that counts the operations made with numbers of its kind."""

    operations = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def _count(self, value: float) -> Counted:
        Counted.operations += 1
        return Counted(value)

    def __add__(self, other: Counted | float) -> Counted:
        return self._count(self.value + float(getattr(other, "value", other)))

    def __sub__(self, other: Counted | float) -> Counted:
        return self._count(self.value - float(getattr(other, "value", other)))

    def __mul__(self, other: Counted | float) -> Counted:
        return self._count(self.value * float(getattr(other, "value", other)))

    def __rsub__(self, other: float) -> Counted:
        return self._count(other - self.value)

    def __neg__(self) -> Counted:
        return self._count(-self.value)

    def of(self, function: Callable[[float], float]) -> Counted:
        return self._count(function(self.value))

    __radd__, __rmul__ = __add__, __mul__


def gates_by_formula(features: int, backward: bool) -> int:
    """Count the operations of one row, by the formulas on self-counting numbers.

    With ``backward`` only those of the backward are counted.
    """
    Counted.operations = 0

    def random(count: int = features) -> list[Counted]:
        return [Counted(value) for value in torch.rand(count).tolist()]

    z, gamma, beta = ([random() for _ in range(4)] for _ in range(3))
    c, dh, dc = random(), random(), random()
    n, a = [], []
    for gate in range(4):
        mean = sum(z[gate]) * (1 / features)
        centred = [value - mean for value in z[gate]]
        r = (sum(value * value for value in centred) * (1 / features)).of(lambda value: (value + 1e-6) ** -0.5)
        n.append([value * r for value in centred])
        a.append([value * scale + shift for value, scale, shift in zip(n[gate], gamma[gate], beta[gate], strict=True)])
    i, f, o = ([(1 + (-value).of(math.exp)).of(lambda x: 1 / x) for value in a[gate]] for gate in range(3))
    phi = [0.5 * (1 + (value * 0.5**0.5).of(math.erf)) for value in a[3]]
    g = [value * p for value, p in zip(a[3], phi, strict=True)]
    new = [x * y + v * w for x, y, v, w in zip(f, c, i, g, strict=True)]
    if not backward:
        [x * y for x, y in zip(o, new, strict=True)]
        return Counted.operations
    for index in range(features):
        t = dc[index] + dh[index] * o[index]
        x = a[3][index]
        slope = phi[index] + x * (0.4 * (-0.5 * (x * x)).of(math.exp))
        da = [
            t * g[index] * i[index] * (1 - i[index]),
            t * c[index] * f[index] * (1 - f[index]),
            dh[index] * new[index] * o[index] * (1 - o[index]),
            t * i[index] * slope,
        ]
        t * f[index]
        for gate in range(4):
            a[gate][index] = da[gate]
    for gate in range(4):
        sum((value * x for value, x in zip(a[gate], n[gate], strict=True)), Counted(0))  # of dgamma, over rows
        sum(a[gate], Counted(0))  # of dbeta
        u = [value * scale for value, scale in zip(a[gate], gamma[gate], strict=True)]
        first, second = sum(u), sum(x * y for x, y in zip(u, n[gate], strict=True))
        [r * (x - first - y * second) for x, y in zip(u, n[gate], strict=True)]
    return Counted.operations


def test_operations_of_the_gates() -> None:
    # a row's fixed cost cancels out
    forward, backward = ((gates_by_formula(48, side) - gates_by_formula(16, side)) / 32 for side in (False, True))
    assert (forward, backward) == (gates.FORWARD_OPERATIONS, gates.BACKWARD_OPERATIONS)
    assert gates.operations(3, 5, backward=True) == 15 * (forward + backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_cell_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    rows, features = 6, 10
    leaves = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, features, dtype)]
    cotangents = [torch.randn(rows, features).to(dtype) for _ in range(2)]
    found = forward_and_backward(dl.reference.depth_lstm_cell, leaves, cotangents)
    assert cell.moved_bytes(rows, features, dtype) == sum(tensor.nbytes for tensor in (*leaves, *cotangents, *found))


def test_flops_of_a_cell() -> None:
    rows = 6
    inputs = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, FEATURES, torch.float32)]
    cotangents = [torch.randn(rows, FEATURES) for _ in range(2)]
    # the counter cannot follow autograd.grad
    found = counted(lambda: torch.autograd.backward(cell.reference_cell(*inputs), cotangents))
    assert matrix_products.training_flops(matrix_products.cell(rows, FEATURES)) == found


def test_flops_of_an_encoder_layer_and_of_its_rival() -> None:
    h, c = (torch.randn(BATCH, LENGTH, FEATURES, requires_grad=True) for _ in range(2))
    cotangents = [torch.randn(BATCH, LENGTH, FEATURES) for _ in range(2)]
    eager, residual = layer.depth_lstm_layers(FEATURES, HEADS)["eager"], layer.residual_layer(FEATURES, HEADS)
    wanted = matrix_products.training_flops(matrix_products.encoder_layer(BATCH, LENGTH, FEATURES, HEADS))
    assert counted(lambda: torch.autograd.backward(eager(h, c), cotangents)) == wanted
    assert counted(lambda: residual(h).backward(cotangents[0])) == wanted


@pytest.mark.parametrize("name", ["eager", "against"])
def test_flops_of_a_model_and_of_its_rival(name: str) -> None:
    models = model.build(FEATURES, HEADS, LAYERS, VOCABULARY)
    source, target = torch.randint(3, VOCABULARY, (BATCH, LENGTH)), torch.randint(3, VOCABULARY, (BATCH, LENGTH + 1))
    needed = model.needed_products(BATCH, LENGTH, FEATURES, HEADS, LAYERS, VOCABULARY)
    assert counted(lambda: model.step(models[name], source, target)) == matrix_products.training_flops(needed)


def test_a_run_of_bare_products_computes_what_is_counted() -> None:
    needed = [*matrix_products.decoder_layer(BATCH, LENGTH, 5, FEATURES, HEADS), *matrix_products.cell(3, FEATURES)]
    assert counted(matrix_products.training_run(needed, torch.float32)) == matrix_products.training_flops(needed)


def test_models_have_equally_many_matrix_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    models = model.build(FEATURES, HEADS, LAYERS, VOCABULARY)
    wanted = LAYERS * (12 + 16) * FEATURES**2 + 2 * VOCABULARY * FEATURES
    assert {matrix_products.matrix_entries(module) for module in models.values()} == {wanted}
    smaller = model.ResidualTransformer
    monkeypatch.setattr(model, "ResidualTransformer", lambda *sizes: smaller(*sizes[:3], sizes[3] - 1, sizes[4]))
    with pytest.raises(ValueError, match="unequal size"):
        model.build(FEATURES, HEADS, LAYERS, VOCABULARY)


def test_bytes_of_the_weights_that_decoding_reads() -> None:
    steps, fused = 5, decoding.build(FEATURES, LAYERS, VOCABULARY)["fused"]
    once = matrix_products.matrix_entries(fused.encoder)
    each = matrix_products.matrix_entries(fused.decoder) + fused.output.weight.numel()
    keys = sum(entry.cross_attn.kv_proj.weight.numel() for entry in fused.decoder.layers)
    wanted = 4 * (once + keys + steps * (each - keys))
    assert decoding.weight_bytes(FEATURES, LAYERS, VOCABULARY, steps, folded=False) == wanted
    # W_x W_o in place of W_x and W_o
    projections = sum(entry.self_attn.out_proj.weight.numel() for entry in fused.encoder.layers)
    assert decoding.weight_bytes(FEATURES, LAYERS, VOCABULARY, steps, folded=True) == wanted - 4 * projections


def test_cost_of_a_call_counts_innermost_operators_and_the_peak_of_memory() -> None:
    x = torch.zeros(1000)

    def run() -> torch.Tensor:
        first = torch.mul(x, x)  # 4 kB
        second = torch.mul(first, x)  # 8 kB
        del first
        return torch.mul(second, x)  # 8 kB again

    assert call_cost.of_call(run) == call_cost.Cost(3, 8000)
    # clone calls empty_like, which calls empty_strided, and copy_
    assert call_cost.of_call(lambda: torch.clone(x)) == call_cost.Cost(2, 4000)
    leaf = x.clone().requires_grad_()
    # exp and its backward's mul
    assert call_cost.of_call(lambda: torch.autograd.grad(leaf.exp(), leaf, x)).op_calls >= 2


@needs_cpp
def test_fused_gates_are_one_call_without_scratch() -> None:
    inputs = gates.make_inputs(8, 64, torch.float32)
    with torch.no_grad(), dl.use_backend("cpp"):
        assert call_cost.of_call(lambda: dl.depth_lstm_gates(*inputs)) == call_cost.Cost(1, 2 * 8 * 64 * 4)
