"""Training of the translation example with a loss or a gradient that is not finite.

Training ends before a weight changes, or skips the step.
"""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from translation_helpers import (
    FOLDER,
    SMALL,
    batches,
    checkpoint,
    compare,
    corpus,
    data,
    log_values,
    one_line,
    options,
    parallel,
    start,
    train,
    training,
)

SETTINGS = replace(SMALL, steps=8, dropout=0.1)
EVERY: dict[str, int] = {"evaluate_every": 4, "checkpoint_every": 2, "beam_size": 1}


def spoil(
    monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str = "loss", value: float = math.nan, batch: int = 0
) -> None:
    """Make the loss, the gradient or the dev loss of ``steps``, counted from 1, be ``value``.

    With several batches only one of them is changed.
    """
    whole = training.Trainer.loss_sum
    calls: list[int] = []

    def loss_sum(self: Any, *arguments: Any) -> Any:
        loss = whole(self, *arguments)
        if not self.model.training:
            return loss * value if what == "dev" and self.steps in steps else loss
        calls.append(self.steps)
        bad = self.steps + 1 in steps and (calls.count(self.steps) - 1) % self.settings.accumulate == batch
        if bad and what == "gradient":  # the loss is unchanged
            parameter = next(self.model.parameters())
            return loss + Spoiled.apply(parameter, value)
        return loss * value if bad and what == "loss" else loss

    monkeypatch.setattr(training.Trainer, "loss_sum", loss_sum)


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient of ``value``."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value, ctx.shape = value, parameter.shape
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_full(ctx.shape, ctx.value), None


def strict_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, which must be JSON."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    return [
        json.loads(line, parse_constant=refuse)
        for line in (run / checkpoint.LOG).read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("what", "accumulate", "batch"),
    [("loss", 1, 0), ("loss", 2, 0), ("loss", 2, 1), ("gradient", 1, 0), ("gradient", 2, 1)],
)
def test_a_step_that_is_not_finite_changes_nothing(
    what: str, accumulate: int, batch: int, value: float, prepared: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, accumulate=accumulate)
    trainer = training.Trainer(training.build_model(settings, 120), settings)
    order = batches.BatchOrder(prepared.examples["train"], settings.token_budget, 0)
    spoil(monkeypatch, {2, 4, 5}, what, value, batch)
    trainer.step_in(order)
    before = trainer.state()
    with pytest.raises(training.DivergedError, match=r"^the (loss is -?(nan|inf)|gradient is not finite) in step 2$"):
        trainer.step_in(order)
    trainer.skip_nonfinite = 1
    result = trainer.step_in(order)
    after = trainer.state()
    assert result.skipped.startswith("the loss is" if what == "loss" else "the gradient is not finite")
    assert (trainer.steps, trainer.skipped) == (2, 1)
    for part in ("model", "optimizer"):
        assert before[part].keys() == after[part].keys()
        for name, tensor in before[part].items():
            assert torch.equal(tensor, after[part][name]), name
    assert not trainer.step_in(order).skipped
    assert trainer.skipped == 0
    assert any(not torch.equal(tensor, trainer.state()["model"][name]) for name, tensor in before["model"].items())
    assert trainer.step_in(order).skipped  # one in a row, once more
    with pytest.raises(training.DivergedError, match=r"in step 5$"):
        trainer.step_in(order)


