"""swap and unswap: fused modules in place of plain ones, with the same parameters, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HAS_CPP, needs_cpp
from torch import Tensor, nn

import depthlstm_fast as dl

SIZE, WIDTH = 6, 5


class PlainCell(nn.Module):
    """A cell of the LSTMCell4RNMT shape, written from its description.

    It has one LayerNorm over (4, D), and gates i, f, o, hidden.
    """

    def __init__(
        self,
        width: int = WIDTH,
        size: int = SIZE,
        act: Any = None,
        dropout: float = 0.0,
        bias: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.trans = nn.Linear(width + size, 4 * size, bias=bias)
        self.normer = nn.LayerNorm((4, size), eps=1e-5, elementwise_affine=affine)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, inpute: Tensor, state: tuple[Tensor, Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        out, cell = state
        z = self.trans(torch.cat((inpute, out), -1))
        i, f, o, hidden = self.normer(z.unflatten(-1, (4, -1))).unbind(-2)
        hidden = self.act(hidden)
        if self.drop is not None:
            hidden = self.drop(hidden)
        cell = f.sigmoid() * cell + i.sigmoid() * hidden
        return scale * o.sigmoid() * cell, cell


class Stack(nn.Module):
    """Cells at two depths of the tree, one of them used twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, WIDTH)
        self.cells = nn.ModuleList(PlainCell(**options) for _ in range(2))
        self.inner = nn.ModuleDict({"cell": PlainCell(**options)})
        self.again = self.cells[0]

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.inputs(x)
        for cell in (*self.cells, self.inner["cell"], self.again):
            state = cell(x, state)
        return state


def randomised(model: nn.Module) -> Any:
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def inputs(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*leading, size, dtype=torch.float64, requires_grad=True) for size in (WIDTH, SIZE, SIZE))  # type: ignore[return-value]


def results(model: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    x, h, c = tensors
    outputs = model(x, (h, c))
    return [*outputs, *torch.autograd.grad(outputs, [*tensors, *model.parameters()], grads, allow_unused=True)]


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    for a, b in zip(found, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def cotangents(*leading: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*leading, SIZE, dtype=torch.float64), torch.randn(*leading, SIZE, dtype=torch.float64)


ACTS = [nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Sigmoid()]
ACTS += [torch.tanh, F.gelu, F.relu, torch.relu, F.silu, torch.sigmoid]  # type: ignore[list-item]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: getattr(act, "__name__", str(act)))
def test_activations(act: Any) -> None:
    model = randomised(nn.ModuleDict({"cell": PlainCell(act=act)}))
    tensors, grads = inputs(3), cotangents(3)
    wanted = results(model["cell"], tensors, grads)
    dl.swap(model)
    assert_same(results(model["cell"], tensors, grads), wanted)
    if HAS_CPP:
        assert dl.last_backend() == "cpp"


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,)], ids=str)
def test_nested_and_shared(leading: tuple[int, ...], options: dict[str, Any]) -> None:
    model = randomised(Stack(**options)).eval()
    tensors, grads = inputs(*leading), cotangents(*leading)
    wanted = results(model, tensors, grads)
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    report = dl.swap(model)
    assert [entry.name for entry in report.changed] == ["cells.0", "cells.1", "inner.cell"]
    assert {(entry.before, entry.after) for entry in report.changed} == {("PlainCell", "FusedPlainCell")}
    assert not report.left
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert isinstance(model.again, PlainCell)
    assert not model.again.training
    assert_same(results(model, tensors, grads), wanted)
    undone = dl.unswap(model)
    assert [entry.name for entry in undone.changed] == ["cells.0", "cells.1", "inner.cell"]
    assert type(model.again) is PlainCell
    assert not any(key.startswith("_depthlstm") for module in model.modules() for key in module.__dict__)
    for a, b in zip(results(model, tensors, grads), wanted, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_root_is_changed_in_place() -> None:
    cell = randomised(PlainCell())
    tensors, grads = inputs(3), cotangents(3)
    wanted = results(cell, tensors, grads)
    same = cell
    report = dl.swap(cell)
    assert report.changed[0].name == ""
    assert same is cell
    assert "(model)  PlainCell -> FusedPlainCell" in str(report)
    assert_same(results(cell, tensors, grads), wanted)
    dl.unswap(cell)
    assert type(cell) is PlainCell


def test_idempotent() -> None:
    model = randomised(Stack())
    dl.swap(model)
    report = dl.swap(model)
    assert not report.changed
    assert not report.left
    assert report.already == ["cells.0", "cells.1", "inner.cell"]
    assert len(dl.unswap(model).changed) == 3
    assert not dl.unswap(model).changed
    assert len(dl.swap(model).changed) == 3


def test_training_goes_on_over_a_swap() -> None:
    """Check that an optimiser made before the swap trains the parameters used after it."""
    model = randomised(Stack())
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, twin)]
    x, h, c = (tensor.detach() for tensor in inputs(4))
    for number in range(4):
        if number == 1:
            dl.swap(model)
        if number == 3:
            dl.unswap(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x, (h, c))[0].square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_copies_and_pickles() -> None:
    model = randomised(Stack())
    dl.swap(model)
    x, h, c = inputs(3)
    wanted = model(x, (h, c))[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.again) is type(model.again)
        assert other.again is other.cells[0]
        assert torch.equal(other(x, (h, c))[0], wanted)
        dl.unswap(other)
        assert type(other.again) is PlainCell
    assert type(model.again) is not PlainCell


