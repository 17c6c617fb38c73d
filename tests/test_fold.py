"""Folding output projections into the cells that follow, for inference."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_helpers import BATCH, LENGTH, D, assert_same, build, pair
from torch import nn
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
