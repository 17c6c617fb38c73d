"""Runs of the translation example: prepare, train, stop at any moment, continue, translate; and refused runs."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from translation_helpers import (
    FOLDER,
    SMALL,
    checkpoint,
    corpus,
    data,
    debian,
    inference,
    log_values,
    options,
    prepare,
    splits,
    start,
    train,
    translate,
)


@pytest.fixture(scope="module")
def unbroken(prepared: corpus.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run of SMALL."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train.run_training(prepared, SMALL, run, evaluate_every=3, checkpoint_every=2, beam_size=1)
    return run


def test_prepared_folder(folder: Path, prepared: corpus.Corpus) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta == prepared.meta
    assert meta["pairs"] == {"train": len(data.PAIRS) - 4, "dev": 2, "test": 2}
    assert (meta["vocabulary"], meta["seed"], meta["target_language"]) == (120, 0, "de")
    everything = []
    for name in corpus.SPLITS:
        pairs = data.read_aligned(folder / f"{name}.source.txt", folder / f"{name}.target.txt")
        everything += pairs
        for (source, target), pair in zip(prepared.examples[name], pairs, strict=True):
            assert source == prepared.tokenizer.encode(pair.source) + [2]
            assert target == [1] + prepared.tokenizer.encode(pair.target) + [2]
    assert sorted(everything) == sorted(data.PAIRS)


def test_split_depends_on_the_seed_alone() -> None:
    pairs = [data.Pair(f"source {number}", f"target {number}") for number in range(100)]
    assert splits.split(pairs, 0) == splits.split(pairs[::-1], 0) != splits.split(pairs, 1)
    assert {name: len(chosen) for name, chosen in splits.split(pairs, 0).items()} == {"dev": 8, "test": 8, "train": 84}


def test_own_files_and_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, pairs: list[tuple[str, str]]) -> tuple[Path, Path]:
        paths = tmp_path / f"{name}.en", tmp_path / f"{name}.de"
        for path, texts in zip(paths, zip(*pairs, strict=True), strict=True):
            path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return paths

    files = {
        "train": write("train", data.PAIRS),
        "test": write("test", [data.PAIRS[3], ("", ""), ("Unheard of.", "Unerhört.")]),
    }
    arguments = ["--source", files["train"][0], "--target", files["train"][1]]
    arguments += ["--test-source", files["test"][0], "--test-target", files["test"][1]]
    assert prepare.main([str(tmp_path / "own"), *map(str, arguments)]) == 0
    own = corpus.load_corpus(tmp_path / "own")
    assert own.texts["test"] == [data.PAIRS[3], ("Unheard of.", "Unerhört.")]
    assert own.meta["pairs"] == {
        "train": len(data.PAIRS) - 3,
        "dev": 2,
        "test": 2,
    }  # less the test pair and two for dev
    trained = (tmp_path / "own" / "train.source.txt").read_text(encoding="utf-8").splitlines()
    assert data.PAIRS[3][0] not in trained

    monkeypatch.setattr(debian, "build", lambda language, folder: files)
    assert prepare.main([str(tmp_path / "debian"), "--data", "debian"]) == 0
    assert corpus.load_corpus(tmp_path / "debian").examples == own.examples


def test_run_logs_every_step_and_scores(unbroken: Path, prepared: corpus.Corpus) -> None:
    lines = log_values(unbroken)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7))
    assert [line["step"] for line in lines if "dev_loss" in line] == [3, 6]
    assert [line["test"] for line in lines[-2:]] == ["BLEU", "chrF"]
    assert all("version:" in line["signature"] and 0 <= line["copied"] <= 100 for line in lines[-2:])
    assert [path.name for path in checkpoint.checkpoints(unbroken)] == ["checkpoint-00000004", "checkpoint-00000006"]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resumed_run_has_the_losses_of_an_unbroken_one(
    stop: int, prepared: corpus.Corpus, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    taken = []

    def step_in(self: Any, order: Any) -> Any:
        if len(taken) == stop:
            raise StoppedError
        taken.append(self.steps)
        return whole(self, order)

    whole = train.Trainer.step_in
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step_in", step_in)
        with pytest.raises(StoppedError):
            train.run_training(prepared, SMALL, run, evaluate_every=3, checkpoint_every=2, beam_size=1)
    with open(run / checkpoint.LOG, "a", encoding="utf-8") as log:
        log.write('{"step": 99, "lo')  # half a line, as a full disk would leave it
    train.run_training(prepared, SMALL, run, evaluate_every=3, checkpoint_every=2, beam_size=1)
    assert log_values(run) == log_values(unbroken)
    model = "checkpoint-00000006/model.safetensors"
    assert (run / model).read_bytes() == (unbroken / model).read_bytes()


def test_finished_run_is_scored_again_and_can_be_lengthened(
    prepared: corpus.Corpus, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for steps in (4, 4, 6):
        train.run_training(
            prepared, replace(SMALL, steps=steps), run, evaluate_every=3, checkpoint_every=2, beam_size=1
        )
    longer = [line for line in log_values(run) if "loss" in line]
    assert longer == [line for line in log_values(unbroken) if "loss" in line]


def test_half_written_checkpoint_is_ignored_and_removed(unbroken: Path, tmp_path: Path) -> None:
    half = tmp_path / "checkpoint-00000100.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoint.checkpoints(tmp_path) == []
    checkpoint.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_the_last_checkpoint(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, numbers = checkpoint.read_checkpoint(checkpoint.checkpoints(unbroken)[-1])
    checkpoint.save_checkpoint(tmp_path, 1, state, numbers)
    calls = 0
    for allowed in range(6):  # the disk fails at each flush in turn

        def flush(path: Path, allowed: int = allowed) -> None:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise OSError("no space left on device")

        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_flush", flush)
            with pytest.raises(OSError, match="no space"):
                checkpoint.save_checkpoint(tmp_path, 2, state, numbers)
        found = checkpoint.checkpoints(tmp_path)
        # the sixth flush is that of the parent folder, after the renaming: the checkpoint exists and is complete
        assert [path.name for path in found] == ["checkpoint-00000001", "checkpoint-00000002"][
            : 1 if allowed < 5 else 2
        ]
        assert checkpoint.read_checkpoint(found[-1])[0].keys() == state.keys()
        checkpoint.remove_partial(tmp_path)


def test_run_with_other_settings_is_refused(prepared: corpus.Corpus, unbroken: Path, tmp_path: Path) -> None:
    before = (unbroken / checkpoint.LOG).read_bytes()
    with pytest.raises(ValueError, match=r"settings must be those .*: d_model was 16, found 32; seed was 0, found 1$"):
        train.run_training(prepared, replace(SMALL, d_model=32, seed=1), unbroken)
    with pytest.raises(ValueError, match="backend was 'auto', found 'reference'"):
        train.run_training(prepared, SMALL, unbroken, "reference")
    with pytest.raises(ValueError, match="data was"):
        train.run_training(replace(prepared, digest="another"), SMALL, unbroken)
    assert (unbroken / checkpoint.LOG).read_bytes() == before
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="output must be a new folder"):
        train.run_training(prepared, SMALL, tmp_path)


@pytest.mark.parametrize("architecture", ["depth-lstm", "pre-norm", "post-norm"])
def test_train_then_translate(
    architecture: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = options(replace(SMALL, steps=2, architecture=architecture))
    assert train.main([str(folder), "--output", str(tmp_path / "run"), *settings, "--beam-size", "2"]) == 0
    printed = capsys.readouterr().out
    for name in ("BLEU", "chrF"):
        line = next(line for line in printed.splitlines() if line.startswith(f"test {name}"))
        assert "of the source copied" in line
        assert "nrefs:1|" in line
        assert "version:" in line
    lines = ["The dog reads a book.", "", "Where is the river?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert translate.main([str(tmp_path / "run"), "--max-length", "8", "--batch-size", "2", "--beam-size", "2"]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert len(printed) == 4
    assert printed[1] == printed[3] == ""
    model, subwords = checkpoint.load_model(tmp_path / "run")
    assert printed[:3] == inference.translate(model, subwords, lines, max_length=8, beam_size=2)
    assert inference.translate_all(model, subwords, lines, 8, 2, batch_size=1) == inference.translate_all(
        model, subwords, lines, 8, 2
    )


def test_bad_input_gives_one_line_and_exit_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three, two, empty = (tmp_path / name for name in ("three.en", "two.de", "empty"))
    three.write_text("One thing.\nTwo things.\nThree things.\n", encoding="utf-8")
    two.write_text("Ein Ding.\nZwei Dinge.\n", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    prepared, run = str(tmp_path / "prepared"), str(tmp_path / "run")
    small = options(SMALL)
    cases: list[tuple[Any, list[Any], str]] = [
        (prepare, [prepared, "--source", three, "--target", two], "equally many lines; found 3"),
        (prepare, [prepared, "--source", three], "source and target must be given together"),
        (prepare, [prepared, "--dev-source", three, "--dev-target", three], "must be given with files for dev"),
        (prepare, [prepared, "--source", empty, "--target", empty], "found 0"),
        (prepare, [prepared, "--source", tmp_path / "none", "--target", two], "none"),
        (prepare, [prepared, "--data", "builtin", "--language", "fr"], "language must be 'de'"),
        (prepare, [prepared, "--data", "builtin", "--vocab-size", "30000"], "vocab_size must be at most"),
        (
            prepare,
            [prepared, "--data", "builtin", "--vocab-size", "20"],
            "vocab_size must hold a piece for every character",
        ),
        (
            train,
            [tmp_path / "none", "--output", run],
            "data must be a folder that prepare.py wrote; found no meta.json",
        ),
        (train, [folder, "--output", run, "--heads", "3"], "divi"),
        (train, [folder, "--output", run, "--steps", "0"], "steps must be at least 1; found 0"),
        (train, [folder, "--output", run, *small, "--parallel", "ddp"], "parallel must be 'none' outside torchrun"),
        (train, [folder, "--output", run, *small, "--checkpoint-every", "0"], "checkpoint_every must be at least 1"),
        (translate, [tmp_path / "none"], "found no run.json, tokenizer.model"),
        (train, [folder], "the following arguments are required: --output"),
        (train, [folder, "--output", run, "--steps", "1e3"], "argument --steps: invalid int value: '1e3'"),
        (train, [folder, "--output", run, "--seed", "9" * 20], "seed must fit 64 bits; found 999"),
        (train, [folder, "--output", ""], "argument --output: must be a path; found ''"),
        (train, [folder, "--output", "/dev/null", *small], "/dev/null must be a folder; found something else of"),
        (prepare, [""], "argument folder: must be a path; found ''"),
        (prepare, ["/dev/null", "--data", "builtin"], "/dev/null must be a folder; found something else of that name"),
        (prepare, [run, "--data", "builtin", "--vocab-size", "0"], "vocab_size must be at least 1; found 0"),
    ]
    for program, arguments, message in cases:
        with pytest.raises(SystemExit) as raised:
            program.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert raised.value.code == 2, message
        assert message in printed.err
        assert printed.err.count("\n") == 1, printed.err
    assert not Path(run).exists()


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_losses(folder: Path, tmp_path: Path) -> None:
    settings = options(replace(SMALL, steps=400))
    arguments = [*settings, "--evaluate-every", "40", "--checkpoint-every", "1", "--beam-size", "1"]
    whole = start("train.py", folder, "--output", tmp_path / "whole", *arguments)
    assert whole.wait(300) == 0, whole.communicate()[1]

    moments, run, kills = random.Random(0), tmp_path / "killed", 0
    while kills < 10:
        process = start("train.py", folder, "--output", run, *arguments)
        before = {path.name for path in checkpoint.checkpoints(run)}
        while process.poll() is None and {path.name for path in checkpoint.checkpoints(run)} <= before:
            time.sleep(0.005)  # importing torch takes most of the time, so wait until training runs
        time.sleep(moments.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, process.communicate()[1]
        kills += 1
        for path in checkpoint.checkpoints(run):
            checkpoint.read_checkpoint(path)
    last = start("train.py", folder, "--output", run, *arguments)
    output, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert "going on from step" in output
    assert log_values(run) == log_values(tmp_path / "whole")


def test_one_process_at_a_time_trains_in_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(folder), "--output", str(tmp_path / "run"), *options(replace(SMALL, steps=1))]
    with checkpoint.held(tmp_path / "run"), pytest.raises(SystemExit) as stopped:
        train.main(command)
    assert stopped.value.code == 2
    assert "a process at work" in capsys.readouterr().err
    assert train.main(command) == 0  # free again


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "nowhere", "device must be"),
        ("--learning-rate", "nan", "learning_rate must be above 0"),
        ("--clip-norm", "0", "clip_norm must be above 0"),
        ("--warmup-steps", "-3", "warmup_steps must be 0 or more"),
        ("--forget-bias", "nan", "forget_bias must be finite"),
    ],
)
def test_numbers_that_make_no_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main([str(folder), "--output", str(tmp_path / "run"), option, value])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_translate_takes_any_bytes_and_any_length(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main([str(folder), "--output", str(run), *options(replace(SMALL, steps=1))]) == 0
    source = b"date\n\xff\xfe bad\n" + b"good day " * 3000 + b"\nname\n"
    command = [sys.executable, str(FOLDER / "translate.py"), str(run), "--max-length", "3"]
    done = subprocess.run(
        command, input=source, capture_output=True, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"\n") == 4
    assert b"is cut to the model's 1023" in done.stderr
    wrong = subprocess.run([*command, "--batch-size", "0"], input=source, capture_output=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert b"batch_size must be at least 1; found 0" in wrong.stderr
