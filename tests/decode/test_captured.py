"""Captured decoding rehearsed without a GPU: the steps run as they are, where a GPU would repeat them from a graph.

A graph repeats the same operators on the same memory. The tests hold the tokens against `generate()` in PyTorch, and
that every step makes the same calls.
"""

from __future__ import annotations

import copy

import pytest
import torch
from decode_helpers import sharpen

import depthlstm_fast as dl
from depthlstm_fast.decode import captured
from depthlstm_fast.decode.captured import CapturedDecoder

V = 37


def prepare(make):
    """A model whose random weights say different tokens; in float64, where no two logits are as close as rounding."""
    torch.manual_seed(3)
    model = make()
    sharpen(model)
    return model.eval().double()


def translator(**options):
    return prepare(lambda: dl.DepthLSTMTransformer(V, V, 16, 2, 2, 2, max_len=80, tie_output=False, **options))


def sources(batch=3, length=7):
    torch.manual_seed(5)
    ids = torch.randint(3, V, (batch, length))
    ids[1:, length - 2 :] = 0
    return ids


def same(found, wanted):
    assert torch.equal(found[0], wanted[0])
    assert torch.allclose(found[1], wanted[1], rtol=1e-6)
    assert wanted[0].unique().numel() >= 3, "one token said over and over tests nothing"


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge": "concat"},
        {"merge": "cells", "hidden": "ffn"},
        {"sublayer": True, "share_cell": True},
        {"positions": "learned"},
    ],
    ids=str,
)
def test_tokens_of_the_paper_s_model(options, beams):
    model = translator(**options)
    served = CapturedDecoder(model)
    for length, most in ((7, 30), (4, 30), (17, 70)):  # shorter and longer than what a step has kept before
        ids = sources(length=length)
        given = {"max_length": most, "beam_size": beams, "return_scores": True}
        same(served.generate(ids, **given), model.generate(ids, **given))
    assert len(served._steps) == 2


@pytest.mark.parametrize("memory", ["top", "transparent"])
@pytest.mark.parametrize("name", dl.connections.names())
def test_tokens_of_every_connection(name, memory):
    model = prepare(
        lambda: dl.Transformer(V, V, 16, 2, 2, 2, max_len=40, connection=name, memory=memory, tie_output=False)
    )
    ids = sources()
    given = {"max_length": 20, "beam_size": 3, "return_scores": True}
    same(CapturedDecoder(model).generate(ids, **given), model.generate(ids, **given))


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"temperature": 1.0, "top_k": 9}], ids=str)
@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_tokens_of_a_language_model(positions, options):
    fixed = {"positions": positions, "ffn": "swiglu", "max_len": 90, "tie_output": False, "eos_id": None}
    model = prepare(lambda: dl.LanguageModel(V, 16, 4, 2, kv_heads=2, **fixed))
    served = CapturedDecoder(model)
    for length, padded in ((9, 4), (5, 0), (1, 0)):
        torch.manual_seed(length)
        ids = torch.randint(3, V, (2, length))
        mask = torch.ones_like(ids)
        mask[1, :padded] = 0

        def run(decoder, ids=ids, mask=mask):
            drawn = {"generator": torch.Generator().manual_seed(7)} if "temperature" in options else {}
            return decoder.generate(ids, 40, attention_mask=mask, return_scores=True, **options, **drawn)

        same(run(served), run(model))
    assert len(served._steps) == 1


def test_a_float_mask_and_hidden_positions():
    model, ids = translator(), sources()
    mask = torch.zeros(ids.shape, dtype=torch.float64)
    mask[:, 1], mask[:, 2] = -torch.inf, -1.5
    given = {"max_length": 20, "src_key_padding_mask": mask, "return_scores": True}
    served = CapturedDecoder(model)
    same(served.generate(ids, **given), model.generate(ids, **given))
    del given["src_key_padding_mask"]
    same(served.generate(ids, **given), model.generate(ids, **given))


@pytest.mark.parametrize("kind", ["translation", "language"])
def test_every_step_makes_the_same_calls(kind, monkeypatch):
    """What a graph has recorded at one place must be right at every other; and nothing may wait for the device."""
    steps = []

    def capture(run, device):
        def replay():
            with torch.profiler.profile(record_shapes=True) as profile:
                run()
            steps.append([(event.name, str(event.input_shapes)) for event in profile.events()])

        return replay

    monkeypatch.setattr(captured, "capture", capture)
    if kind == "translation":
        CapturedDecoder(translator().float()).generate(sources(), max_length=12)
    else:
        model = prepare(lambda: dl.LanguageModel(V, 16, 4, 2, kv_heads=2, max_len=40)).float()
        CapturedDecoder(model).generate(sources(), 12)
    assert len(steps) > 5
    assert len(steps[0]) > 50
    assert all(step == steps[0] for step in steps)
    waits = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")
    assert not {name for name, _ in steps[0]} & set(waits)


