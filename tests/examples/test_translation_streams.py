"""The translation example's programs and their surroundings.

The tests cover closed, closing and limited streams, interrupts, and missing docstrings.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from translation_helpers import (
    EVERY,
    FOLDER,
    SMALL,
    corpus,
    log_values,
    options,
    prepare,
    program,
    start,
    train,
    translate,
)

PROGRAMS = (
    "prepare", "train", "translate", "compare", "study", "study_report", "debian", "analyse", "analysis_report",
    "precision",
)  # fmt: skip
GREEDY = ("--beam-size", "1", "--max-length", "2")


def refuse(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_without_docstrings(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "study_report":
        pytest.importorskip("matplotlib")
    module = program(name)
    monkeypatch.setattr(module, "__doc__", None)  # as under python -OO
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert not stopped.value.code
    assert "usage:" in capsys.readouterr().out


def shell(command: str, *arguments: Any, **environment: str) -> tuple[int, str]:
    """Run ``command`` in bash, with ``arguments`` as ``$1`` and so on.

    Returns its status and its output on stderr.
    """
    script = ["bash", "-c", command, "bash", *map(str, arguments)]
    done = subprocess.run(
        script, capture_output=True, text=True, env=os.environ | environment | {"TERM": "dumb"}, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("ending", [">&- 2>&- <&-", "> /dev/full 2> /dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_a_run_does_not_mind_who_reads_what_it_prints(ending: str, whole: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        FOLDER / "train.py",
        whole / "corpus",
        "--output",
        tmp_path / "run",
        *options(replace(SMALL, steps=4)),
        *EVERY,
    ]
    status, errors = shell(f'"$@" {ending}', *command)
    assert status == 0, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors
    assert log_values(tmp_path / "run") == log_values(whole / "run")


def test_scores_are_kept_whatever_the_terminal_can_show(whole: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        FOLDER / "train.py",
        whole / "corpus",
        "--output",
        tmp_path / "run",
        *options(replace(SMALL, steps=4)),
        *EVERY,
    ]
    status, errors = shell('"$@"', *command, PYTHONIOENCODING="ascii")
    assert status == 0, errors
    assert [line["test"] for line in log_values(tmp_path / "run")[-2:]] == ["BLEU", "chrF"]


def test_scores_are_kept_before_anything_is_printed(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = log_values(own / "run")
    monkeypatch.setattr(train, "print_examples", refuse)
    with pytest.raises(PermissionError):
        train.score_test_set(corpus.load_corpus(own / "corpus"), own / "run", 1, "cpu")
    assert log_values(own / "run") == before + before[-2:]


def test_translate_into_streams_that_are_closed_or_close(whole: Path) -> None:
    command = [sys.executable, FOLDER / "translate.py", whole / "run", *GREEDY, "--batch-size", "1"]
    assert shell('"$@" <&-', *command) == (2, "translate.py: standard input must be open; found it closed\n")
    assert shell('echo dog | "$@" >&-', *command) == (
        2,
        "translate.py: standard output must be open; found it closed\n",
    )
    assert shell('yes dog | head -2000 | "$@" | head -1; exit ${PIPESTATUS[2]}', *command) == (141, "")
    status, errors = shell('echo dog | "$@" > /dev/full', *command)
    assert (status, errors.count("\n")) == (2, 1)
    assert "No space left on device" in errors


@pytest.mark.parametrize("program", [prepare, train, translate])
def test_an_interrupt_ends_a_program_without_a_word(
    program: Any, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    name = {prepare: "read_named", train: "load_corpus", translate: "load_model"}[program]
    monkeypatch.setattr(program, name, interrupt)
    arguments = {prepare: [own / "x"], train: [own / "corpus", "--output", own / "x"], translate: [own / "run"]}[
        program
    ]
    with pytest.raises(SystemExit) as stopped:
        program.main(list(map(str, arguments)))
    assert stopped.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_interrupted_while_it_starts_and_while_it_trains(whole: Path, tmp_path: Path) -> None:
    arguments = [whole / "corpus", "--output", tmp_path / "run", *options(replace(SMALL, steps=100_000)), *EVERY]
    for until in (None, tmp_path / "run" / "checkpoint-00000004"):
        process = start("train.py", *arguments)
        time.sleep(0.7)  # torch is being imported
        while until and process.poll() is None and not until.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
