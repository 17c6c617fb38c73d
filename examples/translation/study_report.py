"""Write a study's results as a page: every number and every sentence with a number comes from its JSON.

    python examples/translation/study_report.py study --docs docs

This command writes study.md, study.json, study_gradients.png and study_learning.png.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import command
from corpus.files import DamagedError, read_json
from study.plots import gradient_plot, learning_plot
from study.report import markdown


@command.program("study_report.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, write the page, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="folder that study.py wrote")
    parser.add_argument("--docs", type=Path, required=True, help="folder for study.md, study.json and the pictures")
    options = parser.parse_args(arguments)
    source = options.study / "study.json"
    if not source.is_file():
        raise ValueError(f"study must be a folder that study.py finished; found no study.json in {options.study}")
    study = read_json(source)
    try:
        page = markdown(study)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise DamagedError(
            f"{source} must be what study.py wrote; found other values: {type(error).__name__}: {error}"
        ) from None
    options.docs.mkdir(parents=True, exist_ok=True)
    if not (options.docs / "study.json").exists() or not source.samefile(options.docs / "study.json"):
        shutil.copyfile(source, options.docs / "study.json")
    gradient_plot(study, options.docs / "study_gradients.png")
    learning_plot(study, options.docs / "study_learning.png")
    (options.docs / "study.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
