"""Ask how much of each layer of a trained model is linear: replace it by a linear map, or leave it out.

Usage:

    python examples/translation/analyse.py RUN FOLDER
    python examples/translation/analyse.py RUN FOLDER --scope layer cell --tune 100 --bleu dev
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import torch
from batches import Batch, BatchOrder, collate, group, target_tokens
from checkpoint import load_model, read_record, write_file
from console import print_analysis
from corpus.files import read_tensors, to_json
from corpus.prepared import Corpus, load_corpus
from inference import translate_all
from scores import corpus_scores
from training import Settings, Trainer, usable_device

import depthlstm_fast as dl
from depthlstm_fast.translate.run import MODEL, newest_whole, whole_file

ANALYSIS = "analysis.json"
SPLITS = ("dev", "test")
SCOPES = ("layer", "cell")
STACKS = ("encoder", "decoder")


def fitting_batches(corpus: Corpus, settings: Settings, tokens: int) -> list[Batch]:
    """Return batches of the training set, in the order of training, until they have ``tokens`` target tokens.

    Every pair comes once at most.
    """
    order, found, chosen = BatchOrder(corpus.examples["train"], settings.token_budget, settings.seed), 0, []
    for index in range(order.per_epoch):
        if found >= tokens:
            break
        found += target_tokens(order[index])
        chosen.append(collate(order[index]))
    return chosen


def scorer(
    corpus: Corpus, dev: list[Batch], settings: Settings, tokenizer: Any, bleu: str | None, beam_size: int
) -> Callable[[Any], dict[str, float]]:
    """Return a function that gives a model's dev cross entropy, and with ``bleu`` its BLEU of that split."""

    def score(model: Any) -> dict[str, float]:
        scores = {"dev_loss": Trainer(model, settings).evaluate(dev)}
        if not math.isfinite(scores["dev_loss"]):
            raise ValueError(f"the dev loss must be finite; found {scores['dev_loss']}")
        if bleu:
            sources, references = zip(*corpus.texts[bleu], strict=True)
            translations = translate_all(model, tokenizer, sources, beam_size=beam_size)
            scores["bleu"] = corpus_scores(translations, references)[0].value
        return scores

    return score


def replacements(
    model: Any,
    fit: list[Any],
    held_out: list[Any],
    where: dict[str, Any],
    ridge: float,
    tune: int,
    learning_rate: float,
) -> Iterator[tuple[str, dl.Linearised]]:
    """Yield what stands in for a part of a layer: the ridge's map, the tuned one, and nothing."""
    options = where | {"ridge": ridge, "held_out": held_out}
    yield "ridge", dl.linearise(model, fit, **options)
    if tune:
        yield "tuned", dl.linearise(model, fit, **options, tune=tune, learning_rate=learning_rate)
    yield "dropped", dl.linearise(model, fit, **options, drop=True)


