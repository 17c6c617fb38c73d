"""The folder of a run: its record, its tokenizer, its log and its last two checkpoints, whole at every moment.

A checkpoint is written to a folder ``*.partial``, flushed to the disk and then renamed, which either has happened or has not. One that is
no longer wanted is renamed back before it is removed. So a folder ``checkpoint-00000100`` is complete, whenever the process was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corpus import Corpus
from tokenizer import load_tokenizer, safetensors_torch
from torch import Tensor, nn
from training import Settings, Trainer, build_model, load_parameters, usable_device

RECORD, TOKENIZER, LOG = "run.json", "tokenizer.model", "log.jsonl"
PREFIX, PARTIAL = "checkpoint-", ".partial"
PARTS = ("model", "optimizer", "generators")
KEPT = 2


def _flush(path: Path) -> None:
    """Have the file or folder ``path`` on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that it holds all of ``content`` or what it held before."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content)
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


class Log:
    """A file of JSON lines; floats are written so that reading gives the same number.

    Args:
        path: the file; it is cut to its first ``size`` bytes.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self.file.truncate(size)

    def write(self, **values: Any) -> None:
        """Append one line."""
        self.file.write((json.dumps(values, ensure_ascii=False) + "\n").encode())

    def flush(self) -> int:
        """Have all lines on the disk; returns the file's size in bytes."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other processes out of the folder ``run``, which is made where it is missing; however this one ends, it is free then.

    Raises:
        ValueError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output must be a folder that nobody is training in; found a process at work in {run}") from None
        yield
    finally:
        os.close(handle)


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(path for path in run.glob(PREFIX + "*") if path.is_dir() and path.suffix != PARTIAL)


def remove_partial(run: Path) -> None:
    """Remove what a killed process left half done."""
    for path in run.glob("*" + PARTIAL):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_checkpoint(run: Path, step: int, state: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> Path:
    """Write ``state`` (``Trainer.state()``) and ``numbers`` as the checkpoint of ``step``, and remove all but the last two."""
    final = run / f"{PREFIX}{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    partial.mkdir()
    for part in PARTS:
        path = partial / f"{part}.safetensors"
        safetensors_torch().save_file({name: tensor.contiguous() for name, tensor in state[part].items()}, path)
        _flush(path)
    write_file(partial / "state.json", (json.dumps({"step": step} | numbers, indent=1) + "\n").encode())
    os.rename(partial, final)
    _flush(run)
    for old in checkpoints(run)[:-KEPT]:
        os.rename(old, old.with_name(old.name + PARTIAL))
    remove_partial(run)
    return final


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the state and the numbers that ``save_checkpoint`` wrote."""
    state = {part: safetensors_torch().load_file(folder / f"{part}.safetensors") for part in PARTS}
    return state, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def check_record(run: Path, record: dict[str, Any]) -> bool:
    """Return whether ``run`` has been started before.

    Raises:
        ValueError: it has, with other settings; "steps" may differ.
    """
    if not (run / RECORD).is_file():
        if run.is_dir() and any(path.suffix != PARTIAL and path.name != TOKENIZER for path in run.iterdir()):
            raise ValueError(f"output must be a new folder or one that train.py wrote; found other files in {run}")
        return False
    kept = json.loads((run / RECORD).read_text(encoding="utf-8"))
    then, now = ({**part["settings"], **{key: part[key] for key in part if key != "settings"}} for part in (kept, record))
    differing = [name for name in {**then, **now} if name != "steps" and then.get(name) != now.get(name)]
    if differing:
        found = "; ".join(f"{name} was {then.get(name)!r}, found {now.get(name)!r}" for name in differing)
        raise ValueError(f"settings must be those that {run} was started with: {found}")
    return True


def start_run(run: Path, record: dict[str, Any], corpus: Corpus) -> None:
    """Make the folder of a new run; the record comes last, so that a run that has one is whole."""
    run.mkdir(parents=True, exist_ok=True)
    write_file(run / TOKENIZER, corpus.tokenizer.serialized_model_proto())
    write_file(run / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def resume(run: Path, trainer: Trainer) -> int:
    """Load the newest checkpoint, if there is one, into ``trainer``; returns the size of the log at that time, in bytes."""
    found = checkpoints(run)
    if not found:
        return 0
    state, numbers = read_checkpoint(found[-1])
    trainer.load_state(state, numbers["step"])
    return numbers["log_bytes"]


def load_model(run: Path, device: str = "cpu") -> tuple[nn.Module, Any]:
    """Return the model of the newest checkpoint of ``run``, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: ``run`` is not the folder of a run, or has no checkpoint yet, or ``device`` cannot be used.
    """
    missing = [name for name in (RECORD, TOKENIZER) if not (run / name).is_file()]
    if missing:
        raise ValueError(f"run must be a folder that train.py --output wrote; found no {', '.join(missing)} in {run}")
    if not (found := checkpoints(run)):
        raise ValueError(f"run must have a checkpoint; found none in {run}: train.py did not get as far")
    record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    tokenizer = load_tokenizer((run / TOKENIZER).read_bytes())
    model = build_model(Settings(**record["settings"]), len(tokenizer), record["backend"])
    load_parameters(model, safetensors_torch().load_file(found[-1] / "model.safetensors"))
    return model.to(usable_device(device)).eval(), tokenizer
