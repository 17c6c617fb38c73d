"""Argument checks: single arguments, and all arguments of one op."""

from ..activations import ACTIVATIONS
from .arguments import (
    FLOATS,
    check_companion,
    check_dense,
    check_eps,
    check_finite,
    check_flags,
    check_float_tensor,
    check_initial,
    check_name,
    check_placement,
    check_probability,
    check_shape,
    check_size,
)
from .connections import (
    NORMALISATIONS,
    check_depth_gru_gates,
    check_layer_attend,
    check_layer_mix,
    check_norm_step,
    check_output_gradients,
    check_siamese_step,
)
from .depth_lstm import MAX_FEATURES, NORMS, check_cell, check_gates, check_options
from .modules import check_beside

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "MAX_FEATURES",
    "NORMALISATIONS",
    "NORMS",
    "check_beside",
    "check_cell",
    "check_companion",
    "check_dense",
    "check_depth_gru_gates",
    "check_eps",
    "check_finite",
    "check_flags",
    "check_initial",
    "check_float_tensor",
    "check_gates",
    "check_layer_attend",
    "check_layer_mix",
    "check_name",
    "check_norm_step",
    "check_options",
    "check_placement",
    "check_output_gradients",
    "check_probability",
    "check_shape",
    "check_siamese_step",
    "check_size",
]