def test_each_backend_has_steps_of_its_own():
    model, ids = translator().float(), sources()
    served = CapturedDecoder(model)
    wanted = served.generate(ids, max_length=20)
    with dl.use_backend("reference"):
        assert torch.equal(served.generate(ids, max_length=20), wanted)
        assert dl.last_backend() == "reference"
    assert len(served._steps) == 2


def test_weights_that_change_are_seen():
    model, ids = translator(), sources()
    served = CapturedDecoder(model)
    before = served.generate(ids, max_length=20)
    step = next(iter(served._steps.values()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)  # in place: the graph reads the same memory
    after = served.generate(ids, max_length=20)
    assert next(iter(served._steps.values())) is step
    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(ids, max_length=20))
    for parameter in model.parameters():
        parameter.data = -parameter.data  # elsewhere: it would read what is free
    again = served.generate(ids, max_length=20)
    assert next(iter(served._steps.values())) is not step
    assert torch.equal(again, before)


def test_nothing_of_a_failed_search_stays():
    model, ids = translator(positions="learned"), sources()
    served = CapturedDecoder(model)
    before = served.generate(ids, max_length=20)
    assert before.shape[1] > 6
    weight = model.tgt_positions.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits must be numbers; found NaN for source 0 at token 6"):
        served.generate(ids, max_length=20)
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(served.generate(ids, max_length=20), before)


def test_steps_and_their_memory_are_bounded():
    model = translator()
    served = CapturedDecoder(model)
    assert served.nbytes == 0
    for batch in range(1, captured.MOST_STEPS + 3):
        served.generate(sources(batch), max_length=4)
    assert len(served._steps) == captured.MOST_STEPS
    # 2 layers, keys and values, of 64 positions of the result and 16 of the source, for 3 to 10 rows
    assert served.nbytes == sum(range(3, 11)) * 2 * 2 * (64 + 16) * 16 * 8


def test_inference_mode_and_training_mode():
    model, ids = translator(), sources()
    served = CapturedDecoder(model)
    wanted = model.generate(ids, max_length=20)
    with torch.inference_mode():
        assert torch.equal(served.generate(ids, max_length=20), wanted)
    model.train()
    assert torch.equal(served.generate(ids, max_length=20), wanted)
    assert model.training


def test_what_cannot_be_captured_is_named():
    merged = dl.Transformer(V, V, 16, 2, 2, 2, decoder_attention="merged", connection="pre-norm")
    with pytest.raises(ValueError, match=r"model must have .*; found MergedAttention in decoder\.layers\.0"):
        CapturedDecoder(merged)
    multiscale = dl.Transformer(V, V, 16, 2, 2, 2, memory="multiscale", connection="pre-norm")
    with pytest.raises(ValueError, match="found MultiscaleAttention in decoder"):
        CapturedDecoder(multiscale)
    model = dl.DepthLSTMTransformer(V, V, 16, 2, 2, 2)
    model.decoder.layers[1].fold_output_projection()
    with pytest.raises(ValueError, match=r"must not fold output projections.*found it on in decoder\.layers\.1"):
        CapturedDecoder(model)
    served = CapturedDecoder(translator())
    with pytest.raises(TypeError, match="use_cache must be left out"):
        served.generate(sources(), use_cache=True)
    with pytest.raises(ValueError, match="max_length must be at most max_len"):
        served.generate(sources(), max_length=1000)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast must be off"):
        served.generate(sources())


def test_compile_decoder_takes_it_on_a_gpu(monkeypatch):
    monkeypatch.setattr("depthlstm_fast.decode.compiled._is_on_gpu", lambda model: True)
    assert isinstance(dl.compile_decoder(translator()), CapturedDecoder)
    with pytest.raises(ValueError, match="dtype must be None for a model on a GPU, which keeps its own; found 'int8'"):
        dl.compile_decoder(translator(), "int8")


def test_what_is_no_model_is_named():
    wanted = "model must be a DepthLSTMTransformer, a Transformer or a LanguageModel; found"
    for wrong in (None, 3, torch.nn.Linear(2, 2), dl.LanguageModel, dl.Encoder(8, 2, 1)):
        with pytest.raises(TypeError, match=wanted):
            CapturedDecoder(wrong)
    with pytest.raises(ValueError, match="model must be on a GPU or a CPU; found meta"):
        CapturedDecoder(dl.LanguageModel(V, 16, 2, 1, device="meta"))


def test_a_copy_captures_anew():
    served = CapturedDecoder(translator())
    wanted = served.generate(sources(), max_length=20)
    other = copy.deepcopy(served)
    assert not other._steps
    assert other.model is not served.model
    assert torch.equal(other.generate(sources(), max_length=20), wanted)
