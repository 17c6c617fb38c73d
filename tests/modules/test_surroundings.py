"""Calls inside surroundings that change or record them.

These are dispatch modes, selective checkpointing, tracers, torch.func and the meta device.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import needs_cpp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import depthlstm_fast as dl

ATEN = torch.ops.aten
SIZES: dict[str, Any] = {
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dropout": 0.0,
    "max_len": 24,
}
SRC, TGT = torch.randint(3, 9, (3, 6)), torch.randint(3, 7, (3, 5))
VARIANTS: list[dict[str, Any]] = [
    {},
    {"merge": "concat", "bias": False},
    {"merge": "cells", "sublayer": True, "hidden": "ffn"},
]
each_twin = pytest.mark.parametrize("module", [dl, dl.reference], ids=["fused", "reference"])
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=str)


def build(module: Any = dl, **options: Any) -> nn.Module:
    return module.DepthLSTMTransformer(9, 7, **{**SIZES, **options})


PRODUCTS = (ATEN.mm.default, ATEN.addmm.default)
POLICIES: dict[str, Callable[[Any], bool]] = {
    "products": lambda operator: operator in PRODUCTS,
    "products by packet": lambda operator: operator.overloadpacket in (ATEN.mm, ATEN.addmm),
    "gates": lambda operator: operator == torch.ops.depthlstm_fast.gates_forward.default,
    "everything": lambda operator: True,
    "nothing": lambda operator: False,
}


@needs_cpp
@each_variant
@pytest.mark.parametrize("policy", POLICIES)
def test_selective_checkpointing(options: dict[str, Any], policy: str) -> None:
    model, calls = build(**options), {"forward": [], "recompute": []}
    # a floating-point mask beside a bool one: the two are added
    masks = (torch.zeros(3, 6), SRC == 8)

    def run(src: Tensor, tgt: Tensor) -> Tensor:
        h = model.encoder(model._embed(src, model.src_embedding, model.src_positions), torch.zeros(6, 6), masks[1])
        return model.decode(tgt, h, None, masks[0])

    def keep(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        calls["recompute" if context.is_recompute else "forward"].append(operator)
        return CheckpointPolicy.MUST_SAVE if POLICIES[policy](operator) else CheckpointPolicy.PREFER_RECOMPUTE

    weight = torch.randn(3, 5, 7)
    wanted = torch.autograd.grad((run(SRC, TGT) * weight).sum(), list(model.parameters()))
    context = functools.partial(create_selective_checkpoint_contexts, keep)
    output = checkpoint(run, SRC, TGT, use_reentrant=False, context_fn=context)
    assert dl.last_backend() == "cpp"
    for found, plain in zip(
        torch.autograd.grad((output * weight).sum(), list(model.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    # the operators that a policy can name: W x is aten.mm, aten.addmm adds W h, and one operator does the rest
    cells = sum(isinstance(each, dl.DepthLSTMCell) for each in model.modules())
    assert calls["forward"].count(torch.ops.depthlstm_fast.gates_forward.default) == cells
    assert calls["forward"].count(ATEN.mm.default) >= cells
    assert not [operator for operator in calls["forward"] if operator._schema.is_mutable]


class Recorder(TorchDispatchMode):
    """The names of the operators that write to an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.mutating: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function._schema.is_mutable:
            self.mutating.append(str(function))
        return function(*arguments, **(options or {}))


@needs_cpp
@each_variant
def test_no_product_is_written_in_place_where_a_mode_looks_on(options: dict[str, Any]) -> None:
    model = build(**options)
    with Recorder() as recorder:
        loss = model(SRC, TGT).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert not [name for name in recorder.mutating if "mm" in name]
    for found, wanted in zip(
        gradients, torch.autograd.grad(model(SRC, TGT).square().sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each_twin
def test_gradients_of_each_sample(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dl.backends.choice, "_strict", False)  # torch.func takes the reference
    model = build(module)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], src: Tensor, tgt: Tensor) -> Tensor:
        return functional_call(model, parameters, (src[None], tgt[None])).logsumexp(-1).sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, SRC, TGT)
    for row in range(3):
        wanted = torch.autograd.grad(
            model(SRC[row : row + 1], TGT[row : row + 1]).logsumexp(-1).sum(), list(model.parameters())
        )
        for (name, _), gradient in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(found[name][row], gradient, rtol=1e-4, atol=1e-5, msg=name)


@each_twin
def test_whole_model_in_fake_mode_and_make_fx(module: Any) -> None:
    model = build(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(SRC), mode.from_tensor(TGT)).shape == (3, 5, 7)
    graph = make_fx(lambda src, tgt: model(src, tgt), tracing_mode="fake", _allow_non_fake_inputs=True)(SRC, TGT)
    torch.testing.assert_close(graph(SRC, TGT), model(SRC, TGT), rtol=1e-5, atol=1e-6)


@each_twin
def test_ids_out_of_range_are_still_told(module: Any) -> None:
    with pytest.raises(ValueError, match="src must hold ids from 0 to 8; found 108"):
        build(module)(SRC + 100, TGT)


