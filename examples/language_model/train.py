"""Train a language model on a folder of prepare.py; a run that is started again goes on from its checkpoint.

Usage:

    python examples/language_model/train.py FOLDER --output RUN
    python examples/language_model/train.py FOLDER --output RUN2 --connection pre-norm
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import runs
import torch
from frame import Parser, program
from runs import DTYPES, SCHEDULES, Settings
from text import BOS, Bigram, Corpus, documents_of, load_corpus, piece_bytes, windows

import depthlstm_fast as dl


def loss_of(model: dl.LanguageModel, rows: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Mean cross entropy in nats of the tokens of rows (batch, length), each document by itself."""
    rows = rows.to(settings.device)
    with torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=settings.dtype == "bf16"):
        return model(rows, labels=rows, document_ids=documents_of(rows))[0]


@torch.no_grad()
def evaluate(model: dl.LanguageModel, rows: torch.Tensor, settings: Settings) -> float:
    """Mean cross entropy of the predicted tokens of all rows, in nats."""
    model.eval()
    total, count = 0.0, 0
    for part in rows.split(settings.batch):
        counted = int((part[:, 1:] != BOS).sum())
        total += loss_of(model, part, settings).item() * counted
        count += counted
    model.train()
    return total / count


def train(corpus: Corpus, settings: Settings, run: Path, evaluate_every: int, checkpoint_every: int) -> list[dict]:
    """Train in ``run``, a new folder or one to go on in, and return the lines of its log.

    Raises:
        ValueError: the folder is another run's, there is too little text, or the loss is not finite.
    """
    for name, number in (("evaluate_every", evaluate_every), ("checkpoint_every", checkpoint_every)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; found {number}")
    dev = windows(corpus.dev, settings.length)
    windows(corpus.train, settings.length)
    model = runs.build_model(settings, len(corpus.tokenizer))
    optimiser = torch.optim.AdamW(
        dl.param_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.95)
    )
    with runs.held(run):
        runs.start(run, settings, corpus.digest, corpus.tokenizer)
        first, lines = runs.load(run, model, optimiser)
        print(
            f"{corpus.meta['source']}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True
        )
        if first:
            print(f"going on from step {first} of {run}", flush=True)
        for step in range(first, settings.steps):
            lines.append(one_step(model, optimiser, corpus, settings, step))
            last = step + 1 == settings.steps
            if last or (step + 1) % evaluate_every == 0:
                found = evaluate(model, dev, settings)
                lines.append({"step": step + 1, "dev_loss": found})
                speed = lines[-2]["tokens_per_second"]
                print(f"step {step + 1}: dev {found:.4f} nats a token, {speed:,.0f} tokens/s", flush=True)
            if last or (step + 1) % checkpoint_every == 0:
                runs.save(run, step + 1, model, optimiser, lines)
    return lines


def one_step(
    model: dl.LanguageModel, optimiser: torch.optim.Optimizer, corpus: Corpus, settings: Settings, step: int
) -> dict[str, Any]:
    """Train once; the line of the log."""
    begun, rate = time.perf_counter(), runs.learning_rate(settings, step)
    torch.manual_seed(settings.seed + step)  # dropout is then that of the step, in whatever process
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    total = 0.0
    for part in range(settings.accumulate):
        loss = loss_of(model, runs.rows_of_step(corpus.train, settings, step, part), settings) / settings.accumulate
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise ValueError(f"loss and gradient must be finite; found {total} and {norm} in step {step + 1}")
    optimiser.step()
    tokens = settings.accumulate * settings.batch * settings.length
    seconds = time.perf_counter() - begun
    return {"step": step + 1, "loss": total, "learning_rate": rate, "tokens_per_second": tokens / seconds}


def report(corpus: Corpus, settings: Settings, run: Path, lines: list[dict]) -> None:
    """Print the dev loss beside a bigram model's, and a paragraph."""
    dev = windows(corpus.dev, settings.length)
    predicted = dev[:, 1:][dev[:, 1:] != BOS]
    bytes_per_token = piece_bytes(corpus.tokenizer)[predicted].double().mean().item()
    bigram = Bigram(corpus.train, len(corpus.tokenizer)).nats(dev)
    for name, nats in ((settings.connection, lines[-1]["dev_loss"]), ("bigram", bigram)):
        print(f"{name}: dev {nats:.4f} nats a token, {nats / math.log(2) / bytes_per_token:.4f} bits a byte")
    model, tokenizer = runs.load_run(run, settings.device)
    print(f"\n{runs.paragraph(model, tokenizer, '', 160, 0.8, 0.95, settings.seed)}")


@program("train.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, train, and return the exit status."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    choices = {"connection": dl.connections.names(), "schedule": SCHEDULES, "dtype": DTYPES}
    for field in fields(Settings):
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(
            option, type=kind, default=field.default, choices=choices.get(field.name), help="default: %(default)s"
        )
    parser.add_argument("--evaluate-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    options = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    corpus = load_corpus(options.data)
    lines = train(corpus, settings, options.output, options.evaluate_every, options.checkpoint_every)
    report(corpus, settings, options.output, lines)
    return 0


if __name__ == "__main__":
    dl.keep_memory()  # spares most page faults of large batches, for the process alone
    sys.exit(main())
