"""Translate standard input line by line with the newest checkpoint of a run of train.py.

Usage:

    python examples/translation/translate.py RUN < english.txt > german.txt
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import command
from checkpoint import load_model
from corpus.lines import standard_input
from inference import translate

BROKEN_PIPE = 141  # the status of a program that the signal has ended


@command.program("translate.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, translate, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder that train.py --output wrote")
    parser.add_argument("--beam-size", type=int, default=4, help="1 is greedy (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens of a translation at most (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="lines translated at once (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; found {options.batch_size}")
    source, output = standard_input(), command.results()
    model, tokenizer = load_model(options.run, options.device)
    try:
        while lines := list(islice(source, options.batch_size)):
            print(
                *translate(model, tokenizer, lines, options.max_length, options.beam_size),
                sep="\n",
                file=output,
                flush=True,
            )
    except BrokenPipeError:  # the reader of the translations has closed its end
        command.discard(output)
        return BROKEN_PIPE
    except OSError:
        command.discard(output)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