def analyse(
    run: Path,
    data: Path,
    scopes: tuple[str, ...] = ("layer",),
    tokens: int = 100_000,
    ridge: float = 1e-3,
    tune: int = 0,
    learning_rate: float = 1e-3,
    bleu: str | None = None,
    beam_size: int = 4,
    device: str = "cpu",
    dev_pairs: int | None = None,
) -> dict[str, Any]:
    """Return plain numbers, strings and lists, fit for JSON.

    Args:
        run: folder of a trained model.
        data: the prepared folder that it was trained on.
        scopes: see ``dl.linearise``.
        tokens: target tokens of the training set that the maps are fitted on, or a batch more; R^2 is on the dev set.
        ridge, tune, learning_rate: see ``dl.linearise``.
        bleu: "dev" or "test": also translate that split, with each of the models.
        beam_size: of these translations.
        dev_pairs: how many pairs of the dev set, from its first on, the losses and R^2 are of; all of them if None.

    Returns:
        "full" has the scores of the model itself; each of "layers" has the stack, the layer and the scope, and the
        scores and R^2 of "ridge", with ``tune`` "tuned", and "dropped".

    Raises:
        ValueError: the run and the data do not belong together, the layers are torch.nn's, or a number is invalid.
    """
    numbers = (("tokens", tokens, 1), ("tune", tune, 0), ("beam_size", beam_size, 1), ("dev_pairs", dev_pairs, 1))
    for option, number, least in numbers:
        if number is not None and number < least:
            raise ValueError(f"{option} must be at least {least}; found {number}")
    model, tokenizer = load_model(run, usable_device(device))
    record = read_record(run)
    settings = replace(Settings(**record["settings"]), device=device)
    if not all(isinstance(getattr(model, stack), dl.probes.STACKS) for stack in STACKS):
        raise ValueError(
            f"architecture must have layers of depthlstm_fast to be analysed; found {settings.architecture!r}, "
            "whose layers are torch.nn's"
        )
    corpus = load_corpus(data)
    if corpus.digest != record["data"]:
        raise ValueError(f"data must be the folder that {run} was trained on; found another text in {data}")
    # load_model has said already which damaged ones it passed over
    (name, _), _ = newest_whole(run, lambda each: (each.name, read_tensors(whole_file(each / MODEL))), says=False)
    dev = [collate(rows) for rows in group(corpus.examples["dev"][:dev_pairs], settings.token_budget)]
    fit, held_out = (
        [(each.source.to(device), each.target.to(device)) for each in part]
        for part in (fitting_batches(corpus, settings, tokens), dev)
    )
    score = scorer(corpus, dev, settings, tokenizer, bleu, beam_size)
    layers: list[dict[str, Any]] = []
    full = score(model)
    for stack in STACKS:
        for layer in range(getattr(model, stack).num_layers):
            for scope in scopes:
                where: dict[str, Any] = {"stack": stack, "layer": layer, "scope": scope}
                row = dict(where)
                for kind, made in replacements(model, fit, held_out, where, ridge, tune, learning_rate):
                    r2 = {
                        part: [None if math.isnan(each) else each for each in found] for part, found in made.r2.items()
                    }
                    row[kind] = score(made.model) | {"r2": r2}
                    row["tokens"] = made.tokens
                    if made.kl:
                        row[kind]["kl"] = list(made.kl)
                layers.append(row)
    return {
        "run": str(run),
        "checkpoint": name,
        "settings": record["settings"],
        "seed": settings.seed,
        "data": corpus.meta | {"digest": corpus.digest},
        "options": {
            "scopes": list(scopes),
            "tokens": tokens,
            "ridge": ridge,
            "tune": tune,
            "learning_rate": learning_rate,
            "bleu": bleu,
            "beam_size": beam_size,
            "device": device,
            "dev_pairs": dev_pairs,
        },
        "versions": {"depthlstm_fast": dl.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "full": full,
        "layers": layers,
    }


@command.program("analyse.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, analyse, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help=f"folder that train.py --output wrote; {ANALYSIS} is written there")
    parser.add_argument("data", type=Path, help="folder of prepare.py that the run was trained on")
    parser.add_argument(
        "--scope",
        nargs="+",
        choices=SCOPES,
        default=["layer"],
        help="what becomes linear: the layer, or its cell (without a cell its feed-forward network); default: layer",
    )
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="target tokens that a map is fitted on; default: %(default)s"
    )
    parser.add_argument("--ridge", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument(
        "--tune", type=int, default=0, metavar="STEPS", help="of Adam on the fitted map; default: %(default)s"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the tuning; default: %(default)s")
    parser.add_argument("--bleu", choices=SPLITS, help="also translate this split with every model")
    parser.add_argument("--beam-size", type=int, default=4, help="of the translations; default: %(default)s")
    parser.add_argument(
        "--dev-pairs", type=int, metavar="PAIRS", help="the first of the dev set, for losses and R^2; default: all"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    numbers = (options.tokens, options.ridge, options.tune, options.learning_rate, options.bleu, options.beam_size)
    result = analyse(
        options.run, options.data, tuple(dict.fromkeys(options.scope)), *numbers, options.device, options.dev_pairs
    )
    write_file(options.run / ANALYSIS, to_json(result, indent=1).encode())
    print_analysis(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
