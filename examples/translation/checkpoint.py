"""The folder of a run: its record, its tokenizer, its log and its last two checkpoints, complete at every moment.

A checkpoint is written to a folder ``*.partial``, flushed to the disk and then renamed. A rename happens completely or
not at all. An old checkpoint is renamed back before it is removed. A folder ``checkpoint-00000100`` is therefore
complete after a kill at any time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from corpus.files import DamagedError, check_values, read_json, read_tensors, to_json, write_tensors
from corpus.prepared import Corpus
from torch import Tensor, nn
from training import Settings, Trainer, build_model, usable_device

from depthlstm_fast.translate.run import (
    PREFIX,
    RECORD,
    TOKENIZER,
    checkpoints,
    load_vocabulary,
    load_weights,
    newest_whole,
    whole_file,
)

LOG = "log.jsonl"
PARTIAL, DAMAGED = ".partial", ".damaged"
PARTS = ("model", "optimizer", "generators")
KEPT = 2


def _flush(path: Path) -> None:
    """Wait until the file or folder ``path`` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that it holds all of ``content`` or its old content."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content)
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


class Log:
    """A file of JSON lines; floats are written so that reading gives the same number.

    Args:
        path: the file. It is cut to its first ``size`` bytes, and to whole lines if it has fewer bytes.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._check(path, size)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        if path.stat().st_size < size:
            size = path.read_bytes().rfind(b"\n") + 1
            print(
                f"{path} is shorter than when the checkpoint was written: it goes on after {size} bytes",
                file=sys.stderr,
            )
        self.file.truncate(size)

    @staticmethod
    def _check(path: Path, size: int) -> None:
        """Raise DamagedError if the kept lines are not those of a log."""
        content = path.read_bytes()[:size] if size and path.is_file() else b""
        *whole, rest = content.split(b"\n")
        if rest and len(content) == size:
            whole.append(rest)  # a checkpoint is written after a whole line
        for number, line in enumerate(whole, 1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise DamagedError(
                    f"{path} must hold JSON objects, one a line; found another line {number}: move the file away"
                )

    def write(self, **values: Any) -> None:
        """Append one line, or nothing if the disk is full."""
        line = to_json(values).encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError:
            self.file.truncate(size)
            raise

    def flush(self) -> int:
        """Wait until all lines are on the disk; return the file's size in bytes."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other processes out of the folder ``run``, which is made if missing.

    The folder is free again when this process ends, in any way.

    Raises:
        ValueError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output must be a folder that nobody is training in; found a process at work in {run}"
            ) from None
        yield
    finally:
        os.close(handle)


def remove_partial(run: Path) -> None:
    """Remove the incomplete files of a killed process."""
    for path in run.glob("*" + PARTIAL):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_checkpoint(run: Path, step: int, state: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> Path:
    """Write ``state`` (``Trainer.state()``) and ``numbers`` as the checkpoint of ``step``; keep only the last two."""
    final = run / f"{PREFIX}{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    partial.mkdir()
    try:
        for part in PARTS:
            path = partial / f"{part}.safetensors"
            write_tensors(path, state[part])
            _flush(path)
        write_file(partial / "state.json", to_json(numbers | {"step": step}, indent=1).encode())
        os.rename(partial, final)
    except BaseException:  # the removed part makes room on a full disk for other files
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(run)
    for old in checkpoints(run)[:-KEPT]:
        os.rename(old, old.with_name(old.name + PARTIAL))
    remove_partial(run)
    return final


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the state and the numbers that ``save_checkpoint`` wrote.

    Raises:
        DamagedError: one of its files is missing, cut, or holds something else.
    """
    numbers = read_json(whole_file(folder / "state.json"), {"step": int, "log_bytes": int})
    if numbers["step"] != int(folder.name.removeprefix(PREFIX)) or numbers["log_bytes"] < 0:
        raise DamagedError(f"{folder} must hold the state of its own step; found step {numbers['step']}")
    return {part: read_tensors(whole_file(folder / f"{part}.safetensors")) for part in PARTS}, numbers


def read_record(run: Path) -> dict[str, Any]:
    """Return the record of a run, with "settings" that make ``Settings``.

    Raises:
        DamagedError: the record is cut, or train.py did not write it.
    """
    path = run / RECORD
    record = read_json(path, {"settings": dict, "backend": str, "parallel": str, "processes": int, "data": str})
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    check_values(path, record["settings"], {name: kind for name, kind in kinds.items() if name in record["settings"]})
    if unknown := sorted(record["settings"].keys() - kinds.keys()):
        raise DamagedError(f"{path} must hold settings that train.py has; found {', '.join(unknown)}")
    return record


def check_record(run: Path, record: dict[str, Any]) -> bool:
    """Return whether ``run`` has been started before.

    Raises:
        ValueError: it was started with other settings; "steps" may differ.
    """
    if not (run / RECORD).exists():
        if run.is_dir() and any(path.suffix != PARTIAL and path.name != TOKENIZER for path in run.iterdir()):
            raise ValueError(f"output must be a new folder or one that train.py wrote; found other files in {run}")
        return False
    kept = read_record(run)
    then, now = (
        {**part["settings"], **{key: part[key] for key in part if key != "settings"}} for part in (kept, record)
    )
    differing = [name for name in {**then, **now} if name != "steps" and then.get(name) != now.get(name)]
    if differing:
        found = "; ".join(f"{name} was {then.get(name)!r}, found {now.get(name)!r}" for name in differing)
        raise ValueError(f"settings must be those that {run} was started with: {found}")
    return True


def start_run(run: Path, record: dict[str, Any], corpus: Corpus) -> None:
    """Make the folder of a new run; the record comes last, so that a run with a record is complete."""
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / TOKENIZER, corpus.tokenizer.serialized_model_proto())
    write_file(run / RECORD, to_json(record, indent=1).encode())


def resume(run: Path, trainer: Trainer) -> int:
    """Load the newest complete checkpoint, if any, into ``trainer``; return the log's size in bytes at that time.

    Damaged newer checkpoints are renamed, because the run will write those steps again.

    Raises:
        DamagedError: there are checkpoints, and all are damaged.
    """
    if not checkpoints(run):
        return 0
    first = trainer.group.rank == 0

    def load(folder: Path) -> dict[str, Any]:
        state, numbers = read_checkpoint(folder)
        trainer.load_state(state, numbers["step"], numbers.get("skipped", 0))
        return numbers

    numbers, damaged = newest_whole(run, load, first)
    trainer.group.barrier()  # every process has looked at the checkpoints
    for folder in damaged if first else ():
        aside = folder.with_name(folder.name + DAMAGED)
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(folder, aside)
    return numbers["log_bytes"]


def load_model(run: Path, device: str = "cpu") -> tuple[nn.Module, Any]:
    """Return the model of the newest complete checkpoint of ``run``, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: ``run`` is not the folder of a run, or has no complete checkpoint, or ``device`` cannot be used.
    """
    tokenizer = load_vocabulary(run)
    record = read_record(run)
    model = build_model(Settings(**record["settings"]), len(tokenizer), record["backend"])
    load_weights(run, model)
    return model.to(usable_device(device)).eval(), tokenizer
