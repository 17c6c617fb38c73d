"""`python -m depthlstm_fast.bench`: the suite, also for an installed package."""

from __future__ import annotations

import importlib.util
import sys


def missing() -> list[str]:
    """Return the names of packages that the suite needs and that are not installed."""
    return [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]


def main() -> int:
    absent = missing()
    if absent:
        print(f'benchmarks: {" and ".join(absent)} not installed: pip install "depthlstm_fast[bench]"', file=sys.stderr)
        return 2
    from . import run

    return run.main()


if __name__ == "__main__":
    sys.exit(main())
