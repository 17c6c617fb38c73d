"""The package's import graph.

It has no circle and no import of an upper floor. Shared modules import no op, and no op imports another.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import depthlstm_fast as dl
from depthlstm_fast.ops.registry import OPERATORS

PACKAGE = Path(dl.__file__).resolve().parent
# A module imports from its own folder and from lower floors; imports inside functions count as well.
FLOORS = (
    ("torch_private", "activations", "callable_module", "command_line", "plain"),
    ("modes", "sharding"),
    ("checks",),
    ("backends", "kernels", "reference"),
    ("memory",),
    ("ops",),
    ("functional",),
    ("layers",),
    ("connections",),
    ("initialisation", "memories"),
    ("stacks",),
    ("decode",),
    ("models", "language_model", "language_model_step"),
    ("probes", "linear_maps"),
    ("growth", "linear_sites"),
    ("linearisation",),
    ("swap",),
    ("translate",),
    ("__init__",),
    ("hf",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def find_modules() -> dict[str, Path]:
    """Return every module of the package but the benchmarks', by its dotted name below the package."""
    found = {}
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name not in ("bench", "__pycache__")]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


MODULES = find_modules()


def module_of(name: str) -> str | None:
    """Return the module that a dotted name below the package means, or whose attribute it is."""
    for candidate in (
        name,
        f"{name}.__init__".removeprefix("."),
        f"{name.rpartition('.')[0]}.__init__".removeprefix("."),
    ):
        if candidate in MODULES:
            return candidate
    return name.rpartition(".")[0] if name.rpartition(".")[0] in MODULES else None


def imports(module: str) -> Iterator[str]:
    """Return the package's modules that ``module`` imports."""
    folder = module.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "depthlstm_fast":
            names = [".".join([*(node.module or "").split(".")[1:], alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [
                alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "depthlstm_fast"
            ]
        else:
            continue
        for name in names:
            found = module_of(name)
            assert found is not None, f"{module} imports {name}, which is no module of the package"
            if found != module:
                yield found


GRAPH = {module: sorted(set(imports(module))) for module in MODULES}


def test_the_graph_is_that_of_the_package() -> None:
    assert {"ops.registry", "checks.__init__"} <= set(GRAPH["ops.depth_lstm"])
    assert "kernels.common.launch" in GRAPH["kernels.depth_lstm"]
    assert "reference.depth_lstm" in GRAPH["functional"]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_upward(module: str) -> None:
    room = module.split(".")[0]
    assert room in FLOOR, f"{room} is on no floor: add it to FLOORS"
    for other in GRAPH[module]:
        below = other.split(".")[0]
        assert below == room or FLOOR[below] < FLOOR[room], f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in GRAPH[module]:
                # "from . import x" names the package, which has been entered already
                if not (other.endswith("__init__") and module.startswith(other.removesuffix("__init__"))):
                    visit(other)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


def op_of(module: str) -> str | None:
    """Return the op that a module belongs to by its name; None for modules that ops share."""
    return next((op for op in OPERATORS if module.split(".")[-1].startswith(op)), None)


def test_shared_modules_know_no_op_and_ops_not_each_other() -> None:
    for module, found in GRAPH.items():
        wing = module.split(".")[0]
        if wing in ("ops", "kernels", "checks", "backends") and not module.endswith("__init__"):
            for other in found:
                assert op_of(other) in (None, op_of(module)), f"{module} imports {other}"
