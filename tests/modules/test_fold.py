"""Folding output projections into the cells that follow, for inference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_helpers import BATCH, LENGTH, D, assert_same, build, pair
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import depthlstm_fast as dl


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("Encoder", {}, ["cell"]),
        ("Encoder", {"hidden": "ffn", "sublayer": True}, ["cell"]),
        ("Decoder", {"merge": "cells"}, ["cell", "cross_cell"]),
        ("Decoder", {"merge": "concat", "hidden": "ffn"}, ["cell"]),
        ("Decoder", {"merge": "add"}, None),
    ],
    ids=str,
)
def test_fold_output_projection(kind: str, options: dict, names: list[str] | None, bias: bool) -> None:
    _, layer = pair(kind, bias=bias, **options)
    inputs = [torch.randn(BATCH, LENGTH, D, dtype=torch.float64) for _ in range(2 if kind == "Encoder" else 3)]
    wanted = layer(*inputs)
    assert dl.fold_output_projections(nn.ModuleList([layer])) == 1
    layer.eval()
    assert_same(layer(*inputs), wanted)
    assert layer._folds is None  # gradients are on
    with torch.no_grad():
        assert_same(layer(*inputs), wanted)
        assert (layer._folds and sorted(layer._folds)) == names
        if names is None:
            return
        kept = layer._folds["cell"]
        layer(*inputs)
        assert layer._folds["cell"] is kept
        for linear in (
            layer.self_attn.out_proj,
            layer.cell.gates,
            layer.cross_attn.out_proj if kind == "Decoder" else layer.self_attn.out_proj,
        ):
            linear.weight.mul_(1.5)
            found = layer(*inputs)
            layer.fold_output_projection(False)
            assert_same(found, layer(*inputs))
            layer.fold_output_projection()
        layer.load_state_dict({name: 0.5 * value for name, value in layer.state_dict().items()})
        found = layer(*inputs)
        assert layer._folds is not None
        assert copy.deepcopy(layer)._folds is None
        layer.fold_output_projection(False)
        assert_same(found, layer(*inputs))
        assert "fold" not in "".join(layer.state_dict())
        layer.fold_output_projection()
        layer.self_attn.out_proj.register_forward_hook(lambda module, args, output: 2 * output)
        if kind == "Encoder":
            found = layer(*inputs)
            layer.fold_output_projection(False)
            assert_same(found, layer(*inputs), 0)


def test_fold_under_autocast_and_inference_mode() -> None:
    layer = build(dl, "Encoder", dtype=torch.float32).eval()
    src = torch.randn(BATCH, LENGTH, D)
    with torch.inference_mode():
        wanted = layer(src)
    layer.fold_output_projection()
    with torch.inference_mode():
        assert_same(layer(src), wanted, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert (layer(src)[0] - wanted[0]).abs().max() < 0.03
            assert layer._folds["cell"].weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert_same(layer(src), wanted, 1e-5)
        assert layer._folds["cell"].weight.dtype == torch.float32


def test_fold_saves_the_projection() -> None:
    layer = build(dl, "Encoder", dtype=torch.float32).eval()
    src = torch.randn(BATCH, LENGTH, D)
    flops = []
    for enabled in (False, True):
        layer.fold_output_projection(enabled)
        with torch.no_grad():
            layer(src)
            with FlopCounterMode(display=False) as counter:
                layer(src)
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * BATCH * LENGTH * D * D


CASES: list[tuple[str, dict]] = [
    ("Encoder", {}),
    ("Encoder", {"hidden": "ffn", "sublayer": True}),
    ("Decoder", {"merge": "cells"}),
    ("Decoder", {"merge": "concat", "hidden": "ffn"}),
]


def twins(kind: str, **options: Any) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Return a folded layer, a plain one with the same parameters, and inputs."""
    _, plain = pair(kind, **options)
    folded = copy.deepcopy(plain.eval())
    folded.fold_output_projection()
    return (
        folded,
        plain,
        [torch.randn(BATCH, LENGTH, D, dtype=torch.float64) for _ in range(2 if kind == "Encoder" else 3)],
    )


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.total += output.numel() * args[-1].shape[0]
        return output


