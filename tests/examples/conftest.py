"""Fixtures of the translation example's tests: a prepared folder, and a run that a test may copy and damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from translation_helpers import corpus

# The fixtures import the helpers themselves, because the helpers skip a module that imports them if a package is
# missing.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built-in sentences, prepared."""
    from translation_helpers import prepare

    path = tmp_path_factory.mktemp("prepared")
    prepare.prepare(path, "builtin", vocab_size=120)
    return path


@pytest.fixture(scope="module")
def prepared(folder: Path) -> corpus.Corpus:
    from translation_helpers import corpus

    return corpus.load_corpus(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared folder and a run with checkpoints of steps 2 and 4."""
    from translation_helpers import FOUR_STEPS, prepare, train

    path = tmp_path_factory.mktemp("whole")
    prepare.prepare(path / "corpus", "builtin", vocab_size=120)
    assert train.main([str(path / "corpus"), "--output", str(path / "run"), *FOUR_STEPS]) == 0
    return path


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    """Return a copy to be damaged."""
    shutil.copytree(whole, tmp_path / "own")
    return tmp_path / "own"
