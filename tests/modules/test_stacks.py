"""Stacks of layers: sharing, initial cells, layouts, checkpointing, incremental decoding."""

from __future__ import annotations

import pytest
import torch
from layer_helpers import BATCH, LENGTH, MERGES, SOURCE, D, assert_same, build, normal
from torch import nn

import depthlstm_fast as dl


@pytest.mark.parametrize("share_cell", [False, True])
@pytest.mark.parametrize("init_cell", ["zeros", "learned"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stacks(share_cell: bool, init_cell: str, batch_first: bool) -> None:
    stacks = {}
    for module in (dl.reference, dl):
        encoder = module.DepthLSTMEncoder(
            build(module, "Encoder", batch_first=batch_first),
            3,
            nn.LayerNorm(D, dtype=torch.float64),
            share_cell,
            init_cell,
        )
        decoder = module.DepthLSTMDecoder(
            build(module, "Decoder", batch_first=batch_first), 2, None, share_cell, init_cell
        )
        stacks[module] = nn.ModuleList([encoder, decoder])
    if init_cell == "learned":
        for stack in stacks[dl.reference]:
            assert stack.initial_cell.shape == (D,)
            assert stack.initial_cell.eq(0).all()
            nn.init.normal_(stack.initial_cell)
    stacks[dl].load_state_dict(stacks[dl.reference].state_dict())
    shape = (BATCH, LENGTH) if batch_first else (LENGTH, BATCH)
    src, tgt, padding = normal(*shape, D), normal(*shape, D), torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2])
    cotangent = torch.randn_like(tgt)
    found = []
    for encoder, decoder in stacks.values():
        memory = encoder(src, src_key_padding_mask=padding)
        output = decoder(tgt, memory, memory_key_padding_mask=padding, tgt_is_causal=True)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        found.append([output, *torch.autograd.grad(output, [src, tgt, *parameters], cotangent)])
        cells = {id(layer.cell) for layer in encoder.layers}
        assert len(cells) == (1 if share_cell else 3)
        weights = [layer.self_attn.in_proj.weight for layer in encoder.layers]
        assert not torch.equal(weights[0], weights[1])
        h, c = src, None if encoder.initial_cell is None else encoder.initial_cell.expand_as(src)
        for layer in encoder.layers:
            h, c = layer(h, c, None, padding)
        assert_same([memory], [encoder.norm(h)])
    assert_same(*found)


def test_gradient_checkpointing() -> None:
    stack = dl.DepthLSTMEncoder(build(dl, "Encoder", dropout=0.2), 2)
    src = normal(BATCH, LENGTH, D)
    cotangent = torch.randn_like(src)
    gradients = []
    for stack.gradient_checkpointing in (False, True):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(stack(src), [src, *stack.parameters()], cotangent))
    assert_same(*gradients)


@pytest.mark.parametrize("merge", MERGES)
def test_steps_equal_the_whole(merge: str) -> None:
    decoder = dl.DepthLSTMDecoder(
        build(dl, "Decoder", merge=merge, sublayer=True), 2, nn.LayerNorm(D, dtype=torch.float64), init_cell="learned"
    ).eval()
    nn.init.normal_(decoder.initial_cell)
    tgt, memory = normal(BATCH, LENGTH, D), normal(BATCH, SOURCE, D)
    padding = torch.tensor([[False] * SOURCE, [False] * 2 + [True] * 2])
    with torch.no_grad():
        wanted = decoder(tgt, memory, memory_key_padding_mask=padding, tgt_is_causal=True)
        caches = decoder.new_caches(memory, padding)
        found = torch.cat([decoder.step(tgt[:, t : t + 1], caches) for t in range(LENGTH)], 1)
    assert_same([found], [wanted])
