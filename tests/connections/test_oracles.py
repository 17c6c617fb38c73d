"""Against other packages' implementations, in the versions they were read in; skipped where not installed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from connection_helpers import C, normal, randomise
from torch import nn

import depthlstm_fast as dl


def oracle(package: str, version: str, module: str) -> Any:
    """A module of ``package``; conventions may change with its versions, so that another one is skipped."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if found != version:
        pytest.skip(f"{package} {version} is the oracle; {found} is installed")
    return pytest.importorskip(module, exc_type=ImportError)


@pytest.mark.parametrize("sources", [1, 2, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_layer_attend_is_flas(sources: int, normed: bool) -> None:
    fla = oracle("fla-core", "0.6.0", "fla.ops.attnres.naive")
    xs = [normal(2, 3, C).float() for _ in range(sources)]
    query, key_weight, weight = (normal(C).float() for _ in range(3))
    wanted = fla.naive_attnres(query, xs, key_weight, weight if normed else None)
    found = dl.layer_attend(xs, query, key_weight, weight if normed else None, norm="rms")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_gru_over_depth_is_x_transformers() -> None:
    package = oracle("x-transformers", "2.31.10", "x_transformers.x_transformers")
    gating = randomise(package.GRUGating(C))
    cell = dl.connections.DepthGRUCell(C, C)
    for own, theirs in (("input_proj", "ih"), ("state_proj", "hh")):
        linear: nn.Module = getattr(cell, own)
        linear.load_state_dict({kind: getattr(gating.gru, f"{kind}_{theirs}") for kind in ("weight", "bias")})
    y, h = normal(2, 3, C).float(), normal(2, 3, C).float()
    torch.testing.assert_close(cell(y, h), gating(y, h), rtol=1e-5, atol=1e-5)
