"""The translation example's training core: order of batches, schedule, accumulation, architectures, placeholders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from translation_helpers import SMALL, architectures, batches, data, placeholders, scores, tokenizer, training

import depthlstm_fast as dl

VOCABULARY = 40


def random_examples(count: int = 30) -> list[tokenizer.Example]:
    generator = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        return torch.randint(
            4, VOCABULARY, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator
        ).tolist()

    return [(ids() + [tokenizer.EOS], [tokenizer.BOS] + ids() + [tokenizer.EOS]) for _ in range(count)]


@pytest.fixture(scope="module")
def examples() -> list[tokenizer.Example]:
    return random_examples()


def test_batch_n_depends_on_seed_and_n_alone(examples: list[tokenizer.Example]) -> None:
    order = batches.BatchOrder(examples, 64, seed=3)
    assert order.per_epoch > 3
    straight = [order[index] for index in range(3 * order.per_epoch)]
    again = batches.BatchOrder(examples, 64, seed=3)
    assert [again[index] for index in reversed(range(len(straight)))] == straight[::-1]
    epochs = [straight[start : start + order.per_epoch] for start in range(0, len(straight), order.per_epoch)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == sorted(examples)


def test_shares_are_a_batch_and_an_empty_one_counts_nothing(examples: list[tokenizer.Example]) -> None:
    rows = examples[:5]
    parts = [batches.share(rows, rank, 3) for rank in range(3)]
    assert [len(part.source) for part in parts] == [2, 2, 1]
    assert sum(part.tokens for part in parts) == batches.collate(rows).tokens
    nothing = batches.share(rows[:1], 1, 3)
    assert nothing.tokens == 0
    trainer = training.Trainer(training.build_model(SMALL, VOCABULARY), SMALL)
    assert trainer.loss_sum(nothing).item() == 0
    assert (nothing.source != tokenizer.PAD).any()


def test_learning_rate() -> None:
    settings = replace(SMALL, learning_rate=2.0, warmup_steps=4)
    assert [training.learning_rate(settings, step) for step in (0, 1, 3, 15)] == pytest.approx([0.5, 1.0, 2.0, 1.0])
    assert training.learning_rate(replace(settings, warmup_steps=0), 0) == 2.0


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_accumulated_batches_are_one_large_batch(architecture: str, examples: list[tokenizer.Example]) -> None:
    settings = replace(SMALL, architecture=architecture, dropout=0.0)
    parts = (examples[:3], examples[3:4], examples[4:9])  # of unequal numbers of tokens
    one, several = (training.Trainer(training.build_model(settings, VOCABULARY), settings) for _ in range(2))
    for step in range(3):
        large = one.step(batches.collate(examples[:9]))
        small = several.step(*map(batches.collate, parts))
        assert small.loss == pytest.approx(large.loss, rel=1e-5)
        assert small.learning_rate == large.learning_rate
        if step == 0:  # later the weights differ, because Adam makes steps of gradients that are only rounding
            for first, second in zip(one.model.parameters(), several.model.parameters(), strict=True):
                torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-6)


def test_steps_in_an_order_take_each_batch_once(
    examples: list[tokenizer.Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, accumulate=2)
    order = batches.BatchOrder(examples, 64, seed=0)
    trainer = training.Trainer(training.build_model(settings, VOCABULARY), settings)
    seen = []
    monkeypatch.setattr(
        training, "share", lambda rows, rank, size: (seen.append(rows), batches.share(rows, rank, size))[1]
    )
    for _ in range(3):
        trainer.step_in(order)
    assert seen == [order[index] for index in range(6)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_every_architecture_learns(architecture: str, dtype: str, examples: list[tokenizer.Example]) -> None:
    settings = replace(SMALL, architecture=architecture, dtype=dtype, dropout=0.0, learning_rate=1e-2)
    trainer = training.Trainer(training.build_model(settings, VOCABULARY), settings)
    batch = batches.collate(examples)
    before = trainer.evaluate([batch])
    for _ in range(15):
        trainer.step(batch)
    assert trainer.evaluate([batch]) < before - 0.2
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_architectures_have_equally_many_matrix_weights() -> None:
    def weights(architecture: str) -> int:
        model = training.build_model(replace(SMALL, architecture=architecture, layers=3), VOCABULARY)
        (decay, _) = dl.param_groups(model)
        return sum(parameter.numel() for parameter in decay["params"])

    size = SMALL.d_model
    equal = dict.fromkeys(architectures.ARCHITECTURES, VOCABULARY * size + 3 * (12 + 16) * size**2)
    # a cell has 6 D^2, W and U of three gates, beside attentions of 4 D^2 each: the layers have no other network
    equal["depth-gru"] = VOCABULARY * size + 3 * (10 + 14) * size**2
    assert {name: weights(name) for name in architectures.ARCHITECTURES} == equal


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_any_architecture_translates(architecture: str, examples: list[tokenizer.Example]) -> None:
    model = training.build_model(replace(SMALL, architecture=architecture, layers=2), VOCABULARY).eval()
    batch = batches.collate(examples[:4])
    target = batch.target[:, :-1]
    with torch.no_grad():
        logits = model(batch.source, target)
        changed = target.clone()
        changed[:, -1] = 5
        assert logits.shape == (*target.shape, VOCABULARY)
        torch.testing.assert_close(model(batch.source, changed)[:, :-1], logits[:, :-1])  # causal
        alone = batches.collate(examples[:1])
        longest = alone.target.shape[1] - 1
        # padding is not seen
        torch.testing.assert_close(
            model(alone.source, alone.target[:, :-1])[0], logits[0, :longest], rtol=1e-4, atol=1e-5
        )
    greedy = model.generate(batch.source, max_length=5)
    assert torch.equal(greedy, model.generate(batch.source, max_length=5, beam_size=1))
    ids, values = model.generate(batch.source, max_length=5, beam_size=3, return_scores=True)
    assert ids.shape[0] == values.shape[0] == 4


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"architecture must be one of pre-norm, .*; found 'mid-norm'"):
        training.build_model(replace(SMALL, architecture="mid-norm"), VOCABULARY)


def test_first_projection_is_drawn_within_its_bound() -> None:
    for init, bound in (("lipschitz", (1 / 16) ** 0.5), ("glorot", (6 / 32) ** 0.5)):
        model = training.build_model(replace(SMALL, architecture="pre-norm", init=init), VOCABULARY)
        weight = model.encoder.layers[0].self_attn.in_proj.weight
        assert 0.9 * bound < weight.abs().max() <= bound


def test_placeholders_are_hidden_and_restored() -> None:
    pair = data.Pair("%(a)s of {b} is %(a)s", "{b}: %(a)s, %(c)d")
    assert placeholders.hide_pair(pair) == ("⟦1⟧ of ⟦2⟧ is ⟦1⟧", "⟦2⟧: ⟦1⟧, %(c)d")
    found: list[str] = []
    assert placeholders.restore(placeholders.hide(pair.source, found), found) == pair.source
    assert found == ["%(a)s", "{b}"]
    assert placeholders.restore("⟦3⟧!", found) == "!"
    many = " ".join(f"{{{number}}}" for number in range(12))
    found = []
    assert placeholders.restore(placeholders.hide(many, found), found) == many
    assert len(found) == len(placeholders.SYMBOLS)


def test_scores() -> None:
    lines = ["The cat sat on the mat today.", "Another sentence of several words."]
    bleu, chrf = scores.corpus_scores(lines, lines)
    assert (bleu.value, chrf.value) == pytest.approx((100, 100))
    assert "tok:13a" in bleu.signature
    assert "nc:6" in chrf.signature
    assert scores.corpus_scores(lines[::-1], lines)[0].value < 50


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 0), ("dropout", 1.0), ("label_smoothing", -0.1), ("dtype", "fp8")]
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*; found {value!r}"):
        replace(SMALL, **{name: value})
