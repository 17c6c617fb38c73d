"""DepthLSTMCell: the fused module against the reference one, and both against their documentation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import depthlstm_fast as dl

INPUT, SIZE = 5, 7
VARIANTS = [
    {"hidden": hidden, "norm": norm, "bias": bias}
    for hidden in ("linear", "ffn")
    for norm in ("gate", "joint", "none")
    for bias in (True, False)
]


def cells(**options: Any) -> tuple[dl.reference.DepthLSTMCell, dl.DepthLSTMCell]:
    """Return a reference cell in fp64 with random parameters, and a fused cell with the same parameters."""
    reference = dl.reference.DepthLSTMCell(INPUT, SIZE, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    fused = dl.DepthLSTMCell(INPUT, SIZE, dtype=torch.float64, **options)
    fused.load_state_dict(reference.state_dict())
    return reference, fused


def arguments(*leading: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*leading, size, dtype=dtype, requires_grad=True) for size in (INPUT, SIZE, SIZE)]


def results(cell: nn.Module, tensors: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Return outputs and every gradient under the cotangents."""
    x, h, c = tensors
    outputs = cell(x, (h, c))
    return [*outputs, *torch.autograd.grad(outputs, [*tensors, *cell.parameters()], cotangents)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    for position, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda text, position=position: f"{position}: {text}"
        )


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 2)], ids=str)
def test_fused_equals_reference(options: dict, leading: tuple[int, ...]) -> None:
    reference, fused = cells(**options)
    tensors = arguments(*leading)
    cotangents = [torch.randn(*leading, SIZE, dtype=torch.float64) for _ in range(2)]
    assert_same(results(fused, tensors, cotangents), results(reference, tensors, cotangents))


@pytest.mark.parametrize("hidden", ["linear", "ffn"])
def test_dropout_is_the_same_under_the_same_seed(hidden: str) -> None:
    reference, fused = cells(hidden=hidden, dropout=0.4)
    tensors = arguments(4)
    cotangents = [torch.randn(4, SIZE, dtype=torch.float64) for _ in range(2)]
    found = []
    for cell in (fused, reference):
        torch.manual_seed(3)
        found.append(results(cell, tensors, cotangents))
    assert_same(*found)
    evaluated = fused.eval()(tensors[0], tensors[1:])
    assert not torch.equal(evaluated[0], found[0][0])
    assert_same(list(evaluated), list(reference.eval()(tensors[0], tensors[1:])))


@pytest.mark.parametrize("hidden", ["linear", "ffn"])
def test_input_in_slices(hidden: str) -> None:
    reference, fused = cells(hidden=hidden)
    x, h, c = arguments(2, 3)
    for cell in (reference, fused):
        whole = cell(x, (h, c))
        sliced = cell((x[..., :2], x[..., 2:]), (h, c))
        assert_same(list(sliced), list(whole))
        weights = list(cell.parameters())
        cotangents = [torch.randn_like(h), torch.randn_like(c)]
        assert_same(
            list(torch.autograd.grad(sliced, weights, cotangents)),
            list(torch.autograd.grad(whole, weights, cotangents)),
        )


@pytest.mark.parametrize(("eps", "activation"), [(1e-6, "gelu"), (0.5, "silu"), (3.0, "relu")])
def test_definition_in_twenty_lines(eps: float, activation: str) -> None:
    reference, fused = cells(hidden="ffn", norm="gate", eps=eps, activation=activation)
    x, h, c = arguments(3)
    xh = torch.cat((x, h), 1)
    z = xh @ reference.gates.weight.T + reference.gates.bias
    gates = []
    for k, part in enumerate(z.split(SIZE, 1)):
        normed = (part - part.mean(1, keepdim=True)) / torch.sqrt(part.var(1, correction=0, keepdim=True) + eps)
        gates.append(torch.sigmoid(normed * reference.norm.weight[k] + reference.norm.bias[k]))
    inner = xh @ reference.ffn_in.weight.T + reference.ffn_in.bias
    inner = (inner - inner.mean(1, keepdim=True)) / torch.sqrt(inner.var(1, correction=0, keepdim=True) + eps)
    inner = getattr(nn.functional, activation)(inner * reference.ffn_norm.weight + reference.ffn_norm.bias)
    g = inner @ reference.ffn_out.weight.T + reference.ffn_out.bias
    new_c = gates[1] * c + gates[0] * g
    for cell in (reference, fused):
        assert_same(list(cell(x, (h, c))), [gates[2] * new_c, new_c])


