"""Translate standard input line by line with the newest checkpoint of a run of train.py.

python examples/translation/translate.py RUN < english.txt > german.txt
"""

from __future__ import annotations

import argparse
import io
import sys
from itertools import islice
from pathlib import Path

from checkpoint import load_model
from inference import translate


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, translate, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that train.py --output wrote")
    parser.add_argument("--beam-size", type=int, default=4, help="1 is greedy (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a translation at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="lines translated at once (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale; what is no UTF-8 is read as U+FFFD
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        if options.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; found {options.batch_size}")
        model, tokenizer = load_model(options.run, options.device)
        while lines := list(islice(sys.stdin, options.batch_size)):
            print(*translate(model, tokenizer, lines, options.max_length, options.beam_size), sep="\n", flush=True)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"translate.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
