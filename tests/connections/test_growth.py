"""grow: the wiring by hand, what trains, decoding, and that the old part is left as it was."""

from __future__ import annotations

import pickle

import pytest
import torch
from connection_helpers import F64, FORMS, C, assert_close, batch, model, normal, randomise

import depthlstm_fast as dl


@pytest.mark.parametrize("form", FORMS)
def test_a_grown_model_is_two_stacks(form: str) -> None:
    translator, (src, tgt) = randomise(model(form)), batch()
    embedded, padding = translator._embed_source(src, None)
    target = translator._embed(tgt, translator.tgt_embedding, translator.tgt_positions)
    before = translator(src, tgt)
    encoder, decoder = translator.encoder, translator.decoder
    assert dl.grow(translator, 3) is translator
    randomise(translator.encoder.second), randomise(translator.decoder.second)
    new_encoder, new_decoder = translator.encoder, translator.decoder
    assert (new_encoder.second.num_layers, new_decoder.second.num_layers) == (3, 3)
    h1 = encoder(embedded, src_key_padding_mask=padding)
    h2 = new_encoder.second(new_encoder.norm(embedded) + h1, src_key_padding_mask=padding)
    options = {"tgt_is_causal": True, "memory_key_padding_mask": padding}
    s1 = decoder(target, h1, **options)
    assert torch.equal(translator.output(s1), before)  # the frozen part sees what it saw
    s2 = new_decoder.second(new_decoder.norm(target) + s1, h2, **options)
    assert_close(translator(src, tgt), translator.output(s2))
    for beams in (1, 3):
        found, scores = translator.generate(src, 5, beams, return_scores=True)
        tokens, wanted = translator.generate(src, 5, beams, use_cache=False, return_scores=True)
        assert torch.equal(found, tokens)
        assert_close(scores, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copy", [True, False])
def test_an_encoder_grows_on_its_own(form: str, copy: bool) -> None:
    encoder = randomise(dl.Encoder(C, 2, 2, dropout=0.0, batch_first=True, connection=FORMS[form], dtype=F64)).eval()
    x, padding = normal(3, 5, C), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    h1 = encoder(x, src_key_padding_mask=padding)
    grown = dl.grow(encoder, 3, copy=copy)
    assert grown.first is encoder
    assert not grown.training
    trained = {name for name, parameter in grown.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in grown.named_parameters() if not name.startswith("first.")}
    for name, parameter in grown.second.layers[2].named_parameters():
        assert torch.equal(parameter, encoder.layers[1].get_parameter(name)) == copy, name
    randomise(grown.second), randomise(grown.norm)
    wanted = grown.second(grown.norm(x) + h1, src_key_padding_mask=padding)
    assert_close(grown(x, src_key_padding_mask=padding), wanted)
    assert_close(pickle.loads(pickle.dumps(grown))(x, src_key_padding_mask=padding), wanted)


@pytest.mark.parametrize("freeze", [True, False])
def test_what_trains(freeze: bool) -> None:
    translator = dl.grow(model("pre-norm"), 1, freeze)
    new = ("encoder.second.", "encoder.norm.", "decoder.second.", "decoder.norm.")
    for name, parameter in translator.named_parameters():
        assert parameter.requires_grad == (name.startswith(new) or not freeze), name
    old = {name: p.clone() for name, p in translator.named_parameters() if not name.startswith(new)}
    optimiser = torch.optim.AdamW(dl.param_groups(translator), lr=0.01)
    translator(*batch()).square().mean().backward()
    optimiser.step()
    changed = [name for name, p in translator.named_parameters() if name in old and not torch.equal(p, old[name])]
    assert bool(changed) != freeze


def test_the_new_stacks_are_of_the_old_ones_kind() -> None:
    translator = dl.grow(
        model("dlcl", decoder_attention="merged", dropout=0.3, bias=False, activation="relu").eval(), 2
    )
    second = translator.decoder.second
    assert (second.attention, second.layers[0].dropout, second.layers[0].activation) == ("merged", 0.3, "relu")
    assert second.connection.branches_per_layer == 2
    assert second.layers[0].linear1.bias is None
    assert not second.training
    translator.encoder.gradient_checkpointing = True
    assert translator.encoder.first.gradient_checkpointing
    assert translator.encoder.second.gradient_checkpointing
    assert set(dl.probe_gradients(translator.requires_grad_(), batch())) == {
        "encoder.first", "encoder.second", "decoder.first", "decoder.second",
    }  # fmt: skip
    sentences = batch()
    assert torch.equal(pickle.loads(pickle.dumps(translator))(*sentences), translator(*sentences))
    translator.reset_parameters()


@pytest.mark.parametrize("form", ["pre-norm", "depth-lstm", "dlcl"])
@pytest.mark.parametrize("layers", [1, 3])
def test_new_layers_may_be_copies_of_the_top_ones(form: str, layers: int) -> None:
    translator = dl.grow(randomise(model(form)), layers, freeze=False, copy=True)
    sources = {1: [1], 3: [1, 0, 1]}[layers]
    for grown in (translator.encoder, translator.decoder):
        first, second = grown.first, grown.second
        pairs = [(first.layers[old], second.layers[new]) for new, old in enumerate(sources)]
        size = first.branches_per_layer
        held = {"pre-norm": "read_norms", "depth-lstm": "cells", "dlcl": "branch_norms"}[form]
        theirs, ours = getattr(first.connection, held), getattr(second.connection, held)
        for new, old in enumerate(sources):
            pairs += [(theirs[old * size + k], ours[new * size + k]) for k in range(size)]
        for old_module, new_module in pairs:
            for a, b in zip(old_module.parameters(), new_module.parameters(), strict=True):
                assert torch.equal(a, b)
                assert a is not b
    assert translator(*batch()).isfinite().all()


def test_what_cannot_be_grown() -> None:
    lstm = dl.DepthLSTMTransformer(11, 13, C, 2, 1, 1)
    for one in (dl.Decoder(C, 2, 1), lstm, dl.grow(dl.Encoder(C, 2, 1), 1)):
        found = type(one).__name__
        with pytest.raises(TypeError, match=f"model must be a Transformer or an Encoder; found {found}"):
            dl.grow(one, 1)
    with pytest.raises(ValueError, match='model must have memory="top"'):
        dl.grow(model(memory="transparent"), 1)
    with pytest.raises(ValueError, match="model must not have been grown before; found a GrownEncoder"):
        dl.grow(dl.grow(model(), 1), 1)
    with pytest.raises(ValueError, match="layers must be at least 1; found 0"):
        dl.grow(model(), 0)
