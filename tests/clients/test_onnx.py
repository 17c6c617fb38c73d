"""ONNX by both of torch's exporters, run by ONNX Runtime.

The tests were run with onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_helpers import HEADS, LONGEST, D, batch, model
from torch import Tensor

import depthlstm_fast as dl

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXPORTERS = [pytest.param(True, marks=pytest.mark.slow), False]


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(
        None, dict(zip([i.name for i in session.get_inputs()], [x.numpy() for x in inputs], strict=True))
    )
    return torch.from_numpy(output)


def axes(dynamo: bool, **names: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments that choose an exporter, with the named axes of each input left open."""
    if not dynamo:
        return {
            "dynamo": False,
            "input_names": list(names),
            "dynamic_axes": {name: dict(enumerate(dims)) for name, dims in names.items()},
        }
    pytest.importorskip("onnxscript")
    limits = {
        axis: torch.export.Dim(axis, max=LONGEST if "length" in axis else 64)
        for dims in names.values()
        for axis in dims
    }
    return {
        "dynamo": True,
        "dynamic_shapes": tuple({i: limits[axis] for i, axis in enumerate(dims)} for dims in names.values()),
        "verbose": False,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("options", [{}, {"hidden": "ffn", "norm": "joint", "sublayer": True}], ids=str)
def test_encoder(dynamo: bool, options: dict[str, Any], tmp_path: Path) -> None:
    layer = dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, batch_first=True, **options)
    encoder = dl.DepthLSTMEncoder(layer, 2).eval()
    torch.onnx.export(encoder, (torch.randn(2, 5, D),), tmp_path / "m.onnx", **axes(dynamo, src=("batch", "length")))
    for shape in ((2, 5, D), (3, 9, D)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(tmp_path / "m.onnx", x), encoder(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_whole_model(dynamo: bool, tmp_path: Path) -> None:
    exported = model().eval()
    names = {"src": ("batch", "source_length"), "tgt": ("batch", "target_length")}
    torch.onnx.export(exported, batch(), tmp_path / "m.onnx", **axes(dynamo, **names))
    source, target = batch()
    for rows, length in ((4, 5), (2, 3)):
        found = run(tmp_path / "m.onnx", source[:rows, : length + 2], target[:rows, :length])
        torch.testing.assert_close(
            found, exported(source[:rows, : length + 2], target[:rows, :length]).detach(), rtol=1e-4, atol=1e-5
        )
