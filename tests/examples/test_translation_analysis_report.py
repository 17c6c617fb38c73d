"""analysis_report.py: the page and its JSON are one, and one line for what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from translation_helpers import one_line, program

analyse, report = program("analyse"), program("analysis_report")


@pytest.fixture(scope="module")
def runs(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that analyse.py was given; the second says that it is pre-norm, which has one tensor of state."""
    first, second = (tmp_path_factory.mktemp(name) / "run" for name in ("first", "second"))
    shutil.copytree(whole / "run", first)
    assert analyse.main([str(first), str(whole / "corpus"), "--dev-pairs", "2"]) == 0
    shutil.copytree(first, second)
    found = json.loads((second / "analysis.json").read_text(encoding="utf-8"))
    found["settings"]["architecture"] = "pre-norm"
    for row in found["layers"]:
        for kind in ("ridge", "dropped"):
            row[kind]["r2"] = {part: values[:1] for part, values in row[kind]["r2"].items()}
            row[kind]["dev_loss"] += 0.5
    (second / "analysis.json").write_text(json.dumps(found), encoding="utf-8")
    return [first, second]


def test_the_page_is_that_of_its_json(runs: list[Path], tmp_path: Path) -> None:
    assert report.main([*map(str, runs), "--docs", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linearisation.json", "linearisation.md"]
    page = (tmp_path / "linearisation.md").read_text(encoding="utf-8")
    text = (tmp_path / "linearisation.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert page == report.markdown(found)
    assert not any(str(run) in page + text for run in runs)
    assert "are of the first 2 of the" in page
    first, second = found["models"]
    for model in found["models"]:
        full = model["full"]["dev_loss"]
        for row in model["layers"]:
            loss = row["ridge"]["dev_loss"]
            assert f"| {loss:.3f} | {loss - full:+.3f} |" in page
            assert f"{row['stack']} {row['layer'] + 1} |" in page
    rows = [row for row in second["layers"] if row["stack"] == "encoder"]
    rise = sum(row["dropped"]["dev_loss"] - second["full"]["dev_loss"] for row in rows) / len(rows)
    assert f"in the pre-norm (leaving it out: {rise:.3f})" in page
    assert first["test"]["BLEU"] == report.read_run(runs[0])["test"]["BLEU"]


def test_a_page_of_one_model_says_so(runs: list[Path]) -> None:
    models = [report.read_run(run) for run in runs]
    said = "What another model of this size loses is not measured."
    assert said in report.markdown({"models": models[:1]})
    assert said not in report.markdown({"models": models})


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    found = json.loads((docs / "linearisation.json").read_text(encoding="utf-8"))
    assert (docs / "linearisation.md").read_text(encoding="utf-8") == report.markdown(found)


def test_translations_worse_than_the_sources_are_named(runs: list[Path]) -> None:
    models = [report.read_run(run) for run in runs]
    for bleu, said in ((-1.0, True), (1.0, False)):
        for model in models:
            model["test"]["BLEU"] = model["copied"]["BLEU"] + bleu
        assert ("None of them translates" in report.markdown({"models": models})) == said


def test_what_is_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = ["--docs", tmp_path / "docs"]
    assert "found no analysis.json" in one_line(report, [tmp_path, *docs], capsys)
    other: dict[str, Any] = json.loads((runs[1] / "analysis.json").read_text(encoding="utf-8"))
    shutil.copytree(runs[1], tmp_path / "other")
    for change, words in (
        ({"settings": {**other["settings"], "d_model": 32}}, "run must have the size, the data and the settings"),
        ({"layers": []}, "analysis.json must be what analyse.py wrote"),
    ):
        (tmp_path / "other" / "analysis.json").write_text(json.dumps({**other, **change}), encoding="utf-8")
        assert words in one_line(report, [runs[0], tmp_path / "other", *docs], capsys)
    assert not (tmp_path / "docs").exists()
