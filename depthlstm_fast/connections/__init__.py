"""Depth connections: what stands in place of the residual connection, one class each."""

from __future__ import annotations

from .. import checks
from .attention_residuals import AttentionResiduals
from .base import Connection
from .denseformer import DenseFormer
from .depth_gru import DepthGRU, DepthGRUCell
from .depth_lstm import DepthLSTM
from .dlcl import DLCL
from .placements import DeepNorm, Keel, LayerScale, PostNorm, PreNorm, ReZero, SandwichNorm
from .siamese import Siamese

_CLASSES: dict[str, type[Connection]] = {
    "pre-norm": PreNorm,
    "post-norm": PostNorm,
    "sandwich": SandwichNorm,
    "deepnorm": DeepNorm,
    "keel": Keel,
    "siamese": Siamese,
    "rezero": ReZero,
    "layerscale": LayerScale,
    "depth-lstm": DepthLSTM,
    "depth-gru": DepthGRU,
    "dlcl": DLCL,
    "denseformer": DenseFormer,
    "attention-residuals": AttentionResiduals,
}


def names() -> tuple[str, ...]:
    """The names that a stack's ``connection`` takes."""
    return tuple(_CLASSES)


def get(name: str) -> type[Connection]:
    """The class of a name, which is built with (d_model, num_branches, **options).

    Raises:
        ValueError: there is no such name; the message lists those there are.
    """
    checks.check_name("connection", name, names())
    return _CLASSES[name]


def is_own(connection: Connection) -> bool:
    """Whether the connection is of a class of this package."""
    return type(connection) in _CLASSES.values()


__all__ = [
    "names",
    "get",
    "Connection",
    "PreNorm",
    "PostNorm",
    "SandwichNorm",
    "DeepNorm",
    "Keel",
    "Siamese",
    "ReZero",
    "LayerScale",
    "DepthLSTM",
    "DepthGRU",
    "DepthGRUCell",
    "DLCL",
    "DenseFormer",
    "AttentionResiduals",
]
