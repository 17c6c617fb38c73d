"""What encoders and decoders share: layers of branches, and one connection through all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks, connections
from ..connections import Connection, DepthLSTM
from ..initialisation import INITS, initialise_connection, initialise_layer
from ..reference.attention import CrossAttention, check_beside
from ..reference.layout import Layout
from ..reference.stacks import CELLS
from .layer import StackLayer, branch_names, checked_state

Factory = str | Callable[[int, int], Connection]


def build_connection(connection: Factory, d_model: int, num_branches: int, hints: dict[str, Any]) -> Connection:
    """The connection of a stack from a name or a callable, which is told those of ``hints`` that it has arguments for.

    Raises:
        TypeError: connection is neither, or what it returns is no Connection.
        ValueError: there is no connection of that name, or it returns one of other sizes.
    """
    factory: Any = connections.get(connection) if isinstance(connection, str) else connection
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"connection must be a name or a callable (d_model, num_branches) -> Connection; "
            f"found {'an instance of ' if callable(factory) else ''}{type(factory).__name__}"
        )
    try:
        signature = inspect.signature(factory)
        chosen = getattr(factory, "keywords", {})
        told = {name: value for name, value in hints.items() if name in signature.parameters and name not in chosen}
        if "norm" in told and signature.parameters["norm"].default not in checks.NORMALISATIONS:
            del told["norm"]  # the depth-wise LSTM's says how gates are normalised
        signature.bind(d_model, num_branches, **told)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"connection must be callable with (d_model, num_branches); found {factory!r}: {error}"
        ) from None
    built = factory(d_model, num_branches, **told)
    if not isinstance(built, Connection):
        raise TypeError(f"connection must return a Connection; found {type(built).__name__}")
    if (built.d_model, built.num_branches) != (d_model, num_branches):
        raise ValueError(
            f"connection must return a Connection of d_model={d_model}, num_branches={num_branches}; "
            f"found d_model={built.d_model}, num_branches={built.num_branches}"
        )
    return built


def absorbs_feed_forward(connection: Factory) -> bool:
    """Whether layers with this connection have no feed-forward network by default, as far as a callable says."""
    factory: Any = connections.get(connection) if isinstance(connection, str) else connection
    while isinstance(factory, functools.partial):
        factory = factory.func
    return bool(getattr(factory, "absorbs_feed_forward", False))


def takes_dropout(connection: Factory) -> bool:
    """Whether the connection drops by itself."""
    factory: Any = connections.get(connection) if isinstance(connection, str) else connection
    return "dropout" in inspect.signature(factory).parameters


class Stack(Layout, nn.Module):
    """Layers of branches, and one connection through all of them."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        connection: Factory,
        feed_forward: bool | None,
        dim_feedforward: int | None,
        dropout: float,
        activation: str,
        layer_norm_eps: float,
        batch_first: bool,
        bias: bool,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        attention: str | None,
        cross_classes: list[Callable[..., CrossAttention]],
        kv_heads: int | None = None,
        gated: bool = False,
        norm: str | None = None,
        layer_class: type[StackLayer] = StackLayer,
    ) -> None:
        super().__init__()
        checks.check_placement(device, dtype)
        checks.check_size("d_model", d_model)
        checks.check_size("num_layers", num_layers)
        checks.check_probability("dropout", dropout)
        checks.check_name("activation", activation, checks.ACTIVATIONS)
        checks.check_eps("layer_norm_eps", layer_norm_eps)
        checks.check_flags(batch_first=batch_first, bias=bias)
        if feed_forward is not None:
            checks.check_flags(feed_forward=feed_forward)
        checks.check_name("init", init, INITS)
        inner = 4 * d_model if dim_feedforward is None else dim_feedforward
        checks.check_size("dim_feedforward", inner)
        has_network = not absorbs_feed_forward(connection) if feed_forward is None else feed_forward
        names = branch_names(attention, has_network)
        hints = {
            "branches_per_layer": len(names),
            "dropout": dropout,
            "activation": activation,
            "bias": bias,
            "eps": layer_norm_eps,
        }
        if norm is not None:
            hints |= {"norm": norm, "output_norm": norm}
        built = build_connection(connection, d_model, num_layers * len(names), hints)
        if feed_forward is None and has_network and built.absorbs_feed_forward:
            raise ValueError(
                f"feed_forward must be True or False where connection is a callable that does not say that "
                f"{type(built).__name__} absorbs it; found None"
            )
        self.d_model, self.nhead, self.num_layers, self.batch_first, self.init = (
            d_model,
            nhead,
            num_layers,
            batch_first,
            init,
        )
        self.dropout = 0.0 if takes_dropout(connection) else dropout
        self.branches_per_layer, self.gradient_checkpointing, self.attention = len(names), False, attention
        self.beta = (4 * built.num_branches) ** -0.25  # DeepNorm's, by branches: (8N) for two a layer, (12M) for three
        common: dict[str, Any] = {"dropout": dropout, "activation": activation, "bias": bias, "kv_heads": kv_heads}
        common |= {"gated": gated, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            [
                layer_class(d_model, nhead, attention, has_network, inner, cross_class=cross_class, **common)
                for cross_class in cross_classes
            ]
        )
        self.connection = built.to(device=device, dtype=dtype)
        self._is_own = connections.is_own(built)
        self.arguments = {
            "dim_feedforward": inner,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "batch_first": batch_first,
            "bias": bias,
            "connection": connection,
            "feed_forward": has_network,
            "init": init,
        }
        self._draw()
        self.register_load_state_dict_pre_hook(_take_cells)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, init={self.init!r}"

    def like(self, num_layers: int) -> Any:
        """A stack of the same kind, of ``num_layers`` layers, each drawn anew."""
        weight = next(self.layers.parameters())
        placed = {"device": weight.device, "dtype": weight.dtype}
        return type(self)(self.d_model, self.nhead, num_layers, **self.arguments, **placed)  # type: ignore[arg-type]

    def _check_beside(self, argument: str, outside: Tensor) -> None:
        # a user's connection may bring the input to the weights' dtype
        if argument == "memory" or self._is_own:
            layer = self.layers[0]
            check_beside(argument, outside, layer, layer)

    def _draw(self) -> None:
        for index, layer in enumerate(self.layers):
            initialise_layer(layer, self.init, index, self.beta)
        initialise_connection(self.connection, self.init, self.branches_per_layer)

    def reset_parameters(self) -> None:
        """Draw every matrix anew, and set every other parameter to its initial value."""
        for layer in self.layers:
            cross = getattr(layer, "cross_attn", None)
            if isinstance(cross, CrossAttention):
                cross.reset_parameters()
        self.connection.reset_parameters()
        self._draw()

    def _through_layers(self, x: Tensor, options: list[dict[str, Any]], outputs: list[Tensor] | None = None) -> Tensor:
        """The output for the embedded input x; ``outputs`` is given what the connection makes of each depth."""
        state = checked_state(self.connection.start(x), self.connection, "start")
        if outputs is not None:
            outputs.append(self.connection.finish(state))
        u = self.connection.read(state, 0)
        for index, each in enumerate(options):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                u, *rest = checkpoint(self._layer, index, each, u, *state, use_reentrant=False)
            else:
                u, *rest = self._layer(index, each, u, *state)
            state = tuple(rest)
            if outputs is not None:
                outputs.append(u if index == self.num_layers - 1 else self.connection.finish(state))
        return u

    def _layer(self, index: int, options: dict[str, Any], u: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(the next layer's input, or after the last one the output; the state)."""
        first = index * self.branches_per_layer
        return self.layers[index](u, state, options, self.connection, first, self.dropout)


def _take_cells(stack: Stack, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a depth-wise LSTM stack's file be loaded: its layers hold the cells, and the stack the norm."""
    connection = stack.connection
    if not isinstance(connection, DepthLSTM):
        return
    own = f"{prefix}connection."
    moved = {f"{prefix}norm.": f"{own}final_norm.", f"{prefix}initial_cell": f"{own}initial_cell"}
    for index in range(stack.num_layers):
        held = f"{prefix}layers.{index}."
        cells = [name for name in CELLS if any(key.startswith(f"{held}{name}.") for key in state_dict)]
        for place, name in enumerate(cells):
            moved[f"{held}{name}."] = f"{own}cells.{index * stack.branches_per_layer + place}."
    for key in list(state_dict):
        for old, new in moved.items():
            if key.startswith(old):
                state_dict[new + key[len(old) :]] = state_dict.pop(key)
                break
