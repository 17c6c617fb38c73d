"""The benchmark suite; see benchmarks/README.md.

`make bench`, `python -m depthlstm_fast.bench` and `pytest benchmarks --benchmark-only` run it.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# the root of the source tree; None in an installed package
CHECKOUT = FOLDER.parent if FOLDER.name == "benchmarks" and (FOLDER.parent / "pyproject.toml").is_file() else None