def test_norms_differ() -> None:
    outputs = []
    for norm in ("gate", "joint", "none"):
        torch.manual_seed(1)
        outputs.append(
            dl.reference.DepthLSTMCell(INPUT, SIZE, norm=norm)(
                torch.randn(4, INPUT), (torch.randn(4, SIZE), torch.randn(4, SIZE))
            )[1]
        )
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options", [{"hidden": "ffn"}, {"norm": "joint"}, {"norm": "none", "activation": "silu"}], ids=str
)
def test_reference_gradients_against_finite_differences(options: dict) -> None:
    reference, _ = cells(ffn_size=3, **options)
    names = [name for name, _ in reference.named_parameters()]

    def run(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(reference, dict(zip(names, parameters, strict=True)), (x, (h, c)))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in reference.parameters()]
    assert torch.autograd.gradcheck(run, (*arguments(2), *parameters))


def test_state_defaults_to_zeros() -> None:
    for cell in cells():
        x = torch.randn(3, INPUT, dtype=torch.float64)
        zeros = torch.zeros(3, SIZE, dtype=torch.float64)
        assert_same(list(cell(x)), list(cell(x, (zeros, zeros))))


def test_the_default_forget_bias_goes_where_a_bias_is() -> None:
    default = dl.reference.cell.FORGET_BIAS
    assert default > 0
    assert dl.DepthLSTMCell(3, 2).norm.bias[1].eq(default).all()
    assert dl.DepthLSTMCell(3, 2, norm="none").gates.bias.tolist() == [0, 0, default, default, 0, 0, 0, 0]
    layer = dl.DepthLSTMEncoderLayer(4, 2)
    assert layer.cell.norm.bias[1].eq(default).all()
    model = dl.Transformer(9, 9, d_model=4, nhead=2, num_encoder_layers=1, num_decoder_layers=1)
    biases = [module.norm.bias for module in model.modules() if isinstance(module, dl.DepthLSTMCell)]
    assert len(biases) == 2
    assert all(bias[1].eq(default).all() for bias in biases)
    without = dl.DepthLSTMCell(3, 2, norm="none", bias=False)  # no bias: nothing to refuse in a default
    assert without.forget_bias == 0
    assert dl.DepthLSTMCell(3, 2, forget_bias=0.0).norm.bias.eq(0).all()


def test_parameters_and_initialisation() -> None:
    cell = dl.DepthLSTMCell(300, 100, forget_bias=2.0)
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == {
        "gates.weight": (400, 400),
        "gates.bias": (400,),
        "norm.weight": (4, 100),
        "norm.bias": (4, 100),
    }
    assert cell.norm.weight.eq(1).all()
    assert cell.norm.bias[1].eq(2).all()
    assert cell.norm.bias[[0, 2, 3]].eq(0).all()
    assert cell.gates.bias.eq(0).all()
    assert 0.99 / 20 < cell.gates.weight.max() <= 1 / 20
    glorot = dl.DepthLSTMCell(300, 100, init="glorot").gates.weight.max().item()
    bound = (6 / (400 + 100)) ** 0.5
    assert 0.99 * bound < glorot <= bound
    plain = dl.DepthLSTMCell(3, 2, norm="none", forget_bias=1.0)
    assert plain.norm is None
    assert plain.gates.bias.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    ffn = dl.DepthLSTMCell(3, 2, hidden="ffn")
    assert {name: tuple(p.shape) for name, p in ffn.named_parameters() if p.dim() > 1} == {
        "gates.weight": (6, 5),
        "norm.weight": (3, 2),
        "norm.bias": (3, 2),
        "ffn_in.weight": (8, 5),
        "ffn_out.weight": (2, 8),
    }
    before = ffn.ffn_in.weight.clone()
    ffn.reset_parameters()
    assert not torch.equal(before, ffn.ffn_in.weight)


def test_copies() -> None:
    for cell in cells(hidden="ffn", norm="joint"):
        x = torch.randn(3, INPUT, dtype=torch.float64)
        for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert type(twin) is type(cell)
            assert repr(twin) == repr(cell)
            assert_same(list(twin(x)), list(cell(x)), 0)
    assert "hidden='ffn'" in repr(cell)
    assert "norm='joint'" in repr(cell)


class LowRank(nn.Module):
    """A linear layer with LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(base.in_features, 2, False, dtype=base.weight.dtype),
            nn.Linear(2, base.out_features, False, dtype=base.weight.dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    """A subclass with the same parameters and another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("hidden", ["linear", "ffn"])
@pytest.mark.parametrize("how", ["module", "hook", "pre-hook", "parametrised", "forward", "subclass"])
def test_replaced_linears_are_called(hidden: str, how: str) -> None:
    reference, fused = cells(hidden=hidden)
    names = ["gates", "ffn_in"] if hidden == "ffn" else ["gates"]
    calls = []
    for name in names:
        linear = getattr(fused, name)
        if how == "module":
            setattr(fused, name, LowRank(linear))
        elif how == "hook":
            linear.register_forward_hook(lambda module, args, output: (calls.append(module), 2 * output)[1])
        elif how == "pre-hook":
            linear.register_forward_pre_hook(lambda module, args: 2 * args[0])
        elif how == "parametrised":
            parametrizations.weight_norm(linear)
        elif how == "subclass":
            linear.__class__ = Doubled
        else:
            original = linear.forward
            linear.forward = lambda x, original=original: 3 * original(x)
        setattr(reference, name, getattr(fused, name))
    x, h, c = arguments(4)
    assert_same(list(fused(x, (h, c))), list(reference(x, (h, c))))
    if how == "hook":
        assert len(calls) == 2 * len(names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(torch.ao, "quantization"), reason="this torch has no torch.ao.quantization")
