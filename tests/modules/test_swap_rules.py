"""swap with the user's rules, and on the modules of the reference."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from helpers import HAS_CPP
from test_swap import SIZE, WIDTH, PlainCell, assert_same, cotangents, inputs, randomised, results
from torch import Tensor, nn

import depthlstm_fast as dl


@pytest.mark.parametrize(
    "kind", ["DepthLSTMCell", "DepthLSTMEncoderLayer", "DepthLSTMDecoderLayer", "DepthLSTMTransformer"]
)
def test_modules_of_the_reference(kind: str) -> None:
    sizes: tuple = {"DepthLSTMCell": (WIDTH, SIZE), "DepthLSTMTransformer": (9, 9, 8, 2, 2, 2)}.get(kind, (8, 2))
    model = randomised(getattr(dl.reference, kind)(*sizes, dropout=0.0))
    classes = [type(module) for module in model.modules()]
    if kind == "DepthLSTMCell":
        x, h, c = inputs(3)
        arguments: tuple = (x, (h, c))
    elif kind == "DepthLSTMTransformer":
        arguments = (torch.randint(3, 9, (2, 5)), torch.randint(3, 9, (2, 4)))
    else:
        arguments = tuple(torch.randn(5, 2, 8, dtype=torch.float64) for _ in range(2 if "Decoder" in kind else 1))

    def run() -> list[Tensor]:
        outputs = model(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(3)
        grads = [torch.randn_like(output) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(model.parameters()), grads)]

    wanted = run()
    report = dl.swap(model)
    assert type(model) is getattr(dl, kind)
    assert report.changed[0] == ("", kind, kind)
    for module in model.modules():
        assert (
            not hasattr(dl.reference, type(module).__name__)
            or not hasattr(dl, type(module).__name__)
            or type(module) is getattr(dl, type(module).__name__)
        )
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    if HAS_CPP:
        assert dl.last_backend() == "cpp"
    assert len(dl.unswap(model).changed) == len(report.changed)
    assert [type(module) for module in model.modules()] == classes


def test_modules_born_fused_stay() -> None:
    model = nn.ModuleList([dl.DepthLSTMCell(3, 4), dl.reference.DepthLSTMCell(3, 4)])
    report = dl.swap(model)
    assert report.already == ["0"]
    assert [entry.name for entry in report.changed] == ["1"]
    dl.unswap(model)
    assert type(model[0]) is dl.DepthLSTMCell
    assert type(model[1]) is dl.reference.DepthLSTMCell


class MyCell(dl.reference.DepthLSTMCell):
    pass


def test_subclasses_are_left() -> None:
    model = nn.ModuleList([MyCell(3, 4), PlainCell()])
    report = dl.swap(model)
    assert [(entry.name, entry.kind) for entry in report.left] == [("0", "MyCell")]
    assert "give a rule for it" in report.left[0].reason


class OtherNames(nn.Module):
    """The same cell with other attribute names."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.ln, self.f, self.dropout = (
            nn.Linear(WIDTH + SIZE, 4 * SIZE),
            nn.LayerNorm((4, SIZE)),
            nn.Tanh(),
            None,
        )

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.ln(self.w(torch.cat((x, state[0]), -1)).unflatten(-1, (4, -1))).unbind(-2)
        c = f.sigmoid() * state[1] + i.sigmoid() * self.f(g)
        return o.sigmoid() * c, c


RENAMED = functools.partial(dl.swap_rnmt_cell, projection="w", norm="ln", activation="f", dropout="dropout")


@pytest.mark.parametrize("match", [OtherNames, lambda module: hasattr(module, "ln")], ids=["class", "predicate"])
def test_rule_for_other_names(match: Any) -> None:
    model = randomised(nn.ModuleDict({"a": OtherNames(), "b": PlainCell()}))
    tensors, grads = inputs(3), cotangents(3)
    wanted = results(model["a"], tensors, grads)
    report = dl.swap(model, {match: RENAMED})
    assert [entry.name for entry in report.changed] == ["a", "b"]
    assert_same(results(model["a"], tensors, grads), wanted)
    assert torch.equal(
        pickle.loads(pickle.dumps(model))["a"](*tensors[:1], tensors[1:])[0], model["a"](*tensors[:1], tensors[1:])[0]
    )
    dl.unswap(model)
    assert type(model["a"]) is OtherNames


