"""What the engine has to know of a translation model's stacks, embeddings and positions."""

from __future__ import annotations

from typing import Any

from .. import reference
from ..layers import DepthLSTMDecoder, DepthLSTMDecoderLayer, DepthLSTMEncoder, DepthLSTMEncoderLayer
from ..plain import is_plain
from ..stacks import Decoder, Encoder
from ..stacks.layer import StackLayer
from .plan import CannotRun, Plan

# one of each pair is the fused class, the other its twin
ENCODER_LAYERS = (DepthLSTMEncoderLayer, reference.DepthLSTMEncoderLayer)
DECODER_LAYERS = (DepthLSTMDecoderLayer, reference.DepthLSTMDecoderLayer)
ENCODERS = (DepthLSTMEncoder, reference.DepthLSTMEncoder)
DECODERS = (DepthLSTMDecoder, reference.DepthLSTMDecoder)


class TranslationPlan(Plan):
    """The plan of a :class:`depthlstm_fast.DepthLSTMTransformer` or a :class:`depthlstm_fast.Transformer`."""

    def _check_surroundings(self, model: Any) -> tuple[int, int]:
        for side in ("src", "tgt"):
            self.embedding(f"{side}_embedding", getattr(model, f"{side}_embedding"))
            self.positions(f"{side}_positions", getattr(model, f"{side}_positions"))
        self.src_vocab, self.bos_id = model.src_vocab, model.bos_id
        self.shared = model.tgt_embedding is model.src_embedding
        return model.tgt_vocab, model.eos_id

    def _sides(self) -> list[tuple[Any, Any]]:
        model = self.model
        return [(model.src_embedding, model.src_positions), (model.tgt_embedding, model.tgt_positions)]

    def _stacks(self, model: Any) -> None:
        of_layers = any(is_plain(model.encoder, each) for each in ENCODERS)
        if of_layers and any(is_plain(model.decoder, each) for each in DECODERS):
            for stack in ("encoder", "decoder"):
                for index, layer in enumerate(getattr(model, stack).layers):
                    self._lstm_layer(stack, f"{stack}.layers.{index}", layer)
            ends = [(getattr(model, s).norm, getattr(model, s).initial_cell) for s in ("encoder", "decoder")]
        elif is_plain(model.encoder, Encoder) and is_plain(model.decoder, Decoder):
            if getattr(model, "memory", "top") != "top":
                raise CannotRun(f'its memory is {model.memory!r}, and not "top"')
            ends = [self._connected(stack, getattr(model, stack)) for stack in ("encoder", "decoder")]
        else:
            names = (type(model.encoder).__name__, type(model.decoder).__name__)
            raise CannotRun(f"its stacks are {' and '.join(names)}, and not the package's")
        self.stack_ends = [
            (self.norm(f"{stack}.norm", norm, self.d_model), cell)
            for stack, (norm, cell) in zip(("encoder", "decoder"), ends, strict=True)
        ]

    def _lstm_layer(self, stack: str, name: str, layer: Any) -> None:
        features = self.d_model
        if not any(is_plain(layer, each) for each in (ENCODER_LAYERS if stack == "encoder" else DECODER_LAYERS)):
            raise CannotRun(f"{name} is {type(layer).__name__}, and not the package's layer")
        own = self.attention(f"{name}.self_attn", layer.self_attn, False)
        merge = getattr(layer, "merge", "cells")
        cell = self.cell(f"{name}.cell", layer.cell, (2 if merge == "concat" else 1) * features)
        if stack == "encoder":
            self.branch(stack, "self", own=own, cell=cell)
        else:
            cross = self.attention(f"{name}.cross_attn", layer.cross_attn, True)
            if merge == "cells":
                self.branch(stack, "self", own=own, cell=cell)
                self.branch(
                    stack, "cross", cross=cross, cell=self.cell(f"{name}.cross_cell", layer.cross_cell, features)
                )
            else:
                kind = "added" if merge == "add" else "concatenated"
                self.branch(stack, kind, own=own, cross=cross, cell=cell)
        if layer.sublayer:
            cell = self.cell(f"{name}.ffn_cell", layer.ffn_cell, features)
            self.branch(stack, "network", cell=cell, **self.network(name, layer))

    def _connected(self, stack: str, module: Any) -> tuple[Any, Any]:
        """The branches of a stack around a connection; returns its last norm and its initial cell."""
        connection = module.connection
        self.check_connection(stack, connection)
        number = 0
        for index, layer in enumerate(module.layers):
            name = f"{stack}.layers.{index}"
            if not is_plain(layer, StackLayer):
                raise CannotRun(f"{name} is {type(layer).__name__}, and not the package's layer")
            for branch in layer.branches:
                self._stack_branch(stack, name, branch, layer, self.link(stack, connection, number))
                number += 1
        return connection.final_norm, getattr(connection, "initial_cell", None)

    def _stack_branch(self, stack: str, name: str, branch: str, layer: Any, options: dict[str, Any]) -> None:
        if branch == "merged_attention":
            raise CannotRun(f"{name} has merged attention")
        if branch in ("self_attention", "added_attention"):
            options["own"] = self.attention(f"{name}.self_attn", layer.self_attn, False)
        if branch in ("cross_attention", "added_attention"):
            options["cross"] = self.attention(f"{name}.cross_attn", layer.cross_attn, True)
        if branch == "feed_forward":
            options |= self.network(name, layer)
        kinds = {"self_attention": "self", "cross_attention": "cross", "added_attention": "added"}
        self.branch(stack, kinds.get(branch, "network"), **options)
