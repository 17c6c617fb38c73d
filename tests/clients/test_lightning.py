"""Lightning's Trainer and Fabric give the results of a plain loop; run with lightning 2.6.6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from client_helpers import batch, model
from torch import Tensor
from torch.utils.data import DataLoader

import depthlstm_fast as dl

lightning = pytest.importorskip("lightning")


def loss_of(trained: Any, rows: tuple[Tensor, Tensor]) -> Tensor:
    source, target = rows
    return F.cross_entropy(trained(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


def by_hand() -> dict[str, Tensor]:
    torch.manual_seed(6)
    plain = model()
    optimizer = torch.optim.AdamW(dl.param_groups(plain), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(plain, batch()).backward()
        optimizer.step()
    return dict(plain.named_parameters())


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.model = model()

    def training_step(self, rows: tuple[Tensor, Tensor], _: int) -> Tensor:
        return loss_of(self.model, rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(dl.param_groups(self.model), 1e-2)


def test_trainer(tmp_path: Path) -> None:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    module = Module()
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader([batch()] * 3, batch_size=None))
    wanted = by_hand()
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    torch.testing.assert_close(loaded.model(*batch()), module.model(*batch()), rtol=0, atol=0)


def test_fabric_makes_empty_modules_and_loads(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    plain = fabric.setup(model().eval())
    fabric.save(tmp_path / "state.ckpt", {"model": plain})
    with fabric.init_module(empty_init=True):
        empty = model().eval()
    empty = fabric.setup(empty)
    fabric.load(tmp_path / "state.ckpt", {"model": empty})
    torch.testing.assert_close(empty(*batch()), plain(*batch()), rtol=0, atol=0)
    empty.mark_forward_method("generate")
    torch.testing.assert_close(
        empty.generate(batch()[0], max_length=6), plain.module.generate(batch()[0], max_length=6)
    )
