"""The scores of a run in each precision: each against a translation made here, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_cpp
from translation_helpers import checkpoint, corpus, inference, prepare, program, scores

import depthlstm_fast as dl

pytestmark = needs_cpp


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = program("precision")
    monkeypatch.setattr(module, "MAX_LENGTH", 8)  # what has not learned translates at length
    return module


def test_scores_are_those_of_the_translations(precision: Any, whole: Path) -> None:
    model, subwords = checkpoint.load_model(whole / "run")
    pairs = corpus.load_corpus(whole / "corpus").texts["test"]
    sources, references = zip(*pairs, strict=True)
    for beams in (1, 2):
        plain = inference.translate_all(model, subwords, sources, 8, beams, batch_size=2)
        found = precision.measure(model, subwords, pairs, beams, 2)
        assert [(result.dtype, result.output_dtype) for result in found] == list(precision.PRECISIONS)
        for result in found:
            served = dl.compile_decoder(model, result.dtype, result.output_dtype)
            translations = inference.translate_all(served, subwords, sources, 8, beams, batch_size=2)
            bleu, chrf = scores.corpus_scores(translations, references)
            assert (result.bleu, result.chrf) == (bleu.value, chrf.value)
            assert result.megabytes == served.nbytes / 1e6
            assert result.beams == beams
            assert result.speed > 0
            same = [a == b for a, b in zip(translations, plain, strict=True)]
            assert result.equal == 100 * sum(same) / len(same)


def test_tokens_and_seconds_are_counted(precision: Any, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, subwords = checkpoint.load_model(whole / "run")
    served = precision.Timed(model, "int8", "float32")
    clock = iter((1.0, 1.5, 7.0, 9.0))
    monkeypatch.setattr(precision.time, "process_time", lambda: next(clock))
    said = 0
    for line in ("The dog.", "A cat reads."):
        inference.translate(served, subwords, [line, ""], 8)
        source = torch.tensor([[*subwords.encode(line), 2]])
        said += int((dl.compile_decoder(model, "int8", "float32").generate(source, 8) != 0).sum())
    assert (served.tokens, served.seconds) == (said, 2.5)


def test_the_table_has_a_row_for_each(precision: Any, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precision.main([str(whole / "run"), str(whole / "corpus"), "--lines", "1", "--beams", "1", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 lines of the test set, 8 at once"
    assert printed[2].startswith("| matrices | output layer | beams | BLEU | chrF | as float32 | tokens/s | MB |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed[4:]]
    assert [tuple(row[:3]) for row in rows] == [(*each, beams) for beams in "13" for each in precision.PRECISIONS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lines", "0"], "lines must be at least 1; found 0"),
        (["--beams", "1", "0"], "beams must be at least 1; found 0"),
        (["--batch-size", "0"], "batch_size must be at least 1; found 0"),
        (["--beams", "5000"], "beam_size must be at most 4096; found 5000"),
    ],
)
def test_wrong_options_end_in_one_line(
    arguments: list[str], message: str, precision: Any, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        precision.main([str(whole / "run"), str(whole / "corpus"), *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"precision.py: {message}\n"


def test_another_text_is_refused(
    precision: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.prepare(tmp_path / "other", "builtin", vocab_size=110)
    with pytest.raises(SystemExit) as stopped:
        precision.main([str(whole / "run"), str(tmp_path / "other")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("precision.py: data must be the folder that ")
