"""The "cuda" backend of a rehearsal: its operators on CPU tensors, on top of the CPU's kernels.

The real kernels, simulated (tests/backends/cuda/simulated.py, ``load``), take seconds a call. A rehearsal tests the run
only.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"


def stand_in_for_cuda() -> str | None:
    """Make CPU tensors run on "cuda" for the rest of this process; return why that is impossible, or None."""
    places = [str(TESTS), str(TESTS / "backends" / "cuda")]
    sys.path[:0] = places
    try:
        import pytest

        simulated = importlib.import_module("simulated")
    except ImportError as error:
        return f"the stand-in of the tests does not import: {error}"
    finally:
        for place in places:
            sys.path.remove(place)
    from depthlstm_fast.backends.choice import RECORDS
    from depthlstm_fast.ops.registry import OPERATORS

    try:
        operators = simulated.stand_in()
    except (pytest.skip.Exception, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"the stand-in of the tests was not built: {error}"
    OPERATORS["depth_lstm"]["cuda"], RECORDS["cuda"] = operators, simulated.anywhere(RECORDS["cuda"])
    return None
