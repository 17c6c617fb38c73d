"""What a command does that translates lines: its options, its streams, its progress."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..command_line import discard, path, results
from ..decode import compile_decoder
from ..decode.plan import WEIGHTS
from .lines import file_lines, standard_input
from .sentences import in_batches, translate

BROKEN_PIPE = 141  # the status of a program that the signal has ended
MOST_BEAMS, MOST_LINES = 4096, 65536
WINDOW = 16  # batches whose lines are read at once and sorted by length


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what both commands take: the run, the file, and the search.

    ``parse_intermixed_args`` reads them, since the file may stand behind an option.
    """
    parser.add_argument("run", type=path, help="folder that train.py --output wrote")
    parser.add_argument("file", type=path, nargs="?", help="UTF-8 text, a sentence a line (default: standard input)")
    parser.add_argument(
        "--dtype", default="float32", choices=WEIGHTS, help="of the matrices while decoding (default: %(default)s)"
    )
    parser.add_argument("--beam-size", "--beam", type=int, default=4, help="1 is greedy (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens of a translation at most (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="lines translated at once (default: %(default)s)")


def serve(options: argparse.Namespace, load: Callable[[], tuple[Any, Any]]) -> int:
    """Translate the lines that ``options`` of ``add_options`` name to standard output; return the exit status.

    Args:
        load: returns the model and the tokenizer.

    Raises:
        ValueError: an option, a stream, the run or a line of the file is wrong. Lines before a wrong one are written.
    """
    for name in ("beam_size", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1; found {getattr(options, name)}")
    for name, most in (("beam_size", MOST_BEAMS), ("batch_size", MOST_LINES)):
        if getattr(options, name) > most:
            raise ValueError(f"{name} must be at most {most}; found {getattr(options, name)}")
    lines = standard_input() if options.file is None else file_lines(options.file)
    by_hand = options.file is None and sys.stdin.isatty()
    output = results()
    model, tokenizer = load()
    model = narrowed(model, options.dtype)
    # a person at a terminal waits for the translation of each line
    window = 1 if by_hand else WINDOW * options.batch_size
    try:
        with progress(not by_hand and sys.stderr.isatty() and not output.isatty()) as advance:

            def translate_batch(batch: list[str]) -> list[str]:
                texts = translate(model, tokenizer, batch, options.max_length, options.beam_size)
                advance(len(batch))
                return texts

            for texts in in_batches(lines, translate_batch, options.batch_size, window):
                output.writelines(f"{text}\n" for text in texts)
                output.flush()
    except BrokenPipeError:  # the reader of the translations has closed its end
        discard(output)
        return BROKEN_PIPE
    except OSError:
        discard(output)
        raise
    return 0


def narrowed(model: Any, dtype: str) -> Any:
    """Return ``model``, or what translates with its matrices in ``dtype``.

    Raises:
        ValueError: the decode engine does not run this model, or the library is missing.
    """
    if dtype == "float32":  # generate() takes the engine by itself where it can
        return model
    try:
        return compile_decoder(model, dtype)
    except RuntimeError as error:
        raise ValueError(f"dtype must be float32 without the compiled library; found {dtype!r}: {error}") from None


@contextmanager
def progress(enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many lines are translated, and how fast; yield a function that takes a number of new ones."""
    started, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if enabled:
            speed = done / max(time.monotonic() - started, 1e-9)
            print(f"\r{done:,} lines, {speed:,.1f} a second", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if enabled:
            print(file=sys.stderr)
