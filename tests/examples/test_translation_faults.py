"""Faults in the translation example: damaged files, full disks, closed streams.

A program prints one line, ends with status 2, and loses nothing.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from translation_helpers import (
    EVERY,
    FOLDER,
    FOUR_STEPS,
    SMALL,
    checkpoint,
    corpus,
    data,
    log_values,
    one_line,
    options,
    prepare,
    train,
    translate,
)

MORE = [*options(replace(SMALL, steps=6)), *EVERY]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b"\xff\x00 something else entirely " * 9)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (cut, empty, foreign, folder_instead)


def commands(own: Path) -> dict[str, tuple[Any, list[Any]]]:
    """Return the commands that read a corpus, continue a run, and translate with one."""
    return {
        "load": (train, [own / "corpus", "--output", own / "other", *MORE]),
        "resume": (train, [own / "corpus", "--output", own / "run", *MORE]),
        "translate": (translate, [own / "run"]),
    }


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "readers"),
    [
        *(
            (f"corpus/{name}", ("load",))
            for name in ("ids.safetensors", "tokenizer.model", "meta.json", "dev.source.txt", "test.target.txt")
        ),
        ("run/run.json", ("resume", "translate")),
        ("run/tokenizer.model", ("translate",)),
    ],
)
def test_a_damaged_file_is_named(
    name: str, readers: tuple[str, ...], damage: Callable[[Path], None], own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(own / name)
    for reader in readers:
        assert Path(name).name in one_line(*commands(own)[reader], capsys)
    assert not (own / "other").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "generators.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str,
    damage: Callable[[Path], None],
    own: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = checkpoint.checkpoints(own / "run")
    damage(new / name)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    if name == "model.safetensors":
        assert translate.main([str(own / "run")]) == 0
        printed = capsys.readouterr().err
        assert printed.startswith(f"passed over for {old.name}: {new / name}") or f"found no file {name}" in printed
        assert printed.count("\n") == 1
    assert train.main([str(own / "corpus"), "--output", str(own / "run"), *FOUR_STEPS]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("passed over for checkpoint-00000002") == 1
    assert "going on from step 2 " in printed.out
    assert log_values(own / "run") == log_values(whole / "run")
    assert [path.name for path in checkpoint.checkpoints(own / "run")] == ["checkpoint-00000002", "checkpoint-00000004"]
    assert (own / "run" / "checkpoint-00000004.damaged").is_dir()
    good = "run/checkpoint-00000004/model.safetensors"
    assert (own / good).read_bytes() == (whole / good).read_bytes()


def test_without_a_whole_checkpoint_nothing_is_lost(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoint.checkpoints(own / "run"):
        cut(path / "model.safetensors")
    before = sorted(path.name for path in (own / "run").rglob("*"))
    for reader in ("resume", "translate"):
        assert "run must have a whole checkpoint; " in one_line(*commands(own)[reader], capsys)
    assert sorted(path.name for path in (own / "run").rglob("*")) == before


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Write the result of ``change`` on the JSON in ``path``."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "reader", "message"),
    [
        ("corpus/meta.json", lambda old: [old], "load", "must hold a JSON object; found list"),
        ("corpus/meta.json", lambda old: None, "load", "must hold a JSON object; found NoneType"),
        ("corpus/meta.json", lambda old: old | {"pairs": 3}, "load", "must hold 'pairs' of type dict; found int"),
        (
            "corpus/meta.json",
            lambda old: old | {"pairs": {"train": "many"}},
            "load",
            "must hold 'train' of type int; found str",
        ),
        (
            "corpus/meta.json",
            lambda old: old | {"vocabulary": True},
            "load",
            "must hold 'vocabulary' of type int; found bool",
        ),
        (
            "corpus/meta.json",
            lambda old: old | {"vocabulary": 7},
            "load",
            "must have 7 pieces, as meta.json says; found 120",
        ),
        ("corpus/meta.json", lambda old: {}, "load", "must hold 'dataset' of type str; found none"),
        ("run/run.json", lambda old: "text", "resume", "must hold a JSON object; found str"),
        ("run/run.json", lambda old: old | {"settings": []}, "resume", "must hold 'settings' of type dict; found list"),
        (
            "run/run.json",
            lambda old: old | {"settings": {"steps": "4"}},
            "translate",
            "must hold 'steps' of type int; found str",
        ),
        (
            "run/run.json",
            lambda old: old | {"settings": {"colour": 1}},
            "translate",
            "must hold settings that train.py has; found colour",
        ),
        (
            "run/run.json",
            lambda old: old | {"backend": None},
            "translate",
            "must hold 'backend' of type str; found NoneType",
        ),
        (
            "run/checkpoint-00000004/state.json",
            lambda old: old | {"step": 3},
            "only",
            "must hold the state of its own step; found step 3",
        ),
        (
            "run/checkpoint-00000004/state.json",
            lambda old: old | {"log_bytes": "9"},
            "only",
            "must hold 'log_bytes' of type int; found str",
        ),
    ],
)
def test_json_of_another_kind_is_named(
    name: str, change: Callable[[Any], Any], reader: str, message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(own / name, change)
    if reader == "only":
        shutil.rmtree(own / "run" / "checkpoint-00000002")
        reader = "resume"
    assert str((own / name).parent) in (line := one_line(*commands(own)[reader], capsys))
    assert message in line


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model", lambda old: dict(list(old.items())[1:]), "tensors must be the model's; they differ in"),
        ("model", lambda old: {key: value[:1] for key, value in old.items()}, "of the model must have the shape"),
        ("optimizer", lambda old: dict(list(old.items())[1:]), "tensors must be the optimizer's; they differ in"),
        (
            "optimizer",
            lambda old: {key: value.reshape(-1)[:1] for key, value in old.items()},
            "of the optimizer must have the shape",
        ),
        ("generators", lambda old: {}, "tensors must be the generators's; they differ in cpu"),
        ("generators", lambda old: {"cpu": old["cpu"].repeat(2, 1)}, "cpu of the generators must have the shape"),
        ("generators", lambda old: {"cpu": old["cpu"].float()}, "generators must hold torch's states"),
    ],
)
def test_tensors_of_another_model_are_named(
    name: str, change: Callable[[Any], Any], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = checkpoint.checkpoints(own / "run")
    shutil.rmtree(old)
    path = new / f"{name}.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(path)).items()}, path)
    assert message in one_line(*commands(own)["resume"], capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda old: {key: value for key, value in old.items() if key != "dev.target.ids"},
            "must hold int32 vectors dev.target.ids",
        ),
        (
            lambda old: old | {"train.source.ids": old["train.source.ids"].long()},
            "must hold int32 vectors train.source.ids",
        ),
        (
            lambda old: old | {"train.source.ids": old["train.source.ids"][1:]},
            "must hold as many ids as the lengths of train.source",
        ),
        (
            lambda old: old | {"test.source.ids": old["test.source.ids"] + 120},
            "must hold ids below 120, the size of the vocabulary",
        ),
        (
            lambda old: old | {f"dev.source.{part}": old[f"train.source.{part}"] for part in ("ids", "lengths")},
            "as many sources as targets",
        ),
    ],
)
def test_ids_of_another_text_are_named(
    change: Callable[[Any], Any], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own / "corpus" / "ids.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(path)).items()}, path)
    assert message in one_line(*commands(own)["load"], capsys)


def test_another_tokenizer_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    model = io.BytesIO()
    texts = iter([text for pair in data.PAIRS for text in pair])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, vocab_size=120, minloglevel=2)
    for folder, reader in (("corpus", "load"), ("run", "translate")):
        (own / folder / "tokenizer.model").write_bytes(model.getvalue())
        assert "found another SentencePiece model" in one_line(*commands(own)[reader], capsys)


def test_a_log_that_was_cut_goes_on_after_its_last_whole_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own / "run" / checkpoint.LOG
    kept = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(kept + b'{"step": 2, "lo')
    assert train.main([str(own / "corpus"), "--output", str(own / "run"), *MORE]) == 0
    assert "is shorter than when the checkpoint was written" in capsys.readouterr().err
    assert path.read_bytes().startswith(kept)
    assert [line["step"] for line in log_values(own / "run") if "loss" in line] == [1, 5, 6]


def test_a_file_where_a_folder_should_be_and_a_folder_where_a_file_should_be(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    for program, arguments in (
        (prepare, ["--data", "builtin", file]),
        (train, [own / "corpus", "--output", file]),
        (train, [own / "corpus", "--output", file / "below"]),
        (train, [file, "--output", own / "other"]),
        (translate, [file]),
        (prepare, ["--source", own, "--target", own, tmp_path / "out"]),
    ):
        one_line(program, arguments, capsys)
    assert file.read_text(encoding="utf-8") == "precious"


class DiskFullError(OSError):
    """The error of the tests' full disk, distinct from a real one."""