def test_dynamic_quantisation() -> None:
    cell = dl.DepthLSTMCell(16, 16).eval()
    x = torch.randn(4, 16)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(cell), {nn.Linear}, torch.qint8)
    assert type(quantised.gates) is not nn.Linear
    wanted, found = cell(x), quantised(x)
    assert (wanted[0] - found[0]).abs().max() < 0.1


@pytest.mark.parametrize("hidden", ["linear", "ffn"])
def test_autocast(hidden: str) -> None:
    reference = dl.reference.DepthLSTMCell(INPUT, SIZE, hidden=hidden)
    fused = dl.DepthLSTMCell(INPUT, SIZE, hidden=hidden)
    fused.load_state_dict(reference.state_dict())
    x, h, c = arguments(6, dtype=torch.float32)
    gradients = []
    for cell in (fused, reference):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = cell(x, (h, c))
        assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32]
        cotangents = [torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype) for output in outputs]
        gradients.append([*outputs, *torch.autograd.grad(outputs, [x, h, c, *cell.parameters()], cotangents)])
    assert_same(*gradients, tolerance=0.06)


@pytest.mark.parametrize("hidden", ["linear", "ffn"])
def test_checkpointing(hidden: str) -> None:
    _, cell = cells(hidden=hidden, dropout=0.3)
    x, h, c = arguments(6)
    gradients = []
    for reentrant in (None, False, True):
        torch.manual_seed(5)
        if reentrant is None:
            outputs = cell(x, (h, c))
        else:
            outputs = torch.utils.checkpoint.checkpoint(lambda *a: cell(a[0], a[1:]), x, h, c, use_reentrant=reentrant)
        cell.zero_grad()
        torch.autograd.backward(
            outputs, [torch.ones_like(h), torch.linspace(-1, 1, c.numel(), dtype=c.dtype).view(c.shape)]
        )
        gradients.append([p.grad.clone() for p in cell.parameters()])
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])


@pytest.mark.parametrize("module", [dl, dl.reference])
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1; found 0"),
        ({"input_size": 2.0}, TypeError, "input_size must be an int; found float"),
        ({"hidden": "mlp"}, ValueError, "hidden must be one of 'linear', 'ffn'; found 'mlp'"),
        ({"norm": "layer"}, ValueError, "norm must be one of"),
        ({"activation": "elu"}, ValueError, "activation must be one of"),
        ({"init": "zeros"}, ValueError, "init must be one of 'lipschitz', 'glorot'; found 'zeros'"),
        ({"dropout": 1.0}, ValueError, r"dropout_?p? must be in \[0, 1\); found 1.0"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative; found -1.0"),
        ({"forget_bias": float("nan")}, ValueError, "forget_bias must be finite; found nan"),
        ({"forget_bias": None}, TypeError, "forget_bias must be a float; found NoneType"),
        ({"hidden": "ffn", "ffn_size": 0}, ValueError, "ffn_size must be at least 1; found 0"),
        ({"norm": "none", "bias": False, "forget_bias": 1.0}, ValueError, "forget_bias must be 0 .* found 1.0"),
    ],
    ids=str,
)
def test_constructor_errors(module: Any, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        module.DepthLSTMCell(**{"input_size": 3, "hidden_size": 4, **options})


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_forward_errors(module: Any) -> None:
    cell = module.DepthLSTMCell(3, 4)
    state = (torch.zeros(2, 4), torch.zeros(2, 4))
    for input, given, error, text in (
        (torch.zeros(2, 5), state, ValueError, "input must have 3 features; found 5"),
        (torch.zeros(2, 3, dtype=torch.int64), state, TypeError, "input must be float32, .* found torch.int64"),
        (torch.zeros(3, 3), state, ValueError, r"h must have shape \(3, 4\); found \(2, 4\)"),
        (torch.zeros(2, 3), (state[0], torch.zeros(2, 5)), ValueError, r"c must have shape \(2, 4\); found \(2, 5\)"),
        (torch.zeros(2, 3), state[0], TypeError, r"state must be a pair \(h, c\) of tensors; found Tensor"),
        (torch.zeros(2, 3), (state[0], None), TypeError, "c must be a torch.Tensor; found NoneType"),
        ((), state, ValueError, "input must hold at least one tensor"),
        ((torch.zeros(2, 1), torch.zeros(1, 2)), state, ValueError, "input must have shapes"),
    ):
        with pytest.raises(error, match=text):
            cell(input, given)
