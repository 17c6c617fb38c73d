"""depthlstm_fast.hf: the encoder-decoder in transformers. Files, generation, training, adapters.

The tests were run with transformers 5.24.0, peft 0.21.2 and accelerate 1.15.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import depthlstm_fast as dl

transformers = pytest.importorskip("transformers", minversion="5.24")

from depthlstm_fast.hf import DepthLSTMForSeq2SeqLM, DepthLSTMSeq2SeqConfig  # noqa: E402

SOURCE, TARGET = 19, 23
SMALL: dict[str, Any] = {"vocab_size": TARGET, "src_vocab_size": SOURCE, "hidden_size": 16, "num_attention_heads": 2}
SMALL |= {"num_encoder_layers": 2, "num_hidden_layers": 2, "max_position_embeddings": 32, "dropout": 0.0}
KINDS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "positions": "learned", "decoder_attention": "separate", "feed_forward": True},
    {"share_embeddings": True, "src_vocab_size": None, "connection_options": {"share_cell": True}},
    {"connection": "attention-residuals", "connection_options": {"block_size": 2}},
]


@torch.no_grad()
def model(**options: Any) -> Any:
    torch.manual_seed(4)
    made = DepthLSTMForSeq2SeqLM(DepthLSTMSeq2SeqConfig(**{**SMALL, **options})).eval()
    for parameter in made.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def sources() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, SOURCE, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[2, 5:] = 0
    return ids * mask, mask


def labels() -> Tensor:
    found = torch.randint(3, TARGET, (3, 5), generator=torch.Generator().manual_seed(2))
    found[1, 2:] = -100
    return found


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_values_and_files_are_those_of_the_package(options: dict[str, Any], tmp_path: Path) -> None:
    each, (ids, mask), wanted = model(**options), sources(), labels()
    own = dl.Transformer(**each.config.model_arguments()).eval()
    own.load_state_dict(each.model.state_dict())
    targets = torch.cat((torch.ones(3, 1, dtype=torch.int64), wanted[:, :-1].clamp(min=0)), 1)
    logits = own(ids, targets)
    for given in ({"attention_mask": mask}, {}):
        output = each(ids, labels=wanted, **given)
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    each.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is DepthLSTMForSeq2SeqLM
    assert torch.equal(loaded(ids, labels=wanted).logits, each(ids, labels=wanted).logits)
    assert (loaded.model.output.weight is loaded.model.tgt_embedding.weight) == each.config.tie_word_embeddings
    assert (loaded.model.src_embedding is loaded.model.tgt_embedding) == each.config.share_embeddings


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_s2s_generate_gives_the_tokens_of_ours(options: dict[str, Any]) -> None:
    each, (ids, mask) = model(**options), sources()
    greedy = each.model.generate(ids, 9)
    end = int(greedy[0, 2])
    for eos in (None, end):
        each.config.eos_token_id = each.generation_config.eos_token_id = eos
        each.model.eos_id = -1 if eos is None else eos
        wanted = each.model.generate(ids, 9, use_cache=False)
        for cached in (True, False):
            common = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "use_cache": cached}
            found = each.generate(ids, **common)[:, 1:]
            assert torch.equal(found, wanted)
            if eos is None:
                found = each.generate(ids, **common, num_beams=4, length_penalty=0.0)[:, 1:]
                assert torch.equal(found, each.model.generate(ids, 9, 4, 0.0, use_cache=False))


def test_cache_is_used_and_holds_the_source_once() -> None:
    each, (ids, mask) = model(), sources()
    targets = torch.randint(3, TARGET, (3, 5), generator=torch.Generator().manual_seed(3))
    whole = each(ids, attention_mask=mask, decoder_input_ids=targets, use_cache=False).logits
    encoded, cache, found = each.get_encoder()(ids, mask), None, []
    calls: list[int] = []
    hook = each.model.decoder.layers[0].cross_attn.kv_proj.register_forward_hook(lambda *_: calls.append(1))
    for first, last in ((0, 2), (2, 3), (3, 5)):
        output = each(
            attention_mask=mask, encoder_outputs=encoded, decoder_input_ids=targets[:, first:last], cache=cache,
            use_cache=True,
        )  # fmt: skip
        cache = output.cache
        found.append(output.logits)
    hook.remove()
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)
    assert calls == [1]
    assert cache.get_seq_length() == 5


def test_checkpointing_changes_no_gradient() -> None:
    each, (ids, mask) = model(dropout=0.2).train(), sources()
    found = []
    for on in (False, True):
        if on:
            each.gradient_checkpointing_enable()
        torch.manual_seed(1)
        found.append(torch.autograd.grad(each(ids, mask, labels=labels()).loss, list(each.parameters())))
    assert each.model.encoder.gradient_checkpointing
    assert each.model.decoder.gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_trainer_with_its_collator(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnop"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, SOURCE, (4 + index % 3,), generator=generator).tolist() for index in range(8)]
    data = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [*row[::-1], 2]} for row in rows]
    each = model(vocab_size=SOURCE).train()
    given = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=6, logging_steps=1, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, predict_with_generate=True,
        generation_max_length=8,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=each)
    batch = collator(data[:3])
    assert torch.equal(
        batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == -100, 0)
    )
    trainer = transformers.Seq2SeqTrainer(each, given, train_dataset=data, eval_dataset=data, data_collator=collator)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert trainer.predict(data).predictions.shape[0] == 8
    again = DepthLSTMForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(value, each.state_dict()[name]) for name, value in again.state_dict().items())


def test_s2s_lora() -> None:
    peft = pytest.importorskip("peft")
    each, (ids, mask) = model(), sources()
    targets = ["gates", "in_proj", "q_proj", "kv_proj", "out_proj"]
    adapted = peft.get_peft_model(
        each, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=targets, init_lora_weights=False)
    )
    output = adapted(input_ids=ids, attention_mask=mask, labels=labels())
    output.loss.backward()
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    merged = adapted.merge_and_unload()
    found = merged(input_ids=ids, attention_mask=mask, labels=labels()).logits
    torch.testing.assert_close(found, output.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), tokens)


def test_what_is_missing_is_told() -> None:
    each, (ids, _) = model(), sources()
    with pytest.raises(ValueError, match="input_ids must be given, or encoder_outputs in their place; found neither"):
        each(labels=labels())
    with pytest.raises(ValueError, match="decoder_input_ids must be given, or labels in their place; found neither"):
        each(ids)
    with pytest.raises(ValueError, match="decoder_attention must be one of 'separate', 'add'; found 'merged'"):
        model(decoder_attention="merged")
