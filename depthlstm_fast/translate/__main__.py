"""`python -m depthlstm_fast.translate RUN`: lines in, lines out."""

from __future__ import annotations

import sys

from ..command_line import Parser, program
from .command import add_options, serve
from .run import load_model

NAME = "python -m depthlstm_fast.translate"


@program(NAME)
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, translate, and return the exit status."""
    parser = Parser(prog=NAME, description="Translate lines with the newest checkpoint of a run, on the CPU.")
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    return serve(options, lambda: load_model(options.run))


if __name__ == "__main__":
    sys.exit(main())
