"""What the engine has to know of a model: its matrices, norms, cells and branches as numbers, and its tensors.

csrc/decode/model.h reads the numbers in the order in which :meth:`Plan.numbers` writes them. A model that has anything
the engine does not run is refused with the reason. Nothing is computed here: a plan is made at every call.
translation_plan.py and causal_plan.py have what the kinds of models have of their own.
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
from ..layers import DepthLSTMCell
from ..plain import hookless, is_plain, is_plain_linear
from ..reference.attention import CrossAttention, SelfAttention
from ..reference.causal import PlainDepthLSTM, PlainPreNorm
from ..reference.cell import GateNorm
from ..reference.positions import Positions
from ..reference.rotary import make_rotation

VERSION = 2
WEIGHTS = ("float32", "bfloat16", "int8")
LONGEST = 1 << 24  # tokens of a sequence, as csrc/decode/model.h takes them
ROTATION_BYTES = 1 << 28
HEAD_BLOCK = 16  # key_block of csrc/decode/call.h
KINDS = ("self", "cross", "added", "concatenated", "network")
# one of each pair is the fused class, the other its twin
CELLS = (DepthLSTMCell, reference.DepthLSTMCell)
LSTMS = (DepthLSTM, PlainDepthLSTM)
PRE_NORMS = (PreNorm, PlainPreNorm)


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
    """A model as numbers and tensors. Raises CannotRun.

    A subclass checks embeddings and positions, finds the branches, and sets ``stack_ends``: the norm and the initial
    cell of the encoder and of the decoder.
    """

    stack_ends: list[tuple[int, Any]]
    src_vocab = 0  # no encoder
    rope_theta: float | None = None
    shared = False
    bos_id = 0

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        cls = type(model)
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:  # it may do anything
            raise CannotRun(f"its class is {cls.__name__}, and not the package's")
        _check_own(model)
        if not is_plain(model.input_dropout, nn.Dropout):
            raise CannotRun(f"input_dropout is {type(model.input_dropout).__name__}, and not a plain nn.Dropout")
        if model.max_len > LONGEST:
            raise CannotRun(f"its max_len is {model.max_len}, and not at most {LONGEST}")
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
        self.heads = self.kv_heads = 0
        self.d_model = model.d_model
        self.vocab, self.eos_id = self._check_surroundings(model)
        self._stacks(model)
        angles = 0 if self.rope_theta is None else 4 * model.max_len * (self.d_model // self.heads)
        if angles > ROTATION_BYTES:
            raise CannotRun(f"its rotary positions would take a table of {angles} bytes")
        self.output = self.matrix("output", model.output, self.vocab, self.d_model, dtype=output_dtype)

    def _check_surroundings(self, model: Any) -> tuple[int, int]:
        """The vocabulary of the output, and the id that ends a search or -1."""
        raise NotImplementedError

    def _stacks(self, model: Any) -> None:
        raise NotImplementedError

    def _sides(self) -> list[tuple[Any, Any]]:
        """The embedding and the positions of the encoder and the decoder; None for what there is none of."""
        raise NotImplementedError

    def numbers(self) -> list[int]:
        model, tables = self.model, (self.matrices, self.norms, self.cells)
        counts = [len(self.matrices), len(self.norms), len(self.cells)]
        head = [VERSION, self.d_model, self.heads, self.d_model // self.heads, self.kv_heads]
        head += [self.src_vocab, self.vocab, model.max_len, model.pad_id, self.bos_id, self.eos_id]
        head += [int(self.shared), int(self.rope_theta is not None), *counts]
        head += [len(self.branches["encoder"]), len(self.branches["decoder"]), self.output]
        for (norm, cell), (_, positions) in zip(self.stack_ends, self._sides(), strict=True):
            head += [norm, int(cell is not None), int(positions is not None)]
        records: tuple[Any, ...] = (*tables, self.branches["encoder"], self.branches["decoder"])
        return head + [number for table in records for record in table for number in record]

    def reals(self) -> list[float]:
        return self.norm_eps + self.cell_eps + ([] if self.rope_theta is None else [self.rope_theta])

    def position_bytes(self) -> int:
        """Keys and values of one position of one sequence."""
        size = self.d_model // self.heads
        return self.kv_heads * (size + -size % HEAD_BLOCK) * 8 * len(self.branches["decoder"])

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
        found += [] if self.rope_theta is None else [self._angles(self.rope_theta)]
        return [none if tensor is None else tensor.detach().contiguous() for tensor in found]

    def _ends(self) -> list[Tensor]:
        """Embeddings, positions and initial cells."""
        found: list[Any] = []
        for (embedding, positions), (_, cell) in zip(self._sides(), self.stack_ends, strict=True):
            if embedding is not None and not (found and self.shared):
                found.append(embedding.weight)
            if positions is not None:
                learned = positions.kind == "learned"
                found.append(positions.weight if learned else positions._table_for(embedding.weight))
            found += [] if cell is None else [cell]
        return found

    def _angles(self, theta: float) -> Tensor:
        """Cosines and sines of every position, (max_len, 2, D / nhead / 2)."""
        positions = torch.arange(self.model.max_len)[None]
        rotation = make_rotation(positions, self.d_model // self.heads, theta, torch.float32)
        return torch.stack([part[0, 0] for part in rotation], 1)

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

    def embedding(self, name: str, embedding: Any) -> None:
        if not is_plain(embedding, nn.Embedding) or embedding.max_norm is not None:
            raise CannotRun(f"{name} is {type(embedding).__name__}, and not a plain nn.Embedding without max_norm")

    def positions(self, name: str, positions: Any) -> None:
        if not is_plain(positions, Positions):
            raise CannotRun(f"{name} is {type(positions).__name__}, and not the package's Positions")

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
        found = (attention.nhead, attention.nhead if cross else attention.kv_heads)
        if not self.heads:
            self.heads, self.kv_heads = found
        if found != (self.heads, self.kv_heads) or attention.d_model != features:
            raise CannotRun(f"{name} has {found} heads, and the first attention {(self.heads, self.kv_heads)}")
        out = self.matrix(f"{name}.out_proj", attention.out_proj, features, features, "columns")
        if not cross:
            outputs = sum(attention.parts)
            return self.matrix(f"{name}.in_proj", attention.in_proj, outputs, features, "rows"), out
        query = self.matrix(f"{name}.q_proj", attention.q_proj, features, features, "rows")
        return query, self.matrix(f"{name}.kv_proj", attention.kv_proj, 2 * features, features, "rows"), out

    def branch(
        self,
        stack: str,
        kind: str,
        activation: str = ACTIVATIONS[0],
        gated: bool = False,
        own: tuple[int, ...] = (-1, -1),
        cross: tuple[int, ...] = (-1, -1, -1),
        network: tuple[int, int] = (-1, -1),
        cell: int = -1,
        read_norm: int = -1,
    ) -> None:
        codes = (KINDS.index(kind), ACTIVATIONS.index(activation), int(gated))
        self.branches[stack].append((*codes, *own, *cross, *network, cell, read_norm))

    def network(self, name: str, layer: Any) -> dict[str, Any]:
        """What :meth:`branch` has to know of a feed-forward network."""
        gated = getattr(layer, "gated", False)
        inner = layer.linear1.out_features // (1 + gated) if is_plain_linear(layer.linear1) else 0
        matrices = (
            self.matrix(f"{name}.linear1", layer.linear1, inner * (1 + gated), self.d_model),
            self.matrix(f"{name}.linear2", layer.linear2, self.d_model, inner),
        )
        activation = "silu" if gated else getattr(layer, "activation", "gelu")  # a CausalLayer has no other
        return {"network": matrices, "activation": activation, "gated": gated}

    def check_connection(self, stack: str, connection: Any) -> None:
        if not any(is_plain(connection, each) for each in (*LSTMS, *PRE_NORMS)):
            raise CannotRun(f"{stack}.connection is {type(connection).__name__}, and not DepthLSTM or PreNorm")

    def link(self, stack: str, connection: Any, number: int) -> dict[str, Any]:
        """What a connection puts around branch ``number``: a cell behind it, or a norm before it."""
        name = f"{stack}.connection"
        if isinstance(connection, LSTMS):
            return {"cell": self.cell(f"{name}.cells.{number}", connection.cells[number], self.d_model)}
        norm: Any = connection.read_norms[number]
        return {"read_norm": self.norm(f"{name}.read_norms.{number}", norm, self.d_model)}