class Wrapper(nn.Module):
    """A possible result of a rule: another object that shares the parameters."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.w, self.ln = cell.w, cell.ln

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        return dl.depth_lstm_cell(
            x, h, c, self.w.weight, self.w.bias, self.ln.weight, self.ln.bias, norm="joint", activation="tanh", eps=1e-5
        )


def test_rule_that_replaces() -> None:
    cell = randomised(OtherNames())
    model = nn.ModuleDict({"a": cell, "b": nn.Sequential(cell)}).eval()
    tensors, grads = inputs(3), cotangents(3)
    wanted = results(cell, tensors, grads)
    report = dl.swap(model, {OtherNames: Wrapper})
    assert [entry.name for entry in report.changed] == ["a"]
    assert type(model["a"]) is Wrapper
    assert model["b"][0] is model["a"]
    assert not model["a"].training
    assert_same(results(model["a"], tensors, grads), wanted)
    assert dl.swap(model, {OtherNames: Wrapper}).already == ["a"]
    dl.unswap(model)
    assert model["a"] is cell
    assert model["b"][0] is cell
    with pytest.raises(ValueError, match="model itself is a OtherNames that its rule replaces by another object"):
        dl.swap(cell, {OtherNames: Wrapper})
    with pytest.raises(TypeError, match=r"the rule for OtherNames must return a torch\.nn\.Module; found int"):
        dl.swap(model, {OtherNames: lambda module: 3})
    with pytest.raises(TypeError, match=r"the rule for OtherNames must return a torch\.nn\.Module; found NoneType"):
        dl.swap(model, {OtherNames: lambda module: None})
    with pytest.raises(TypeError, match=r"rules must be a dict .* found int"):
        dl.swap(model, 1)


class Exact(PlainCell):
    """PlainCell with a visible eps."""

    def __init__(self, eps: float, **options: Any) -> None:
        super().__init__(**options)
        self.normer.eps = eps


def check_swapped(cell: nn.Module, plain: nn.Module, tolerance: float = 1e-12) -> None:
    """Check that the swapped cell equals its twin, forward and backward, in fp64 or rounded to the type of both."""
    dtype = next(cell.parameters()).dtype
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs(4)]
    grads = [grad.to(dtype) for grad in cotangents(4)]
    for found, wanted in zip(results(cell, tensors, grads), results(plain, tensors, grads), strict=True):
        assert found.dtype == wanted.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eps", [1e-12, 0.3, 5.0])
def test_eps_of_a_swapped_cell(eps: float) -> None:
    plain = randomised(Exact(eps))
    cell = copy.deepcopy(plain)
    dl.swap(cell)
    check_swapped(cell, plain)


def test_what_is_changed_after_a_swap_counts() -> None:
    """Check that eps, activation, probability, mode and dtype are read at each call."""
    plain = randomised(PlainCell(dropout=0.5)).eval()
    cell = copy.deepcopy(plain)
    dl.swap(cell)
    for change in (
        lambda module: setattr(module.normer, "eps", 0.7),
        lambda module: setattr(module, "act", nn.Tanh()),
        lambda module: setattr(module, "act", nn.GELU(approximate="tanh")),
        lambda module: setattr(module.drop, "p", 0.9),
        lambda module: setattr(module, "drop", None),
    ):
        for module in (cell, plain):
            change(module)
        check_swapped(cell, plain)
        if HAS_CPP:
            assert dl.last_backend() == "cpp"
    cell.float(), plain.float()
    check_swapped(cell, plain, 1e-5)
    cell.bfloat16(), plain.bfloat16()
    check_swapped(cell, plain, 0.1)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_dropout_of_a_swapped_cell(p: float) -> None:
    """Check dropout of a swapped cell.

    Kept elements are multiplied by 1 / (1 - p), only elements of g are dropped, and the dropout module's mode decides.
    """
    plain = randomised(PlainCell(dropout=p))
    cell = copy.deepcopy(plain)
    dl.swap(cell)
    x, h, _ = (tensor.detach() for tensor in inputs(500))
    zeros = torch.zeros(500, SIZE, dtype=torch.float64)
    without = plain.eval()(x, (h, zeros))[1]
    for drops in (True, False):
        cell.train(not drops)
        cell.drop.train(drops)
        found = cell(x, (h, zeros))[1]
        kept = found != 0
        # 3000 elements: four standard deviations
        assert abs(kept.double().mean().item() - (1 - p if drops else 1)) < 0.04
        torch.testing.assert_close(found[kept], without[kept] / (1 - p if drops else 1), rtol=1e-12, atol=1e-12)