@needs_cpp
def test_dropout_in_training() -> None:
    cell = randomised(PlainCell(dropout=0.5))
    dl.swap(cell)
    x, h, _ = inputs(200)
    zeros = torch.zeros(200, SIZE, dtype=torch.float64)
    torch.manual_seed(1)
    first = cell(x, (h, zeros))[1]
    torch.manual_seed(1)
    assert torch.equal(cell(x, (h, zeros))[1], first)
    assert 0.4 < (first == 0).double().mean() < 0.6
    cell.drop.eval()  # the dropout module's own mode counts, as before the swap
    assert (cell(x, (h, zeros))[1] != 0).all()


def test_what_the_fused_class_does_not_cover() -> None:
    """Check calls that the fused class does not cover.

    Hooks inside the cell run, replaced projections are called, and other arguments reach the original forward.
    """
    cell = randomised(PlainCell())
    x, h, c = inputs(3)
    plain = copy.deepcopy(cell)
    dl.swap(cell)
    assert_same(list(cell(x, (h, c), scale=3.0)), list(plain(x, (h, c), scale=3.0)))
    assert_same(list(cell(x, (h, c[:1]))), list(plain(x, (h, c[:1]))))  # a cell state that broadcasts
    seen: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, _, __: seen.append(module))
        for module in (cell.trans, cell.normer, cell.act)
    ]
    assert_same(list(cell(x, (h, c))), list(plain(x, (h, c))))
    assert seen == [cell.trans, cell.normer, cell.act]
    for handle in handles:
        handle.remove()
    own: list[int] = []
    cell.register_forward_hook(lambda *_: own.append(1))
    cell(x, (h, c))
    assert own == [1]
    projection = cell.trans
    cell.trans = nn.Sequential(projection)
    assert_same(list(cell(x, (h, c))), list(plain(x, (h, c))))


class TanhOnC(PlainCell):
    def forward(self, inpute: Tensor, state: tuple[Tensor, Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h, c = super().forward(inpute, state)
        return torch.tanh(h), c


class OneOutput(PlainCell):
    def forward(self, inpute: Tensor, state: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(inpute, state)[0]


class Unlike(PlainCell):
    def forward(self, inpute: Tensor) -> Tensor:  # type: ignore[override]
        return inpute


def changed(**attributes: Any) -> PlainCell:
    cell = PlainCell()
    for name, value in attributes.items():
        delattr(cell, name)  # setattr cannot put a function in a registered submodule's place
        setattr(cell, name, value)
    return cell


ODD = {
    "act must be GELU, ReLU, Tanh, SiLU or Sigmoid; found ELU": changed(act=nn.ELU()),
    "act must be GELU, ReLU, Tanh, SiLU or Sigmoid; found sin": changed(act=torch.sin),
    r"normer must normalise over (4, D); found (24,)": changed(normer=nn.LayerNorm(4 * SIZE)),
    "normer must be an nn.LayerNorm; found Identity": changed(normer=nn.Identity()),
    "normer must have both weight and bias, or neither": changed(normer=nn.LayerNorm((4, SIZE), bias=False)),
    "trans must be an nn.Linear; found Identity": changed(trans=nn.Identity()),
    "trans must have 24 rows and more than 6 columns; found (18, 11)": changed(trans=nn.Linear(WIDTH + SIZE, 3 * SIZE)),
    "drop must be an nn.Dropout or None; found AlphaDropout": changed(drop=nn.AlphaDropout(0.1)),
    "drop must drop with a probability in [0, 1); found 1.0": changed(drop=nn.Dropout(1.0)),
    "it has the attributes of the cell but computes something else": TanhOnC(),
    "forward(input, (h, c)) does not return (h, c)": OneOutput(),
    "forward(input, (h, c)) raises TypeError": Unlike(),
}


@pytest.mark.parametrize("reason", ODD)
def test_left_with_a_reason(reason: str) -> None:
    odd = ODD[reason]
    before = type(odd)
    model = nn.ModuleDict({"good": PlainCell(), "odd": odd})
    report = dl.swap(model)
    assert [entry.name for entry in report.changed] == ["good"]
    assert [entry.name for entry in report.left] == ["odd"]
    assert report.left[0].reason.startswith(reason)
    assert f"left     odd   {before.__name__}: {reason}" in str(report)
    assert type(model["odd"]) is before
    assert model["odd"].training
    with pytest.raises(ValueError, match="model holds no module that a rule matches; found"):
        dl.swap(odd)


def test_nothing_matched() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTMCell(2, 2))
    with pytest.raises(ValueError, match="model holds no module that a rule matches; found Sequential"):
        dl.swap(model)
    assert not dl.unswap(model).changed
    for function in (dl.swap, dl.unswap):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; found dict"):
            function({})  # type: ignore[arg-type]


def test_swapped_model_compiles() -> None:
    torch._dynamo.reset()
    model = randomised(PlainCell())
    x, h, c = inputs(3)
    wanted = model(x, (h, c))
    dl.swap(model)
    found = torch.compile(model, fullgraph=True, backend="eager")(x, (h, c))
    assert_same(list(found), list(wanted))
