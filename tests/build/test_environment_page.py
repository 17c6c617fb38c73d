"""docs/environment.md has every DEPTHLSTM_ variable of the source, and none that the source does not read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "environment.md"
NAME = re.compile(r"\bDEPTHLSTM_[A-Z_]*[A-Z]\b")  # a macro given as "-DDEPTHLSTM_Z" has no word boundary there
C_VARIABLE = re.compile(r'getenv\("(DEPTHLSTM_[A-Z_]+)"\)')

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def in_source() -> set[str]:
    files = [ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run"]
    for folder in ("depthlstm_fast", "kernels", "benchmarks", "tools"):
        files += (ROOT / folder).rglob("*.py")
    found = {name for path in files if path.is_file() for name in NAME.findall(path.read_text(encoding="utf-8"))}
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        found |= set(C_VARIABLE.findall(path.read_text(encoding="utf-8")))
    return found


def test_page_and_source_hold_the_same_variables() -> None:
    on_page = set(NAME.findall(PAGE.read_text(encoding="utf-8")))
    assert {"DEPTHLSTM_STRICT", "DEPTHLSTM_CPU_ISA", "DEPTHLSTM_CUDA_ARCHS"} <= on_page
    assert on_page == in_source()
