"""Accelerate: weights offloaded until a module is called, and models made on the meta device.

The tests were run with accelerate 1.15.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_helpers import assert_equal_dicts, batch, cotangent, gradients, model

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("options", [{}, {"hidden": "ffn", "sublayer": True}], ids=str)
def test_cpu_offload(options: dict[str, Any]) -> None:
    plain = model(**options).eval()
    wanted, tokens = plain(*batch()).detach(), plain.generate(batch()[0], max_length=6)
    accelerate.cpu_offload(plain, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in plain.encoder.layers.parameters()} == {"meta"}
    with torch.no_grad():
        torch.testing.assert_close(plain(*batch()), wanted)
    torch.testing.assert_close(plain.generate(batch()[0], max_length=6), tokens)


def test_empty_weights_are_loaded(tmp_path: Path) -> None:
    plain = model().eval()
    accelerate.Accelerator(cpu=True).save_model(plain, tmp_path)
    with accelerate.init_empty_weights():
        empty = model().eval()
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert loaded.output.weight is loaded.tgt_embedding.weight
    torch.testing.assert_close(loaded(*batch()), plain(*batch()), rtol=0, atol=0)


def test_accelerator_trains_saves_and_goes_on(tmp_path: Path) -> None:
    wanted = gradients(model_with_seed())
    accelerator = accelerate.Accelerator(cpu=True)
    trained = model_with_seed()
    trained, optimizer = accelerator.prepare(trained, torch.optim.AdamW(trained.parameters(), 1e-2))
    accelerator.backward((trained(*batch()) * cotangent()).sum())
    assert_equal_dicts({name: p.grad for name, p in trained.named_parameters() if p.grad is not None}, wanted)
    accelerator.save_state(str(tmp_path))
    before = trained(*batch()).detach()
    optimizer.step()
    assert not torch.equal(trained(*batch()), before)
    accelerator.load_state(str(tmp_path))
    torch.testing.assert_close(trained(*batch()), before, rtol=0, atol=0)


def model_with_seed() -> Any:
    torch.manual_seed(3)
    return model()
