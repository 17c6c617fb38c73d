"""The translation example, offline: its built-in sentence pairs, catalogs written by the test, and tiny models."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from translation_helpers import batches, compare, data, tokenizer, training

import depthlstm_fast as dl

VOCABULARY = 120
TINY = training.Settings(steps=2, token_budget=128, d_model=16, heads=2, layers=1, dropout=0.0, warmup_steps=20)

CATALOG = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Please enter   a\\n valid date."
msgstr "Bitte ein gültiges Datum eingeben."

#, fuzzy
msgid "A guess"
msgstr "Geraten"

msgid "Not translated"
msgstr ""

msgid "%(count)d page"
msgid_plural "%(count)d pages"
msgstr[0] "%(count)d Seite"
msgstr[1] "%(count)d Seiten"

msgid "%(a)s: {}"
msgstr "%(a)s: {} "

msgctxt "elsewhere"
msgid "please enter a valid date."
msgstr "Gib ein gültiges Datum ein."

#~ msgid "Old message"
#~ msgstr "Alte Nachricht"
"""


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.load_dataset("builtin")


@pytest.fixture(scope="module")
def subwords(dataset: data.Dataset) -> Any:
    return tokenizer.train_tokenizer([text for pair in dataset.train for text in pair], VOCABULARY)


@pytest.fixture(scope="module")
def examples(dataset: data.Dataset, subwords: Any) -> list[tokenizer.Example]:
    return tokenizer.encode_pairs(dataset.train, subwords)


def test_catalog_gives_finished_translations_only() -> None:
    pairs = data.parse_catalog(CATALOG)
    assert [pair.target for pair in pairs] == [
        "Bitte ein gültiges Datum eingeben.",
        "%(count)d Seiten",
        "%(a)s: {} ",
        "Gib ein gültiges Datum ein.",
    ]
    assert data.clean(pairs) == [
        ("Please enter a valid date.", "Bitte ein gültiges Datum eingeben."),
        ("%(count)d pages", "%(count)d Seiten"),
    ]


@pytest.mark.parametrize(
    "pair", [("", "Leer"), ("Same", "Same"), ("<b>Bold</b>", "<b>Fett</b>"), ("{}th", "{}."), ("%s GB", "%s GB!")]
)
def test_clean_drops(pair: tuple[str, str]) -> None:
    assert data.clean([data.Pair(*pair)]) == []


def test_wheel_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = tmp_path / "depthlstm_fast" / f"django-{data.DJANGO_VERSION}-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("django/conf/locale/de/LC_MESSAGES/django.po", CATALOG)
        archive.writestr("django/conf/locale/fr/LC_MESSAGES/django.po", CATALOG.replace("Seiten", "pages !"))
    loaded = data.load_dataset("django")
    assert len(loaded.train) == len(loaded.heldout) == 1
    assert "Django" in loaded.name
    wheel.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="damaged"):
        data.load_dataset("django")


def test_without_network_one_line_and_the_built_in_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    loaded = data.load_dataset()
    assert len(loaded.train) + len(loaded.heldout) == len(data.PAIRS) >= 24
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "built-in sentence pairs" in message
    with pytest.raises(data.DownloadError):
        data.load_dataset("django")


def test_pip_that_never_answers_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(data.DownloadError, match="no answer"):
        data.fetch_wheel(timeout=0.01)