@pytest.mark.parametrize(
    ("what", "steps", "message", "last"),
    [
        ("loss", {5}, "the loss is nan in step 5; the last good checkpoint is {run}/checkpoint-00000004", 4),
        (
            "gradient",
            {3},
            "the gradient is not finite in step 3; the last good checkpoint is {run}/checkpoint-00000002",
            2,
        ),
        ("dev", {8}, "the dev loss is nan after step 8; the last good checkpoint is {run}/checkpoint-00000006", 6),
        ("loss", {1}, "the loss is nan in step 1; there is no checkpoint yet", None),
    ],
)
def test_a_run_that_diverges_ends_with_its_good_checkpoints(
    what: str,
    steps: set[int],
    message: str,
    last: int | None,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    command = [
        folder,
        "--output",
        run,
        *options(SETTINGS),
        *(f"--{name.replace('_', '-')}={value}" for name, value in EVERY.items()),
    ]
    with monkeypatch.context() as patch:
        spoil(patch, steps, what)
        for _ in range(2):  # and once more from there
            assert one_line(train, command, capsys) == f"train.py: {message.format(run=run)}\n"
            names = [f"checkpoint-{step:08d}" for step in range(2, last + 1, 2)][-2:] if last else []
            assert [path.name for path in checkpoint.checkpoints(run)] == names
            for path in checkpoint.checkpoints(run):
                state, _ = checkpoint.read_checkpoint(path)
                assert all(
                    tensor.isfinite().all() for part in ("model", "optimizer") for tensor in state[part].values()
                )
            assert all(math.isfinite(line["loss"]) for line in strict_log(run) if "loss" in line)
    assert train.main(list(map(str, command))) == 0
    whole = tmp_path / "whole"
    assert train.main([str(folder), "--output", str(whole), *map(str, command[3:])]) == 0
    assert log_values(run) == log_values(whole)


def test_weights_that_are_not_finite_are_not_saved(
    prepared: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.Trainer.step

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        result = whole(self, *arguments, **named)
        if self.steps == 4:
            next(self.model.parameters()).data[0, 0] = math.inf
        return result

    monkeypatch.setattr(training.Trainer, "step", step)
    with pytest.raises(
        training.DivergedError, match=r"is not finite after step 4; the last good checkpoint is .*checkpoint-00000002"
    ):
        train.run_training(prepared, SETTINGS, tmp_path / "run", **(EVERY | {"evaluate_every": 100}))


@pytest.mark.parametrize("stop", [None, 4, 6])
def test_skipped_steps_are_logged_and_a_resumed_run_skips_the_same(
    stop: int | None, prepared: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {1, 4, 5, 7})
    run, straight = tmp_path / "run", tmp_path / "straight"
    train.run_training(prepared, SETTINGS, straight, **EVERY, skip_nonfinite=2)
    lines = strict_log(straight)
    assert [line["step"] for line in lines if "skipped" in line] == [1, 4, 5, 7]
    assert {line["skipped"] for line in lines if "skipped" in line} == {"the loss is nan"}
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 6, 8]
    if stop:
        train.run_training(prepared, replace(SETTINGS, steps=stop), run, **EVERY, skip_nonfinite=2)
        train.run_training(prepared, SETTINGS, run, **EVERY, skip_nonfinite=2)
        steps = [[line for line in log_values(path) if "learning_rate" in line] for path in (run, straight)]
        assert steps[0] == steps[1]
        states = [checkpoint.checkpoints(path)[-1] / "model.safetensors" for path in (run, straight)]
        assert states[0].read_bytes() == states[1].read_bytes()
    else:
        with pytest.raises(training.DivergedError, match=r"in step 5; the last good checkpoint is .*00000004$"):
            train.run_training(prepared, SETTINGS, run, **EVERY, skip_nonfinite=1)
        with pytest.raises(training.DivergedError, match=r"in step 5; "):  # the fourth counts after the restart, too
            train.run_training(prepared, SETTINGS, run, **EVERY, skip_nonfinite=1)
        with pytest.raises(ValueError, match="skip_nonfinite must be 0 or more; found -1"):
            train.run_training(prepared, SETTINGS, run, skip_nonfinite=-1)


def test_the_log_takes_no_number_that_is_not_json(tmp_path: Path) -> None:
    log = checkpoint.Log(tmp_path / "log")
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            log.write(loss=value)
    log.close()
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("what", ["loss", "gradient", "dev"])
def test_a_comparison_that_diverges_is_none(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {2}, what)
    with pytest.raises(training.DivergedError, match=r"^(reference|fused): the .* (in|after) step 2$"):
        compare.run_comparison(2, settings=SMALL, dataset=data.load_dataset("builtin"), progress=False, vocab_size=120)


def test_an_error_holds_no_model() -> None:
    """Check that an error holds no model.

    A replica that outlived its process group made some runs hang at their end.
    """
    models: list[weakref.ref[nn.Module]] = []

    def train() -> None:
        model = nn.Linear(1, 1)
        models.append(weakref.ref(model))
        raise ValueError("a cause")

    def run() -> None:
        model = nn.Linear(1, 1)
        models.append(weakref.ref(model))
        try:
            train()
        except ValueError:
            raise training.DivergedError("diverged") from None

    with pytest.raises(training.DivergedError) as caught:
        run()
    assert all(model() is not None for model in models)
    parallel.forget_frames(caught.value)
    assert [model() for model in models] == [None, None]


DRIVER = """
import math, os, sys
sys.path.insert(0, {folder!r})
import train, training
whole = training.Trainer.loss_sum
def loss_sum(self, *arguments):
    bad = self.model.training and self.steps == 2 and self.group.rank == 1
    return whole(self, *arguments) * (math.nan if bad else 1)
training.Trainer.loss_sum = loss_sum
sys.exit(train.main())
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_processes_stop_where_one_diverges(kind: str, folder: Path, tmp_path: Path) -> None:
    driver, run = tmp_path / "driver.py", tmp_path / "run"
    driver.write_text(DRIVER.format(folder=str(FOLDER)), encoding="utf-8")
    settings = options(replace(SETTINGS, dropout=0.0, accumulate=2, steps=4))
    command = [
        driver,
        folder,
        "--output",
        run,
        *settings,
        "--checkpoint-every",
        2,
        "--beam-size",
        1,
        "--parallel",
        kind,
    ]
    process = start(*command, processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        errors.count(f"train.py: the loss is nan in step 3; the last good checkpoint is {run}/checkpoint-00000002\n")
        == 1
    )
    assert errors.count("train.py: ") == 1
    assert [line["step"] for line in strict_log(run)] == [1, 2]
    process = start(*command, "--skip-nonfinite", 1, processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [line["step"] for line in strict_log(run) if "skipped" in line] == [3]
    assert [line["step"] for line in strict_log(run) if "loss" in line] == [1, 2, 4]
