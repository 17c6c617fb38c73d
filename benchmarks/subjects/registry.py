"""All subjects by name, each with its problems by name; a problem is made only when it is about to be measured."""

from __future__ import annotations

from collections.abc import Callable

from depthlstm_fast.bench import cell, decoding, gates, layer, memory, model, overhead
from depthlstm_fast.bench.compiled import Compiled
from depthlstm_fast.bench.problems import Problem

SUBJECTS: dict[str, dict[str, Callable[[Compiled], Problem]]] = {
    "gates": gates.PROBLEMS,
    "cell": cell.PROBLEMS,
    "layer": layer.PROBLEMS,
    "model": model.PROBLEMS,
    "decoding": decoding.PROBLEMS,
    "memory": memory.PROBLEMS,
    "overhead": overhead.PROBLEMS,
}
