"""Score a trained model in each precision of the decode engine: BLEU, chrF and speed, greedy and with beams.

Usage:

    python examples/translation/precision.py RUN FOLDER
    python examples/translation/precision.py RUN FOLDER --lines 1000 --beams 1 4
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command
from checkpoint import load_model, read_record
from corpus.prepared import load_corpus
from corpus.tokenizer import PAD
from scores import corpus_scores
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.translate.sentences import in_batches, translate

# of the matrices, and of the output layer's
PRECISIONS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int8", "float32"))
MAX_LENGTH = 128


class Timed:
    """A packed model that counts its tokens and its CPU seconds, the encoder's among them."""

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        self.served = dl.compile_decoder(model, dtype, output_dtype)
        self.max_len = self.served.max_len
        self.tokens, self.seconds = 0, 0.0

    def generate(self, source: Tensor, **options: Any) -> Tensor:
        before = time.process_time()
        found = self.served.generate(source, **options)
        self.seconds += time.process_time() - before
        self.tokens += int((found != PAD).sum())
        return found


class Result(NamedTuple):
    """What one precision and one number of beams gave.

    ``equal`` is the percentage of lines that read as float32's, ``speed`` tokens a second of CPU time.
    """

    dtype: str
    output_dtype: str
    beams: int
    bleu: float
    chrf: float
    equal: float
    speed: float
    megabytes: float


def measure(model: Any, tokenizer: Any, pairs: Sequence[Any], beams: int, batch_size: int) -> list[Result]:
    """Translate the sources of ``pairs`` in each of ``PRECISIONS``, a batch in turn; return the scores."""
    sources, references = zip(*pairs, strict=True)
    served = [Timed(model, *precision) for precision in PRECISIONS]

    def translate_batch(batch: list[str]) -> list[tuple[str, ...]]:
        found = [translate(each, tokenizer, batch, MAX_LENGTH, beams) for each in served]
        return list(zip(*found, strict=True))

    (rows,) = in_batches(iter(sources), translate_batch, batch_size, len(sources))
    results = []
    for precision, each, translations in zip(PRECISIONS, served, zip(*rows, strict=True), strict=True):
        bleu, chrf = (score.value for score in corpus_scores(translations, references))
        equal = 100 * sum(row[0] == text for row, text in zip(rows, translations, strict=True)) / len(rows)
        speed, size = each.tokens / each.seconds, each.served.nbytes / 1e6
        results.append(Result(*precision, beams, bleu, chrf, equal, speed, size))
    return results


@command.program("precision.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, print a Markdown table, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder that train.py --output wrote")
    parser.add_argument("data", type=Path, help="folder that prepare.py wrote, of the run's text")
    parser.add_argument("--lines", type=int, help="of the test set, the first ones; default: all")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4], help="default: 1 4")
    parser.add_argument("--batch-size", type=int, default=8, help="lines translated at once; default: %(default)s")
    options = parser.parse_args(arguments)
    for name, numbers in (("lines", [options.lines]), ("beams", options.beams), ("batch_size", [options.batch_size])):
        for number in numbers:
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1; found {number}")
    model, tokenizer = load_model(options.run)
    corpus = load_corpus(options.data)
    if corpus.digest != read_record(options.run)["data"]:
        raise ValueError(
            f"data must be the folder that {options.run} was trained on; found another text in {options.data}"
        )
    pairs = corpus.texts["test"][: options.lines]
    print(f"{len(pairs)} lines of the test set, {options.batch_size} at once\n")
    print("| matrices | output layer | beams | BLEU | chrF | as float32 | tokens/s | MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for beams in options.beams:
        for found in measure(model, tokenizer, pairs, beams, options.batch_size):
            scores = f"{found.bleu:.2f} | {found.chrf:.2f} | {found.equal:.1f}%"
            costs = f"{found.speed:,.0f} | {found.megabytes:.1f}"
            print(f"| {found.dtype} | {found.output_dtype} | {beams} | {scores} | {costs} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
