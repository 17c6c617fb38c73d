"""Where a linear map is fitted: the parts of one layer, what runs through them, and what then stands there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .connections.base import State
from .linear_maps import (
    AroundConnection,
    LinearCell,
    LinearConnection,
    LinearDecoderLayer,
    LinearEncoderLayer,
    LinearLayer,
    PartialLayer,
)
from .reference import DepthLSTMDecoder
from .reference.stacks import CELLS

# the name of a part, its tensors before and after: (batch, length, ...) or, from some layers, (length, batch, ...)
Note = Callable[[str, tuple[Tensor, ...], tuple[Tensor, ...]], None]


class _Watched(AroundConnection):
    """A connection that notes the states before and after parts of a layer."""

    def __init__(self, inner: Any, parts: list[tuple[str, int, int, bool]], note: Note) -> None:
        super().__init__(inner)
        self.parts, self.note, self.held = parts, note, {}  # type: ignore[var-annotated]

    def _enter(self, state: State, y: Tensor, i: int) -> None:
        for name, first, _, takes_branch in self.parts:
            if i == first:
                self.held[name] = (*state, y) if takes_branch else state

    def _leave(self, state: State, i: int) -> None:
        for name, _, last, _ in self.parts:
            if i == last:
                self.note(name, self.held.pop(name), state)

    def write(self, state: State, y: Tensor, i: int) -> State:
        self._enter(state, y, i)
        state = super().write(state, y, i)
        self._leave(state, i)
        return state

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        self._enter(state, y, i)
        state, u = super().step(state, y, i)
        self._leave(state, i)
        return state, u


class _WatchedCell(nn.Module):
    """A cell that notes its state before and after, with its input."""

    def __init__(self, cell: Any, name: str, note: Note) -> None:
        super().__init__()
        self.input_size, self.cell, self.name, self.note = cell.input_size, cell, name, note

    def forward(self, input: Tensor | tuple[Tensor, ...], state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        after = self.cell(input, state)
        self.note(self.name, (*state, *(input if isinstance(input, tuple) else (input,))), after)
        return after


class StackSite:
    """A layer of a stack of any connection: its parts, what runs through them, and what stands in their place."""

    transposed = False  # a state is (batch, length, ...)

    def __init__(self, stack: Any, layer: int, scope: str) -> None:
        connection, found, per_layer = stack.connection, stack.layers[layer], stack.branches_per_layer
        if connection.mixes_depth:
            raise ValueError(
                f"connection must keep as many tensors at every depth to be linearised; found "
                f"{type(connection).__name__}, which keeps earlier outputs"
            )
        self.stack, self.layer, self.scope, first = stack, layer, scope, layer * per_layer
        while isinstance(connection, LinearConnection):
            if first <= connection.first < first + per_layer:
                raise ValueError(f"layer must be one that is not linear yet; found {layer}")
            connection = connection.inner
        self.absorbs = connection.absorbs_feed_forward
        if scope == "layer":
            self.parts = [("layer", first, first + per_layer - 1, False)]
        elif self.absorbs:
            self.parts = [(name, first + place, first + place, True) for place, name in enumerate(found.branches)]
        else:
            self.parts = [
                (name, first + place, first + place, False)
                for place, name in enumerate(found.branches)
                if name == "feed_forward"
            ]
            if not self.parts:
                raise ValueError(
                    'scope must be "layer" where layers have neither a cell nor a feed-forward network; found "cell"'
                )

    @contextlib.contextmanager
    def watched(self, note: Note) -> Iterator[None]:
        inner = self.stack.connection
        self.stack.connection = _Watched(inner, self.parts, note)
        try:
            yield
        finally:
            self.stack.connection = inner

    def replace(self, maps: dict[str, nn.Module]) -> None:
        for name, first, last, takes_branch in self.parts:
            inner = self.stack.connection
            made = LinearConnection(inner, first, last, maps[name], takes_branch)
            self.stack.connection = _as_before(made, inner, maps[name])
        if self.scope == "layer" or not self.absorbs:
            found = self.stack.layers[self.layer]
            self.stack.layers[self.layer] = _as_before(PartialLayer(found, self.scope == "cell"), found)


class LayerSite:
    """A layer of a :class:`DepthLSTMEncoder` or :class:`DepthLSTMDecoder`."""

    def __init__(self, stack: Any, layer: int, scope: str) -> None:
        self.stack, self.layer, self.scope = stack, layer, scope
        self.found: Any = stack.layers[layer]
        self.cells = [name for name in CELLS if isinstance(getattr(self.found, name, None), nn.Module)]
        linear = [name for name in self.cells if isinstance(getattr(self.found, name), LinearCell)]
        if linear or isinstance(self.found, LinearLayer):
            raise ValueError(f"layer must be one that is not linear yet; found {layer}")
        if scope == "cell" and not self.cells:
            raise ValueError(f"layer must hold a cell with scope={scope!r}; found {type(self.found).__name__}")
        # a layer's states are in the caller's layout, a cell's are (batch, length, D)
        self.transposed = scope == "layer" and not stack.batch_first

    @contextlib.contextmanager
    def watched(self, note: Note) -> Iterator[None]:
        if self.scope == "layer":

            def keep(layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
                h, c = inputs[0], inputs[-1]
                before: tuple[Tensor, ...] = (h, torch.zeros_like(h) if c is None else c)
                after = output
                if h.dim() == 2:
                    before, after = tuple(each[None] for each in before), tuple(each[None] for each in after)
                note("layer", before, after)

            hook = self.found.register_forward_hook(keep)
            try:
                yield
            finally:
                hook.remove()
            return
        cells = {name: getattr(self.found, name) for name in self.cells}
        try:
            for name, cell in cells.items():
                setattr(self.found, name, _WatchedCell(cell, name, note))
            yield
        finally:
            for name, cell in cells.items():
                setattr(self.found, name, cell)

    def replace(self, maps: dict[str, nn.Module]) -> None:
        if self.scope == "layer":
            kind = LinearDecoderLayer if isinstance(self.stack, DepthLSTMDecoder) else LinearEncoderLayer
            made = kind(self.found, maps["layer"])
            self.stack.layers[self.layer] = _as_before(made, self.found, maps["layer"])
            return
        for name in self.cells:
            cell = getattr(self.found, name)
            setattr(self.found, name, _as_before(LinearCell(cell, maps[name]), cell, maps[name]))


def _as_before(made: nn.Module, found: nn.Module, *maps: nn.Module) -> nn.Module:
    """``made`` and the maps in the mode of what they replace; what else is inside keeps its own."""
    made.training = found.training
    for each in maps:
        each.train(found.training)
    return made
