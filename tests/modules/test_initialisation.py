"""Models whose memory is filled after they are built.

They come from the meta device, by to_empty(), skip_init and load_state_dict(assign=True).
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.reference.models import sinusoidal_positions

SIZES: dict[str, Any] = {
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "dropout": 0.0,
    "max_len": 12,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"positions": "learned"},
    {"share_embeddings": True},
    {"tie_output": False},
    {"hidden": "ffn", "init_cell": "learned", "share_cell": True, "forget_bias": 2.0},
]
SRC, TGT = torch.randint(3, 9, (2, 5)), torch.randint(3, 9, (2, 4))

each_twin = pytest.mark.parametrize("module", [dl, dl.reference], ids=["fused", "reference"])
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=str)


def build(module: Any, **options: Any) -> nn.Module:
    return module.DepthLSTMTransformer(9, 9, **SIZES, **options)


def on_meta(module: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build(module, **options)


def poisoned(module: Any, **options: Any) -> nn.Module:
    """Return a model from the meta device whose memory is NaN, as uninitialised memory may be."""
    model = on_meta(module, **options).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    return model


def assert_tied(model: Any, tied: bool) -> None:
    assert (model.output.weight is model.tgt_embedding.weight) == tied
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


@each_twin
@each_variant
def test_reset_parameters_draws_everything(module: Any, options: dict[str, Any]) -> None:
    model = poisoned(module, **options)
    torch.manual_seed(3)
    model.reset_parameters()
    other = build(module, **options)
    torch.manual_seed(3)
    other.reset_parameters()
    for (name, found), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    assert_tied(model, options.get("tie_output", True))
    assert torch.equal(model(SRC, TGT), other(SRC, TGT))
    if options.get("forget_bias"):
        assert torch.equal(model.decoder.layers[1].cell.norm.bias[1], torch.full((16,), 2.0))


@each_twin
@each_variant
@pytest.mark.parametrize("how", ["to_empty", "assign", "skip_init", "without the output's key", "whole module"])
def test_loading_makes_it_right(module: Any, options: dict[str, Any], how: str) -> None:
    full = build(module, **options).eval()
    state = full.state_dict()
    tied = options.get("tie_output", True)
    if how == "to_empty":
        model = poisoned(module, **options)
        model.load_state_dict(state)
    elif how == "assign":
        model = on_meta(module, **options)
        model.load_state_dict(state, assign=True)
    elif how == "skip_init":
        model = nn.utils.skip_init(module.DepthLSTMTransformer, 9, 9, **SIZES, **options)
        model.load_state_dict(state)
    elif how == "without the output's key":  # files that keep a tied tensor once
        model = on_meta(module, **options)
        kept = {name: value for name, value in state.items() if name != "output.weight" or not tied}
        model.load_state_dict(kept, assign=True, strict=not tied)
    else:  # inside another module, whose load_state_dict() is not the model's
        outer = nn.ModuleDict({"model": on_meta(module, **options)})
        outer.load_state_dict({f"model.{name}": value for name, value in state.items()}, assign=True)
        model = outer["model"]
    assert_tied(model, tied)
    assert torch.equal(model.eval()(SRC, TGT), full(SRC, TGT))
    assert torch.equal(model.generate(SRC, 8), full.generate(SRC, 8))


@each_twin
def test_without_any_call_of_ours(module: Any) -> None:
    # as with a loader that knows parameters by name: tensors that the file lacks stay uninitialised
    full, model = build(module).eval(), poisoned(module).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(full.get_parameter(name))
    assert torch.equal(model(SRC, TGT), full(SRC, TGT))
    assert not list(model.buffers())


@each_twin
def test_tie_weights(module: Any) -> None:
    model = build(module)
    # the state after accelerate.init_empty_weights: two separate parameters
    model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    model.tie_weights()
    assert_tied(model, True)
    untied = build(module, tie_output=False)
    untied.tie_weights()
    assert_tied(untied, False)


@each_twin
def test_a_head_of_the_users_own_stays(module: Any) -> None:
    model = build(module)
    model.output = nn.Linear(16, 9, bias=False)
    kept = model.output.weight.detach().clone()
    model.double().float()
    model.load_state_dict(model.state_dict())
    assert_tied(model, False)
    assert torch.equal(model.output.weight, kept)
    model.output = nn.Sequential(nn.Linear(16, 9))
    model.tie_weights()
    model.reset_parameters()
    assert isinstance(model.output, nn.Sequential)


@each_twin
@pytest.mark.parametrize("kept", ["output.weight", "tgt_embedding.weight"])
@pytest.mark.parametrize("start", ["drawn", "to_empty", "meta"])
@pytest.mark.parametrize("assign", [True, False])
def test_one_name_of_the_tied_weight_is_enough(module: Any, kept: str, start: str, assign: bool) -> None:
    full = build(module).eval()
    state = {
        name: value
        for name, value in full.state_dict().items()
        if name not in {"output.weight", "tgt_embedding.weight"} - {kept}
    }
    model = {"drawn": build, "to_empty": poisoned, "meta": on_meta}[start](module)
    if start == "meta" and not assign:
        model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False, assign=assign)
    assert_tied(model, True)
    assert torch.equal(model.eval()(SRC, TGT), full(SRC, TGT))


@each_twin
@pytest.mark.parametrize("whole", [True, False])
def test_a_head_of_the_users_own_is_loaded_onto_meta(module: Any, whole: bool) -> None:
    full = build(module).eval()
    full.output = nn.Linear(16, 9, bias=False)
    model = on_meta(module) if whole else build(module)
    model.output = nn.Linear(16, 9, bias=False, device="meta")
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(model.output.weight, full.output.weight)
    assert torch.equal(model.eval()(SRC, TGT), full(SRC, TGT))


@each_twin
@pytest.mark.parametrize("move", ["double", "bfloat16", "cpu", "share_memory", "to_empty"])
def test_tables_follow_the_model(module: Any, move: str) -> None:
    model = build(module)
    moved = model.to_empty(device="cpu") if move == "to_empty" else getattr(model, move)()
    dtype = {"double": torch.float64, "bfloat16": torch.bfloat16}.get(move, torch.float32)
    for positions in (moved.src_positions, moved.tgt_positions):
        assert torch.equal(positions.table, sinusoidal_positions(12, 16).to(dtype))


@each_twin
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "inference mode", "another dtype"])
def test_tables_that_are_made_on_first_use(module: Any, way: str) -> None:
    model = on_meta(module)
    assert model.src_positions.table is None
    positions = model.src_positions
    x = torch.zeros(2, 5, 16)
    wanted = sinusoidal_positions(12, 16)
    if way == "inference mode":
        with torch.inference_mode():
            assert torch.equal(positions(x)[0], wanted[:5])
        x.requires_grad_()
        positions(x).sum().backward()
        assert x.grad is not None
    elif way == "another dtype":
        assert torch.equal(positions(x), wanted[:5].expand_as(x))
        assert positions(x.double()).dtype == torch.float64
    else:
        copied = copy.deepcopy(positions) if way == "deepcopy" else pickle.loads(pickle.dumps(positions))
        assert torch.equal(copied(x, 3)[1], wanted[3:8])


def test_tables_under_a_default_device() -> None:
    torch.set_default_device("meta")
    try:
        model = dl.DepthLSTMTransformer(9, 9, **SIZES, device="cpu")
    finally:
        torch.set_default_device(None)
    assert torch.equal(model.src_positions.table, sinusoidal_positions(12, 16))


def test_compiled_with_a_table_that_is_not_there_yet() -> None:
    model = on_meta(dl)
    model.to_empty(device="cpu").reset_parameters()
    assert model.src_positions.table is None
    compiled: Tensor = torch.compile(model, backend="eager", fullgraph=True)(SRC, TGT)
    torch.testing.assert_close(compiled, model(SRC, TGT))
