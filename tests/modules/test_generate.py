"""generate(): the cache against recomputing, beams against brute force, independence of the batch, ties, errors."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.reference.generation import Settings, beam_search, best, greedy_search

SMALL: dict[str, Any] = {
    "src_vocab": 9,
    "tgt_vocab": 7,
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dtype": torch.float64,
    "max_len": 24,
    "dropout": 0.0,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"merge": "concat", "hidden": "ffn", "init_cell": "learned"},
    {"merge": "cells", "sublayer": True, "norm": "joint", "share_cell": True, "positions": "learned"},
]


@functools.cache
def trained(variant: int) -> dict[str, Tensor]:
    """Return parameters after a few steps of fitting random targets.

    Untrained models repeat one token and hardly ever end.
    """
    torch.manual_seed(variant)
    each = dl.DepthLSTMTransformer(**SMALL, **VARIANTS[variant])
    src, lengths = sources(), (2, 7, 4, 1, 5)
    tgt = torch.randint(3, 7, (5, 9))
    for row, length in enumerate(lengths):
        tgt[row, length:] = 0
        tgt[row, length] = 2
    optimiser = torch.optim.Adam(each.parameters(), 0.02)
    inputs = torch.cat((torch.ones(5, 1, dtype=torch.int64), tgt[:, :-1]), 1)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(each(src, inputs).flatten(0, 1), tgt.flatten(), ignore_index=0).backward()
        optimiser.step()
    return each.state_dict()


def model(module: Any = dl, variant: int = 0) -> nn.Module:
    each = module.DepthLSTMTransformer(**SMALL, **VARIANTS[variant])
    each.load_state_dict(trained(variant))
    return each.eval()


def sources() -> Tensor:
    """Return five ragged sources, padded on the right."""
    src = torch.randint(3, 9, (5, 6), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((6, 4, 1, 3, 5)):
        src[row, length:] = 0
    return src


def padded(tokens: Tensor, length: int) -> Tensor:
    return nn.functional.pad(tokens, (0, length - tokens.shape[1]))


@pytest.mark.parametrize("module", [dl, dl.reference])
@pytest.mark.parametrize("variant", range(3))
@pytest.mark.parametrize("beam_size", [1, 2, 4])
def test_cache_changes_nothing(module: Any, variant: int, beam_size: int) -> None:
    each = model(module, variant)
    cached, scores = each.generate(sources(), 9, beam_size, return_scores=True)
    plain, plain_scores = each.generate(sources(), 9, beam_size, use_cache=False, return_scores=True)
    assert torch.equal(cached, plain)
    torch.testing.assert_close(scores, plain_scores, rtol=1e-9, atol=1e-9)
    ends = [row.index(2) if 2 in row else 9 for row in cached.tolist()]
    assert len(set(ends)) > 1  # the rows do end at different times


@pytest.mark.parametrize("beam_size", [1, 3])
def test_fused_equals_reference(beam_size: int) -> None:
    for variant, options in enumerate(VARIANTS):
        reference, fused = model(dl.reference, variant), model(dl, variant)
        wanted = reference.generate(sources(), 8, beam_size)
        assert torch.equal(fused.generate(sources(), 8, beam_size), wanted)
        assert dl.fold_output_projections(fused) == 4
        assert torch.equal(fused.generate(sources(), 8, beam_size), wanted)
        folded = [layer._folds is not None for layer in (*fused.encoder.layers, *fused.decoder.layers)]
        assert folded == [True, True, *[options.get("merge", "add") != "add"] * 2]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_rows_do_not_see_their_batch(beam_size: int) -> None:
    src = sources()
    for variant in range(3):
        each = model(dl, variant)
        tokens, scores = each.generate(src, 8, beam_size, return_scores=True)
        for row, length in enumerate((6, 4, 1, 3, 5)):
            alone, score = each.generate(src[row : row + 1, :length], 8, beam_size, return_scores=True)
            assert torch.equal(padded(alone, tokens.shape[1])[0], tokens[row])
            torch.testing.assert_close(score[0], scores[row], rtol=1e-9, atol=1e-9)


def test_greedy_by_hand() -> None:
    each, src = model(), sources()
    tokens, scores = each.generate(src, 8, length_penalty=0.7, return_scores=True)
    for row in range(5):
        ids, total = [1], 0.0
        while len(ids) <= 8 and (len(ids) == 1 or ids[-1] != 2):
            logp = each(src[row : row + 1], torch.tensor([ids]))[0, -1].log_softmax(0)
            ids.append(int(logp.argmax()))
            total += logp.max().item()
        assert padded(torch.tensor([ids[1:]]), tokens.shape[1])[0].tolist() == tokens[row].tolist()
        assert scores[row].item() == pytest.approx(total / ((5 + len(ids) - 1) / 6) ** 0.7)


def test_one_beam_is_greedy() -> None:
    for variant in range(3):
        each, src = model(dl, variant), sources()
        decode = lambda ids, each=each, src=src: each(src, ids)[:, -1].detach()  # noqa: E731
        settings = Settings(5, 1, 8, 1.0, 1, 2, 0, src.device)
        found, scores = beam_search(decode, lambda rows: None, settings)
        wanted, wanted_scores = greedy_search(decode, lambda rows: None, settings)
        assert torch.equal(found, wanted)
        torch.testing.assert_close(scores, wanted_scores)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_wide_beam_finds_the_best_of_all_sequences(length_penalty: float) -> None:
    max_length, vocab, eos = 3, 7, 2
    each, src = model(), sources()[:2]
    tokens, scores = each.generate(src, max_length, vocab**max_length, length_penalty, return_scores=True)
    everything = torch.tensor(list(itertools.product(range(vocab), repeat=max_length)))
    inputs = torch.cat((torch.ones(len(everything), 1, dtype=torch.int64), everything[:, :-1]), 1)
    for row in range(2):
        logp = (
            each(src[row : row + 1].expand(len(everything), -1), inputs)
            .log_softmax(-1)
            .gather(2, everything[..., None])[..., 0]
        )
        found: dict[tuple[int, ...], float] = {}
        for sequence, steps in zip(everything.tolist(), logp.tolist(), strict=True):
            length = sequence.index(eos) + 1 if eos in sequence else max_length
            found[tuple(sequence[:length])] = sum(steps[:length]) / ((5 + length) / 6) ** length_penalty
        winner = max(found, key=lambda sequence: found[sequence])
        assert tuple(tokens[row, : len(winner)].tolist()) == winner
        assert scores[row].item() == pytest.approx(found[winner])


def test_beams_never_score_below_their_own_claim() -> None:
    each, src = model(), sources()
    tokens, scores = each.generate(src, 8, 4, return_scores=True)
    for row in range(5):
        ids = tokens[row].tolist()
        length = ids.index(2) + 1 if 2 in ids else len(ids)
        logp = each(src[row : row + 1], torch.tensor([[1, *ids[: length - 1]]]))[0].log_softmax(-1)
        total = sum(logp[t, ids[t]].item() for t in range(length))
        assert scores[row].item() == pytest.approx(total / ((5 + length) / 6))


def test_ties_go_to_the_first() -> None:
    values, indices = best(torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 1.0]]), 4)
    assert indices.tolist() == [[1, 3, 4, 2], [4, 0, 1, 2]]
    assert values.tolist() == [[3, 3, 3, 2], [1, 0, 0, 0]]
    settings = Settings(2, 3, 4, 1.0, 1, 2, 0, torch.device("cpu"))
    for search in (greedy_search, beam_search):
        tokens, _ = search(lambda ids: torch.zeros(len(ids), 5), lambda rows: None, settings)
        again, _ = search(lambda ids: torch.zeros(len(ids), 5), lambda rows: None, settings)
        assert torch.equal(tokens, again)
    assert greedy_search(lambda ids: torch.zeros(len(ids), 5), lambda rows: None, settings)[0].tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_stops_early_and_pads(search: Any) -> None:
    calls = []

    def next_logits(ids: Tensor) -> Tensor:
        """Return logits with which the rows of source n end after n + 1 tokens."""
        calls.append(ids.shape[1])
        logits = torch.zeros(len(ids), 6)
        wanted = torch.arange(len(ids)) * 3 // len(ids) + 1
        logits[:, 4] = 5
        logits[ids.shape[1] >= wanted, 2] = 50
        return logits

    settings = Settings(3, 1 if search is greedy_search else 2, 20, 1.0, 1, 2, 0, torch.device("cpu"))
    tokens, _ = search(next_logits, lambda rows: None, settings)
    assert tokens.tolist() == [[2, 0, 0], [4, 2, 0], [4, 4, 2]]
    assert max(calls) <= 5


def test_modes_are_restored() -> None:
    each = model(dl).train()
    each.encoder.eval()
    modes = [module.training for module in each.modules()]
    first = each.generate(sources(), 6)
    assert [module.training for module in each.modules()] == modes
    assert torch.equal(each.eval().generate(sources(), 6), first)
    assert not first.requires_grad
    assert each.generate(sources(), 1).shape == (5, 1)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("length_penalty", [-43, 43])
def test_the_largest_length_penalty_gives_finite_scores(beams: int, length_penalty: float) -> None:
    tokens, scores = model().generate(sources(), 24, beams, length_penalty, return_scores=True)
    assert tokens.shape[1] > 0
    assert scores.isfinite().all()
    assert (scores < 0).all()


def test_fully_padded_source() -> None:
    tokens, scores = model().generate(torch.zeros(2, 3, dtype=torch.int64), 5, 2, return_scores=True)
    assert tokens.shape[0] == 2
    assert scores.isfinite().all()


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_errors(module: Any) -> None:
    each, src = model(module), sources()
    for arguments, options, error, text in (
        ((src.double(),), {}, TypeError, "src must be int64; found torch.float64"),
        ((src[0],), {}, ValueError, r"src must have shape \(batch, length\), neither of them 0; found \(6,\)"),
        ((src[:0],), {}, ValueError, r"neither of them 0; found \(0, 6\)"),
        ((src + 3,), {}, ValueError, "src must hold ids from 0 to 8; found 11"),
        ((src, 0), {}, ValueError, "max_length must be at least 1; found 0"),
        ((src, 2.0), {}, TypeError, "max_length must be an int; found float"),
        ((src, 25), {}, ValueError, "max_length must be at most max_len, 24; found 25"),
        ((src, 4, 0), {}, ValueError, "beam_size must be at least 1; found 0"),
        ((src, 4, 2, math.inf), {}, ValueError, "length_penalty must be finite; found inf"),
        ((src, 4, 2, "1"), {}, TypeError, "length_penalty must be a float; found str"),
        ((src, 4, 2, 10**400), {}, ValueError, "length_penalty must be finite; found an integer too large"),
        ((src, 4, 1, 1e5), {}, ValueError, "length_penalty must be at most 170 in size with max_length=4; found 1000"),
        ((src, 4, 2, -1e5), {}, ValueError, "length_penalty must be at most 170 in size .* found -100000.0"),
        (
            (src, 24, 1, -50),
            {},
            ValueError,
            "length_penalty must be at most 43.8 in size with max_length=24; found -50",
        ),
        ((src,), {"src_key_padding_mask": src[:2] == 0}, ValueError, "src_key_padding_mask must have shape"),
    ):
        with pytest.raises(error, match=text):
            each.generate(*arguments, **options)
