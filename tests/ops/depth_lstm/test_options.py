"""Every option of a constructor takes effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_helpers import BATCH, LENGTH, D, assert_same, build
from torch import nn

import depthlstm_fast as dl

MODULES = [dl, dl.reference]
OPTIONS: dict[str, Any] = {
    "hidden": "ffn",
    "dim_feedforward": 20,
    "norm": "joint",
    "activation": "silu",
    "layer_norm_eps": 0.5,
    "dropout": 0.25,
    "forget_bias": 2.0,
    "init": "glorot",
    "sublayer": True,
    "bias": False,
}
SMALL: dict[str, Any] = {
    "src_vocab": 50,
    "tgt_vocab": 60,
    "d_model": 8,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}


def check_parts(module: nn.Module, cells: int, attentions: int) -> None:
    found = [part for part in module.modules() if isinstance(part, dl.reference.DepthLSTMCell)]
    assert len(found) == cells
    for cell in found:
        assert (cell.hidden, cell.ffn_size, cell.norm_kind, cell.activation) == ("ffn", 20, "joint", "silu")
        assert (cell.eps, cell.ffn_norm.eps, cell.dropout, cell.init) == (0.5, 0.5, 0.25, "glorot")
        assert cell.norm.bias[1].eq(2).all()
        assert not cell.norm.bias[[0, 2]].any()
    found = [
        part for part in module.modules() if isinstance(part, (dl.reference.SelfAttention, dl.reference.CrossAttention))
    ]
    assert len(found) == attentions
    assert all((attention.dropout, attention.init) == (0.25, "glorot") for attention in found)
    assert all(part.bias is None for part in module.modules() if isinstance(part, nn.Linear))


@pytest.mark.parametrize("module", MODULES)
def test_options_reach_every_part(module: Any) -> None:
    check_parts(build(module, "Encoder", **OPTIONS), 2, 1)
    decoder = build(module, "Decoder", **OPTIONS, merge="cells")
    check_parts(decoder, 3, 2)
    assert (decoder.linear1.out_features, decoder.activation, decoder.dropout) == (20, "silu", 0.25)
    model = module.DepthLSTMTransformer(**SMALL, **OPTIONS, merge="cells")
    check_parts(model, 10, 6)
    assert [stack.norm.eps for stack in (model.encoder, model.decoder)] == [0.5, 0.5]
    assert model.input_dropout.p == 0.25


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_sublayer_by_hand(kind: str, module: Any) -> None:
    layer = build(module, kind, sublayer=True, activation="silu", dim_feedforward=20)
    src, memory = (torch.randn(BATCH, LENGTH, D, dtype=torch.float64) for _ in range(2))
    s = layer.self_attn(src)
    h, c = layer.cell(s if kind == "Encoder" else s + layer.cross_attn(s, memory), (src, torch.zeros_like(src)))
    wanted = layer.ffn_cell(layer.linear2(nn.functional.silu(layer.linear1(h))), (h, c))
    assert_same(layer(src) if kind == "Encoder" else layer(src, memory), wanted)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("merge", ["add", "concat", "cells"])
def test_causal_hints_each_for_its_own_attention(merge: str, module: Any) -> None:
    layer = build(module, "Decoder", merge=merge)
    decoder = module.DepthLSTMDecoder(layer, 1)
    tgt, memory = (torch.randn(BATCH, LENGTH, D, dtype=torch.float64) for _ in range(2))
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    outputs = []
    for hints, masks in (
        ({"tgt_is_causal": True}, {"tgt_mask": causal}),
        ({"memory_is_causal": True}, {"memory_mask": causal}),
        ({}, {}),
    ):
        outputs.append(layer(tgt, memory, **hints)[0])
        assert_same(layer(tgt, memory, **hints), layer(tgt, memory, **masks))
        assert_same([decoder(tgt, memory, **hints)], [decoder(tgt, memory, **masks)])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


@pytest.mark.parametrize("module", MODULES)
def test_every_cell_is_shared(module: Any) -> None:
    stacks = [
        module.DepthLSTMEncoder(build(module, "Encoder", sublayer=True), 3, share_cell=True),
        module.DepthLSTMDecoder(build(module, "Decoder", sublayer=True, merge="cells"), 3, share_cell=True),
    ]
    for stack, names in zip(stacks, (["cell", "ffn_cell"], ["cell", "cross_cell", "ffn_cell"]), strict=True):
        for name in names:
            assert len({id(getattr(layer, name)) for layer in stack.layers}) == 1, name
        assert len({id(getattr(stack.layers[0], name)) for name in names}) == len(names)
        assert (
            len({id(layer.self_attn) for layer in stack.layers})
            == len({id(layer.linear1) for layer in stack.layers})
            == 3
        )


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("init", ["lipschitz", "glorot"])
def test_tables_of_a_model(init: str, module: Any) -> None:
    """Check how embeddings, learned positions and an untied output are drawn.

    They come from U(+-sqrt((2 or 6) / (rows + D))), and are drawn anew.
    """
    model = module.DepthLSTMTransformer(
        **SMALL, init=init, positions="learned", max_len=70, tie_output=False, init_cell="learned"
    )
    tables = [model.src_embedding, model.tgt_embedding, model.output, model.src_positions, model.tgt_positions]
    cells = [model.encoder.initial_cell, model.decoder.initial_cell]
    with torch.no_grad():
        for cell in cells:
            assert not cell.any()
            cell.fill_(1)
    before = [table.weight.clone() for table in tables]
    for again in (False, True):
        if again:
            model.reset_parameters()
            assert not any(cell.any() for cell in cells)
            assert not any(torch.equal(table.weight, old) for table, old in zip(tables, before, strict=True))
        for table in tables:
            bound = ((2 if init == "lipschitz" else 6) / sum(table.weight.shape)) ** 0.5
            assert 0.95 * bound < table.weight.abs().max() <= bound
