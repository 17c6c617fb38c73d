"""The language model example: text in, tokens out, a run that a kill does not change, refused runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("sentencepiece", reason="the language model example needs sentencepiece")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "language_model"
SMALL = ("--batch", "4", "--length", "16", "--d-model", "16", "--heads", "2", "--kv-heads", "1", "--layers", "1")
PROGRAMS: dict[str, Any] = {}
STEPS = (*SMALL, "--steps", "6", "--warmup-steps", "2", "--evaluate-every", "3", "--checkpoint-every", "2")


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[Any]:
    """The example's modules; their names are free again afterwards."""
    names = ("text", "runs", "frame")
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {name: importlib.import_module(name) for name in names}
        for name in ("prepare", "train", "sample"):  # another example has programs of these names
            found = importlib.util.spec_from_file_location(f"language_model_{name}", FOLDER / f"{name}.py")
            assert found is not None
            assert found.loader is not None
            modules[name] = importlib.util.module_from_spec(found)
            found.loader.exec_module(modules[name])
        PROGRAMS.update(modules)
        yield modules
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def call(program: str, *arguments: object) -> Finished:
    """Run a program in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = PROGRAMS[program].main([str(each) for each in arguments])
    return Finished(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def corpus(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text = (Path(__file__).resolve().parents[2] / "docs").glob("*.md")
    documents = [part for page in sorted(text) for part in page.read_text(encoding="utf-8").split("\n## ")]
    for index, document in enumerate(documents):
        (folder / f"{index:03}.txt").write_text(document, encoding="utf-8")
    found = call("prepare", folder / "corpus", "--text", folder, "--vocab-size", 500)
    assert found.returncode == 0, found.stderr
    assert "500 subwords" in found.stdout
    return folder / "corpus"


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing stopped, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    found = call("train", corpus, "--output", run, *STEPS, "--dropout", 0.1)
    assert found.returncode == 0, found.stderr
    return run, found.stdout


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("dev_loss")) for line in lines(run)]


def test_text_comes_back(example: Any, corpus: Path) -> None:
    text, found = example["text"], example["text"].load_corpus(corpus)
    for written in ("  two  spaces\n\n\tand a tab", "Grüße, 日本語 🙂", "a\nb\n", "1234"):
        ids = found.tokenizer.encode(written)
        assert found.tokenizer.decode(ids) == written
        assert int(text.piece_bytes(found.tokenizer)[ids].sum()) == len(written.encode())
    assert int(text.piece_bytes(found.tokenizer)[[text.PAD, text.BOS, text.EOS]].sum()) == 1
    for name in ("train", "dev"):
        ids, sizes = getattr(found, name), found.meta[name]
        assert len(ids) == sizes["tokens"]
        assert int((ids == text.BOS).sum()) == int((ids == text.EOS).sum()) == sizes["documents"]
        total = int(text.piece_bytes(found.tokenizer)[ids].sum())
        assert total == sizes["bytes"] + sizes["documents"]
    assert list(text.cut(["a\n\nb" * 3, " \n "], 4)) == ["a\n\nba", "ba\n\nb"]


def test_docstrings_are_found(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = example["text"]
    long = " ".join(["word"] * 50)
    (tmp_path / "good.py").write_text(f'"""{long}"""\ndef f():\n    """short"""\n', encoding="utf-8")
    (tmp_path / "bad.py").write_text('def f(: """x"""', encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text(f'"""other {long}"""', encoding="utf-8")
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(text.torch, "__file__", str(tmp_path / "good.py"))
    assert list(text.read_docstrings()) == [long]


def test_bigram_is_a_distribution_and_counts(example: Any) -> None:
    text = example["text"]
    ids = torch.tensor([1, 4, 5, 4, 5, 2, 1, 4, 4, 2])
    bigram = text.Bigram(ids, 7)

    def probability(first: int, second: int) -> float:
        return math.exp(-bigram.nats(torch.tensor([[first, second]])))

    for first in range(7):  # BOS is given and never predicted
        assert math.isclose(sum(probability(first, second) for second in range(7) if second != 1)
                            + (float(bigram.rest[first] * bigram.unigrams[1])), 1.0, rel_tol=1e-9)  # fmt: skip
    assert math.isclose(probability(4, 5), (2 - 0.75) / 4 + 0.75 * 3 / 4 * 3 / 15)
    assert math.isclose(probability(3, 2), 3 / 15)  # nothing followed 3
    both = bigram.nats(torch.tensor([[1, 4, 5, 1, 4]]))
    assert math.isclose(both, -math.log(probability(1, 4) ** 2 * probability(4, 5)) / 3)


def test_run_reports_what_it_measured(example: Any, corpus: Path, whole: tuple[Path, str]) -> None:
    run, printed = whole
    text, runs = example["text"], example["runs"]
    found = text.load_corpus(corpus)
    log = lines(run)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "dev_loss" in line] == [3, 6]
    model, _ = runs.load_run(run)
    rows = text.windows(found.dev, 16)
    predicted = rows[:, 1:] != text.BOS
    logp = model(rows, document_ids=(rows == text.BOS).cumsum(1))[:, :-1].log_softmax(-1)
    nats = -logp.gather(2, rows[:, 1:, None])[..., 0][predicted].double().mean().item()
    assert math.isclose(log[-1]["dev_loss"], nats, rel_tol=1e-5)
    size = text.piece_bytes(found.tokenizer)[rows[:, 1:][predicted]].double().mean().item()
    bigram = text.Bigram(found.train, 500).nats(rows)
    assert f"depth-lstm: dev {nats:.4f} nats a token, {nats / math.log(2) / size:.4f} bits a byte" in printed
    assert f"bigram: dev {bigram:.4f} nats a token, {bigram / math.log(2) / size:.4f} bits a byte" in printed


def test_killed_run_has_the_losses_of_a_whole_one(corpus: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / "train.py"), str(corpus), "--output", str(run), *STEPS, "--dropout", "0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (run / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (run / "checkpoint.pt").exists()
    (run / "checkpoint.pt.partial").write_bytes(b"half of one")  # as a kill while writing leaves it
    found = call("train", corpus, "--output", run, *STEPS, "--dropout", 0.1)
    assert found.returncode == 0, found.stderr
    assert "going on from step" in found.stdout
    assert losses(run) == losses(whole[0])
    longer = call("train", corpus, "--output", run, *STEPS, "--dropout", 0.1, "--steps", 7)
    assert longer.returncode == 0
    assert "going on from step 6" in longer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_run_killed_ten_times_has_the_losses_of_a_whole_one(corpus: Path, tmp_path: Path, seed: int) -> None:
    steps = ("--steps", "150", "--warmup-steps", "20", "--evaluate-every", "150", "--checkpoint-every", "7")
    command = [sys.executable, str(Path(__file__).with_name("kill_runs.py")), str(FOLDER), str(seed)]
    command += [str(tmp_path / "whole"), str(tmp_path / "killed"), str(corpus), *SMALL, *steps, "--dropout", "0.1"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {"signals": [signal.SIGKILL] * 10, "last_status": 0}, found.stderr
    starts = re.findall(r"going on from step (\d+)", (tmp_path / "killed.txt").read_text(encoding="utf-8"))
    assert len(set(starts)) > 3  # kills came between checkpoints, and not before the first step alone
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "killed")) == 151


def test_other_ways_to_train(corpus: Path, tmp_path: Path) -> None:
    options = ("--connection", "pre-norm", "--schedule", "wsd", "--dtype", "bf16", "--accumulate", 2)
    found = call("train", corpus, "--output", tmp_path / "run", *STEPS, *options)
    assert found.returncode == 0, found.stderr
    assert "pre-norm: dev " in found.stdout
    rates = [line["learning_rate"] for line in lines(tmp_path / "run") if "loss" in line]
    assert rates == pytest.approx([0.0015, 0.003, 0.003, 0.003, 0.003, 0.003])


def test_learning_rates(example: Any) -> None:
    runs = example["runs"]
    cosine = runs.Settings(steps=20, warmup_steps=4, learning_rate=1.0)
    rates = [runs.learning_rate(cosine, step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.55)
    assert 0.1 < rates[-1] < 0.12
    wsd = runs.Settings(steps=20, warmup_steps=4, learning_rate=1.0, schedule="wsd")
    rates = [runs.learning_rate(wsd, step) for step in range(20)]
    assert rates[3:17] == [1.0] * 14
    assert rates[17:] == pytest.approx([0.75, 0.5, 0.25])


def test_samples_repeat(whole: tuple[Path, str]) -> None:
    run, _ = whole
    first = call("sample", run, "--prompt", "The cell", "--tokens", 9, "--seed", 3)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The cell")
    assert call("sample", run, "--prompt", "The cell", "--tokens", 9, "--seed", 3).stdout == first.stdout
    cold = call("sample", run, "--temperature", 0, "--tokens", 9)
    assert cold.returncode == 0, cold.stderr


def test_what_is_amiss_is_one_line(corpus: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = whole
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in run.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in corpus.iterdir():
        (torn / path.name).write_bytes(path.read_bytes())
    (torn / "ids.pt").write_bytes(b"no tensors")
    for program, arguments, text in (
        ("prepare", (tmp_path / "x", "--text", tmp_path / "none"), "text must name files or folders; found no "),
        ("prepare", (tmp_path / "x", "--text", tmp_path / "empty"), "text must name folders with .txt or .md files"),
        ("prepare", (tmp_path / "x", "--text", tmp_path / "latin.txt"), "text must be UTF-8; found byte 3 of"),
        ("prepare", (tmp_path / "x", "--text", tmp_path / "short.txt"), "text must have enough documents"),
        ("prepare", (), "the following arguments are required: folder"),
        ("train", (tmp_path, "--output", tmp_path / "y"), "data must be a folder that prepare.py wrote; found no meta"),
        ("train", (torn, "--output", tmp_path / "y"), "data must be a whole folder of prepare.py; found "),
        ("train", (corpus, "--output", run, *STEPS), "settings must be those that"),
        ("train", (corpus, "--output", tmp_path / "y", *STEPS, "--steps", 0), "steps must be at least 1; found 0"),
        ("train", (corpus, "--output", tmp_path / "y", *STEPS, "--heads", 3), "nhead must divide d_model, 16; found 3"),
        ("train", (corpus, "--output", tmp_path / "y", *STEPS, "--length", 10**7), "length must be at most "),
        (
            "train",
            (corpus, "--output", tmp_path / "y", *STEPS, "--learning-rate", "nan"),
            "learning_rate must be above",
        ),
        ("train", (corpus, "--output", damaged, *STEPS, "--dropout", 0.1), "must be a whole checkpoint; found "),
        ("sample", (tmp_path,), "run must be a folder that train.py wrote; found FileNotFoundError"),
        ("sample", (run, "--tokens", 9999), "max_new_tokens must be at most "),
        ("sample", (run, "--top-p", 2), "top_p must be in (0, 1]; found 2.0"),
    ):
        found = call(program, *arguments)
        assert found.returncode == 2, (program, arguments, found.stderr)
        assert text in found.stderr, found.stderr
        assert found.stderr.startswith(f"{program}.py: ")
        assert found.stderr.count("\n") == 1


def test_a_folder_takes_one_process(example: Any, tmp_path: Path) -> None:
    runs = example["runs"]
    refused = pytest.raises(ValueError, match="output must be a folder that nobody trains in")
    with runs.held(tmp_path), refused, runs.held(tmp_path):
        pass
