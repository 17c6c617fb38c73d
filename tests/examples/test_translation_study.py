"""The small study.

Every run is kept and found again, the gradients are those of the layers' outputs, and the page agrees with the JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from translation_helpers import (
    FOLDER,
    one_line,
    prepare,
    program,
    training,
)

pytest.importorskip("matplotlib")
sys.path.insert(0, str(FOLDER))

from study import experiment as study
from study import report as study_report

sys.path.remove(str(FOLDER))

TINY = replace(study.BASE, steps=3, token_budget=64, d_model=8, heads=2, warmup_steps=2)
SIZES: dict[str, Any] = {
    "base": TINY,
    "plan": {1: (study.FORGET_BIASES[0], "pre-norm"), 2: (study.FORGET_BIASES[0], "pre-norm", "post-norm", "deepnorm")},
    "gradient_depths": (1, 2),
    "cost_depth": 2,
    "rates": (1e-3, 2e-3),
    "seeds": (0, 1),
    "dev_pairs": 3,
    "seconds": 0.0,
}


def run_study(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Run ``study`` with the example's folder where its processes look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return study.study(*arguments, workers=1, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread.

    Such small tensors gain nothing from a second one, and waiting for it on a busy core takes seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("study") / "corpus"
    assert prepare.main(["--data", "builtin", "--vocab-size", "120", str(found)]) == 0
    return found


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("study") / "output"
    return output, run_study(folder, output, **SIZES)


def test_every_variant_is_tuned_and_run_with_every_seed(finished: tuple[Path, dict[str, Any]]) -> None:
    _, found = finished
    for layers, variants in SIZES["plan"].items():
        for variant in variants:
            grid = study_report.tuning(found, variant, layers)
            assert set(SIZES["rates"]) <= set(grid)
            runs = study_report.tuned(found, variant, layers)
            assert [run["seed"] for run in runs] == [0, 1]
            best = runs[0]
            assert best["dev_loss"] == min(run["dev_loss"] for run in grid.values())
    assert {run["backend"] for run in found["runs"] if run["variant"] in study.FORGET_BIASES} <= {"cpp", "reference"}
    assert len(found["gradients"]) == 2 * 2 * 2 * len(study.VARIANTS)
    assert {entry["variant"] for entry in found["costs"]} == set(study.VARIANTS) - set(study.FORGET_BIASES[1:])


def test_a_study_goes_on_where_it_was_stopped(
    folder: Path, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, found = finished
    gone = next((output / "runs").glob("pre-norm-1-*.json"))
    kept = json.loads(gone.read_text(encoding="utf-8"))
    gone.unlink()
    (output / "runs" / "post-norm-2-0.001-0.1.partial").write_text("{", encoding="utf-8")  # as a kill leaves it
    again = run_study(folder, output, **SIZES)
    assert again["costs"] == found["costs"]  # measured once
    assert json.loads(gone.read_text(encoding="utf-8"))["dev_loss"] == pytest.approx(kept["dev_loss"], rel=1e-5)
    assert len(again["runs"]) == len(found["runs"])
    with pytest.raises(ValueError, match="another one's runs"):
        run_study(folder, output, **(SIZES | {"seeds": (0, 1, 2)}))


def test_gradients_are_those_of_the_layers_outputs(folder: Path) -> None:
    corpus = study.load_corpus(folder)
    batch = study.collate(corpus.examples["train"][:2])
    model = training.build_model(replace(TINY, layers=3, architecture="pre-norm"), len(corpus.tokenizer), "reference")
    norms = study.layer_gradients(model, batch, "decoder")
    assert len(norms) == 3
    # only the connection's last norm and the output layer follow the last layer's output
    outputs: list[torch.Tensor] = []
    connection = model.decoder.connection
    finish = connection.finish
    connection.finish = lambda state: (outputs.append(state[0].detach().requires_grad_()), finish(state))[1]
    with torch.no_grad():
        model(batch.source, batch.target[:, :-1])
    logits = torch.nn.functional.linear(finish((outputs[-1],)), model.tgt_embedding.weight)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=0)
    (wanted,) = torch.autograd.grad(loss, outputs[-1:])
    assert norms[-1] == pytest.approx(float(wanted.norm()), rel=1e-4)


def test_the_unigram_loss_is_that_of_counts(folder: Path) -> None:
    corpus = study.load_corpus(folder)
    dev = study.dev_batches(corpus, 2, 64)
    found = study.unigram_loss(corpus, dev, 2, TINY)
    order = study.BatchOrder(corpus.examples["train"], TINY.token_budget, TINY.seed)
    seen = [id for index in range(2) for _, target in order[index] for id in target[1:]]
    tokens = [id for batch in dev for row in batch.target[:, 1:].tolist() for id in row if id != 0]
    total = len(seen) + len(corpus.tokenizer)
    wanted = -sum(torch.tensor((seen.count(id) + 1) / total).log().item() for id in tokens) / len(tokens)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_run_that_diverges_ends_without_a_dev_loss(folder: Path, tmp_path: Path) -> None:
    corpus = study.load_corpus(folder)
    wild = replace(TINY, learning_rate=1e38, clip_norm=1e30, warmup_steps=0)
    found = study.train_run(corpus, wild, study.dev_batches(corpus, 2, 64))
    assert found["dev_loss"] is None
    assert found["train_losses"] == [None]
    study.write_atomically(tmp_path / "run.json", {"variant": "post-norm", "layers": 1} | found)
    assert study.read_run(tmp_path / "run.json")["train_losses"] == [None]
    with pytest.raises(ValueError, match="JSON"):
        study.write_atomically(tmp_path / "other.json", {"loss": float("nan")})
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("content", [b"", b'{"found": ', b"[]", b"{}", b'{"variant": "pre-norm", "layers": "1"}'])
def test_damaged_files_of_a_study_are_named(
    content: bytes, finished: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "output")
    for name in ("about.json", "costs.json"):
        path = tmp_path / "output" / name
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} must "):
            run_study(folder, tmp_path / "output", **SIZES)
        path.write_bytes(whole)
    path = tmp_path / "output" / "runs" / "pre-norm-1-0.001-0.json"
    assert study.read_run(path)["layers"] == 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} must "):
        study.read_run(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"runs": 3, "settings": []}'])
def test_a_damaged_study_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.json").write_bytes(content)
    assert "study.json must " in one_line(program("study_report"), [tmp_path, "--docs", tmp_path / "docs"], capsys)
    assert not (tmp_path / "docs").exists()


def test_the_page_tells_failures_and_defeats(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, found = finished
    assert program("study_report").main([str(output), "--docs", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "study.md",
        "study.json",
        "study_gradients.png",
        "study_learning.png",
    }
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert page == study_report.markdown(json.loads((tmp_path / "study.json").read_text(encoding="utf-8")))
    changed = json.loads(json.dumps(found))
    for run in changed["runs"]:
        if run["variant"] == "post-norm":
            run["dev_loss"] = None if run["layers"] == 2 else found["unigram_loss"] + 1
        else:
            run["dev_loss"] = 0.5 if run["variant"] == "pre-norm" else 0.9
    text = "\n".join(study_report.findings(changed))
    assert text.count("pre-norm has the lowest dev cross entropy, 0.500") == 2
    assert text.count("depth-lstm, forget bias 0 +0.400") == 2
    count = sum(run["variant"] == "post-norm" for run in changed["runs"])
    assert f"{count} of {len(changed['runs'])} runs failed" in text
    broken = len(study_report.tuned(changed, "post-norm", 2))
    assert f"inf (inf to inf, {broken} of {broken} failed)" in study_report.loss_table(changed)
    for run in changed["runs"]:
        run["dev_loss"] = None
    text = "\n".join(study_report.findings(changed))
    assert "nan" not in text
    assert "pre-norm changes by no number (runs broke off)." in text


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert (docs / "study.md").read_text(encoding="utf-8") == study_report.markdown(
        json.loads((docs / "study.json").read_text("utf-8"))
    )


@pytest.mark.parametrize("name", ["study", "study_report"])
def test_a_missing_folder_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "out")] if name == "study" else ["--docs", str(tmp_path / "docs")]
    with pytest.raises(SystemExit) as stopped:
        program(name).main([str(tmp_path / "nothing"), *options])
    assert stopped.value.code == 2
    assert "found no" in capsys.readouterr().err
