"""The benchmark suite: `make bench`, `python -m depthlstm_fast.bench` or `pytest benchmarks --benchmark-only`. See benchmarks/README.md."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# the root of the source tree; None in an installed package
CHECKOUT = FOLDER.parent if FOLDER.name == "benchmarks" and (FOLDER.parent / "pyproject.toml").is_file() else None