def products(layer: nn.Module, inputs: list[Tensor]) -> int:
    with Products() as counter:
        layer(*inputs)
    assert counter.total
    return counter.total


def assert_folds(
    folded: nn.Module, plain: nn.Module, inputs: list[Tensor], folds: bool, tolerance: float = 1e-10
) -> None:
    """Check that the results are the plain layer's, with fewer products if ``folds``.

    One seed serves the modes that drop.
    """
    for _ in range(2):  # the second call finds the weights of the first
        found = []
        for layer in (folded, plain):
            torch.manual_seed(5)
            found.append(layer(*inputs))
        assert_same(*found, tolerance)
    assert (products(folded, inputs) < products(plain, inputs)) == folds


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_modes_in_which_nothing_is_folded(kind: str, options: dict) -> None:
    folded, plain, inputs = twins(kind, dropout=0.5, **options)
    with torch.no_grad():
        assert_folds(folded, plain, inputs, True)
    names = [name for name, _ in plain.named_children() if name.endswith(("attn", "cell")) and name != "ffn_cell"]
    for name in names:
        for layer in (folded, plain):
            getattr(layer, name).train()
        with torch.no_grad():
            if len(names) == 2:
                assert_folds(folded, plain, inputs, False)
            else:
                assert_same(*(torch.manual_seed(5) and layer(*inputs) for layer in (folded, plain)))
        for layer in (folded, plain):
            layer.eval()
        with torch.no_grad():
            assert_folds(folded, plain, inputs, True)
    assert_folds(folded, plain, inputs, False)  # gradients are on
    cotangents = [torch.randn_like(inputs[0]) for _ in range(2)]
    assert_same(
        *(torch.autograd.grad(layer(*inputs), list(layer.parameters()), cotangents) for layer in (folded, plain))
    )
    for layer in (folded, plain):
        layer.train()
    with torch.no_grad():
        assert_folds(folded, plain, inputs, False)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_fold_follows_its_sources(kind: str, options: dict) -> None:
    """Check that the next call uses every change of a weight or a bias."""
    folded, plain, inputs = twins(kind, **options)
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]

    def step(layer: nn.Module) -> None:
        optimiser = torch.optim.SGD(layer.parameters(), 0.5)
        with torch.enable_grad():
            layer(*inputs)[0].square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    def replace(module: nn.Module, name: str) -> None:
        value = 1.5 * getattr(module, name).detach()
        delattr(module, name)
        setattr(module, name, nn.Parameter(value))

    with torch.no_grad():
        assert_folds(folded, plain, inputs, True)
        for name in linears:
            for parameter in ("weight", "bias"):
                for layer in (folded, plain):
                    getattr(layer.get_submodule(name), parameter).mul_(0.5)
                assert_folds(folded, plain, inputs, True)
                for layer in (folded, plain):
                    replace(layer.get_submodule(name), parameter)
                assert_folds(folded, plain, inputs, True)
        state = {name: 0.9 * value for name, value in plain.state_dict().items()}
        for assign in (False, True):
            for layer in (folded, plain):
                layer.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
            assert_folds(folded, plain, inputs, True)
            state = {name: 0.9 * value for name, value in state.items()}
        for layer in (folded, plain):
            step(layer)
        assert_folds(folded, plain, inputs, True)
        inputs = [x.float() for x in inputs]
        for layer in (folded, plain):
            layer.float()
        assert_folds(folded, plain, inputs, True, 1e-4)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_fold_leaves_hooks_and_replaced_modules_alone(kind: str, options: dict) -> None:
    """Check that a hook on a bypassed module runs, and sees and changes the same values as without folding."""
    folded, plain, inputs = twins(kind, **options)
    with torch.no_grad():
        assert_folds(folded, plain, inputs, True)
        names = [
            name
            for name, _ in plain.named_modules()
            if name.endswith(("attn", "out_proj", "cell", "gates", "ffn_in", "cross_cell"))
        ]
        for name in names:
            for how in ("register_forward_hook", "register_forward_pre_hook"):
                seen: list[nn.Module] = []

                def hook(module: nn.Module, *given: Any, seen: list[nn.Module] = seen, how: str = how) -> Any:
                    seen.append(module)
                    if how == "register_forward_pre_hook":
                        return None
                    output = given[1]
                    return tuple(0.5 * part for part in output) if isinstance(output, tuple) else 0.5 * output

                handles = [getattr(layer.get_submodule(name), how)(hook) for layer in (folded, plain)]
                assert_same(folded(*inputs), plain(*inputs))
                assert len(seen) == 2, (name, how)
                for handle in handles:
                    handle.remove()
                assert_folds(folded, plain, inputs, True)
        for name in (name for name in names if isinstance(plain.get_submodule(name), nn.Linear)):
            before = [layer.get_submodule(name) for layer in (folded, plain)]
            for layer, linear in zip((folded, plain), before, strict=True):
                layer.set_submodule(name, nn.Sequential(linear, nn.Tanh()))
            assert_same(folded(*inputs), plain(*inputs))
            for layer, linear in zip((folded, plain), before, strict=True):
                layer.set_submodule(name, linear)
            assert_folds(folded, plain, inputs, True)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_fold_when_autocast_changes(kind: str, options: dict) -> None:
    """Check autocast on, off and of another type from call to call: each is as accurate as without folding."""
    folded, plain, inputs = twins(kind, **options)
    exact = plain(*inputs)[0]
    inputs = [x.float() for x in inputs]
    for layer in (folded, plain):
        layer.float()
    with torch.no_grad():
        for dtype in (None, torch.bfloat16, None, torch.float16, torch.bfloat16, torch.float16, None):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                found, wanted = folded(*inputs)[0], plain(*inputs)[0]
            assert found.dtype == wanted.dtype == (dtype or torch.float32)
            error, eager = ((x.double() - exact).abs().max().item() for x in (found, wanted))
            assert error <= 2 * eager + torch.finfo(found.dtype).eps * exact.abs().max().item()


