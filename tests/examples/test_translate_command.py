"""`python -m depthlstm_fast.translate`: order, precisions, odd lines, faults, interrupts, streams, missing packages."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import needs_cpp
from translation_helpers import SMALL, checkpoint, data, options, train

import depthlstm_fast as dl
from depthlstm_fast.translate import __main__ as program
from depthlstm_fast.translate import command, sentences

NAME = "python -m depthlstm_fast.translate"
MARK = "\ufeff"
SHORT = ("--beam", "1", "--max-length", "5", "--batch-size", "2")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    arguments = [str(folder), "--output", str(folder / "run"), *options(SMALL), "--steps", "2", "--beam-size", "1"]
    assert train.main(arguments) == 0
    return folder / "run"


@pytest.fixture
def translated(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return the command in this process: it takes the input and the options, and returns status, stdout and stderr."""

    def call(given: bytes, *arguments: Any, where: Path = run) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
        capsys.readouterr()
        try:
            status = program.main([str(where), *SHORT, *map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return call


def sentences_of(count: int) -> list[str]:
    """Return ``count`` sentences of very different lengths, in a random order."""
    words, chosen = [word for pair in data.PAIRS for word in pair[0].split()], random.Random(0)
    return [" ".join(chosen.sample(words, chosen.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=needs_cpp), pytest.param("int8", marks=needs_cpp)]
)
def test_lines_come_in_their_order(
    dtype: str, run: Path, tmp_path: Path, translated: Callable[..., tuple[int, str, str]]
) -> None:
    given = sentences_of(command.WINDOW * 2 + 7)  # more lines than are sorted at once
    model, subwords = checkpoint.load_model(run)
    served = model if dtype == "float32" else dl.compile_decoder(model, dtype)
    wanted = [sentences.translate(served, subwords, [line], 5, 1)[0] for line in given]
    assert len(set(wanted)) > 1
    text = "".join(f"{line}\n" for line in given)
    assert translated(text.encode(), "--dtype", dtype) == (0, "".join(f"{line}\n" for line in wanted), "")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    assert translated(b"", tmp_path / "text", "--dtype", dtype)[1].splitlines() == wanted


def test_lines_of_like_length_share_a_batch(
    run: Path, monkeypatch: pytest.MonkeyPatch, translated: Callable[..., tuple[int, str, str]]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        command,
        "translate",
        lambda model, subwords, batch, *rest: (seen.append(batch), [each.upper() for each in batch])[1],
    )
    given = ["long line", "b", "another line", "c", "d" * 12]
    assert translated("\n".join(given).encode())[1].splitlines() == [line.upper() for line in given]
    assert seen == [["b", "c"], ["long line", "another line"], ["d" * 12]]


def test_odd_lines(run: Path, tmp_path: Path, translated: Callable[..., tuple[int, str, str]]) -> None:
    blank = ["", "\u200b", " \t ", "\u0301", "\0", "\u2028"]
    given = ["The dog.", *blank, "The\rdog\x0creads.", "last"]
    status, printed, errors = translated((MARK + "\r\n".join(given)).encode())
    lines = printed.split("\n")
    assert (status, errors, len(lines)) == (0, "", len(given) + 1)
    assert lines[1 : 1 + len(blank)] == [""] * len(blank)
    assert lines[0] == translated(b"The dog.\n")[1].rstrip("\n")  # without the mark
    assert translated(b"\xff the dog\n")[:2] == (0, translated("\ufffd the dog\n".encode())[1])
    for content, count in ((b"", 0), (MARK.encode(), 0), (b"\n", 1)):
        assert translated(content) == (0, "\n" * count, "")
        (tmp_path / "text").write_bytes(content)
        assert translated(b"The dog.\n", tmp_path / "text") == (0, "\n" * count, "")


def test_a_line_longer_than_the_positions_is_cut(translated: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, errors = translated(b"dog " * 3000 + b"\ncat\n")
    assert (status, printed.count("\n")) == (0, 2)
    assert errors.startswith("a line of ")
    assert errors.endswith(" subwords is cut to the model's 1023\n")
    assert errors.count("\n") == 1


def test_lines_before_a_line_that_is_no_text_are_written(
    tmp_path: Path, translated: Callable[..., tuple[int, str, str]]
) -> None:
    good = sentences_of(command.WINDOW * 2 + 5)
    wanted = translated("\n".join(good).encode())[1]
    (tmp_path / "text").write_bytes("".join(f"{line}\n" for line in good).encode() + b"caf\xe9\nlast\n")
    message = f"{NAME}: {tmp_path / 'text'} must be UTF-8; found byte 0xe9 in line {len(good) + 1}\n"
    assert translated(b"", tmp_path / "text") == (2, wanted, message)


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (ValueError("logits must be numbers;\nfound NaN"), 2, f"{NAME}: logits must be numbers; found NaN\n"),
        (RuntimeError("can't allocate memory: you tried"), 2, f"{NAME}: can't allocate memory: you tried\n"),
        (MemoryError(), 2, f"{NAME}: MemoryError\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_lines_translated_before_a_fault_are_written(
    fault: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, translated: Any
) -> None:
    def broken(model: Any, subwords: Any, batch: list[str], *rest: Any) -> list[str]:
        if "bad" in batch:
            raise fault
        return [each.upper() for each in batch]

    monkeypatch.setattr(command, "translate", broken)
    assert translated(b"a\nb\nc\nbad\nd\n") == (status, "A\nB\nC\n", message)
    assert translated(b"a\n" * 40 + b"bad\n") == (status, "A\n" * 40, message)
    assert translated(b"bad\na\n") == (status, "", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam", "0"], "beam_size must be at least 1; found 0"),
        (["--beam", "5000"], "beam_size must be at most 4096; found 5000"),
        (["--batch-size", "99999999999999999999"], "batch_size must be at most 65536; found 99999999999999999999"),
        (["--max-length", "0"], "max_length must be at least 1; found 0"),
        (["--batch-size", "-3"], "batch_size must be at least 1; found -3"),
        (["--max-length", "5000"], "max_length must be at most max_len, 1024; found 5000"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--beam", "x"], "argument --beam-size/--beam: invalid int value: 'x'"),
        (["--colour"], "unrecognized arguments: --colour"),
        ([""], "argument file: must be a path; found ''"),
        (["nowhere"], "No such file or directory: 'nowhere'"),
        (["."], "Is a directory: '.'"),
    ],
)
def test_wrong_options_end_in_one_line(arguments: list[str], message: str, translated: Any) -> None:
    status, printed, errors = translated(b"The dog.\n", *arguments)
    assert (status, printed) == (2, "")
    assert errors.startswith(f"{NAME}: ")
    assert message in errors
    assert errors.count("\n") == 1


def changed(settings: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record["settings"] |= settings
        record["settings"] = {name: value for name, value in record["settings"].items() if value is not None}
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "run must be a folder that train.py --output wrote; found no run.json"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "found no tokenizer.model"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), "must be a whole SentencePiece model; found an"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json must be whole and hold JSON; found "),
        (lambda folder: shutil.rmtree(folder / "checkpoint-00000002"), "run must have a checkpoint; found none in"),
        (lambda folder: (folder / "checkpoint-00000002/model.safetensors").unlink(), "found no file model.safetensors"),
        (changed({"architecture": "lstm"}), "architecture must be one of "),
        (changed({"d_model": "16"}), "must hold 'd_model' of type int; found str"),
        (changed({"layers": None}), "must hold 'layers' of type int; found none"),
        (changed({"layers": 2}), "tensors must be the model's; they differ in "),
        (changed({"d_model": 32}), "of the model must have the shape "),
        (changed({"heads": 3}), "nhead must divide d_model, 16; found 3"),
        (changed({"d_model": 10**12}), ""),
    ],
)
def test_a_damaged_run_ends_in_one_line(
    damage: Callable[[Path], Any], message: str, run: Path, tmp_path: Path, translated: Any
) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    status, printed, errors = translated(b"The dog.\n", where=tmp_path / "run")
    assert (status, printed, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith(f"{NAME}: ")
    assert message in errors


@needs_cpp
def test_a_model_that_the_engine_does_not_run(folder: Path, tmp_path: Path, translated: Any) -> None:
    arguments = [str(folder), "--output", str(tmp_path / "run"), *options(SMALL), "--architecture", "denseformer"]
    assert train.main([*arguments, "--steps", "1", "--beam-size", "1"]) == 0
    assert translated(b"The dog.\n", where=tmp_path / "run")[:1] == (0,)
    status, printed, errors = translated(b"The dog.\n", "--dtype", "int8", where=tmp_path / "run")
    assert (status, printed) == (2, "")
    assert errors.startswith(
        f"{NAME}: model must be one that the decode engine runs: encoder.connection is DenseFormer"
    )


def test_narrow_weights_need_the_library(monkeypatch: pytest.MonkeyPatch, translated: Any) -> None:
    monkeypatch.setattr("depthlstm_fast.backends.library.load_error", "not built")
    status, _, errors = translated(b"The dog.\n", "--dtype", "int8")
    assert (status, errors.count("\n")) == (2, 1)
    assert "dtype must be float32 without the compiled library; found 'int8': " in errors


@pytest.mark.parametrize("package", ["sentencepiece", "safetensors"])
def test_a_missing_package_is_named(package: str, run: Path) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from depthlstm_fast.translate.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, run], input="dog\n", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.endswith(f": pip install {package}\n")


def command_line(run: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "depthlstm_fast.translate", str(run), *SHORT, *arguments]


def test_the_package_does_not_import_the_command() -> None:
    script = "import sys, depthlstm_fast; assert not {'depthlstm_fast.translate', 'sentencepiece'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_streams_that_are_closed_or_close(run: Path) -> None:
    def shell(script: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", script, "bash", *command_line(run)], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    assert shell('"$@" <&-') == (2, f"{NAME}: standard input must be open; found it closed\n")
    assert shell('echo dog | "$@" >&-') == (2, f"{NAME}: standard output must be open; found it closed\n")
    assert shell('yes dog | head -2000 | "$@" | head -1; exit ${PIPESTATUS[2]}') == (141, "")
    status, errors = shell('echo dog | "$@" > /dev/full')
    assert (status, errors.count("\n")) == (2, 1)
    assert "No space left on device" in errors


def test_killed_it_leaves_whole_lines_and_a_whole_run(run: Path, tmp_path: Path, translated: Any) -> None:
    text, output = tmp_path / "text", tmp_path / "output"
    text.write_text("".join(f"{line}\n" for line in sentences_of(2000)), encoding="utf-8")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with open(output, "wb") as file:
        process = subprocess.Popen(command_line(run, str(text)), stdout=file)
        while process.poll() is None and not output.stat().st_size:
            time.sleep(0.002)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    printed = output.read_text(encoding="utf-8")
    assert printed.endswith("\n")
    count = printed.count("\n")
    assert count < 2000
    assert translated("\n".join(sentences_of(2000)[:count]).encode())[1] == printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_progress_is_for_terminals(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("dog\n" * 5, encoding="utf-8")
    outer, inner = pty.openpty()
    for arguments, shown in (({"stdout": subprocess.DEVNULL}, True), ({"stdout": inner}, False)):
        subprocess.run(command_line(run, str(text)), stdin=subprocess.DEVNULL, stderr=inner, check=True, **arguments)
        os.set_blocking(outer, False)
        printed = os.read(outer, 10_000).decode()
        assert ("5 lines, " in printed) == shown
        assert (" a second\r\n" in printed) == shown
    done = subprocess.run(command_line(run, str(text)), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    os.close(inner)
    os.close(outer)


def test_a_person_at_a_terminal_waits_for_no_second_line(run: Path) -> None:
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        command_line(run), stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.write(outer, b"The dog.\n")
    assert process.stdout is not None
    assert process.stdout.readline().endswith("\n")  # before the end of the input
    os.write(outer, b"\x04")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    os.close(inner)
    os.close(outer)
