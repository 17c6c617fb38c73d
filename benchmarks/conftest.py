"""Fixtures of `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import depthlstm_fast as dl

from .measure import machine
from .measure.accuracy import Check
from .measure.compiled import Compiled
from .measure.place import Place
from .measure.rows import QUICK, Settings
from .subjects import registry


@pytest.hookimpl(tryfirst=True)
def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('pytest-benchmark not installed: pip install "depthlstm_fast[bench]"')
    parser.addoption("--quick", action="store_true", help="no torch.compile, three rounds: not to be quoted")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the machine description of the suite's own reports to that of pytest-benchmark."""
    machine_info["depthlstm_fast"] = machine.describe()


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return QUICK if request.config.getoption("--quick") else Settings()


@pytest.fixture(scope="session")
def place(settings: Settings) -> Place:
    return Place(Compiled(settings.compile))


@pytest.fixture(autouse=True)
def compiled_backend() -> Iterator[None]:
    """Make a call that would fall back raise instead of being timed."""
    status = dl.backends()[registry.BACKEND]
    if not status.available:
        pytest.fail(
            f"nothing to measure, the {registry.BACKEND} backend is not available: {status.detail}", pytrace=False
        )
    torch.manual_seed(0)
    with dl.use_backend(registry.BACKEND):
        yield


@pytest.fixture(scope="session")
def checked() -> Callable[[str], list[Check]]:
    """Return a function that makes the checks of a subject, each once."""
    known: dict[str, list[Check]] = {}

    def find(subject: str) -> list[Check]:
        if subject not in known:
            known[subject] = registry.run_checks([subject])
        return known[subject]

    return find
