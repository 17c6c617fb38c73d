"""Decoding by CUDA graphs on a GPU: the tokens and scores of `generate()`, which launches kernel by kernel.

tests/decode/test_captured.py holds every option against it without a graph. DEPTHLSTM_REHEARSE=1 runs these, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_helpers import BF16, DEVICE, F32, REHEARSE, every_backend, few, runnable

import depthlstm_fast as dl
from depthlstm_fast.decode.captured import CapturedDecoder

pytestmark = [] if REHEARSE else [pytest.mark.gpu]
V = 211


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return runnable(request.param, monkeypatch)


def prepared(model: Any, dtype: torch.dtype = F32) -> Any:
    """The model with steep logits, so that rounding changes no token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "output" in name or "positions" in name:
                parameter.normal_(0, 1)
    return model.eval().to(DEVICE, dtype)


def sources(batch: int, length: int) -> torch.Tensor:
    torch.manual_seed(length)
    ids = torch.randint(3, V, (batch, length), device=DEVICE)
    ids[-1, length - 2 :] = 0
    return ids


def served_by(model: Any) -> CapturedDecoder:
    return CapturedDecoder(model) if REHEARSE else dl.compile_decoder(model)


def same(found: Any, wanted: Any) -> None:
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("beams", [1, 4])
def test_translations(backend: str, beams: int) -> None:
    sizes: dict[str, Any] = {"d_model": few(256, 8), "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 2}
    model = prepared(dl.DepthLSTMTransformer(V, V, max_len=100, tie_output=False, **sizes))
    with dl.use_backend(backend):
        served = served_by(model)
        # a step is captured, used again with other sources, captured for longer ones, and used again
        for batch, length, most in ((3, 9, 12), (3, 7, few(40, 5)), (2, 33, few(90, 4)), (3, 9, 12)):
            ids, given = sources(batch, length), {"beam_size": beams, "return_scores": True}
            same(served.generate(ids, few(most, 4), **given), model.generate(ids, few(most, 4), **given))
        assert dl.last_backend() == backend
    assert len(served._steps) == (2 if REHEARSE else 3)


@every_backend
def test_a_language_model(backend: str) -> None:
    model = prepared(
        dl.LanguageModel(V, few(256, 8), 4, 2, kv_heads=2, ffn="swiglu", max_len=100, eos_id=None, tie_output=False)
    )
    ids = sources(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with dl.use_backend(backend):
        served = served_by(model)
        for options in ({}, {"beam_size": 3}, {"temperature": 1.0, "top_k": 5}):
            both = []
            for decoder in (served, model):
                drawn = {"generator": torch.Generator(DEVICE).manual_seed(7)} if "top_k" in options else {}
                both.append(
                    decoder.generate(ids, few(40, 4), attention_mask=mask, return_scores=True, **options, **drawn)
                )
            same(*both)
        assert dl.last_backend() == backend


@every_backend
def test_weights_in_16_bits_that_change(backend: str) -> None:
    sizes: dict[str, Any] = {"d_model": few(256, 8), "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = prepared(dl.DepthLSTMTransformer(V, V, max_len=64, tie_output=False, **sizes), F32 if REHEARSE else BF16)
    ids = sources(2, 9)
    with dl.use_backend(backend):
        served = served_by(model)
        before = served.generate(ids, few(12, 4))
        with torch.no_grad():
            model.tgt_embedding.weight.neg_()
        after = served.generate(ids, few(12, 4))
        assert not torch.equal(before, after)
        with torch.no_grad():
            model.tgt_embedding.weight.neg_()
        assert torch.equal(served.generate(ids, few(12, 4)), before)
