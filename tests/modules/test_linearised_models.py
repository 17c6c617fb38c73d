"""Models with a linear layer: decoding, saving, checkpointing, tuning; and the given model is left alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from connection_helpers import assert_close, batch, model, randomise
from linearisation_helpers import KEEPING, many, translator
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.connections import DepthLSTM


def decodes_the_same(found: Any) -> None:
    src, _ = batch()
    for beams in (1, 3):
        tokens, scores = found.generate(src, 6, beams, return_scores=True)
        wanted, their_scores = found.generate(src, 6, beams, use_cache=False, return_scores=True)
        assert torch.equal(tokens, wanted)
        assert_close(scores, their_scores)


@pytest.mark.parametrize("scope", ["layer", "cell"])
@pytest.mark.parametrize(
    ("form", "drop"),
    [(form, False) for form in KEEPING] + [("pre-norm", True), ("depth-lstm", True), ("siamese", True)],
)
def test_decoding_with_caches(form: str, scope: str, drop: bool) -> None:
    found = randomise(model(form))
    first = dl.linearise(found, many(), 0, scope, stack="decoder", drop=drop)
    decodes_the_same(first.model)
    assert not torch.equal(first.model(*batch()), found(*batch()))
    # another layer of the result
    decodes_the_same(dl.linearise(first.model, many(), 1, scope, stack="decoder", drop=drop).model)
    decodes_the_same(dl.linearise(found, many(), 1, scope, drop=drop).model)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("options", [{}, {"merge": "concat"}, {"merge": "cells"}, {"sublayer": True, "hidden": "ffn"}])
@pytest.mark.parametrize("module", [dl, dl.reference])
def test_decoding_of_depth_lstm_layers_with_caches(module: Any, options: dict[str, Any], drop: bool) -> None:
    found = translator(module, **options)
    for scope in ("layer", "cell"):
        first = dl.linearise(found, many(), 0, scope, stack="decoder", drop=drop)
        decodes_the_same(first.model)
        both = dl.linearise(first.model, many(), 1, scope, drop=drop)
        decodes_the_same(both.model)
        dl.fold_output_projections(both.model)
        decodes_the_same(both.model)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_attention": "merged"},
        {"memory": "transparent"},
        {"memory": "multiscale"},
        {"connection": DepthLSTM, "feed_forward": True, "decoder_attention": "separate"},
    ],
)
def test_other_decoders(options: dict[str, Any]) -> None:
    found = randomise(model("pre-norm", **options))
    for stack in ("encoder", "decoder"):
        for scope in ("layer", "cell"):
            decodes_the_same(dl.linearise(found, many(), 1, scope, stack=stack).model)


def test_a_grown_model() -> None:
    found, batches = randomise(dl.grow(model("pre-norm"), 1)), many()
    for stack in ("encoder.first", "encoder.second", "decoder.first", "decoder.second"):
        made = dl.linearise(found, batches, 0, stack=stack)
        seen = [src if stack.startswith("encoder") else tgt[:, 1:] for src, tgt in batches]
        assert made.tokens == sum(int((each != 0).sum()) for each in seen)
        decodes_the_same(made.model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["depth-lstm layers", "depth-lstm", "pre-norm"])
def test_the_given_model_is_left_alone(kind: str, training: bool) -> None:
    found = (translator() if kind == "depth-lstm layers" else model(kind, dropout=0.1)).train(training)
    found.encoder.layers[0].eval()  # a mode of its own
    found.tgt_embedding.weight.requires_grad_(False)
    modes = {name: each.training for name, each in found.named_modules()}
    before, generator = copy.deepcopy(found.state_dict()), torch.get_rng_state()
    for options in ({}, {"scope": "cell"}, {"drop": True}, {"tune": 2}):
        made = dl.linearise(found, many(), 1, **{"stack": "decoder", **options})
        assert {name: each.training for name, each in found.named_modules()} == modes
        assert made.model.training == training
        assert not made.model.encoder.layers[0].training
        assert made.model.decoder.layers[1].training == training
        assert all(each.training == training for each in made.model.decoder.modules())
        assert made.model.output.weight is made.model.tgt_embedding.weight
        frozen = [name for name, p in made.model.named_parameters() if not p.requires_grad]
        assert frozen == ["tgt_embedding.weight"]
        assert all(p.grad is None for p in (*found.parameters(), *made.model.parameters()))
        shared = {id(p) for p in found.parameters()} & {id(p) for p in made.model.parameters()}
        assert not shared
    assert torch.equal(torch.get_rng_state(), generator)
    assert before.keys() == found.state_dict().keys()
    assert all(torch.equal(each, found.state_dict()[name]) for name, each in before.items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in found.modules())


@pytest.mark.parametrize("scope", ["layer", "cell"])
@pytest.mark.parametrize("kind", ["depth-lstm layers", "depth-lstm", "pre-norm", "siamese"])
def test_saving_checkpointing_and_training(kind: str, scope: str) -> None:
    found = translator(dropout=0.0) if kind == "depth-lstm layers" else randomise(model(kind))
    src, tgt = batch()
    for stack in ("encoder", "decoder"):
        made = dl.linearise(found, many(), 1, scope, stack=stack).model
        other = dl.linearise(found, many(seed=1), 1, scope, stack=stack).model
        assert not torch.equal(other(src, tgt), made(src, tgt))
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(src, tgt), made(src, tgt))
        assert torch.equal(pickle.loads(pickle.dumps(made))(src, tgt), made(src, tgt))
        gradients = []
        for checkpointed in (False, True):
            made.train().zero_grad()
            made.encoder.gradient_checkpointing = made.decoder.gradient_checkpointing = checkpointed
            made(src, tgt).square().mean().backward()
            used = [p for p in made.parameters() if p.grad is not None]
            gradients.append([p.grad.clone() for p in used])
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b)
        assert sum(p.grad is not None for n, p in made.named_parameters() if ".map.linear." in n) == 2
        made.reset_parameters()
        assert not torch.equal(other(src, tgt), made.eval()(src, tgt))


def divergence(found: Any, made: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    total, tokens = 0.0, 0
    for src, tgt in batches:
        p, q = (each(src, tgt[:, :-1]).log_softmax(-1)[tgt[:, 1:] != 0] for each in (found, made))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(p)
    return total / tokens


@pytest.mark.parametrize("scope", ["layer", "cell"])
@pytest.mark.parametrize("kind", ["depth-lstm layers", "pre-norm"])
def test_tuning_lowers_the_divergence_and_moves_the_map_alone(kind: str, scope: str) -> None:
    found = translator() if kind == "depth-lstm layers" else randomise(model(kind)).eval()
    batches = many()
    fitted = dl.linearise(found, batches, 1, scope)
    tuned = dl.linearise(found, batches, 1, scope, tune=60, learning_rate=1e-3)
    assert len(tuned.kl) == 60
    with torch.no_grad():
        assert tuned.kl[0] == pytest.approx(divergence(found, fitted.model, batches[:1]), rel=1e-5)
        assert divergence(found, tuned.model, batches) < 0.9 * divergence(found, fitted.model, batches)
    theirs = dict(fitted.model.named_parameters())
    for name, parameter in tuned.model.named_parameters():
        assert torch.equal(parameter, theirs[name]) != (".map." in name), name
    # R^2 is that of the tuned map, and no map has a higher one than the fitted; nobody reads the last layer's c
    (found_r2,), (best,) = tuned.r2.values(), fitted.r2.values()
    assert found_r2[0] < best[0]
    assert found_r2[1:] == best[1:]
