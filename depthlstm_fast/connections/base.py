"""The seam: what stands in place of the residual connection, for every branch of a stack."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..plain import is_plain
from ..reference.normalise import NORM_CLASSES

State = tuple[Tensor, ...]


class Connection(nn.Module):
    """What carries a token's representation from branch to branch of a stack.

    A branch is a self-attention, a cross-attention or a feed-forward network. A stack runs

        state = connection.start(x)
        u = connection.read(state, 0)
        for each branch i but the last:   state, u = connection.step(state, branch(u), i)
        for the last:                     state = connection.write(state, branch(u), i)
        h = connection.finish(state)

    A class of your own defines ``read`` and ``write``, and what else it needs. It works unregistered: a stack's
    ``connection`` is a name or a callable (d_model, num_branches) -> Connection. A callable that has the keyword
    arguments ``branches_per_layer``, ``dropout``, ``activation``, ``bias`` or ``eps`` is told the stack's; with
    ``dropout`` it drops by itself, and the stack does not drop the branches' outputs.

    All rows are tokens: no method may let one token see another, so that incremental decoding needs no state of its
    own. No method may change a tensor of the state in place: later branches read it.

    Args:
        d_model: C, the width.
        num_branches: how many branches the stack has.

    Attributes:
        absorbs_feed_forward: the stack's layers have no feed-forward network by default.
        mixes_depth: the state keeps outputs of earlier branches.
        is_identity_at_init: a stack equals one with pre-norm at initialisation, bit for bit, in plain PyTorch and in
            the fused kernels.

    Raises:
        TypeError, ValueError: d_model or num_branches is not an int of at least 1.
    """

    absorbs_feed_forward = False
    mixes_depth = False
    is_identity_at_init = False

    def __init__(self, d_model: int, num_branches: int) -> None:
        super().__init__()
        checks.check_size("d_model", d_model)
        checks.check_size("num_branches", num_branches)
        self.d_model, self.num_branches = d_model, num_branches

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_branches={self.num_branches}"

    def start(self, x: Tensor) -> State:
        """The state before the first branch: a tuple of tensors, from the embedded input x (..., C)."""
        return (x,)

    def read(self, state: State, i: int) -> Tensor:
        """The input (..., C) of branch i, 0 <= i < num_branches."""
        raise NotImplementedError(f"{type(self).__name__} must define read(state, i)")

    def write(self, state: State, y: Tensor, i: int) -> State:
        """The state after branch i, whose output is y (..., C)."""
        raise NotImplementedError(f"{type(self).__name__} must define write(state, y, i)")

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        """``write`` for branch i and ``read`` for branch i + 1, which a kernel may do at once."""
        state = self.write(state, y, i)
        return state, self.read(state, i + 1)

    def finish(self, state: State) -> Tensor:
        """The stack's output (..., C); it is also called on the states after inner layers, where they are memories."""
        return state[0]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of this module that must not decay.

        Those of normalisations and those with fewer than two dimensions need not be named:
        :func:`depthlstm_fast.param_groups` knows them.
        """
        return set()

    def reset_parameters(self) -> None:
        """Set every parameter of the connection to its initial value."""
        for child in self.children():
            _reset(child)

    def bytes_moved(self, rows: int, itemsize: int = 4) -> int:
        """Bytes that must be read and written in a forward pass through the stack, by formula.

        Each call of read, step, write and finish is one pass over its operands. Products are not counted: what
        precedes the gates of a recurrent connection is a library's.

        Args:
            rows: tokens.
            itemsize: bytes of an element of the state.

        Raises:
            TypeError, ValueError: rows is no int of at least 0, or itemsize none of at least 1.
        """
        checks.check_size("rows", rows, 0)
        checks.check_size("itemsize", itemsize)
        return rows * self.d_model * itemsize * self._elements()

    def _elements(self) -> int:
        """What :meth:`bytes_moved` counts, in units of C elements a token."""
        raise NotImplementedError(f"{type(self).__name__} has no formula for bytes_moved")


def _reset(module: nn.Module) -> None:
    """Reset what knows how to; what is inside it is its own business, as a cell's biases are."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    else:
        for child in module.children():
            _reset(child)


def make_norms(number: int, d_model: int, norm: str, eps: float) -> nn.ModuleList:
    """``number`` LayerNorms or RMSNorms; raises ValueError for another name, ValueError or TypeError for eps."""
    checks.check_name("norm", norm, checks.NORMALISATIONS)
    checks.check_eps("eps", eps)
    return nn.ModuleList([NORM_CLASSES[norm](d_model, eps=eps) for _ in range(number)])


def affine_of(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None] | None:
    """(weight, bias) of a norm that a fused op may apply in its place, (None, None) for no norm.

    None where the module must be called: it has hooks, or is none of torch's.
    """
    if norm is None:
        return None, None
    if is_plain(norm, nn.LayerNorm):
        return norm.weight, norm.bias  # type: ignore[return-value]
    return (norm.weight, None) if is_plain(norm, nn.RMSNorm) else None  # type: ignore[return-value]


def affines_of(norms: dict[str, nn.Module | None]) -> dict[str, Any] | None:
    """``weight<key>`` and ``bias<key>`` of each norm, as the ops take them; None where one of them must be called."""
    named: dict[str, Any] = {}
    for key, norm in norms.items():
        pair = affine_of(norm)
        if pair is None:
            return None
        named[f"weight{key}"], named[f"bias{key}"] = pair
    return named


def check_layers(num_branches: int, branches_per_layer: int) -> int:
    """The number of layers; raises ValueError where they do not come out even."""
    checks.check_size("branches_per_layer", branches_per_layer)
    if num_branches % branches_per_layer:
        raise ValueError(f"branches_per_layer must divide num_branches, {num_branches}; found {branches_per_layer}")
    return num_branches // branches_per_layer
