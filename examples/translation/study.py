"""Test the paper's claim in small, beside every other depth connection: which of them let deep models learn?

The study measures gradients at initialisation, dev cross entropy, speed and memory.

    python examples/translation/prepare.py --data debian --language de --vocab-size 2000 corpus
    python examples/translation/study.py corpus --output study
        continues where it was stopped; takes some hours on two cores
    python examples/translation/study_report.py study --docs docs
        writes docs/study.md, its pictures and docs/study.json
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import command

# the package in this folder, which precedes the module of its name
from study.experiment import BASE, PLAN, RATES, SEEDS, VARIANTS, study


@command.program("study.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, do the study, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and study.json")
    parser.add_argument("--steps", type=int, default=BASE.steps, help="of each run; default: %(default)s")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from; default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the weights; default: %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        default=list(VARIANTS),
        help="that learn; default: all",
    )
    options = parser.parse_args(arguments)
    plan = {layers: tuple(name for name in names if name in options.variants) for layers, names in PLAN.items()}
    study(
        options.data,
        options.output,
        replace(BASE, steps=options.steps),
        {layers: names for layers, names in plan.items() if names},
        rates=tuple(options.rates),
        seeds=tuple(options.seeds),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
