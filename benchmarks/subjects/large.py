"""Cell, layer and model at 32,768 tokens, with memory as it is and kept.

These are the batches that people train with. Fresh memory costs page faults here, which no small row shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..measure.allocator import KEPT
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from . import cell, layer, model

TOKENS = 32768
MAKERS: dict[str, Callable[[Place], Problem]] = {
    "cell": functools.partial(cell.training, rows=TOKENS),
    "layer": functools.partial(layer.training, batch=TOKENS // layer.LENGTH),
    "model": functools.partial(model.training, batch=TOKENS // model.LENGTH),
}


def kept(make: Callable[[Place], Problem], place: Place) -> Problem:
    """Make the problem under ``dl.keep_memory()``."""
    return make(place).keeping_memory()


SUBJECT = Subject(
    "large",
    {**MAKERS, **{f"{name}{KEPT}": functools.partial(kept, make) for name, make in MAKERS.items()}},
    needs=("cell", "layer", "model"),
    on_request=True,
)