def test_aligned_files(tmp_path: Path) -> None:
    english, german = tmp_path / "text.en", tmp_path / "text.de"
    english.write_text("Good morning.\n\nThank you.\n", encoding="utf-8")
    german.write_text("Guten Morgen.\n\nVielen Dank.\n", encoding="utf-8")
    loaded = data.load_dataset(source=english, target=german)
    assert {*loaded.train, *loaded.heldout} == {("Good morning.", "Guten Morgen."), ("Thank you.", "Vielen Dank.")}
    german.write_text("Guten Morgen.\nVielen Dank.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"found 3 in .*text\.en and 2 in .*text\.de"):
        data.load_dataset(source=english, target=german)
    with pytest.raises(ValueError, match="together"):
        data.load_dataset(source=english)
    with pytest.raises(ValueError, match="data must be one of"):
        data.load_dataset("wmt")


def test_split_is_disjoint_complete_and_keeps_its_held_out_pairs(dataset: data.Dataset) -> None:
    everything = [*dataset.train, *dataset.heldout]
    assert not {pair.source for pair in dataset.train} & {pair.source for pair in dataset.heldout}
    assert sorted(everything) == sorted(data.PAIRS)
    assert data.split("", reversed(everything)) == dataset._replace(name="")
    with pytest.raises(ValueError, match="two at least"):
        data.split("", everything[:1])


def test_tokenizer_ids_and_round_trip(dataset: data.Dataset, subwords: Any) -> None:
    assert (subwords.pad_id(), subwords.bos_id(), subwords.eos_id(), subwords.unk_id()) == (0, 1, 2, 3)
    assert len(subwords) == VOCABULARY
    text = dataset.train[0].target
    assert subwords.decode([tokenizer.BOS, *subwords.encode(text), tokenizer.EOS, tokenizer.PAD]) == text
    again = tokenizer.load_tokenizer(subwords.serialized_model_proto())
    assert again.encode(text) == subwords.encode(text)


def test_batches_are_deterministic_and_cover_every_example_once_an_epoch(examples: list[tokenizer.Example]) -> None:
    def rows(seed: int) -> list[tuple[tuple[int, ...], ...]]:
        order, seen = batches.BatchOrder(examples, 128, seed), []
        for index in range(order.per_epoch):
            batch = batches.collate(order[index])
            pairs = zip(batch.source.tolist(), batch.target.tolist(), strict=True)
            seen += [tuple(tuple(id for id in row if id) for row in pair) for pair in pairs]
        return seen

    assert rows(seed=1) == rows(seed=1) != rows(seed=2)
    assert sorted(rows(seed=1)) == sorted((tuple(source), tuple(target)) for source, target in examples)


def test_batches_keep_the_budget_and_pad_only_at_the_end(examples: list[tokenizer.Example]) -> None:
    groups = list(batches.group(examples, 128))
    assert len(groups) > 1
    for chosen in groups:
        batch = batches.collate(chosen)
        assert batch.source.dtype == batch.target.dtype == torch.int64
        assert batch.source.numel() + batch.target.numel() <= 128
        assert (batch.target[:, 0] == tokenizer.BOS).all()
        assert batch.tokens == sum(int((ids != tokenizer.PAD).sum()) for ids in (batch.source, batch.target[:, 1:]))
        for ids, column in ((batch.source, 0), (batch.target, 1)):
            for row, example in zip(ids.tolist(), chosen, strict=True):
                length = len(example[column])
                assert row == example[column] + [tokenizer.PAD] * (len(row) - length)
                assert row[length - 1] == tokenizer.EOS
    assert [len(chosen) for chosen in batches.group(examples[:3], 1)] == [1, 1, 1]


def test_pairs_too_long_are_left_out(dataset: data.Dataset, subwords: Any) -> None:
    lengths = [max(map(len, example)) for example in tokenizer.encode_pairs(dataset.train, subwords, longest=20)]
    assert 0 < len(lengths) < len(dataset.train)
    assert max(lengths) <= 20
    with pytest.raises(ValueError, match="at most 2 tokens"):
        tokenizer.encode_pairs(dataset.train, subwords, longest=2)


def test_padding_does_not_change_the_loss(examples: list[tokenizer.Example], subwords: Any) -> None:
    torch.manual_seed(0)
    trainer = training.Trainer(training.build_model(TINY, len(subwords)), TINY)
    together = trainer.evaluate([batches.collate(examples[:4])])
    alone = trainer.evaluate([batches.collate([example]) for example in examples[:4]])
    assert together == pytest.approx(alone, rel=1e-5)


def test_comparison_of_two_steps(dataset: data.Dataset) -> None:
    result = compare.run_comparison(
        2, settings=TINY, dataset=dataset, progress=False, examples=1, vocab_size=VOCABULARY
    )
    assert result["losses"]["fused"] == pytest.approx(result["losses"]["reference"], rel=1e-4)
    assert result["losses_agree"]
    assert result["heldout_loss"]["fused"] == pytest.approx(result["heldout_loss"]["reference"], rel=1e-3)
    assert result["pairs"] == len(data.PAIRS)
    assert result["speedup"] > 0
    assert result["backend"] in dl.backends()
    ((source, target, translation),) = result["examples"]
    assert data.Pair(source, target) in dataset.heldout
    assert isinstance(translation, str)
    assert compare.run_comparison(5, settings=TINY, dataset=dataset, progress=False, limit_seconds=0.0)["steps"] == 1
    with pytest.raises(ValueError, match="steps must be at least 1"):
        compare.run_comparison(0, dataset=dataset)


def test_comparison_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SETTINGS", TINY)
    assert compare.main(["--steps", "2", "--data", "builtin"]) == 0
    printed = capsys.readouterr().out
    assert "losses agree" in printed
    assert "See you tomorrow morning." in printed


def test_training_lowers_the_loss(examples: list[tokenizer.Example], subwords: Any) -> None:
    torch.manual_seed(0)
    trainer = training.Trainer(training.build_model(TINY, len(subwords)), TINY)
    batch = batches.collate(examples)
    losses = [trainer.step(batch).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.2


def test_backend_that_cannot_run_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    missing = [name for name, status in dl.backends().items() if not status.available]
    if not missing:
        pytest.skip("every backend runs on this machine")
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--backend", missing[0], "--data", "builtin"])
    assert f"--backend {missing[0]}: {dl.backends()[missing[0]].detail}" in " ".join(capsys.readouterr().err.split())
