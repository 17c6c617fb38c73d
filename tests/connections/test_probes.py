"""probe_gradients: against gradients that are taken by hand; what it leaves alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from connection_helpers import F64, FORMS, C, batch, model, normal, randomise
from torch import nn

import depthlstm_fast as dl


def test_gradients_and_gains_of_pre_norm_by_hand() -> None:
    encoder = randomise(dl.Encoder(C, 2, 3, dropout=0.0, dtype=F64, connection="pre-norm", batch_first=True))
    src = normal(2, 4, C)
    streams, x = [src], src
    for index, layer in enumerate(encoder.layers):
        norms = encoder.connection.read_norms
        x = x + layer.self_attn(norms[2 * index](x))
        x = x + layer.feed_forward(norms[2 * index + 1](x), {})
        streams.append(x)
    output = encoder.connection.final_norm(x)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).double()
    wanted = [float(each.norm()) for each in torch.autograd.grad((output * direction).sum(), streams[1:])]
    (probe,) = dl.probe_gradients(encoder, (src,)).values()
    assert probe.gradients == pytest.approx(wanted)
    assert probe.ratio == pytest.approx(wanted[0] / wanted[-1])
    sizes = [float(each.detach().square().mean().sqrt()) for each in streams]
    assert probe.gains == pytest.approx([after / before for before, after in itertools.pairwise(sizes)])


def test_only_the_outputs_that_a_layer_made_count_as_its_own() -> None:
    encoder = randomise(dl.Encoder(C, 2, 2, dropout=0.0, dtype=F64, connection="attention-residuals"))
    src, connection = normal(4, 1, C), encoder.connection
    sources = [src]
    for i in range(4):
        layer, u = encoder.layers[i // 2], connection.read(tuple(sources), i)
        sources.append(layer.feed_forward(u, {}) if i % 2 else layer.self_attn(u.transpose(0, 1)).transpose(0, 1))
    output = connection.finish(tuple(sources))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).double()
    found = torch.autograd.grad((output * direction).sum(), sources[1:])
    wanted = [float(torch.stack(found[k : k + 2]).norm()) for k in (0, 2)]
    assert dl.probe_gradients(encoder, (src,))[""].gradients == pytest.approx(wanted)


@pytest.mark.parametrize("form", FORMS)
def test_every_connection_can_be_probed(form: str) -> None:
    translator, sentences = model(form, num_encoder_layers=3), batch()
    if form == "rezero":  # no gradient enters a branch at the start, and so none reaches the encoder
        randomise(translator)
    probes = dl.probe_gradients(translator, sentences)
    assert {name: len(probe.gradients) for name, probe in probes.items()} == {"encoder": 3, "decoder": 2}
    for probe in probes.values():
        assert all(math.isfinite(value) and value > 0 for value in (*probe.gradients, *probe.gains, probe.ratio))
    assert all(parameter.grad is None for parameter in translator.parameters())
    assert all("_layer" not in stack.__dict__ for stack in (translator.encoder, translator.decoder))


def test_checkpointing_and_frozen_parameters_change_nothing() -> None:
    translator, sentences = model("dlcl"), batch()
    wanted = dl.probe_gradients(translator, sentences)
    translator.encoder.gradient_checkpointing = translator.decoder.gradient_checkpointing = True
    with torch.no_grad():
        assert dl.probe_gradients(translator, sentences) == wanted


def test_the_depth_wise_lstms_own_stacks_can_be_probed() -> None:
    translator = dl.DepthLSTMTransformer(11, 13, C, 2, 3, 2, dropout=0.0, dtype=F64)
    new = dl.Transformer(11, 13, C, 2, 3, 2, dropout=0.0, dtype=F64)
    new.load_state_dict(translator.state_dict())
    sentences = batch()
    found, wanted = dl.probe_gradients(translator, sentences), dl.probe_gradients(new, sentences)
    for name in ("encoder", "decoder"):
        assert found[name].gradients == pytest.approx(wanted[name].gradients)
        assert found[name].gains[1:] == pytest.approx(wanted[name].gains[1:])


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="batch must be a tuple of the model's arguments; found Tensor"):
        dl.probe_gradients(dl.Encoder(C, 2, 1), torch.randn(2, 1, C))
    with pytest.raises(ValueError, match="model must hold an Encoder or a Decoder; found none"):
        dl.probe_gradients(nn.Linear(2, 2), (torch.randn(2, 2),))