@pytest.mark.parametrize("allowed", range(4))
def test_a_disk_that_fills_up_ends_a_run_in_one_line(
    allowed: int, own: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def full(path: Path, content: Any, really: Callable[..., None]) -> None:
        if len(written) == allowed:
            path.write_bytes(b"half")
            raise DiskFullError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        really(path, content)

    tensors, file = checkpoint.write_tensors, checkpoint.write_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", lambda path, content: full(path, content, tensors))
        patch.setattr(checkpoint, "write_file", lambda path, content: full(path, content, file))
        assert "No space left on device" in one_line(*commands(own)["resume"], capsys)
    assert [path.name for path in checkpoint.checkpoints(own / "run")] == ["checkpoint-00000002", "checkpoint-00000004"]
    assert not list((own / "run").glob("*.partial"))  # the room is given back
    assert train.main([str(own / "corpus"), "--output", str(own / "run"), *MORE]) == 0
    assert [line["step"] for line in log_values(own / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_files_that_may_not_grow(own: Path) -> None:
    """Check the system's own error for every write beyond a size: in safetensors, the log, the corpus."""

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    run = own / "run"
    size = (checkpoint.checkpoints(run)[-1] / "model.safetensors").stat().st_size
    for bound in (size - 100, 100):
        command = [sys.executable, FOLDER / "train.py", own / "corpus", "--output", run, *MORE]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, preexec_fn=limit(bound), check=False
        )
        assert done.returncode == 2, done.stderr
        assert [line for line in done.stderr.splitlines() if "training" not in line][-1].startswith("train.py: ")
        assert "Traceback" not in done.stderr
        assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-00000002", "checkpoint-00000004"]
        for path in checkpoint.checkpoints(run):
            checkpoint.read_checkpoint(path)
        for line in (run / checkpoint.LOG).read_text(encoding="utf-8").splitlines():
            json.loads(line)
    command = [sys.executable, FOLDER / "prepare.py", "--data", "builtin", own / "new"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, preexec_fn=limit(100), check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (own / "new" / corpus.META).exists()


@pytest.mark.parametrize(
    "content", [bytes(3000), b"\xff\n" * 1500, b"[1]\n" * 800, b"no JSON\n" * 400], ids=["nul", "bytes", "list", "text"]
)
def test_a_log_of_something_else_is_refused(own: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    log = own / "run" / checkpoint.LOG
    log.write_bytes(content)
    printed = one_line(train, [own / "corpus", "--output", own / "run", *MORE], capsys)
    assert "must hold JSON objects, one a line; found another line 1" in printed
    assert log.read_bytes() == content


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--d-model", "1000000000000"], ""),
        (["--forget-bias", "1e300"], "forget_bias must be at most 3.4e+38 in size; found 1e+300"),
        (["--device", "meta"], "device must be one that torch can use here; found 'meta'"),
        (["--beam-size", "9" * 30], ""),
        (["--warmup-steps", "1" + "0" * 320], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_numbers_that_no_machine_can_hold(
    own: Path, more: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*options(replace(SMALL, steps=1)), *EVERY, *more]
    assert wanted in one_line(train, [own / "corpus", "--output", own / "other", *given], capsys)
