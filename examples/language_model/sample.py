"""Print a paragraph that a trained model goes on with.

Usage:

    python examples/language_model/sample.py RUN --prompt "Return a new" --seed 3
"""

from __future__ import annotations

import sys
from pathlib import Path

from frame import Parser, program
from runs import load_run, paragraph


@program("sample.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, print the paragraph, and return the exit status."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder that train.py wrote")
    parser.add_argument("--prompt", default="", help="what the paragraph begins with")
    parser.add_argument("--tokens", type=int, default=200, help="at most; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for the likeliest; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    model, tokenizer = load_run(options.run)
    print(paragraph(model, tokenizer, options.prompt, options.tokens, options.temperature, options.top_p, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
