"""Train a small depth-wise LSTM translation model on English-German pairs, or compare the fused backend with plain PyTorch.

python examples/translation/train.py --steps 60 --compare
python examples/translation/train.py --steps 2000 --dropout 0.1 --output checkpoint
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from batches import collate, encode_pairs, endless_batches, group
from checkpoint import save_checkpoint
from compare import run_comparison, show
from console import print_comparison, print_examples, progress_bar
from data import DATASETS, Dataset, DownloadError, load_dataset
from inference import translate
from tokenizer import train_tokenizer
from training import Settings, Trainer

import depthlstm_fast as dl

__all__ = ["main", "run_comparison", "train"]


def train(dataset: Dataset, settings: Settings, backend: str = "auto", output: Path | None = None) -> float:
    """Train one model, print held-out loss and translations, keep it below ``output`` if given, and return the held-out loss."""
    tokenizer = train_tokenizer((text for pair in dataset.train for text in pair), settings.vocab_size)
    batches = endless_batches(encode_pairs(dataset.train, tokenizer), settings.token_budget, settings.seed)
    heldout = [collate(rows) for rows in group(encode_pairs(dataset.heldout, tokenizer), settings.token_budget)]
    arguments = settings.model_arguments(len(tokenizer))
    torch.manual_seed(settings.seed)
    model = dl.reference.DepthLSTMTransformer(**arguments) if backend == "reference" else dl.DepthLSTMTransformer(**arguments)
    trainer = Trainer(model, settings, None if backend == "reference" else backend)
    print(f"{dataset.name}: {len(dataset.train)} pairs to train on, {len(dataset.heldout)} held out; {len(tokenizer)} subwords")
    with progress_bar(f"training ({backend})", settings.steps) as advance:
        for _ in range(settings.steps):
            advance(trainer.step(next(batches)))
    loss = trainer.evaluate(heldout)
    print(f"held-out loss {loss:.4f}")
    shown = show(dataset, 5)
    translations = translate(model, tokenizer, [pair.source for pair in shown], max_length=64)
    print_examples([(pair.source, pair.target, text) for pair, text in zip(shown, translations, strict=True)])
    if output is not None:
        save_checkpoint(output, model, tokenizer, arguments)
        print(f"checkpoint in {output}")
    return loss


def command_line() -> argparse.ArgumentParser:
    """Return the parser: one option for each of ``Settings``, and those of the run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in fields(Settings):
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=field.default, help="default: %(default)s"
        )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "reference", "cpp", "cuda", "triton"),
        help="reference is plain PyTorch; default: %(default)s",
    )
    parser.add_argument("--compare", action="store_true", help="train reference and fused model side by side")
    parser.add_argument(
        "--data", default="auto", choices=DATASETS, help="auto is django, and builtin without a network; default: %(default)s"
    )
    parser.add_argument("--source", type=Path, help="text file, one sentence a line, to train on instead; needs --target")
    parser.add_argument("--target", type=Path, help="its translation, line by line")
    parser.add_argument("--output", type=Path, help="folder to keep the trained model in, for translate.py")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, train or compare, and return the exit status: 1 where the losses of a comparison disagree."""
    parser = command_line()
    options = parser.parse_args(arguments)
    settings = replace(Settings(), **{field.name: getattr(options, field.name) for field in fields(Settings)})
    if options.compare and options.output:
        parser.error("--output keeps a trained model; leave out --compare")
    if options.backend != "auto" and not (status := dl.backends()[options.backend]).available:
        parser.error(f"--backend {options.backend}: {status.detail}")
    try:
        dataset = load_dataset(options.data, options.source, options.target)
    except (DownloadError, ImportError, OSError, ValueError) as error:
        parser.exit(2, f"train.py: {error}\n")
    if options.compare:
        result = run_comparison(settings=settings, dataset=dataset, backend=options.backend)
        print_comparison(result)
        return 0 if result["losses_agree"] else 1
    train(dataset, settings, options.backend, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
