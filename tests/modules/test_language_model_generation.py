"""dl.LanguageModel.generate and its cache: searches, samples, left padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from language_model_helpers import VOCAB, assert_close, model, tokens
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.reference.sampling import Sampler

NAMES = dl.connections.names()


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - row.shape[1] :], mask[index, longest - row.shape[1] :] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_with_a_cache_are_those_without(name: str, positions: str) -> None:
    each = model(connection=name, positions=positions, kv_heads=2)
    rows = [tokens(1, length) for length in (4, 2, 6)]
    ids, mask = left_padded(rows)
    for beams in (1, 3):
        found, scores = each.generate(ids, 7, beams, attention_mask=mask, return_scores=True)
        wanted = each.generate(ids, 7, beams, attention_mask=mask, use_cache=False, return_scores=True)
        assert torch.equal(found, wanted[0])
        assert_close(scores, wanted[1])
        for index, row in enumerate(rows):  # and a batch gives what its prompts give alone
            alone, score = each.generate(row, 7, beams, return_scores=True)
            assert torch.equal(alone[0], found[index])
            assert_close(score[0], scores[index])


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_may_be_given_any_pieces(name: str) -> None:
    each = model(connection=name, kv_heads=2)
    ids, mask = left_padded([tokens(1, 9), tokens(1, 5)])
    wanted = each(ids, mask)
    for pieces in ((9,), (4, 5), (6, 1, 1, 1), (1,) * 9, (1, 3, 4, 1)):
        cache, found = each.new_cache(), []
        for part, seen in zip(ids.split(pieces, 1), mask.split(pieces, 1), strict=True):
            found.append(each(part, seen, cache=cache))
        assert_close(torch.cat(found, 1)[mask == 1], wanted[mask == 1])
        assert cache.length == 9
        bare, found = each.new_cache(), []
        for part in ids.split(pieces, 1):
            found.append(each(part, cache=bare))
        assert_close(torch.cat(found, 1), each(ids))


def test_greedy_takes_the_likeliest_and_ends_rows() -> None:
    each, ids = model(), tokens(3, 4)
    text = ids
    for _ in range(6):
        text = torch.cat((text, each(text)[:, -1:].argmax(-1)), 1)
    found, scores = each.generate(ids, 6, return_scores=True)
    assert torch.equal(found, text[:, 4:])
    logp = each(text).log_softmax(-1)[:, 3:-1].gather(2, found[:, :, None]).sum((1, 2))
    assert_close(scores, logp / ((5 + 6) / 6))
    each.eos_id, each.pad_id = int(found[0, 2]), 1
    ended = each.generate(ids, 6)
    for index in range(3):
        row = found[index].tolist()
        end = row.index(each.eos_id) + 1 if each.eos_id in row else 6
        assert ended[index, :end].tolist() == row[:end]
        assert set(ended[index, end:].tolist()) <= {1}


@torch.no_grad()
def test_wide_beams_find_the_best_of_all_continuations() -> None:
    each = model(vocab_size=4, d_model=8, nhead=2)
    ids = torch.tensor([[3, 1]])
    tokens_found, score = each.generate(ids, 3, 64, 0.0, return_scores=True)
    best = -math.inf
    for words in itertools.product(range(4), repeat=3):
        logp = each(torch.tensor([[3, 1, *words]])).log_softmax(-1)[0]
        total = sum(float(logp[1 + t, word]) for t, word in enumerate(words))
        if total > best:
            best, wanted = total, words
    assert tuple(tokens_found[0].tolist()) == wanted
    assert math.isclose(float(score), best, rel_tol=1e-9)


def test_samples_follow_the_distribution() -> None:
    each = model()
    logp = each(torch.tensor([[5, 7]]))[0, -1].log_softmax(-1)
    many = torch.tensor([[5, 7]]).expand(4000, 2)
    for options in ({}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.5}):
        found = each.generate(many, 1, temperature=2.0, generator=torch.Generator().manual_seed(3), **options)
        shares = (logp / 2.0).softmax(-1)
        order = shares.argsort(descending=True).tolist()
        kept = order[: options.get("top_k", VOCAB)]
        if "top_p" in options:
            total, chosen = 0.0, []
            norm = sum(float(shares[word]) for word in kept)
            for word in kept:
                chosen.append(word)
                total += float(shares[word]) / norm
                if total >= options["top_p"]:
                    break
            kept = chosen
        wanted = torch.zeros(VOCAB, dtype=shares.dtype)
        wanted[kept] = shares[kept] / shares[kept].sum()
        counts = torch.bincount(found[:, 0], minlength=VOCAB)
        assert set(counts.nonzero().flatten().tolist()) <= set(kept)
        spread = (wanted * (1 - wanted) / 4000).sqrt()
        assert ((counts / 4000 - wanted).abs() <= 5 * spread + 1e-12).all()


def test_samples_repeat_with_their_seed_and_cold_ones_are_greedy() -> None:
    each, ids = model(), tokens(3, 4)

    def draw(seed: int, **options: Any) -> Tensor:
        return each.generate(ids, 8, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1, temperature=3.0), draw(1, temperature=3.0))
    assert not torch.equal(draw(1, temperature=3.0), draw(2, temperature=3.0))
    assert torch.equal(draw(1, temperature=3.0), draw(1, temperature=3.0, use_cache=False))
    greedy = each.generate(ids, 8)
    assert torch.equal(draw(1, temperature=3.0, top_k=1), greedy)
    for least in (1e-9, 1e-17):  # 1 - 1e-17 is 1
        assert torch.equal(draw(1, temperature=3.0, top_p=least), greedy)
    assert torch.equal(draw(1, temperature=1e-300), greedy)
    torch.manual_seed(5)
    first = each.generate(ids, 8, temperature=3.0)
    torch.manual_seed(5)
    assert torch.equal(each.generate(ids, 8, temperature=3.0), first)


def test_what_is_kept_is_what_transformers_keeps() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process

    logits = torch.randn(50, VOCAB, dtype=torch.float64) * 3
    for temperature, top_k, top_p in ((0.7, None, None), (1.3, 4, None), (1.0, None, 0.8), (2.0, 12, 0.55)):
        scores = logits_process.TemperatureLogitsWarper(temperature)(None, logits)
        if top_k is not None:
            scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
        if top_p is not None:
            scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
        wanted = torch.multinomial(scores.softmax(-1), 1, generator=torch.Generator().manual_seed(9))
        sampler = Sampler(temperature, top_k, top_p, torch.Generator().manual_seed(9))
        assert torch.equal(sampler.draw(logits.log_softmax(-1)), wanted), transformers.__version__


def test_generation_leaves_the_model_as_it_was() -> None:
    each, ids = model(dropout=0.5), tokens(2, 3)
    each.train()
    each.decoder.layers[0].eval()
    first = each.generate(ids, 5)
    assert torch.equal(first, each.generate(ids, 5))
    assert each.training
    assert not each.decoder.layers[0].training
    assert each.decoder.layers[1].training


def test_nan_is_told() -> None:
    each, ids = model(), tokens(2, 3)
    with torch.no_grad():
        each.decoder.connection.final_norm.weight[0] = torch.nan
    for options in ({}, {"temperature": 1.0}, {"beam_size": 2}):
        with pytest.raises(ValueError, match="logits must be numbers; found NaN for source 0 at token 1"):
            each.generate(ids, 3, **options)


class Bypassing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Any, is_causal: Any, cache: Any, rotation: Any) -> Tensor:
        return self.inner(x, mask, is_causal, None, rotation)


def test_an_attention_that_passes_its_cache_by_is_told() -> None:
    each, ids = model(), tokens(2, 3)
    wanted = each.generate(ids, 4)
    each.decoder.layers[1].self_attn = Bypassing(each.decoder.layers[1].self_attn)
    with pytest.raises(ValueError, match=r"cache must be None: decoder.layers.1 passes it by .* found 0 .* wanted 3"):
        each.generate(ids, 4)
    assert torch.equal(each.generate(ids, 4, use_cache=False), wanted)
