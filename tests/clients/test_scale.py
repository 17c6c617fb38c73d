"""docs/scale.md: the memory of each device by formula, held against models sharded on the meta device."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import depthlstm_fast as dl

dist = pytest.importorskip("torch.distributed")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
CONNECTIONS = ("depth-lstm", "pre-norm")
DEVICES = (1, 8, 64)
STATES = 16  # bytes an element in float32: parameter, gradient, and both moments of AdamW


def large(connection: str) -> Any:
    with torch.device("meta"):
        return dl.Transformer(32000, 32000, 1024, 16, 24, 24, connection=connection)


def held(connection: str, devices: int) -> int:
    """Return how many elements the first of ``devices`` processes holds, after FSDP2 has sharded every layer."""
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=devices)
    try:
        mesh, model = init_device_mesh("cpu", (devices,)), large(connection)
        for layer in (*model.encoder.layers, *model.decoder.layers):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return sum(parameter.to_local().numel() for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def by_formula(connection: str, devices: int) -> int:
    """FSDP2 cuts the first axis of each parameter, and rounds up."""
    shapes = [parameter.shape for parameter in large(connection).parameters()]
    return sum(math.ceil(shape[0] / devices) * math.prod(shape[1:]) for shape in shapes)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_formula_of_the_memory(connection: str, devices: int) -> None:
    assert held(connection, devices) == by_formula(connection, devices)


@pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")
def test_page_has_the_formula_s_numbers() -> None:
    shown = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", line):
            shown[found[1]] = found.groups()[1:]
    wanted = {
        name: tuple(f"{STATES * by_formula(name, devices) / 1e9:.2f}" for devices in DEVICES) for name in CONNECTIONS
    }
    assert shown == wanted
