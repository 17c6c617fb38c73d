"""All subjects by name, each with its problems by name; a problem is made only when it is about to be measured."""

from __future__ import annotations

from collections.abc import Callable

from ..measure.compiled import Compiled
from ..measure.problems import Problem
from . import cell, decoding, gates, layer, memory, model, overhead

SUBJECTS: dict[str, dict[str, Callable[[Compiled], Problem]]] = {
    "gates": gates.PROBLEMS,
    "cell": cell.PROBLEMS,
    "layer": layer.PROBLEMS,
    "model": model.PROBLEMS,
    "decoding": decoding.PROBLEMS,
    "memory": memory.PROBLEMS,
    "overhead": overhead.PROBLEMS,
}
