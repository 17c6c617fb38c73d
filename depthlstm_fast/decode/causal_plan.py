"""What the engine has to know of a language model's stack, embedding and positions."""

from __future__ import annotations

from typing import Any

from ..plain import is_plain
from ..reference.causal import CausalLayer, PlainCausalStack
from ..stacks import CausalStack
from ..stacks.layer import StackLayer
from .plan import CannotRun, Plan

# one of each pair is the fused class, the other its twin
STACKS = (CausalStack, PlainCausalStack)
LAYERS = (StackLayer, CausalLayer)


class CausalPlan(Plan):
    """The plan of a :class:`depthlstm_fast.LanguageModel`: a decoder whose layers have no cross-attention."""

    def _check_surroundings(self, model: Any) -> tuple[int, int]:
        self.embedding("embedding", model.embedding)
        if model.positions is not None:
            self.positions("positions", model.positions)
        self.rope_theta = float(model.rope_theta) if model.position_kind == "rope" else None
        return model.vocab_size, -1 if model.eos_id is None else model.eos_id

    def _sides(self) -> list[tuple[Any, Any]]:
        return [(None, None), (self.model.embedding, self.model.positions)]

    def _stacks(self, model: Any) -> None:
        stack = model.decoder
        if not any(is_plain(stack, each) for each in STACKS):
            raise CannotRun(f"its stack is {type(stack).__name__}, and not the package's")
        connection = stack.connection
        self.check_connection("decoder", connection)
        number = 0
        for index, layer in enumerate(stack.layers):
            name = f"decoder.layers.{index}"
            if not any(is_plain(layer, each) for each in LAYERS):
                raise CannotRun(f"{name} is {type(layer).__name__}, and not the package's layer")
            own = self.attention(f"{name}.self_attn", layer.self_attn, False)
            self.branch("decoder", "self", own=own, **self.link("decoder", connection, number))
            number += 1
            if hasattr(layer, "linear1"):
                network = self.network(name, layer)
                self.branch("decoder", "network", **network, **self.link("decoder", connection, number))
                number += 1
        norm = self.norm("decoder.connection.final_norm", connection.final_norm, self.d_model)
        self.stack_ends = [(-1, None), (norm, getattr(connection, "initial_cell", None))]