def test_fold_of_a_model_that_goes_on_training() -> None:
    """Check evaluation between training steps, as in every training loop.

    The folded model and the plain one agree throughout.
    """
    options: dict[str, Any] = {
        "d_model": 8,
        "nhead": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "merge": "cells",
    }
    plain = dl.DepthLSTMTransformer(11, 13, **options, dropout=0.0, dtype=torch.float64)
    folded = copy.deepcopy(plain)
    assert dl.fold_output_projections(folded) == 4
    src, tgt = torch.randint(3, 11, (3, 6)), torch.randint(3, 13, (3, 5))
    optimisers = [torch.optim.Adam(model.parameters(), 0.05) for model in (folded, plain)]
    for modes in (True, False, True):  # whether train() and eval() are called
        logits = []
        for model, optimiser in zip((folded, plain), optimisers, strict=True):
            model(src, tgt).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            model.train(not modes and model.training)
            with torch.no_grad():
                logits.append(model(src, tgt))
            if modes:
                model.train()
                model.eval()
        assert_same(logits[:1], logits[1:], 1e-6)


def test_fold_of_a_parameter_in_the_place_of_another() -> None:
    """Check a replaced parameter: if it was freed first, the new one may have its address and version."""
    folded, plain, inputs = twins("Encoder")
    linear = folded.self_attn.out_proj
    with torch.no_grad():
        for _ in range(20):
            values = (linear.weight.numpy() * 0.9).tolist()
            del linear.weight
            linear.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))
            plain.load_state_dict(folded.state_dict())
            assert_same(folded(*inputs), plain(*inputs))


def test_fold_when_parameter_data_changes() -> None:
    """Check parameter.data, which has its own version counter."""
    folded, plain, inputs = twins("Encoder")
    with torch.no_grad():
        assert_folds(folded, plain, inputs, True)
        for layer in (folded, plain):
            for parameter in layer.parameters():
                parameter.data.mul_(0.9)
        assert_folds(folded, plain, inputs, True)
