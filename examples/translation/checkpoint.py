"""A trained model in a folder: weights (safetensors), tokenizer, and the arguments that rebuild the model (JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizer import load_tokenizer
from torch import nn

import depthlstm_fast as dl

WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.model", "config.json"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from error
    return safetensors.torch


def save_checkpoint(folder: Path, model: nn.Module, tokenizer: Any, config: dict[str, Any]) -> None:
    """Write ``model``, ``tokenizer`` and ``config``, the keyword arguments of ``DepthLSTMTransformer``, below ``folder``."""
    library = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    library.save_model(model, str(folder / WEIGHTS))  # save_model, not save_file: tied weights are one tensor
    (folder / TOKENIZER).write_bytes(tokenizer.serialized_model_proto())
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Any]:
    """Return the model, in evaluation mode, and the tokenizer below ``folder``.

    Raises:
        ValueError: one of the three files is missing.
    """
    missing = [name for name in (WEIGHTS, TOKENIZER, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"checkpoint must be a folder that train.py --output wrote; found no {', '.join(missing)} in {folder}")
    model = dl.DepthLSTMTransformer(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    _safetensors().load_model(model, str(folder / WEIGHTS))
    return model.to(device).eval(), load_tokenizer((folder / TOKENIZER).read_bytes())
