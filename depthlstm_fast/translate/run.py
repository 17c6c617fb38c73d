"""The folder of a run of examples/translation/train.py, as far as a translation needs it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .architectures import build_architecture, model_arguments
from .files import DamagedError, check_values, read_json, read_tensors
from .tokenizer import load_tokenizer

RECORD, TOKENIZER, MODEL = "run.json", "tokenizer.model", "model.safetensors"
PREFIX = "checkpoint-"
SIZES = ("d_model", "heads", "layers")  # of the settings in the record
Loaded = TypeVar("Loaded")


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    found = (path for path in run.glob(PREFIX + "*") if re.fullmatch(PREFIX + r"\d+", path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def whole_file(path: Path) -> Path:
    """Return ``path``.

    Raises:
        DamagedError: there is no such file.
    """
    if not path.is_file():
        raise DamagedError(f"{path.parent} must be a whole checkpoint; found no file {path.name}")
    return path


def newest_whole(run: Path, load: Callable[[Path], Loaded], says: bool = True) -> tuple[Loaded, list[Path]]:
    """Load the newest complete checkpoint of ``run``; return the result of ``load`` and the newer, damaged checkpoints.

    Args:
        load: gets a checkpoint's folder, and raises ValueError if it is damaged.
        says: name each damaged checkpoint on stderr.

    Raises:
        DamagedError: no checkpoint is complete.
    """
    found, errors = checkpoints(run)[::-1], []
    for number, folder in enumerate(found):
        try:
            loaded = load(folder)
        except ValueError as error:
            errors.append(error)
            continue
        for damage in errors if says else ():
            print(f"passed over for {folder.name}: {damage}", file=sys.stderr)
        return loaded, found[:number]
    raise DamagedError(f"run must have a whole checkpoint; {errors[0]}")


def check_tensors(what: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that ``tensors`` have the names and the shapes ``shapes``.

    Raises:
        ValueError: they have not.
    """
    if tensors.keys() != shapes.keys():
        raise ValueError(
            f"tensors must be the {what}'s; they differ in {', '.join(sorted(tensors.keys() ^ shapes.keys()))}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} of the {what} must have the shape {shape}; found {tuple(tensors[name].shape)}")


@torch.no_grad()
def load_parameters(
    model: nn.Module, tensors: dict[str, Tensor], like: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Copy ``tensors`` into the parameters of their names.

    Args:
        like: makes of a parameter and its whole tensor what is copied, where a process holds a part of the parameter.

    Raises:
        ValueError: the names or the shapes are not those of the model's parameters.
    """
    parameters = dict(model.named_parameters())
    check_tensors("model", tensors, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name] if like is None else like(parameter, tensors[name]))


def load_vocabulary(run: Path) -> Any:
    """Return the tokenizer of a run that has a checkpoint.

    Raises:
        ValueError: ``run`` is not the folder of a run, or has no checkpoint, or its vocabulary is damaged.
    """
    missing = [name for name in (RECORD, TOKENIZER) if not (run / name).is_file()]
    if missing:
        raise ValueError(f"run must be a folder that train.py --output wrote; found no {', '.join(missing)} in {run}")
    if not checkpoints(run):
        raise ValueError(f"run must have a checkpoint; found none in {run}: train.py did not get as far")
    return load_tokenizer((run / TOKENIZER).read_bytes(), str(run / TOKENIZER))


def load_weights(run: Path, model: nn.Module) -> None:
    """Copy the newest complete checkpoint of ``run`` into ``model``.

    Raises:
        DamagedError: no checkpoint is complete.
    """
    newest_whole(run, lambda folder: load_parameters(model, read_tensors(whole_file(folder / MODEL))))


def load_model(run: Path) -> tuple[nn.Module, Any]:
    """Return the model of the newest complete checkpoint of ``run``, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: ``run`` is not the folder of a run, or one of its files is damaged.
    """
    tokenizer = load_vocabulary(run)
    path = run / RECORD
    record = read_json(path, {"settings": dict, "backend": str})
    settings = record["settings"]
    check_values(path, settings, {"architecture": str, **dict.fromkeys(SIZES, int)})
    arguments = model_arguments(len(tokenizer), *(settings[name] for name in SIZES))
    model = build_architecture(settings["architecture"], arguments, record["backend"])
    load_weights(run, model)
    return model.eval(), tokenizer
