"""Train a translation model on a folder of prepare.py; a restarted run continues from its last checkpoint.

Usage:

    python examples/translation/train.py FOLDER --output RUN
    torchrun --nproc-per-node 2 examples/translation/train.py FOLDER --output RUN --parallel ddp
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

import command
import torch
from batches import BatchOrder, group, share
from checkpoint import (
    LOG,
    Log,
    check_record,
    held,
    load_model,
    remove_partial,
    resume,
    save_checkpoint,
    start_run,
)
from console import print_examples, progress_bar
from corpus.prepared import Corpus, load_corpus
from inference import translate_all
from parallel import KINDS, Processes, processes
from scores import Score, corpus_scores
from training import DTYPES, DivergedError, Settings, StepResult, Trainer, build_model, usable_device

import depthlstm_fast as dl
from depthlstm_fast.initialisation import INITS
from depthlstm_fast.translate.architectures import ARCHITECTURES
from depthlstm_fast.translate.run import checkpoints


def log_step(log: Log, step: int, result: StepResult) -> None:
    """Append a step; a skipped step has its reason in place of a loss that JSON cannot hold."""
    what = {"skipped": result.skipped} if result.skipped else {"loss": result.loss}
    log.write(step=step, **what, learning_rate=result.learning_rate, tokens_per_second=result.tokens_per_second)


def train_steps(
    trainer: Trainer, corpus: Corpus, run: Path, log_size: int, evaluate_every: int, checkpoint_every: int
) -> None:
    """Train from the current step of ``trainer`` to ``settings.steps``.

    Process 0 writes log and checkpoints below ``run``.

    Raises:
        DivergedError: a number that training depends on is not finite. All processes raise it or none, and nothing is
            saved afterwards.
    """
    settings, first = trainer.settings, trainer.group.rank == 0
    order = BatchOrder(corpus.examples["train"], settings.token_budget, settings.seed)
    dev = [
        share(rows, trainer.group.rank, trainer.group.size)
        for rows in group(corpus.examples["dev"], settings.token_budget)
    ]
    log = Log(run / LOG, log_size) if first else None
    with progress_bar("training", settings.steps, first, trainer.steps) as advance:
        while trainer.steps < settings.steps:
            result = trainer.step_in(order)
            advance(result)
            last = trainer.steps == settings.steps
            if log:
                log_step(log, trainer.steps, result)
            if last or trainer.steps % evaluate_every == 0:
                loss = trainer.evaluate(dev)
                if not math.isfinite(loss):
                    raise DivergedError(f"the dev loss is {loss} after step {trainer.steps}")
                if log:
                    log.write(step=trainer.steps, dev_loss=loss)
                    print(f"step {trainer.steps}: dev cross entropy {loss:.4f} nats a token", flush=True)
            if last or trainer.steps % checkpoint_every == 0:
                state = trainer.state()
                if log:
                    numbers = {
                        "batch": trainer.steps * settings.accumulate,
                        "learning_rate": result.learning_rate,
                        "skipped": trainer.skipped,
                        "log_bytes": log.flush(),
                    }
                    save_checkpoint(run, trainer.steps, state, numbers)
    if log:
        log.close()


def score_test_set(corpus: Corpus, run: Path, beam_size: int, device: str) -> list[Score]:
    """Translate the test set with the last checkpoint of ``run``.

    Its BLEU and chrF are logged and printed beside those of the sources, and returned.
    """
    model, tokenizer = load_model(run, device)
    sources, references = zip(*corpus.texts["test"], strict=True)
    translations = translate_all(model, tokenizer, sources, beam_size=beam_size)
    scores, copied = corpus_scores(translations, references), corpus_scores(sources, references)
    log = Log(run / LOG, (run / LOG).stat().st_size)
    for score, copy in zip(scores, copied, strict=True):
        log.write(test=score.name, value=score.value, copied=copy.value, beam_size=beam_size, signature=score.signature)
    log.close()
    print_examples(list(zip(sources, references, translations, strict=True))[:5])
    for score, copy in zip(scores, copied, strict=True):
        print(
            f"test {score.name} {score.value:.2f}, of the source copied "
            f"{copy.value:.2f}; beam {beam_size}, {score.signature}"
        )
    return scores


def run_training(
    corpus: Corpus,
    settings: Settings,
    run: Path,
    backend: str = "auto",
    group: Processes | None = None,
    device: str | None = None,
    evaluate_every: int = 100,
    checkpoint_every: int = 100,
    beam_size: int = 4,
    skip_nonfinite: int = 0,
) -> list[Score]:
    """Train in ``run``, a new or an existing folder, and return the scores of the test set.

    Processes other than the first return no scores.

    Args:
        corpus: the result of ``load_corpus``.
        settings: see ``Settings``.
        backend: the backend of the depth-wise LSTM; "reference" is plain PyTorch.
        group, device: the values that ``parallel.processes`` yields.
        evaluate_every, checkpoint_every: steps from one to the next; the last step gets both.
        beam_size: of the test set's translation.
        skip_nonfinite: see ``Trainer``; a continued run may have another one.

    Raises:
        DivergedError: a loss or gradient is not finite, and may not be skipped; the message names the step and the last
            good checkpoint.
        ValueError: ``run`` was started with other settings, or holds something else, or another process trains in it.
    """
    for name, number in (
        ("evaluate_every", evaluate_every),
        ("checkpoint_every", checkpoint_every),
        ("beam_size", beam_size),
    ):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; found {number}")
    if skip_nonfinite < 0:
        raise ValueError(f"skip_nonfinite must be 0 or more; found {skip_nonfinite}")
    group, device = group or Processes(), device or settings.device
    record = {
        "settings": asdict(settings),
        "backend": backend,
        "parallel": group.kind,
        "processes": group.size,
        "data": corpus.digest,
    }
    started = check_record(run, record)
    model = build_model(settings, len(corpus.tokenizer), backend)
    torch.manual_seed(settings.seed + group.rank)  # dropout differs on each process
    trainer = Trainer(model, replace(settings, device=device), backend, group, skip_nonfinite)
    group.barrier()  # every process has looked at the folder before one changes it
    with held(run) if group.rank == 0 else nullcontext():
        if group.rank == 0:
            if not started:
                start_run(run, record, corpus)
            remove_partial(run)
        group.barrier()
        size = resume(run, trainer)
        if group.rank == 0:
            meta, count = corpus.meta, sum(parameter.numel() for parameter in model.parameters())
            about = f"{meta['pairs']['train']} pairs, {meta['vocabulary']} subwords; {count / 1e6:.2f}M parameters"
            print(f"{meta['dataset']}: {about}", flush=True)
            if checkpoints(run):
                print(f"going on from step {trainer.steps} of {run}", flush=True)
        try:
            train_steps(trainer, corpus, run, size, evaluate_every, checkpoint_every)
        except DivergedError as error:
            good = checkpoints(run)
            kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            raise DivergedError(f"{error}; {kept}") from None
        return score_test_set(corpus, run, beam_size, device) if group.rank == 0 else []


def command_line() -> argparse.ArgumentParser:
    """Return the parser: one option for each of ``Settings``, and those of the run."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder that prepare.py wrote")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="folder of the run: log and checkpoints"
    )
    choices = {"architecture": ARCHITECTURES, "dtype": tuple(DTYPES), "init": INITS}
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(
            option,
            type=type(field.default),
            default=field.default,
            choices=choices.get(field.name),
            help="default: %(default)s",
        )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "reference", "cpp", "cuda", "triton"),
        help="of the depth connection; reference is plain PyTorch; default: %(default)s",
    )
    parser.add_argument(
        "--parallel",
        default="none",
        choices=KINDS,
        help="how torchrun's processes share the work; default: %(default)s",
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=100, metavar="STEPS", help="dev cross entropy; default: %(default)s"
    )
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    parser.add_argument(
        "--beam-size", type=int, default=4, help="of the test set's translation at the end; default: %(default)s"
    )
    parser.add_argument(
        "--skip-nonfinite",
        type=int,
        default=0,
        metavar="STEPS",
        help=(
            "in a row that are left out where loss or gradient is not finite; "
            "default: %(default)s, the first one ends the run"
        ),
    )
    return parser


@command.program("train.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, train, and return the exit status."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.backend != "auto" and not (status := dl.backends()[options.backend]).available:
        parser.error(f"--backend {options.backend}: {status.detail}")
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    usable_device(settings.device)
    corpus = load_corpus(options.data)
    with processes(options.parallel, settings.device) as (joined, device):
        every = (options.evaluate_every, options.checkpoint_every, options.beam_size, options.skip_nonfinite)
        run_training(corpus, settings, options.output, options.backend, joined, device, *every)
    return 0


if __name__ == "__main__":
    dl.keep_memory()  # spares most page faults of large batches, for the process alone
    sys.exit(main())
