"""The translation example by torchrun.

Two gloo processes train as one does, and continue where they were stopped.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from translation_helpers import SMALL, checkpoint, log_values, options, start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

# no dropout, because processes draw their own
SETTINGS = replace(SMALL, dropout=0.0, accumulate=2)
EVERY = ("--evaluate-every", "3", "--checkpoint-every", "3", "--beam-size", "1")


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("single") / "run"
    finish(start("train.py", folder, "--output", run, *options(SETTINGS), *EVERY))
    return run


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for a process that must succeed; return its output."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


@pytest.mark.parametrize("architecture", ["depth-lstm", pytest.param("pre-norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_match_one_and_resume(
    kind: str, architecture: str, folder: Path, single: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, architecture=architecture)
    if architecture != "depth-lstm":
        single = tmp_path / "single"
        finish(start("train.py", folder, "--output", single, *options(settings), *EVERY))
    run, half = tmp_path / "run", tmp_path / "half"
    for path, steps in ((run, 6), (half, 3), (half, 6)):
        chosen = options(replace(settings, steps=steps))
        output, _ = finish(
            start("train.py", folder, "--output", path, *chosen, *EVERY, "--parallel", kind, processes=2)
        )
        assert output.count("test BLEU") == 1  # by the first process alone
    assert "going on from step 3" in output
    alone, together, resumed = (
        [line for line in log_values(path) if "test" not in line] for path in (single, run, half)
    )
    assert resumed == together
    assert len(alone) == len(together) == 8
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=2e-4)
    state, _ = checkpoint.read_checkpoint(checkpoint.checkpoints(run)[-1])
    assert len(state["optimizer"]) == 3 * len(state["model"])
    last = [checkpoint.read_checkpoint(checkpoint.checkpoints(path)[-1])[0]["model"] for path in (single, run)]
    assert last[0].keys() == last[1].keys()
    for name, tensor in last[0].items():
        if name.endswith(("in_proj.bias", "kv_proj.bias", "in_proj_bias")):
            continue  # keys' biases have only rounding as gradient, and Adam makes steps of it
        torch.testing.assert_close(last[1][name], tensor, rtol=0.02, atol=2e-4)


def test_torchrun_without_parallel_is_refused(folder: Path, tmp_path: Path) -> None:
    process = start("train.py", folder, "--output", tmp_path / "run", *options(SETTINGS), processes=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "train.py: parallel must be ddp or fsdp2 under torchrun" in errors
