"""swap with rules of the user's, and on the modules of the reference."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from helpers import HAS_CPP
from test_swap import SIZE, WIDTH, PlainCell, assert_same, cotangents, inputs, randomised, results
from torch import Tensor, nn

import depthlstm_fast as dl


@pytest.mark.parametrize("kind", ["DepthLSTMCell", "DepthLSTMEncoderLayer", "DepthLSTMDecoderLayer", "DepthLSTMTransformer"])
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
    """The same cell under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.ln, self.f, self.dropout = nn.Linear(WIDTH + SIZE, 4 * SIZE), nn.LayerNorm((4, SIZE)), nn.Tanh(), None

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
    assert torch.equal(pickle.loads(pickle.dumps(model))["a"](*tensors[:1], tensors[1:])[0], model["a"](*tensors[:1], tensors[1:])[0])
    dl.unswap(model)
    assert type(model["a"]) is OtherNames


class Wrapper(nn.Module):
    """What a rule may return: another object that shares the parameters."""

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
