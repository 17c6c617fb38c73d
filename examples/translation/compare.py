"""Train the same model twice, plain PyTorch beside fused: same weights, same batches, step by step in turn.

Usage:

    python examples/translation/compare.py --steps 50
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import command
import torch
from batches import BatchOrder, collate, group
from console import print_comparison, progress_bar
from corpus.data import DATASETS, Dataset, DownloadError, Pair, load_dataset
from corpus.placeholders import hide_pair
from corpus.tokenizer import encode_pairs, train_tokenizer
from inference import translate
from training import DivergedError, Settings, StepResult, Trainer

import depthlstm_fast as dl

# A step of moderate size on two CPU cores. The comparison is between the two sides, not between models.
SETTINGS = Settings(steps=50, token_budget=1024, d_model=256, layers=4, dropout=0.0, warmup_steps=20)
SIDES = ("reference", "fused")
# Rounding differs from the first step on, and Adam divides by the gradient's own size, so runs drift apart slowly.
TOLERANCE = 1e-3
UNTIMED = 3  # first steps: allocations, thread start, caches


def show(dataset: Dataset, count: int) -> list[Pair]:
    """Return up to ``count`` held-out pairs to print, first those of four to twelve words."""
    return sorted(dataset.heldout, key=lambda pair: not 4 <= len(pair.source.split()) <= 12)[:count]


def run_comparison(
    steps: int | None = None,
    *,
    settings: Settings | None = None,
    data: str = "auto",
    dataset: Dataset | None = None,
    backend: str = "auto",
    examples: int = 5,
    progress: bool = True,
    limit_seconds: float | None = None,
    vocab_size: int = 2000,
) -> dict[str, Any]:
    """Train reference and fused model side by side and return plain numbers, strings and lists, fit for JSON.

    Args:
        steps: training steps of each; None takes them from ``settings``.
        settings: model size and training; None is ``SETTINGS``. Dropout is off in both, so that losses compare.
        data: "auto", "django" or "builtin", see ``data.load_dataset``; ``dataset`` takes precedence.
        dataset: the pairs, if the caller has them.
        backend: backend of the fused model.
        examples: number of returned held-out translations of the fused model.
        progress: show a progress bar on stderr.
        limit_seconds: for a busy machine: start no further step after this many seconds of training.
        vocab_size: the most subwords of both languages together.

    Returns:
        a dict whose "losses", "heldout_loss" and "tokens_per_second" (median) have the keys "reference" and "fused";
        "speedup" is the median over steps of the fused model's tokens a second over the reference's in the same step.

    Raises:
        DivergedError: a loss or gradient of one of the two is not finite, so that there is nothing to compare.
    """
    settings = settings or SETTINGS
    steps = settings.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1; found {steps}")
    dataset = dataset or load_dataset(data)
    tokenizer = train_tokenizer((text for pair in map(hide_pair, dataset.train) for text in pair), vocab_size)
    train = encode_pairs(dataset.train, tokenizer)
    arguments = settings.model_arguments(len(tokenizer)) | {"dropout": 0.0}
    torch.manual_seed(settings.seed)
    reference = dl.reference.DepthLSTMTransformer(**arguments)
    fused = dl.DepthLSTMTransformer(**arguments)
    fused.load_state_dict(reference.state_dict())
    trainers = {"reference": Trainer(reference, settings), "fused": Trainer(fused, settings, backend)}
    results: dict[str, list[StepResult]] = {side: [] for side in SIDES}
    ran = None
    order = BatchOrder(train, settings.token_budget, settings.seed)
    start = time.perf_counter()
    with progress_bar("reference and fused", steps, progress) as advance:
        for step in range(steps):
            if step and limit_seconds is not None and time.perf_counter() - start > limit_seconds:
                steps = step
                break
            batch = collate(order[step])
            # the second side finds warm caches and a warm batch, so the sides take turns
            for side in SIDES if step % 2 == 0 else SIDES[::-1]:
                try:
                    results[side].append(trainers[side].step(batch))
                except DivergedError as error:
                    raise DivergedError(f"{side}: {error}") from None
                ran = dl.last_backend() if side == "fused" else ran
            advance(results["fused"][-1])
    losses = {side: [result.loss for result in results[side]] for side in SIDES}
    speeds = {
        side: [result.tokens_per_second for result in results[side]][UNTIMED if steps > UNTIMED else 0 :]
        for side in SIDES
    }
    difference = max(abs(a - b) / abs(a) for a, b in zip(losses["reference"], losses["fused"], strict=True))
    heldout = [collate(rows) for rows in group(encode_pairs(dataset.heldout, tokenizer), settings.token_budget)]
    heldout_loss = {side: trainers[side].evaluate(heldout) for side in SIDES}
    for side, loss in heldout_loss.items():
        if not math.isfinite(loss):
            raise DivergedError(f"{side}: the held-out loss is {loss} after step {steps}")
    shown = show(dataset, examples)
    with dl.use_backend(backend):
        translations = translate(fused, tokenizer, [pair.source for pair in shown], max_length=64)
    return {
        "dataset": dataset.name,
        "pairs": len(dataset.train) + len(dataset.heldout),
        "heldout_pairs": len(dataset.heldout),
        "vocabulary": len(tokenizer),
        "d_model": settings.d_model,
        "encoder_layers": settings.layers,
        "decoder_layers": settings.layers,
        "parameters": sum(parameter.numel() for parameter in fused.parameters()),
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "backend": ran,
        "steps": steps,
        "losses": losses,
        "max_relative_loss_difference": difference,
        "tolerance": TOLERANCE,
        "losses_agree": difference <= TOLERANCE,
        "heldout_loss": heldout_loss,
        "tokens_per_second": {side: median(speeds[side]) for side in SIDES},
        "speedup": median(b / a for a, b in zip(speeds["reference"], speeds["fused"], strict=True)),
        "examples": [(pair.source, pair.target, text) for pair, text in zip(shown, translations, strict=True)],
    }


@command.program("compare.py", DownloadError)
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, compare, and return the exit status: 1 if the losses disagree."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="default: %(default)s")
    parser.add_argument(
        "--data",
        default="auto",
        choices=DATASETS,
        help="auto is django, builtin without a network; default: %(default)s",
    )
    parser.add_argument(
        "--source", type=Path, help="text file, one sentence a line, to train on instead; needs --target"
    )
    parser.add_argument("--target", type=Path, help="its translation, line by line")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "cpp", "cuda", "triton"),
        help="of the fused model; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    if options.backend != "auto" and not (status := dl.backends()[options.backend]).available:
        parser.error(f"--backend {options.backend}: {status.detail}")
    dataset = load_dataset(options.data, options.source, options.target)
    result = run_comparison(options.steps, dataset=dataset, backend=options.backend)
    print_comparison(result)
    return 0 if result["losses_agree"] else 1


if __name__ == "__main__":
    dl.keep_memory()  # spares most page faults of large batches, for the process alone
    sys.exit(main())
