"""The translation example's numbers, each against one computed here.

The numbers are losses, updates, schedules, scores and the records of a run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from translation_helpers import (
    SMALL,
    architectures,
    batches,
    checkpoint,
    corpus,
    data,
    inference,
    log_values,
    prepare,
    scores,
    splits,
    tokenizer,
    train,
    training,
    translate,
)

import depthlstm_fast as dl
from depthlstm_fast.translate import command as serving

VOCABULARY = 40
SETTINGS = replace(
    SMALL, dropout=0.0, learning_rate=0.02, warmup_steps=2, weight_decay=0.3, label_smoothing=0.2, clip_norm=0.05
)


@pytest.fixture(scope="module")
def examples() -> list[tokenizer.Example]:
    """Return sentences of unequal lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()

    return [
        (ids(3 + index % 5) + [tokenizer.EOS], [tokenizer.BOS] + ids(1 + index % 7) + [tokenizer.EOS])
        for index in range(12)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared")
    prepare.prepare(path, "builtin", vocab_size=120)
    return path


@pytest.fixture(scope="module")
def run(prepared: Path) -> Path:
    train.run_training(
        corpus.load_corpus(prepared), SMALL, prepared / "run", evaluate_every=4, checkpoint_every=2, beam_size=2
    )
    return prepared / "run"


def smoothed_loss(model: Any, rows: list[tokenizer.Example], smoothing: float) -> tuple[Tensor, int]:
    """Return the summed loss of ``rows``, one at a time and without padding.

    The number of their predicted tokens is returned as well.
    """
    total, count = torch.zeros(()), 0
    for source, target in rows:
        logs = model(torch.tensor([source]), torch.tensor([target[:-1]]))[0].log_softmax(-1)
        for log, label in zip(logs, target[1:], strict=True):
            total = total - (1 - smoothing) * log[label] - smoothing * log.mean()
            count += 1
    return total, count


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_a_loop_written_out(accumulate: int, examples: list[tokenizer.Example]) -> None:
    settings = replace(SETTINGS, accumulate=accumulate)
    trainer = training.Trainer(training.build_model(settings, VOCABULARY), settings, "reference")
    model = training.build_model(settings, VOCABULARY)
    first: dict[str, Tensor] = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    second = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    order = batches.BatchOrder(examples, 64, seed=0)
    clipped = []
    for step in range(4):
        rows = [row for index in range(step * accumulate, (step + 1) * accumulate) for row in order[index]]
        loss, count = smoothed_loss(model, rows, 0.2)
        model.zero_grad()
        (loss / count).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert gradients.keys() == first.keys()
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        clipped.append(norm > 0.05)
        rate = 0.02 * ((step + 1) / 2 if step < 2 else math.sqrt(2 / (step + 1)))
        for name, parameter in model.named_parameters():
            gradient = gradients[name] * min(1.0, 0.05 / norm)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.98 * second[name] + 0.02 * gradient**2
            update = first[name] / (1 - 0.9 ** (step + 1)) / ((second[name] / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
            decay = 0.3 if parameter.dim() > 1 and "norm" not in name else 0.0
            with torch.no_grad():
                parameter.mul_(1 - rate * decay).sub_(rate * update)
        result = trainer.step_in(order)
        assert result.loss == pytest.approx(float(loss.detach()) / count, rel=1e-4)
        assert result.learning_rate == pytest.approx(rate)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([rate, rate])
        total = math.sqrt(
            sum(float(parameter.grad.double().square().sum()) for parameter in trainer.model.parameters())
        )
        assert total == pytest.approx(min(norm, 0.05), rel=1e-3)
        if step < 2:  # later the rounding of tiny gradients has spread, because Adam makes whole steps of it
            for (name, one), other in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
                scarce = first[name].abs() < 1e-6 * 0.05
                torch.testing.assert_close(
                    one[~scarce], other[~scarce], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )
        trainer.model.load_state_dict(model.state_dict())
    assert all(clipped)


def test_what_decays_are_the_matrices() -> None:
    trainer = training.Trainer(training.build_model(SETTINGS, VOCABULARY), SETTINGS)
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        assert decays[id(parameter)] == (0.3 if parameter.dim() > 1 and "norm" not in name else 0.0), name
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.98)}


def test_the_dev_loss_has_no_smoothing_and_no_dropout(examples: list[tokenizer.Example]) -> None:
    settings = replace(SETTINGS, dropout=0.5)
    trainer = training.Trainer(training.build_model(settings, VOCABULARY), settings, "reference")
    trainer.model.train()
    parts = [batches.collate(examples[:5]), batches.collate(examples[5:])]
    found = trainer.evaluate(parts)
    with torch.no_grad():
        total, count = smoothed_loss(trainer.model.eval(), examples, 0.0)
    assert found == pytest.approx(float(total) / count, rel=1e-5)
    torch.manual_seed(0)
    training_loss = trainer.step(*parts).loss  # with both
    with torch.no_grad():
        total, count = smoothed_loss(training.build_model(settings, VOCABULARY).eval(), examples, 0.2)
    assert abs(training_loss - float(total) / count) > 1e-3


def test_bleu_and_chrf_know_which_side_is_the_reference() -> None:
    bleu, _ = scores.corpus_scores(["the cat sat on the mat"], ["the cat sat on the mat today and again"])
    assert bleu.value == pytest.approx(100 * math.exp(1 - 9 / 6))  # every n-gram is right, and a third is missing
    _, chrf = scores.corpus_scores(["ab"], ["abab"])
    recall = (2 / 4 + 1 / 3) / 2
    # precision is 1; recall counts for more, four to one
    assert chrf.value == pytest.approx(100 * 5 * recall / (4 + recall))


def test_translations_come_in_the_order_of_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(model: Any, subwords: Any, lines: list[str], max_length: int, beam_size: int) -> list[str]:
        seen.append((max_length, beam_size, [len(line) for line in lines]))
        return [f"<{line}>" for line in lines]

    monkeypatch.setattr(inference, "translate", fake)
    lines = [letter * (7 * index % 11) for index, letter in enumerate("abcdefghij")]
    assert inference.translate_all(None, None, lines, 17, 3, batch_size=4) == [f"<{line}>" for line in lines]
    assert [call[:2] for call in seen] == [(17, 3)] * 3
    assert [length for call in seen for length in call[2]] == sorted(map(len, lines))


class Echo:
    """A model whose translation is the source's ids backwards, to tell lines apart."""

    max_len = 12

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def eval(self) -> None:
        pass

    def parameters(self) -> Any:
        return iter([torch.zeros(())])

    def generate(self, source: Tensor, **named: Any) -> Tensor:
        self.calls.append(named)
        rows = [
            [id for id in row if id not in (tokenizer.PAD, tokenizer.EOS)][::-1] + [tokenizer.EOS]
            for row in source.tolist()
        ]
        return batches.pad([[*row, 9, 9] for row in rows])  # ids after the end are not text


def test_each_line_gets_its_own_translation_and_placeholders() -> None:
    texts = [text for pair in data.PAIRS for text in pair]
    subwords, model = tokenizer.train_tokenizer(texts, 120), Echo()
    lines = ["%(a)s", "", "no", "\u200b", "{b} or {c}", "a" * 30]
    found = inference.translate(model, subwords, lines, max_length=5, beam_size=3)
    wanted = [subwords.decode(subwords.encode(text)[:11][::-1]) for text in ("⟦1⟧", "no", "⟦1⟧ or ⟦2⟧", "a" * 30)]
    wanted = [
        wanted[0].replace("⟦1⟧", "%(a)s"),
        "",
        wanted[1],
        "",
        wanted[2].replace("⟦1⟧", "{b}").replace("⟦2⟧", "{c}"),
        wanted[3],
    ]
    assert found == wanted
    assert model.calls == [{"max_length": 5, "beam_size": 3}]


def test_translate_hands_its_options_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    seen = []
    monkeypatch.setattr(serving, "translate", lambda model, subwords, *rest: (seen.append(rest), list(rest[0]))[1])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
    assert translate.main([str(run), "--beam-size", "3", "--max-length", "9", "--batch-size", "2"]) == 0
    assert seen == [(["a", "b"], 9, 3), (["c"], 9, 3)]
    assert capsys.readouterr().out == "a\nb\nc\n"


def test_a_split_is_every_pair_once() -> None:
    pairs = [data.Pair(f"source {number}", f"target {number}") for number in range(100)]
    for seed in (0, 1):
        texts = splits.split(pairs, seed)
        assert sorted(pair for chosen in texts.values() for pair in chosen) == sorted(pairs)
    assert {name: len(chosen) for name, chosen in splits.split(pairs, 0, ["test"]).items()} == {"test": 8, "train": 92}
    assert len(splits.split([data.Pair(str(number), "") for number in range(100_000)], 0)["dev"]) == splits.HELDOUT_MOST


def test_the_scores_in_the_log_are_those_of_the_test_set(run: Path, prepared: Path) -> None:
    sources, references = (
        (prepared / f"test.{side}.txt").read_text(encoding="utf-8").splitlines() for side in ("source", "target")
    )
    model, subwords = checkpoint.load_model(run)
    translations = [inference.translate(model, subwords, [line], beam_size=2)[0] for line in sources]
    for line, metric in zip(log_values(run)[-2:], (BLEU(), CHRF()), strict=True):
        assert line["value"] == pytest.approx(metric.corpus_score(translations, [references]).score)
        assert line["copied"] == pytest.approx(metric.corpus_score(sources, [references]).score)
        assert line["copied"] > 0
        assert line["beam_size"] == 2


def test_a_checkpoint_holds_its_own_step(run: Path, prepared: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, steps=4)
    text = corpus.load_corpus(prepared)
    train.run_training(text, settings, tmp_path / "four", evaluate_every=4, checkpoint_every=100, beam_size=1)
    one, other = run / "checkpoint-00000004", tmp_path / "four" / "checkpoint-00000004"
    for part in checkpoint.PARTS:
        assert (one / f"{part}.safetensors").read_bytes() == (other / f"{part}.safetensors").read_bytes()
    state, numbers = checkpoint.read_checkpoint(one)
    assert {name: numbers[name] for name in ("step", "batch", "skipped")} == {"step": 4, "batch": 4, "skipped": 0}
    assert {float(value) for name, value in state["optimizer"].items() if name.startswith("step/")} == {4.0}
    kept = (run / checkpoint.LOG).read_bytes()[: numbers["log_bytes"]].decode().splitlines()
    assert '"step": 4, "dev_loss"' in kept[-1]
    trainer = training.Trainer(training.build_model(settings, 120), settings)
    trainer.load_state(state, 4)
    dev = [batches.collate(rows) for rows in batches.group(text.examples["dev"], settings.token_budget)]
    (logged,) = [line["dev_loss"] for line in log_values(run) if line.get("step") == 4 and "dev_loss" in line]
    assert logged == trainer.evaluate(dev)
    rates = [line["learning_rate"] for line in log_values(run) if "loss" in line]
    assert rates == [training.learning_rate(SMALL, step) for step in range(6)]


def test_every_seed_is_used(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, seen = corpus.load_corpus(prepared), []
    order = train.BatchOrder
    monkeypatch.setattr(train, "BatchOrder", lambda *arguments: (seen.append(arguments[1:]), order(*arguments))[1])
    losses = {}
    for seed in (0, 3):
        settings = replace(SMALL, steps=2, seed=seed, dropout=0.5)
        train.run_training(text, settings, tmp_path / str(seed), beam_size=1)
        losses[seed] = [line["loss"] for line in log_values(tmp_path / str(seed)) if "loss" in line]
    assert seen == [(SMALL.token_budget, 0), (SMALL.token_budget, 3)]
    assert losses[0] != losses[3]
    weights = [next(training.build_model(replace(SMALL, seed=seed), VOCABULARY).parameters()) for seed in (0, 0, 3)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    texts = [splits.split([data.Pair(*pair) for pair in data.PAIRS], seed)["test"] for seed in (0, 0, 3)]
    assert texts[0] == texts[1] != texts[2]


def test_architecture_names_say_what_is_built() -> None:
    found = [
        type(training.build_model(replace(SMALL, architecture=name), VOCABULARY))
        for name in architectures.ARCHITECTURES
    ]
    assert found == [
        dl.DepthLSTMTransformer if name == "depth-lstm" else dl.Transformer for name in dl.connections.names()
    ]
