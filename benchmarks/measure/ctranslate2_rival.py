"""The optional rival of the decode engine: a residual Transformer of random weights in CTranslate2, of equal sizes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MISSING = "ctranslate2 is not installed"


def _matrix(outputs: int, inputs: int) -> Any:
    return ((torch.rand(outputs, inputs) * 2 - 1) / inputs**0.5).numpy()


def _linear(spec: Any, outputs: int, inputs: int) -> None:
    spec.weight, spec.bias = _matrix(outputs, inputs), torch.zeros(outputs).numpy()


def _norm(spec: Any, features: int) -> None:
    spec.gamma, spec.beta = torch.ones(features).numpy(), torch.zeros(features).numpy()


def _attention(spec: Any, features: int, is_cross: bool) -> None:
    _norm(spec.layer_norm, features)
    widths = (1, 2, 1) if is_cross else (3, 1)
    for linear, times in zip(spec.linear, widths, strict=True):
        _linear(linear, times * features, features)


def _build(features: int, heads: int, layers: int, vocabulary: int, positions: Tensor) -> Any:
    from ctranslate2.specs import transformer_spec

    spec = transformer_spec.TransformerSpec.from_config((layers, layers), heads, pre_norm=True)
    spread = (2 / (vocabulary + features)) ** 0.5
    embeddings = [((torch.rand(vocabulary, features) * 2 - 1) * spread).numpy() for _ in range(2)]
    encoder, decoder = spec.encoder, spec.decoder
    (encoder.embeddings[0] if isinstance(encoder.embeddings, list) else encoder.embeddings).weight = embeddings[0]
    decoder.embeddings.weight = embeddings[1]
    for side in (encoder, decoder):
        side.position_encodings.encodings = positions.numpy()
        side.scale_embeddings = True
        _norm(side.layer_norm, features)
        for layer in side.layer:
            _attention(layer.self_attention, features, is_cross=False)
            if side is decoder:
                _attention(layer.attention, features, is_cross=True)
            _norm(layer.ffn.layer_norm, features)
            _linear(layer.ffn.linear_0, 4 * features, features)
            _linear(layer.ffn.linear_1, features, 4 * features)
    decoder.projection.weight, decoder.projection.bias = embeddings[1], torch.zeros(vocabulary).numpy()
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
    spec.config.decoder_start_token = "<s>"
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.validate()
    return spec


def translator(
    features: int, heads: int, layers: int, vocabulary: int, positions: Tensor, kind: str = "float32"
) -> Callable[[Tensor, int, int], object] | None:
    """Return a function of source ids, the number of tokens and the beams; None where CTranslate2 is not installed."""
    try:
        import ctranslate2
    except ImportError:
        return None
    folder = tempfile.mkdtemp()
    try:
        _build(features, heads, layers, vocabulary, positions).save(str(Path(folder)))
        made = ctranslate2.Translator(
            folder, device="cpu", compute_type=kind, inter_threads=1, intra_threads=torch.get_num_threads()
        )
    finally:
        shutil.rmtree(folder)

    def translate(source: Tensor, length: int, beams: int) -> object:
        words = [[f"w{max(4, each)}" for each in row] for row in source.tolist()]
        lengths = {"max_decoding_length": length, "min_decoding_length": length}
        return made.translate_batch(words, beam_size=beams, max_batch_size=0, **lengths)

    return translate
