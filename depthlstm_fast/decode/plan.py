"""What the engine has to know of a model: its matrices, norms, cells and branches as numbers, and its tensors.

csrc/decode/model.h reads the numbers in the order in which :meth:`Plan.numbers` writes them. A model that has anything
the engine does not run is refused with the reason. Nothing is computed here: a plan is made at every call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..activations import ACTIVATIONS
from ..checks import NORMS
from ..connections import DepthLSTM
from ..connections.placements import PreNorm
from ..layers import (
    DepthLSTMCell,
    DepthLSTMDecoder,
    DepthLSTMDecoderLayer,
    DepthLSTMEncoder,
    DepthLSTMEncoderLayer,
)
from ..plain import hookless, is_plain, is_plain_linear
from ..reference.attention import CrossAttention, SelfAttention
from ..reference.cell import GateNorm
from ..reference.positions import Positions
from ..stacks import Decoder, Encoder
from ..stacks.layer import StackLayer

VERSION = 1
WEIGHTS = ("float32", "bfloat16", "int8")
HEAD_BLOCK = 16  # key_block of csrc/decode/call.h
KINDS = ("self", "cross", "added", "concatenated", "network")
# one of each pair is the fused class, the other its twin
CELLS = (DepthLSTMCell, reference.DepthLSTMCell)
ENCODER_LAYERS = (DepthLSTMEncoderLayer, reference.DepthLSTMEncoderLayer)
DECODER_LAYERS = (DepthLSTMDecoderLayer, reference.DepthLSTMDecoderLayer)
ENCODERS = (DepthLSTMEncoder, reference.DepthLSTMEncoder)
DECODERS = (DepthLSTMDecoder, reference.DepthLSTMDecoder)


class CannotRun(Exception):
    """The engine does not run this model; the text says why."""


@functools.lru_cache(maxsize=256)
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def _check_own(model: nn.Module) -> None:
    """Refuse hooks and methods that an instance has in place of its class's."""
    for module in model.modules():
        cls: Any = type(module)
        own = module.__dict__.keys() & _methods(cls)
        if own or not hookless(module):
            name = next(name for name, each in model.named_modules() if each is module) or "the model"
            if own:
                raise CannotRun(f"{name} has its own {min(own)}")
            raise CannotRun(f"{name} has hooks")


