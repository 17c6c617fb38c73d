"""A run: its settings, its model, and its folder, which is whole after a kill at any moment."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from text import BOS, EOS, PAD, TOKENIZER, load_tokenizer, write_whole
from torch import Tensor, nn

import depthlstm_fast as dl

RECORD, CHECKPOINT, LOG = "run.json", "checkpoint.pt", "log.jsonl"
SCHEDULES, DTYPES = ("cosine", "wsd"), ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the defaults suit some megabytes of text and two CPU cores.

    A step takes ``accumulate`` batches of ``batch`` rows of ``length`` tokens. The rate rises for ``warmup_steps`` and
    falls to a tenth by a cosine, or with "wsd" stays and falls to nothing over the last fifth.

    Raises:
        ValueError: a number or name is invalid.
    """

    steps: int = 400
    batch: int = 16
    length: int = 128
    accumulate: int = 1
    connection: str = "depth-lstm"
    d_model: int = 192
    heads: int = 6
    kv_heads: int = 3
    layers: int = 4
    positions: str = "rope"
    dropout: float = 0.0
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_steps: int = 40
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dtype: str = "fp32"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("accumulate", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; found {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0; found {getattr(self, name)}")
        for name, names in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}; found {getattr(self, name)!r}")


def build_model(settings: Settings, vocabulary: int) -> dl.LanguageModel:
    """A new model, whose weights depend on the settings alone.

    Pre-norm and the others have a SwiGLU network, the depth-wise LSTM none; the matrices are about as many.
    """
    torch.manual_seed(settings.seed)
    try:
        return dl.LanguageModel(
            vocabulary, settings.d_model, settings.heads, settings.layers, kv_heads=settings.kv_heads,
            positions=settings.positions, connection=settings.connection, ffn="swiglu", norm="rms",
            dropout=settings.dropout, max_len=max(1024, settings.length), pad_id=PAD, eos_id=EOS,
            device=settings.device,
        )  # fmt: skip
    except RuntimeError as error:  # torch's, for a device that it has not
        raise ValueError(f"device must be one that torch can use; found {settings.device!r}: {error}") from None


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of step number ``step``, counted from 0."""
    rise = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "wsd":
        return settings.learning_rate * rise * min(1.0, (settings.steps - step) / max(1, settings.steps // 5))
    done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * done))


def rows_of_step(ids: Tensor, settings: Settings, step: int, part: int) -> Tensor:
    """Rows (batch, length) at places that depend on the seed, the step and the part of it alone."""
    generator = torch.Generator().manual_seed(settings.seed + 1000003 * (step * settings.accumulate + part + 1))
    first = torch.randint(0, len(ids) - settings.length + 1, (settings.batch,), generator=generator)
    return ids[first[:, None] + torch.arange(settings.length)]


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out of it until this one ends, in any way.

    Raises:
        ValueError: another process trains in it.
    """
    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output must be a folder that nobody trains in; found a process in {run}") from None
        yield
    finally:
        os.close(handle)


def start(run: Path, settings: Settings, digest: str, tokenizer: Any) -> None:
    """Write what belongs to the run, or hold it against what is there; "steps" may have grown.

    Raises:
        ValueError: the run was started with other settings or other data.
    """
    record = {"settings": asdict(settings), "data": digest}
    if (run / RECORD).is_file():
        kept = read_record(run)
        then, now = ({**each["settings"], "data": each["data"]} for each in (kept, record))
        differing = [
            f"{name} was {then.get(name)!r}" for name in now if name != "steps" and then.get(name) != now[name]
        ]
        if differing:
            raise ValueError(f"settings must be those that {run} was started with: {', '.join(differing)}")
    write_whole(run / TOKENIZER, tokenizer.serialized_model_proto())
    write_whole(run / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def read_record(run: Path) -> dict[str, Any]:
    """Raises ValueError where ``run`` has no record of train.py."""
    try:
        record = json.loads((run / RECORD).read_bytes())
        Settings(**record["settings"])
        return {"settings": record["settings"], "data": record["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run must be a folder that train.py wrote; found {type(error).__name__} in {run}") from None


def save(run: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, lines: list[dict]) -> None:
    """Write the checkpoint of ``step`` in place of the last one, and then the log's lines up to it."""
    content = io.BytesIO()
    state = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict(), "log": json.dumps(lines)}
    torch.save(state, content)
    write_whole(run / CHECKPOINT, content.getvalue())
    write_whole(run / LOG, "".join(json.dumps(line) + "\n" for line in lines).encode())


def load(run: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> tuple[int, list[dict]]:
    """Load the checkpoint, and return its step and the log's lines; (0, []) where there is none yet.

    Raises:
        ValueError: the checkpoint is damaged, or another model's.
    """
    if not (run / CHECKPOINT).is_file():
        return 0, []
    try:
        state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        if optimiser is not None:
            optimiser.load_state_dict(state["optimiser"])
        return state["step"], json.loads(state["log"])
    except Exception as error:  # noqa: BLE001 - torch raises a dozen kinds for a damaged file
        name = type(error).__name__
        raise ValueError(
            f"{run / CHECKPOINT} must be a whole checkpoint; found {name}: remove it to begin anew"
        ) from None


def load_run(run: Path, device: str = "cpu") -> tuple[dl.LanguageModel, Any]:
    """The model of a run, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: ``run`` is no folder of train.py, or has no checkpoint.
    """
    record = read_record(run)
    if not (run / CHECKPOINT).is_file():
        raise ValueError(f"run must have a checkpoint; found none in {run}: train.py did not get as far")
    tokenizer = load_tokenizer((run / TOKENIZER).read_bytes())
    model = build_model(Settings(**{**record["settings"], "device": device}), len(tokenizer))
    load(run, model)
    return model.eval(), tokenizer


def paragraph(
    model: dl.LanguageModel, tokenizer: Any, prompt: str, tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """A sample that goes on from ``prompt``."""
    ids = torch.tensor([[BOS, *tokenizer.encode(prompt)]], device=model.embedding.weight.device)
    generator = torch.Generator(ids.device).manual_seed(seed)
    drawing: dict[str, Any] = (
        {"temperature": temperature, "top_p": top_p, "generator": generator} if temperature else {}
    )
    found = model.generate(ids, tokens, **drawing)
    return prompt + tokenizer.decode([token for token in found[0].tolist() if token not in (PAD, EOS)])
