"""The translation example's modules, imported from its folder, and its programs run as processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for package in ("sentencepiece", "rich", "polib", "safetensors", "sacrebleu"):
    pytest.importorskip(package, reason=f"the translation example needs {package}: pip install {package}")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "translation"
sys.path.insert(0, str(FOLDER))

import batches  # noqa: E402
import checkpoint  # noqa: E402
import command  # noqa: E402
import compare  # noqa: E402
import inference  # noqa: E402
import parallel  # noqa: E402
import prepare  # noqa: E402
import scores  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
import translate  # noqa: E402
from corpus import data, debian, files, lines, placeholders, splits, tokenizer  # noqa: E402
from corpus import prepared as corpus  # noqa: E402

from depthlstm_fast.translate import architectures  # noqa: E402

sys.path.remove(str(FOLDER))

__all__ = [
    "EVERY",
    "FOLDER",
    "FOUR_STEPS",
    "SMALL",
    "architectures",
    "batches",
    "checkpoint",
    "command",
    "compare",
    "corpus",
    "data",
    "debian",
    "files",
    "inference",
    "lines",
    "log_values",
    "one_line",
    "options",
    "parallel",
    "placeholders",
    "prepare",
    "program",
    "scores",
    "splits",
    "start",
    "tokenizer",
    "train",
    "training",
    "translate",
]

SMALL = training.Settings(steps=6, token_budget=128, d_model=16, heads=2, layers=1, dropout=0.1, warmup_steps=4)
EVERY = ("--evaluate-every", "2", "--checkpoint-every", "2", "--beam-size", "1")


def program(name: str) -> Any:
    """Return the program ``name``.py of the example as a module.

    A folder may share its name, and an import would take the folder.
    """
    found = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found.loader.exec_module(module)
    return module


def options(settings: training.Settings) -> list[str]:
    """Return ``settings`` as options of train.py."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(settings).items()]


# of train.py; the fixture `whole` is such a run
FOUR_STEPS = [*options(replace(SMALL, steps=4)), *EVERY]


def one_line(program: Any, arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Run ``program`` with ``arguments``; return its single line on stderr, and check for status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        program.main([str(argument) for argument in arguments])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    assert printed.startswith(f"{program.__name__}.py: "), printed
    assert printed.count("\n") == 1, printed
    return printed


def start(*command: str | Path, processes: int = 1) -> subprocess.Popen:
    """Start a program of the example with one thread each, by torchrun for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program, *arguments = map(str, command)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        [*launcher, str(FOLDER / program), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log_values(run: Path) -> list[dict]:
    """Return the lines of a run's log without the speeds, which differ between runs."""
    import json

    lines = [json.loads(line) for line in (run / checkpoint.LOG).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