class Plan:
    """A model as numbers and tensors. Raises CannotRun."""

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        cls = type(model)
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:  # it may do anything
            raise CannotRun(f"its class is {cls.__name__}, and not the package's")
        _check_own(model)
        if not is_plain(model.input_dropout, nn.Dropout):
            raise CannotRun(f"input_dropout is {type(model.input_dropout).__name__}, and not a plain nn.Dropout")
        self.model, self.dtype = model, dtype
        self.matrices: list[tuple[int, int, int]] = []
        self.norms: list[tuple[int, int]] = []
        self.cells: list[tuple[int, ...]] = []
        self.branches: dict[str, list[tuple[int, ...]]] = {"encoder": [], "decoder": []}
        self.norm_eps: list[float] = []
        self.cell_eps: list[float] = []
        self.matrix_tensors: list[tuple[nn.Linear, str]] = []
        self.norm_tensors: list[Any] = []
        self.cell_tensors: list[Any] = []
        self.seen: dict[tuple[int, str], int] = {}
        self.heads = 0
        self.d_model = model.d_model
        self._stacks(model)
        for name in ("src_embedding", "tgt_embedding"):
            embedding = getattr(model, name)
            if not is_plain(embedding, nn.Embedding) or embedding.max_norm is not None:
                raise CannotRun(f"{name} is {type(embedding).__name__}, and not a plain nn.Embedding without max_norm")
        for name in ("src_positions", "tgt_positions"):
            positions = getattr(model, name)
            if not is_plain(positions, Positions):
                raise CannotRun(f"{name} is {type(positions).__name__}, and not the package's Positions")
        self.output = self.matrix("output", model.output, model.tgt_vocab, self.d_model, dtype=output_dtype)
        self.shared = model.tgt_embedding is model.src_embedding

    def numbers(self) -> list[int]:
        model, tables = self.model, (self.matrices, self.norms, self.cells)
        counts = [len(self.matrices), len(self.norms), len(self.cells)]
        head = [VERSION, self.d_model, self.heads, self.d_model // self.heads, model.src_vocab, model.tgt_vocab]
        head += [model.max_len, model.pad_id, model.bos_id, model.eos_id, int(self.shared), *counts]
        head += [len(self.branches["encoder"]), len(self.branches["decoder"]), self.output]
        for norm, cell in self.stack_ends:
            head += [norm, int(cell is not None)]
        records: tuple[Any, ...] = (*tables, self.branches["encoder"], self.branches["decoder"])
        return head + [number for table in records for record in table for number in record]

    def reals(self) -> list[float]:
        return self.norm_eps + self.cell_eps

    def sources(self) -> list[Tensor]:
        """Every tensor that the engine reads, as the model holds it."""
        found: list[Any] = [t for linear, _ in self.matrix_tensors for t in (linear.weight, linear.bias)]
        found += [t for norm in self.norm_tensors for t in (norm.weight, getattr(norm, "bias", None))]
        found += [t for norm in self.cell_tensors if norm is not None for t in (norm.weight, norm.bias)]
        found += self._ends()
        once = {id(tensor): tensor for tensor in found if tensor is not None}  # a tied output layer is read once
        return [tensor.detach().contiguous() for tensor in once.values()]

    def weights(self) -> list[Tensor]:
        """The tensors of decode_pack, with heads padded to whole blocks; an empty one stands for None."""
        none = torch.empty(0)
        found: list[Any] = []
        for linear, pad in self.matrix_tensors:
            found += [self._padded(linear.weight, pad), None if linear.bias is None else self._padded(linear.bias, pad)]
        for norm in self.norm_tensors:
            found += [norm.weight, getattr(norm, "bias", None)]
        for norm in self.cell_tensors:
            found += [] if norm is None else [norm.weight, norm.bias]
        found += self._ends()
        return [none if tensor is None else tensor.detach().contiguous() for tensor in found]

    def _ends(self) -> list[Tensor]:
        """Embeddings, positions and initial cells."""
        model, found = self.model, []
        for side, (_, cell) in zip(("src", "tgt"), self.stack_ends, strict=True):
            weight = getattr(model, f"{side}_embedding").weight
            positions = getattr(model, f"{side}_positions")
            found += [weight] if side == "src" or not self.shared else []
            found.append(positions.weight if positions.kind == "learned" else positions._table_for(weight))
            found += [] if cell is None else [cell]
        return found

    def _padded(self, tensor: Tensor, pad: str) -> Tensor:
        """Heads of D / nhead rows or columns as heads of whole blocks, with zeros at their ends."""
        size = self.d_model // self.heads
        extra = -size % HEAD_BLOCK
        tensor = tensor.detach()
        if not pad or not extra or (pad == "columns" and tensor.dim() == 1):
            return tensor
        if pad == "columns":
            return nn.functional.pad(tensor.unflatten(1, (-1, size)), (0, extra)).flatten(1)
        ends = (0, extra) if tensor.dim() == 1 else (0, 0, 0, extra)
        return nn.functional.pad(tensor.unflatten(0, (-1, size)), ends).flatten(0, 1)

    # what a model has

    def matrix(self, name: str, linear: Any, outputs: int, inputs: int, pad: str = "", dtype: str | None = None) -> int:
        if (id(linear), "matrix") in self.seen:
            return self.seen[id(linear), "matrix"]
        if not is_plain_linear(linear):
            raise CannotRun(f"{name} is {type(linear).__name__}, and not a plain nn.Linear")
        if linear.weight.shape != (outputs, inputs) or (linear.bias is not None and linear.bias.shape != (outputs,)):
            raise CannotRun(f"{name} has the shape {tuple(linear.weight.shape)} in place of {(outputs, inputs)}")
        if pad:
            size = self.d_model // self.heads
            wide = size + -size % HEAD_BLOCK
            outputs = outputs // size * wide if pad == "rows" else outputs
            inputs = inputs // size * wide if pad == "columns" else inputs
        self.matrices.append((outputs, inputs, WEIGHTS.index(dtype or self.dtype)))
        self.matrix_tensors.append((linear, pad))
        self.seen[id(linear), "matrix"] = len(self.matrices) - 1
        return len(self.matrices) - 1

    def norm(self, name: str, norm: Any, features: int) -> int:
        if norm is None:
            return -1
        if (id(norm), "norm") in self.seen:
            return self.seen[id(norm), "norm"]
        rms = is_plain(norm, nn.RMSNorm)
        if not (rms or is_plain(norm, nn.LayerNorm)):
            raise CannotRun(f"{name} is {type(norm).__name__}, and not a plain nn.LayerNorm or nn.RMSNorm")
        if tuple(norm.normalized_shape) != (features,):
            raise CannotRun(f"{name} normalises {tuple(norm.normalized_shape)} in place of {(features,)}")
        self.norms.append((features, int(rms)))
        self.norm_eps.append(torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)
        self.norm_tensors.append(norm)
        self.seen[id(norm), "norm"] = len(self.norms) - 1
        return len(self.norms) - 1

    def cell(self, name: str, cell: Any, inputs: int) -> int:
        if (id(cell), "cell") in self.seen:
            return self.seen[id(cell), "cell"]
        features = self.d_model
        if not any(is_plain(cell, each) for each in CELLS):
            raise CannotRun(f"{name} is {type(cell).__name__}, and not the package's cell")
        if cell.hidden_size != features or cell.input_size != inputs:
            raise CannotRun(f"{name} has {cell.input_size} inputs and {cell.hidden_size} features")
        network = cell.hidden == "ffn"
        gates = self.matrix(f"{name}.gates", cell.gates, (3 if network else 4) * features, inputs + features)
        ffn = (-1, -1, -1)
        if network:
            ffn = (
                self.matrix(f"{name}.ffn_in", cell.ffn_in, cell.ffn_size, inputs + features),
                self.norm(f"{name}.ffn_norm", cell.ffn_norm, cell.ffn_size),
                self.matrix(f"{name}.ffn_out", cell.ffn_out, features, cell.ffn_size),
            )
        if cell.norm is not None and not is_plain(cell.norm, GateNorm):
            raise CannotRun(f"{name}.norm is {type(cell.norm).__name__}, and not a plain GateNorm")
        affine = int(cell.norm is not None)
        codes = (NORMS.index(cell.norm_kind), ACTIVATIONS.index(cell.activation))
        self.cells.append((gates, *codes, *ffn, affine))
        self.cell_eps.append(cell.eps)
        self.cell_tensors.append(cell.norm)
        self.seen[id(cell), "cell"] = len(self.cells) - 1
        return len(self.cells) - 1

    def attention(self, name: str, attention: Any, cross: bool) -> tuple[int, ...]:
        if not is_plain(attention, CrossAttention if cross else SelfAttention):
            raise CannotRun(f"{name} is {type(attention).__name__}, and not the package's attention")
        features = self.d_model
        self.heads = self.heads or attention.nhead
        if attention.nhead != self.heads or attention.d_model != features:
            raise CannotRun(f"{name} has {attention.nhead} heads, and the first attention {self.heads}")
        out = self.matrix(f"{name}.out_proj", attention.out_proj, features, features, "columns")
        if not cross:
            return self.matrix(f"{name}.in_proj", attention.in_proj, 3 * features, features, "rows"), out
        query = self.matrix(f"{name}.q_proj", attention.q_proj, features, features, "rows")
        return query, self.matrix(f"{name}.kv_proj", attention.kv_proj, 2 * features, features, "rows"), out

    def branch(
        self,
        stack: str,
        kind: str,
        activation: str = ACTIVATIONS[0],
        own: tuple[int, ...] = (-1, -1),
        cross: tuple[int, ...] = (-1, -1, -1),
        network: tuple[int, int] = (-1, -1),
        cell: int = -1,
        read_norm: int = -1,
    ) -> None:
        codes = (KINDS.index(kind), ACTIVATIONS.index(activation))
        self.branches[stack].append((*codes, *own, *cross, *network, cell, read_norm))

    def network(self, name: str, layer: Any) -> tuple[int, int]:
        inner = layer.linear1.out_features if is_plain_linear(layer.linear1) else 0
        return (
            self.matrix(f"{name}.linear1", layer.linear1, inner, self.d_model),
            self.matrix(f"{name}.linear2", layer.linear2, self.d_model, inner),
        )

    # the stacks of the two kinds of models

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
            self.branch(stack, "network", layer.activation, network=self.network(name, layer), cell=cell)

    def _connected(self, stack: str, module: Any) -> tuple[Any, Any]:
        """The branches of a stack around a connection; returns its last norm and its initial cell."""
        connection = module.connection
        lstm = is_plain(connection, DepthLSTM)
        if not lstm and not is_plain(connection, PreNorm):
            raise CannotRun(f"{stack}.connection is {type(connection).__name__}, and not DepthLSTM or PreNorm")
        number = 0
        for index, layer in enumerate(module.layers):
            name = f"{stack}.layers.{index}"
            if not is_plain(layer, StackLayer):
                raise CannotRun(f"{name} is {type(layer).__name__}, and not the package's layer")
            for branch in layer.branches:
                options: dict[str, Any] = {}
                if lstm:
                    options["cell"] = self.cell(
                        f"{stack}.connection.cells.{number}", connection.cells[number], self.d_model
                    )
                else:
                    norm = connection.read_norms[number]
                    options["read_norm"] = self.norm(f"{stack}.connection.read_norms.{number}", norm, self.d_model)
                self._stack_branch(stack, name, branch, layer, options)
                number += 1
        return connection.final_norm, connection.initial_cell if lstm else None

    def _stack_branch(self, stack: str, name: str, branch: str, layer: Any, options: dict[str, Any]) -> None:
        if branch == "merged_attention":
            raise CannotRun(f"{name} has merged attention")
        if branch in ("self_attention", "added_attention"):
            options["own"] = self.attention(f"{name}.self_attn", layer.self_attn, False)
        if branch in ("cross_attention", "added_attention"):
            options["cross"] = self.attention(f"{name}.cross_attn", layer.cross_attn, True)
        if branch == "feed_forward":
            options |= {"activation": layer.activation, "network": self.network(name, layer)}
        kinds = {"self_attention": "self", "cross_attention": "cross", "added_attention": "added"}
        self.branch(stack, kinds.get(branch, "network"), **options)
