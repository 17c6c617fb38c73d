"""depthlstm_fast.hf: models that begin on the meta device, configurations and positions that cannot be.

The tests were run with transformers 5.24.0 and accelerate 1.15.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from hf_helpers import CAUSAL, SEQ2SEQ, causal, labels, prompts, seq2seq, sources  # noqa: E402

from depthlstm_fast.hf import (  # noqa: E402
    DepthLSTMConfig,
    DepthLSTMForCausalLM,
    DepthLSTMForSeq2SeqLM,
    DepthLSTMSeq2SeqConfig,
)

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("causal", {"positions": "sinusoidal"}),  # a table that is no buffer
    ("causal", {"tie_word_embeddings": False, "connection_options": {"share_cell": True}}),
    ("seq2seq", {"share_embeddings": True, "src_vocab_size": None}),
    ("seq2seq", {"memory": "multiscale"}),
]


def made(kind: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """A model, what it is asked, and the class that loads it."""
    if kind == "causal":
        ids, mask = prompts()
        return causal(**options), {"input_ids": ids, "attention_mask": mask}, transformers.AutoModelForCausalLM
    ids, mask = sources()
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels()}
    return seq2seq(**options), given, transformers.AutoModelForSeq2SeqLM


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_a_model_on_the_meta_device_takes_a_file(kind: str, options: dict[str, Any]) -> None:
    each, given, auto = made(kind, options)
    with torch.device("meta"):
        empty = auto.from_config(each.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu")
    empty.load_state_dict(each.state_dict())
    assert torch.equal(empty.eval()(**given).logits, each(**given).logits)
    tied = each.config.tie_word_embeddings
    assert (empty.get_output_embeddings().weight is empty.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_accelerate_loads_by_a_device_map(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    each, given, auto = made(kind, options)
    each.save_pretrained(tmp_path)
    wanted = each(**given).logits
    mapped = auto.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(mapped(**given).logits, wanted)
    with accelerate.init_empty_weights():
        empty = auto.from_config(each.config)
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(loaded.eval()(**given).logits, wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"connection_options": "a"}, TypeError, "connection_options must be a dict or None; found str"),
        ({"connection_options": ""}, TypeError, "connection_options must be a dict or None; found str"),
        ({"connection_options": []}, TypeError, "connection_options must be a dict or None; found list"),
        ({"connection_options": {"a": 1}}, ValueError, "connection_options must have arguments of DepthLSTM as keys, "),
        ({"connection_options": {1: 1}}, ValueError, "connection_options must have arguments .*share_cell.*; found 1"),
        ({"connection_options": {"d_model": 8}}, ValueError, "connection_options must have .*; found 'd_model'"),
        ({"connection": "all", "connection_options": {"a": 1}}, ValueError, "connection must be one of"),
    ],
)
def test_wrong_configurations_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for config, cls, sizes in (
        (DepthLSTMConfig, DepthLSTMForCausalLM, CAUSAL),
        (DepthLSTMSeq2SeqConfig, DepthLSTMForSeq2SeqLM, SEQ2SEQ),
    ):
        with pytest.raises(error, match=message):
            cls(config(**sizes, **options))


def test_empty_options_are_none() -> None:
    with_none, with_empty = (DepthLSTMConfig(**CAUSAL, connection_options=each) for each in (None, {}))
    assert with_none.model_arguments() == with_empty.model_arguments()


def test_rotary_positions_have_no_end() -> None:
    """A longer input runs, and its first tokens have the logits that they have alone."""
    each = causal(max_position_embeddings=8)
    ids = torch.randint(3, 29, (1, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(each(ids).logits[:, :8], each(ids[:, :8]).logits, rtol=1e-5, atol=1e-5)
    assert each(ids, position_ids=torch.arange(100, 120)[None]).logits.isfinite().all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_tables_of_positions_end(positions: str) -> None:
    """By length, by number, and behind a cache; packed rows are as long as they like."""
    each = causal(max_position_embeddings=8, positions=positions)
    ids = torch.randint(3, 29, (1, 12), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"input_ids must have at most max_position_embeddings, 8, .*; found 9"):
        each(ids[:, :9])
    for first, last, found in ((3, 9, 8), (-1, 5, -1)):
        places = torch.arange(first, last)[None]
        message = f"position_ids must hold positions from 0 to max_position_embeddings - 1, 7; found {found}"
        with pytest.raises(ValueError, match=message):
            each(ids[:, : last - first], position_ids=places)
    static = transformers.StaticCache(config=each.config, max_cache_len=16)
    for cache in (transformers.DynamicCache(config=each.config), static):
        each(ids[:, :8], cache=cache)
        with pytest.raises(ValueError, match="tokens with those of the cache; found 9"):
            each(ids[:, 8:9], cache=cache)
    packed = torch.cat((torch.arange(7), torch.arange(5)))[None]
    found = each(ids, position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(found[:, 7:], each(ids[:, 7:]).logits, rtol=1e-5, atol=1e-5)
