"""Accidental misuse of the Triton backend.

The cases are lazy signs, no rows, threads, senseless hints and broken installations.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICE, needs_triton

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[3]


@needs_triton
@pytest.mark.parametrize("place", range(4))
def test_lazy_minus_signs_are_applied(place: int) -> None:
    """Check that a pending minus sign is applied, as in the imaginary part of a conjugate.

    Kernels see memory, not signs.
    """
    tensors = [torch.randn(shape, device=DEVICE) for shape in ((5, 32), (5, 8), (4, 8), (4, 8))]
    tensors[place] = torch._neg_view(tensors[place])
    assert tensors[place].is_neg()
    for found, wanted in zip(
        dl.depth_lstm_gates(*tensors, backend="triton"), dl.depth_lstm_gates(*tensors, backend="reference"), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@needs_triton
def test_lazy_minus_sign_of_a_gradient() -> None:
    z, c = torch.randn(5, 4, device=DEVICE, requires_grad=True), torch.randn(5, 1, device=DEVICE)
    sign = torch.randn(5, 1, dtype=torch.complex64, device=DEVICE).conj().imag
    gradients = []
    for backend in ("triton", "reference"):
        h, _ = dl.depth_lstm_gates(z, c, norm="none", backend=backend)
        gradients.append(torch.autograd.grad(h, z, sign)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_stack_of_no_rows(backend: str, shape: tuple[int, ...]) -> None:
    """Check a stack in training, so that dropout's mask has no rows either."""
    encoder = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(16, 2, batch_first=True, dropout=0.1), 2).to(DEVICE)
    decoder = dl.DepthLSTMDecoder(dl.DepthLSTMDecoderLayer(16, 2, batch_first=True, dropout=0.0), 2).to(DEVICE)
    source = torch.randn(shape, device=DEVICE)
    cell = dl.DepthLSTMCell(16, 16, dropout=0.1).to(DEVICE)
    with dl.use_backend(backend):
        assert cell(source)[0].shape == shape
        assert encoder.eval()(source).shape == shape
        assert decoder(source, torch.randn(shape[0], 4, 16, device=DEVICE)).shape == shape


@needs_triton
def test_threads() -> None:
    """Check two threads at once: they take turns with the interpreter's globals, which are restored afterwards."""
    z, c = torch.randn(20, 64, device=DEVICE).to(torch.bfloat16), torch.randn(20, 16, device=DEVICE).to(torch.bfloat16)
    alone = dl.depth_lstm_gates(z, c, backend="triton")
    found: list[Any] = []

    def run() -> None:
        try:
            found.extend(dl.depth_lstm_gates(z, c, backend="triton") for _ in range(5))
        except Exception as error:  # noqa: BLE001
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15, found
    assert all(torch.equal(h, alone[0]) and torch.equal(new_c, alone[1]) for h, new_c in found)


@pytest.mark.parametrize("left", [-1, "x", 1.5, True, None])
def test_left_is_checked_by_every_backend(left: Any) -> None:
    x, h = torch.randn(3, 5), torch.randn(3, 6)
    with pytest.raises((TypeError, ValueError), match="left must be"):
        dl.depth_lstm_cell(x, h, h, torch.randn(24, 11), left=left, backend="reference")


def test_tensors_must_be_dense() -> None:
    z, c = torch.randn(3, 8), torch.randn(3, 2)
    for other in (z.to_sparse(), z.to_mkldnn(), torch.nested.nested_tensor([z[0], z[1]])):
        with pytest.raises(ValueError, match="z must be a dense tensor"):
            dl.depth_lstm_gates(other, c)


def test_eps_that_no_float_holds() -> None:
    for eps in (10**400, 10**9000, -(10**9000)):
        with pytest.raises(ValueError, match="eps must be finite"):
            dl.depth_lstm_gates(torch.randn(3, 8), torch.randn(3, 2), eps=eps)


@pytest.mark.parametrize(
    ("init", "metadata", "words"),
    [
        ("raise RuntimeError('boom')", "Name: triton\nVersion: 3.6.0", "do not import: RuntimeError: boom"),
        ("", "Name: triton\nVersion: 2.1.0", "2.1.0 is too old"),
        (
            "raise RuntimeError('boom')",
            "Name: triton",
            "do not import: RuntimeError: boom",
        ),  # left by an interrupted pip
    ],
    ids=["raises", "old", "no version"],
)
def test_broken_triton_is_reported_and_breaks_nothing(init: str, metadata: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(init)
    (tmp_path / "triton-9.dist-info").mkdir()
    (tmp_path / "triton-9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "TRITON_INTERPRET": "1"}
    script = (
        "import torch, depthlstm_fast as dl; dl.depth_lstm_gates(torch.ones(1, "
        "4), torch.ones(1, 1)); print(dl.backends()['triton'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "available=False" in run.stdout
    assert words in run.stdout
