"""What a decoder attends to: transparent and multiscale memories, merged attention."""

from __future__ import annotations

import pytest
import torch
from connection_helpers import F64, NAMES, C, assert_close, batch, model, normal, randomise
from torch import nn

import depthlstm_fast as dl
from depthlstm_fast.reference import CrossAttention, MergedAttention, MultiscaleAttention

KINDS = [
    {"memory": "transparent"},
    {"memory": "transparent", "num_decoder_layers": 3},
    {"memory": "multiscale"},
    {"memory": "multiscale", "fusion": "scalar"},
    {"decoder_attention": "merged"},
    {"decoder_attention": "merged", "memory": "transparent"},
    {"decoder_attention": "add"},
]


@pytest.mark.parametrize("connection", ["post-norm", "depth-lstm", "attention-residuals"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_decoding_with_a_cache_is_that_without(options: dict, connection: str) -> None:
    translator, (src, tgt) = randomise(model(connection, **options)), batch()
    for beams in (1, 3):
        found, scores = translator.generate(src, 5, beams, return_scores=True)
        tokens, wanted = translator.generate(src, 5, beams, use_cache=False, return_scores=True)
        assert torch.equal(found, tokens)
        assert_close(scores, wanted)
    loss = translator(src, tgt).square().mean()
    gradients = torch.autograd.grad(loss, list(translator.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_checkpointing_and_files(options: dict) -> None:
    translator, (src, tgt) = randomise(model(**options)), batch()
    wanted = torch.autograd.grad(translator(src, tgt).square().mean(), list(translator.parameters()))
    second = model(**options)
    second.load_state_dict(translator.state_dict())
    second.encoder.gradient_checkpointing = second.decoder.gradient_checkpointing = True
    found = torch.autograd.grad(second(src, tgt).square().mean(), list(second.parameters()))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", NAMES)
def test_transparent_memories_are_softmax_mixtures_of_all_layers(name: str) -> None:
    translator, (src, _) = model(name, memory="transparent", num_decoder_layers=3), batch()
    outputs = torch.stack(translator.encoder.layer_outputs(translator._embed_source(src, None)[0], None, src == 0))
    assert outputs.shape[0] == 3
    found = translator.encode(src)
    assert_close(torch.stack(found), outputs.mean(0).expand(3, *outputs.shape[1:]))  # zero weights: the mean
    randomise(translator.memories, 1.0)
    shares = translator.memories.weights.softmax(1)
    assert_close(torch.stack(translator.encode(src)), torch.einsum("jk,k...->j...", shares, outputs))
    assert_close(outputs[-1], translator.encoder(translator._embed_source(src, None)[0], None, src == 0))


def test_a_multiscale_memory_is_a_gru_over_depth() -> None:
    memory = randomise(dl.memories.MultiscaleMemory(C, 2).double())
    outputs = [normal(2, 3, C) for _ in range(3)]
    context = outputs[0].flatten(0, 1)
    for cell, output in zip(memory.cells, outputs[1:], strict=True):
        twin = nn.GRUCell(C, C, dtype=F64)
        twin.load_state_dict(
            {
                "weight_ih": cell.input_proj.weight,
                "weight_hh": cell.state_proj.weight,
                "bias_ih": cell.input_proj.bias,
                "bias_hh": cell.state_proj.bias,
            }
        )
        context = twin(output.flatten(0, 1), context)
    *layers, found = memory(outputs)
    assert all(map(torch.equal, layers, outputs[1:]))
    assert_close(found, context.view(2, 3, C))


@pytest.mark.parametrize("fusion", ["gate", "scalar"])
def test_multiscale_attention_mixes_two_attentions(fusion: str) -> None:
    attention = randomise(MultiscaleAttention(C, 2, fusion=fusion, dtype=F64))
    x, memory, context = normal(2, 3, C), normal(2, 4, C), normal(2, 4, C)
    plain = CrossAttention(C, 2, dtype=F64)
    plain.load_state_dict({name: attention.state_dict()[name] for name in plain.state_dict()})
    top, other = plain(x, memory), attention.context_attn(x, context)
    if fusion == "gate":
        share = 1 / (1 + torch.exp(-(torch.cat((top, other), -1) @ attention.gate.weight.T + attention.gate.bias)))
    else:
        share = 1 / (1 + torch.exp(-attention.gate))
    assert_close(attention(x, memory, context=context), share * other + (1 - share) * top)


def test_only_the_top_layer_sees_the_context() -> None:
    translator = model(memory="multiscale")
    kinds = [type(layer.cross_attn) for layer in translator.decoder.layers]
    assert kinds == [CrossAttention, MultiscaleAttention]
    memories = tuple(normal(3, 6, C) for _ in range(3))
    tgt = normal(3, 5, C)
    whole = translator.decoder(tgt, memories, tgt_is_causal=True)
    for index in range(3):  # each of them matters
        changed = [*memories]
        changed[index] = normal(3, 6, C)
        assert not torch.equal(translator.decoder(tgt, tuple(changed), tgt_is_causal=True), whole)


def test_merged_attention_is_cross_attention_and_a_causal_mean() -> None:
    attention = randomise(MergedAttention(C, 2, dtype=F64))
    plain = CrossAttention(C, 2, dtype=F64)
    plain.load_state_dict(attention.state_dict())
    x, memory = normal(2, 4, C), normal(2, 3, C)
    values = x @ attention.kv_proj.weight[C:].T + attention.kv_proj.bias[C:]
    mean = torch.ones(4, 4, dtype=F64).tril() / torch.arange(1, 5)[:, None]
    wanted = attention.out_proj(plain.context(x, memory) + mean @ values)
    assert_close(attention(x, memory), wanted)
    keep = torch.tensor([[False, True, True, False], [True] * 4])
    shares = torch.ones(4, 4, dtype=F64).tril() * keep[:, None, :]
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1)
    wanted = attention.out_proj(plain.context(x, memory) + shares @ values)
    assert_close(attention(x, memory, keep=keep), wanted)


def test_merged_attention_calls_an_adapted_projection() -> None:
    attention = randomise(MergedAttention(C, 2, dtype=F64))
    x, memory = normal(2, 4, C), normal(2, 3, C)
    wanted = attention(x, memory)
    calls: list[int] = []
    attention.kv_proj.register_forward_hook(lambda *_: calls.append(1))
    assert_close(attention(x, memory), wanted)
    assert len(calls) == 2


def test_merged_decoders_have_one_attention_and_take_no_mask() -> None:
    decoder = dl.Decoder(C, 2, 2, batch_first=True, connection="pre-norm", decoder_attention="merged", dtype=F64)
    assert not hasattr(decoder.layers[0], "self_attn")
    assert decoder.connection.num_branches == 4
    tgt, memory = normal(2, 4, C), normal(2, 3, C)
    assert decoder(tgt, memory).shape == tgt.shape
    with pytest.raises(ValueError, match='tgt_mask must be None with decoder_attention="merged"'):
        decoder(tgt, memory, torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="tgt_key_padding_mask must be bool with decoder_attention"):
        decoder(tgt, memory, tgt_key_padding_mask=torch.zeros(2, 4, dtype=F64))
    with pytest.raises(TypeError, match="cache must be a MergedCache"):
        decoder.step(tgt[:, :1], [dl.reference.DecoderCache(memory), dl.reference.DecoderCache(memory)])


def test_merged_decoders_average_no_padding() -> None:
    options = {"batch_first": True, "connection": "pre-norm", "decoder_attention": "merged", "dropout": 0.0}
    decoder = randomise(dl.Decoder(C, 2, 2, dtype=F64, **options))
    tgt, memory = normal(2, 5, C), normal(2, 3, C)
    padding = torch.tensor([[True, True, False, False, False]] * 2)  # on the left
    found = decoder(tgt, memory, tgt_key_padding_mask=padding)
    assert_close(found[:, 2:], decoder(tgt[:, 2:], memory))


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="num_decoder_layers must equal num_encoder_layers, 2, with memory"):
        model(memory="multiscale", num_decoder_layers=3)
    with pytest.raises(ValueError, match='decoder_attention must not be "merged" with a second memory'):
        model(memory="multiscale", decoder_attention="merged")
    with pytest.raises(ValueError, match="memory must be one of 'top', 'transparent', 'multiscale'; found 'all'"):
        model(memory="all")
    with pytest.raises(ValueError, match="fusion must be one of 'gate', 'scalar'"):
        model(memory="multiscale", fusion="sum")


def test_mixing_weights_do_not_decay() -> None:
    translator = model(memory="transparent")
    _, kept = dl.param_groups(translator)
    assert any(parameter is translator.memories.weights for parameter in kept["params"])