@each_twin
@each_variant
def test_meta_device(module: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dl.backends.choice, "_strict", False)  # the shapes come from the reference
    with torch.device("meta"):
        model = build(module, **options)
        output = model(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
        assert output.is_meta
        assert output.shape == (2, 4, 7)
        output.sum().backward()
        cell = module.DepthLSTMCell(8, 8)
        with torch.autocast("cpu", torch.bfloat16):  # autocast of another device type
            h, c = cell(torch.randn(3, 8))
        assert (h.shape, c.shape, h.dtype) == ((3, 8), (3, 8), torch.float32)
        z, state = torch.empty(3, 32), torch.empty(3, 8)
        assert module.depth_lstm_gates(z, state)[0].shape == (3, 8)
        assert module.depth_lstm_cell(state, state, state, torch.empty(32, 16))[0].is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@each_twin
def test_ids_and_masks_on_meta_beside_weights_that_are_not(module: Any) -> None:
    # torch's CPU embedding and attention take them, and return uninitialised memory
    model, padding = build(module), torch.zeros(3, 6, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="tgt must be on the device of the model, cpu; found meta"):
        model(SRC, TGT.to("meta"))
    with pytest.raises(ValueError, match="src must be on the device of the model, cpu; found meta"):
        model.generate(SRC.to("meta"))
    with pytest.raises(ValueError, match="src_key_padding_mask must be on the device of its queries, cpu; found meta"):
        model.encode(SRC, padding)
    with pytest.raises(ValueError, match="src_mask must be on the device of its queries, cpu; found meta"):
        model.encoder(torch.randn(3, 6, 16), torch.zeros(6, 6, device="meta"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_folds_and_what_is_not_a_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dl.backends.choice, "_strict", False)  # torch.func takes the reference
    layer = dl.DepthLSTMEncoderLayer(16, 2, dropout=0.0, batch_first=True).eval()
    layer.fold_output_projection()
    x = torch.randn(2, 4, 16)
    parameters = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in layer.named_parameters()}
    with torch.no_grad():
        for _ in range(2):  # before the weights are folded, and after
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert layer(mode.from_tensor(x))[0].shape == x.shape
            make_fx(lambda y: layer(y)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(x)
            assert vmap(lambda p: functional_call(layer, p, (x,))[0])(parameters).shape == (2, 2, 4, 16)
            traced = torch.jit.trace(layer, (x,))
            for found, wanted in zip(layer(x), traced(x), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_backend_by_name_refuses_the_meta_device() -> None:
    with pytest.raises(ValueError, match="backend='cpp' cannot run this call"):
        dl.depth_lstm_gates(torch.empty(3, 32, device="meta"), torch.empty(3, 8, device="meta"), backend="cpp")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
@each_variant
def test_jit_trace(options: dict[str, Any], gradients: bool) -> None:
    model = build(**options, dtype=torch.float64).eval()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (SRC, TGT))
    src, tgt = torch.randint(3, 9, (2, 9)), torch.randint(3, 7, (2, 8))
    wanted, found = model(src, tgt), traced(src, tgt)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad((traced(src, tgt) * weight).sum(), list(traced.parameters())),
        torch.autograd.grad((wanted * weight).sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_default_device_and_models_that_lie_elsewhere(default: str) -> None:
    cell, x = Toolkit(), torch.randn(4, 8)
    state = (torch.randn(4, 8), torch.randn(4, 8))
    wanted = cell(x, state)
    model, src = build().eval(), SRC
    tokens = model.generate(src, 6, beam_size=2, return_scores=True)
    torch.set_default_device(default)
    try:
        assert len(dl.swap(cell).changed) == 1
        found = cell(x, state)
        again = model.generate(src, 6, beam_size=2, return_scores=True)
        logits = model(src, TGT)
    finally:
        torch.set_default_device(None)
    for a, b in zip((*found, *again, logits), (*wanted, *tokens, model(src, TGT)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Toolkit(nn.Module):
    """A cell of the shape that swap() recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.trans, self.normer, self.act, self.drop = nn.Linear(16, 32), nn.LayerNorm((4, 8)), nn.GELU(), None

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = self.normer(self.trans(torch.cat((x, h), -1)).unflatten(-1, (4, 8))).unbind(-2)
        c = f.sigmoid() * c + i.sigmoid() * self.act(g)
        return o.sigmoid() * c, c


@each_twin
def test_return_hidden(module: Any) -> None:
    model = build(module).eval()
    memory = model.encode(SRC)
    hidden = model.decode(TGT, memory, return_hidden=True)
    assert hidden.shape == (3, 5, 16)
    assert torch.equal(model.output(hidden), model.decode(TGT, memory))
    assert torch.equal(
        model(SRC, TGT, return_hidden=True), model.decode(TGT, memory, None, SRC == 0, return_hidden=True)
    )


@pytest.mark.parametrize("name", ["backends", "swap"])
def test_a_module_and_a_function_of_one_name(name: str) -> None:
    module = importlib.import_module(f"depthlstm_fast.{name}")
    function = getattr(module, name)
    assert isinstance(module, ModuleType)
    assert getattr(dl, name) is module
    assert inspect.signature(module) == inspect.signature(function)
    assert module.__doc__ == function.__doc__
    with pytest.raises(TypeError):
        module(1, 2, 3, 4)


@each_twin
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_a_stack_refuses_a_layer_of_another_kind(module: Any, kind: str) -> None:
    other = getattr(module, f"DepthLSTM{'Decoder' if kind == 'Encoder' else 'Encoder'}Layer")(16, 2)
    for layer in (nn.TransformerEncoderLayer(16, 2), other, module.DepthLSTMCell(16, 16), None):
        wanted = rf"layer must be a DepthLSTM{kind}Layer, whose forward returns \(h, c\); found {type(layer).__name__}"
        with pytest.raises(TypeError, match=wanted):
            getattr(module, f"DepthLSTM{kind}")(layer, 2)


def test_math_of_the_embedding_is_the_forwards() -> None:
    # the helper above embeds by hand, which must equal encode()
    model = build()
    embedded = model._embed(SRC, model.src_embedding, model.src_positions)
    assert torch.equal(embedded, model.src_embedding(SRC) * math.sqrt(16) + model.src_positions.table[:6])
