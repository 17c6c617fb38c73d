"""PEFT on the cell's product, on attention's projections and on the gates' normalisation.

The tests were run with peft 0.21.2.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from client_helpers import batch, cotangent, model
from helpers import HAS_CPP
from torch import Tensor, nn

import depthlstm_fast as dl

peft = pytest.importorskip("peft")

LINEAR = {"target_modules": ["gates", "in_proj", "kv_proj", "out_proj"]}
NORM = {"target_modules": [], "target_parameters": ["cell.norm.weight"]}


def adapted(base: nn.Module, **targets: Any) -> Any:
    """Return ``base`` with LoRA adapters that change its results from the start."""
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, init_lora_weights=False, **targets)
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return wrapped


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def merged_by_hand(base: nn.Module, wrapped: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a plain copy of ``base`` that computes with W + 2 B A, and the leaves of A and B.

    The leaves are returned by their names.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in trained(wrapped).items()}
    plain = copy.deepcopy(base).requires_grad_(False)
    for name, a in leaves.items():
        if "lora_A" not in name:
            continue
        b = leaves[name.replace("lora_A", "lora_B")]
        path = name.split("base_model.model.")[1].split(".lora_A")[0].removesuffix(".base_layer")
        owner = plain.get_submodule(path)
        weight = owner._parameters.pop("weight")
        owner.weight = weight + 2.0 * b @ a
    return plain, leaves


@pytest.mark.parametrize("targets", [LINEAR, NORM, {**NORM, **LINEAR}], ids=["linear", "norm", "both"])
@pytest.mark.parametrize("options", [{}, {"hidden": "ffn", "merge": "cells"}], ids=str)
def test_lora(targets: dict[str, Any], options: dict[str, Any]) -> None:
    base = model(dtype=torch.float64, **options)
    wrapped = adapted(copy.deepcopy(base), **targets)
    plain, leaves = merged_by_hand(base, wrapped)
    logits, wanted = wrapped(*batch()), plain(*batch())
    assert dl.last_backend() == "cpp" or not HAS_CPP
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(wanted, base(*batch()), atol=1e-2)  # the adapters count
    logits.backward(cotangent().double())
    wanted.backward(cotangent().double())
    assert len(leaves) >= 8
    for name, parameter in trained(wrapped).items():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-9, atol=1e-9)
        assert parameter.grad.abs().max() > 0
    tokens = wrapped.generate(batch()[0], max_length=6)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(*batch()), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.generate(batch()[0], max_length=6), tokens)


def test_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    base = model()
    wrapped = adapted(copy.deepcopy(base), **LINEAR)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(*batch()), wrapped(*batch()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"hidden": "ffn"}], ids=str)
def test_norm_tuning(options: dict[str, Any]) -> None:
    """Check LNTuning, which trains copies of the gates' and the stacks' normalisations.

    Their gradients are those of the plain model.
    """
    base = model(dtype=torch.float64, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["norm"]))
    base(*batch()).backward(cotangent().double())
    wrapped(*batch()).backward(cotangent().double())
    found = trained(wrapped)
    assert len(found) == 2 * (4 + 2)  # cells and stacks, weight and bias
    for name, parameter in found.items():
        path = name.split("base_model.model.")[1].split(".ln_tuning_layers")[0]
        wanted = base.get_parameter(f"{path}.{name.rsplit('.', 1)[1]}").grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for parameter in found.values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tuned = wrapped(*batch())
    assert not torch.allclose(tuned, base(*batch()), atol=1e-2)
    torch.testing.assert_close(wrapped.merge_and_unload()(*batch()), tuned)
