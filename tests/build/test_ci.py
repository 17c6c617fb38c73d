"""`.ci/run` knows its steps by name, and the version is the same everywhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import depthlstm_fast

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".ci" / "run"

needs_checkout = pytest.mark.skipif(not RUN.is_file(), reason="no checkout")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(RUN), *arguments], capture_output=True, text=True, check=False, timeout=60)


@needs_checkout
def test_every_listed_step_is_a_function() -> None:
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    steps = listed.stdout.split()
    assert {"lint", "suite", "wheel"} <= set(steps)
    defined = re.findall(r"^step_([\w-]+)\(\)", RUN.read_text(encoding="utf-8"), re.M)
    assert steps == defined


@needs_checkout
@pytest.mark.parametrize("arguments", [["no-such-step"], ["lint", "no-such-step"], ["--no-such-option"]])
def test_an_unknown_step_is_one_line(arguments: list[str]) -> None:
    refused = run(*arguments)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith(".ci/run: a step must be one of lint ")
    assert refused.stderr.endswith(f"; found {arguments[-1]}\n")
    assert refused.stderr.count("\n") == 1


@needs_checkout
def test_files_that_steps_name_exist() -> None:
    named = re.findall(r"(?<![\w/.-])(?:tests|tools|\.ci)/[\w./-]+", RUN.read_text(encoding="utf-8"))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_version_is_that_of_the_project() -> None:
    version = re.compile(r'^version(?: =|:) "?([\w.]+)"?$', re.M)
    for name in ("pyproject.toml", "CITATION.cff"):
        path = ROOT / name
        if path.is_file():
            assert version.findall(path.read_text(encoding="utf-8")) == [depthlstm_fast.__version__], name
    changes = ROOT / "CHANGELOG.md"
    if changes.is_file():
        assert f"## {depthlstm_fast.__version__}" in changes.read_text(encoding="utf-8")
