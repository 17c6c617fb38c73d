"""Arguments of dl.LanguageModel that are refused by name, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from language_model_helpers import SMALL, model

import depthlstm_fast as dl

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
ONES = torch.ones_like(IDS)
LONG = torch.full((1, 24), 3)


def ends(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


BUILDING: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"vocab_size": 1}, ValueError, "vocab_size must be at least 2; found 1"),
    ({"d_model": 1.5}, TypeError, "d_model must be an int; found float"),
    ({"nhead": 3}, ValueError, "nhead must divide d_model, 16; found 3"),
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1; found 0"),
    ({"kv_heads": 3}, ValueError, "kv_heads must divide nhead, 4; found 3"),
    ({"kv_heads": 0}, ValueError, "kv_heads must be at least 1; found 0"),
    ({"positions": "alibi"}, ValueError, "positions must be one of 'rope', .*; found 'alibi'"),
    ({"d_model": 12}, ValueError, 'd_model / nhead must be even with positions="rope"; found 3'),
    ({"rope_theta": 0.0}, ValueError, "rope_theta must be above 0; found 0.0"),
    ({"rope_theta": 1e-80}, ValueError, "rope_theta must be at least 1e-06; found 1e-80"),
    ({"rope_theta": float("nan")}, ValueError, "rope_theta must be finite"),
    ({"connection": "residual"}, ValueError, "connection must be one of"),
    ({"connection": 3}, (TypeError, ValueError), "connection must be"),
    ({"feed_forward": "yes"}, TypeError, "feed_forward must be a bool; found str"),
    ({"ffn": "relu"}, ValueError, "ffn must be one of 'gelu', 'swiglu'; found 'relu'"),
    ({"dim_feedforward": 0}, ValueError, "dim_feedforward must be at least 1; found 0"),
    ({"norm": "batch"}, ValueError, "norm must be one of 'layer', 'rms'; found 'batch'"),
    ({"layer_norm_eps": -1.0}, ValueError, "layer_norm_eps must be finite and not negative"),
    ({"bias": 1}, TypeError, "bias must be a bool; found int"),
    ({"init": "he"}, ValueError, "init must be one of"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\); found 1.0"),
    ({"tie_output": None}, TypeError, "tie_output must be a bool; found NoneType"),
    ({"max_len": 0}, ValueError, "max_len must be at least 1; found 0"),
    ({"pad_id": 23}, ValueError, "pad_id must be below the vocabulary size, 23; found 23"),
    ({"pad_id": None}, TypeError, "pad_id must be an int; found NoneType"),
    ({"eos_id": -1}, ValueError, "eos_id must be at least 0; found -1"),
    ({"dtype": torch.int64}, TypeError, "dtype must be float32"),
    ({"device": "nowhere"}, ValueError, "device must be one that torch can use here"),
]


@pytest.mark.parametrize("cls", [dl.LanguageModel, dl.reference.LanguageModel], ids=["fused", "reference"])
@pytest.mark.parametrize(("wrong", "error", "text"), BUILDING, ids=lambda each: str(each)[:40])
def test_building(cls: Callable[..., Any], wrong: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        cls(**{**SMALL, **wrong})


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": [[3]]}, TypeError, "ids must be a torch.Tensor; found list"),
    ({"ids": IDS.int()}, TypeError, "ids must be int64; found torch.int32"),
    ({"ids": IDS[0]}, ValueError, r"ids must have shape \(batch, length\), neither of them 0; found \(4,\)"),
    ({"ids": IDS[:, :0]}, ValueError, "ids must have shape"),
    ({"ids": IDS + 20}, ValueError, "ids must hold ids from 0 to 22; found 30"),
    ({"ids": -IDS}, ValueError, "ids must hold ids from 0 to 22; found -10"),
    ({"ids": LONG.repeat(1, 2)}, ValueError, "ids must have at most max_len, 24, tokens; found 48"),
    ({"attention_mask": ONES.float()}, TypeError, "attention_mask must be bool or int64; found torch.float32"),
    ({"attention_mask": [[1]]}, TypeError, "attention_mask must be a torch.Tensor; found list"),
    ({"attention_mask": ONES[:, :3]}, ValueError, r"attention_mask must have shape \(2, 4\); found \(2, 3\)"),
    ({"attention_mask": 2 * ONES}, ValueError, "attention_mask must hold 0 and 1 alone; found 2"),
    ({"attention_mask": ONES.to("meta")}, ValueError, "attention_mask must be on the device of ids, cpu; found meta"),
    ({"labels": IDS.int()}, TypeError, "labels must be int64; found torch.int32"),
    ({"labels": IDS[:1]}, ValueError, r"labels must have shape \(2, 4\); found \(1, 4\)"),
    ({"labels": -IDS}, ValueError, "labels must hold ids from 0 to 22, or -100; found -3"),
    ({"labels": IDS + 20}, ValueError, "labels must hold ids from 0 to 22, or -100; found 23"),
    ({"labels": IDS, "return_hidden": True}, ValueError, "labels must be None with return_hidden=True"),
    ({"return_hidden": 1}, TypeError, "return_hidden must be a bool; found int"),
    ({"document_ids": ONES.bool()}, TypeError, "document_ids must be int64; found torch.bool"),
    ({"document_ids": ONES[:, 1:]}, ValueError, r"document_ids must have shape \(2, 4\); found \(2, 3\)"),
    ({"document_ids": ONES, "cu_seqlens": ends(0, 4)}, ValueError, "cu_seqlens must be None with document_ids"),
    ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens must be a torch.Tensor; found list"),
    ({"cu_seqlens": ends(0, 4).float()}, TypeError, "cu_seqlens must be int32 or int64; found torch.float32"),
    ({"cu_seqlens": ends(0)}, ValueError, r"cu_seqlens must have shape \(documents \+ 1,\); found \(1,\)"),
    ({"cu_seqlens": ends(0, 4)}, ValueError, r"ids must have shape \(1, length\) with cu_seqlens; found \(2, 4\)"),
    ({"ids": IDS[:1], "cu_seqlens": ends(0, 3)}, ValueError, r"cu_seqlens must rise from 0 to 4, .*; found \[0, 3\]"),
    ({"ids": IDS[:1], "cu_seqlens": ends(1, 4)}, ValueError, "cu_seqlens must rise from 0 to 4"),
    ({"ids": IDS[:1], "cu_seqlens": ends(0, 3, 2, 4)}, ValueError, "cu_seqlens must rise from 0 to 4"),
    ({"ids": IDS[:1], "cu_seqlens": ends(0, 4).to("meta")}, ValueError, "cu_seqlens must be on the device of ids, cpu"),
    (
        {"ids": LONG.repeat(1, 2), "cu_seqlens": ends(0, 20, 48)},
        ValueError,
        "ids must have at most max_len, 24, tokens a document; found 28",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "text"), CALLS, ids=lambda each: str(each)[:60])
def test_calling(wrong: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        model()(**{"ids": IDS, **wrong})


def test_packed_rows_may_be_longer_than_a_document() -> None:
    long = LONG.repeat(1, 3)
    assert model()(long, cu_seqlens=ends(0, 24, 48, 72)).shape == (1, 72, 23)


def test_caches() -> None:
    each, other = model(), model(kv_heads=2)
    cache = each.new_cache()
    each(IDS, cache=cache)
    mine = r"\(layers, kv_heads, head size\) \(2, 4, 4\); found "
    for call, error, text in (
        (lambda: each(IDS, cache=[]), TypeError, "cache must be a CausalCache, as new_cache makes it; found list"),
        (lambda: each(IDS, cache=other.new_cache()), ValueError, mine + r"\(2, 2, 4\)"),
        (lambda: each(IDS, cache=model(num_layers=3).new_cache()), ValueError, mine + r"\(3, 4, 4\)"),
        (lambda: each(IDS, cache=model(d_model=32).new_cache()), ValueError, mine + r"\(2, 4, 8\)"),
        (lambda: each(IDS[:1], cache=cache), ValueError, "ids must have the batch that the cache began with, 2"),
        (lambda: each(IDS, cache=cache, labels=IDS), ValueError, "labels must be None with a cache; found a tensor"),
        (lambda: each(IDS, cache=cache, document_ids=ONES), ValueError, "cache must be None with document_ids or"),
        (
            lambda: each(LONG[:, :21].repeat(2, 1), cache=cache),
            ValueError,
            "ids must have at most max_len, 24, tokens with those of the cache; found 25",
        ),
        (lambda: cache.reorder(ends(0, 5)), ValueError, r"rows must hold rows from 0 to 1; found \[0, 5\]"),
        (lambda: cache.reorder([0]), TypeError, "rows must be an int64 tensor; found list"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert cache.length == 4  # nothing of these was added
    assert each(IDS[:, :1], cache=cache).shape == (2, 1, 23)


SEARCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": IDS + 20}, ValueError, "ids must hold ids from 0 to 22; found 30"),
    ({"ids": LONG}, ValueError, "ids must leave room for a token before max_len, 24; found 24"),
    ({"max_new_tokens": 21}, ValueError, "max_new_tokens must be at most 20, what ids leave of max_len; found 21"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1; found 0"),
    ({"beam_size": 0}, ValueError, "beam_size must be at least 1; found 0"),
    ({"length_penalty": "long"}, TypeError, "length_penalty must be a float; found str"),
    ({"attention_mask": ONES[:1]}, ValueError, "attention_mask must have shape"),
    (
        {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])},
        ValueError,
        "attention_mask must be 0 on the left of a prompt alone; found padding behind a token",
    ),
    ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, ValueError, "must be 0 on the left of a prompt"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative; found -1.0"),
    ({"temperature": None}, TypeError, "temperature must be a float; found NoneType"),
    ({"temperature": 1.0, "top_k": 0}, ValueError, "top_k must be at least 1; found 0"),
    ({"temperature": 1.0, "top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\]; found 1.5"),
    ({"temperature": 1.0, "top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]; found 0.0"),
    ({"temperature": 1.0, "generator": 3}, TypeError, "generator must be a torch.Generator; found int"),
    ({"temperature": 1.0, "beam_size": 2}, ValueError, "beam_size must be 1 with a temperature above 0; found 2"),
    ({"top_k": 5}, ValueError, "temperature must be above 0 with top_k, top_p or a generator; found 0"),
    ({"use_cache": 1}, TypeError, "use_cache must be a bool; found int"),
    ({"return_scores": 1}, TypeError, "return_scores must be a bool; found int"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), SEARCHES, ids=lambda each: str(each)[:60])
def test_generating(wrong: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        model().generate(**{"ids": IDS, **wrong})


def test_a_cache_of_another_dtype() -> None:
    each, ids = dl.LanguageModel(20, 16, 2, 1, max_len=8).eval(), torch.randint(3, 20, (2, 3))
    cache = each.new_cache()
    each(ids, cache=cache)
    with pytest.raises(TypeError, match="cache must be float64 beside a float64 model; found float32"):
        each.double()(ids, cache=cache)


@pytest.mark.parametrize("rows", ["a", None, [0]])
def test_rows_of_an_empty_cache(rows: Any) -> None:
    with pytest.raises(TypeError, match="rows must be an int64 tensor"):
        dl.LanguageModel(20, 16, 2, 1).new_cache().reorder(rows)


def test_a_prompt_of_padding_alone() -> None:
    each, ids = dl.LanguageModel(20, 16, 2, 1, max_len=8).eval(), torch.randint(3, 20, (2, 3))
    with pytest.raises(ValueError, match="attention_mask must have a real token in each row; found a row of padding"):
        each.generate(ids, 2, attention_mask=torch.tensor([[0, 0, 0], [0, 1, 1]]))


def test_the_least_temperature_takes_the_likeliest() -> None:
    each, ids = dl.LanguageModel(20, 16, 2, 1, max_len=8, eos_id=None).eval(), torch.randint(3, 20, (2, 3))
    assert torch.equal(each.generate(ids, 4, temperature=1e-46), each.generate(ids, 4))
