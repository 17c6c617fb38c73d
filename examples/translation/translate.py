"""Translate lines with the newest checkpoint of a run of train.py, on any device.

On a CPU ``python -m depthlstm_fast.translate`` does the same without this example.

Usage:

    python examples/translation/translate.py RUN < english.txt > german.txt
"""

from __future__ import annotations

import sys

import command
from checkpoint import load_model

from depthlstm_fast.translate.command import add_options, serve


@command.program("translate.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, translate, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    return serve(options, lambda: load_model(options.run, options.device))


if __name__ == "__main__":
    sys.exit(main())
