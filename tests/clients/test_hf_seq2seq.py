"""depthlstm_fast.hf: the encoder-decoder in transformers. Files, generation, training, adapters.

The tests were run with transformers 5.24.0, peft 0.21.2 and accelerate 1.15.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import depthlstm_fast as dl

transformers = pytest.importorskip("transformers", minversion="5.24")

from hf_helpers import SOURCE, TARGET, labels, sources  # noqa: E402
from hf_helpers import seq2seq as model  # noqa: E402

from depthlstm_fast.hf import DepthLSTMForSeq2SeqLM  # noqa: E402

KINDS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "positions": "learned", "decoder_attention": "separate", "feed_forward": True},
    {"share_embeddings": True, "src_vocab_size": None, "connection_options": {"share_cell": True}},
    {"connection": "attention-residuals", "connection_options": {"block_size": 2}},
    {"memory": "transparent"},
    {"memory": "multiscale"},
    {"memory": "multiscale", "fusion": "scalar", "connection": "pre-norm"},
]


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
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert trainer.predict(data).predictions.shape[0] == 8
    again = DepthLSTMForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(value, each.state_dict()[name]) for name, value in again.state_dict().items())
    fresh = model(vocab_size=SOURCE).train()
    resumed = transformers.Seq2SeqTrainer(fresh, given, train_dataset=data, data_collator=collator)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses
    assert all(torch.equal(value, each.state_dict()[name]) for name, value in fresh.state_dict().items())


def losses_of(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["gates", "in_proj", "q_proj", "kv_proj", "out_proj"], {}),
        ("all-linear", {"connection": "pre-norm", "memory": "multiscale"}),
    ],
    ids=str,
)
def test_s2s_lora(targets: Any, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    each, (ids, mask) = model(**options), sources()
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


@pytest.mark.parametrize("memory", ["transparent", "multiscale"])
def test_encoder_outputs_of_the_user(memory: str) -> None:
    """A memory of all layers is made of the hidden states that are given, and never of the last one alone."""
    each, (ids, mask) = model(memory=memory), sources()
    given = {"attention_mask": mask, "labels": labels()}
    wanted = each(ids, **given).logits
    encoded = each.get_encoder()(ids, mask, output_hidden_states=True)
    assert encoded.memories.shape == (3, 2 + (memory == "multiscale"), 6, 16)
    output = transformers.modeling_outputs.BaseModelOutput
    layers = output(encoded.last_hidden_state, encoded.hidden_states)
    for outputs in (encoded, layers):
        torch.testing.assert_close(each(encoder_outputs=outputs, **given).logits, wanted, rtol=1e-5, atol=1e-5)
    found = each.generate(encoder_outputs=encoded, attention_mask=mask, max_new_tokens=5, num_beams=3)
    assert torch.equal(found, each.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3))
    short = output(encoded.last_hidden_state, encoded.hidden_states[1:])
    for wrong, what in ((output(encoded[0]), "neither"), ((encoded[0],), "neither"), (short, "2 hidden_states")):
        message = f"encoder_outputs must have memories, .*, or 3 hidden_states, with memory='{memory}'; found {what}"
        with pytest.raises(ValueError, match=message):
            each(encoder_outputs=wrong, **given)


def test_a_larger_batch_of_beams_reads_its_own_source() -> None:
    """Beams repeat memories as they repeat sources."""
    each, (ids, mask) = model(memory="multiscale", eos_token_id=22), sources()
    common = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    together = each.generate(ids, attention_mask=mask, **common)
    for row in range(3):
        length = int(mask[row].sum())
        alone = each.generate(ids[row : row + 1, :length], **common)[0]
        assert torch.equal(alone, together[row, : len(alone)])


def test_s2s_static_cache() -> None:
    each, (ids, mask) = model(memory="multiscale"), sources()
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = each.generate(ids, **common, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, each.generate(ids, **common))


def test_s2s_bf16_file(tmp_path: Path) -> None:
    each, (ids, mask) = model(memory="transparent"), sources()
    each.save_pretrained(tmp_path)
    half = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    wanted = each(ids, mask, labels=labels()).logits
    assert (half(ids, mask, labels=labels()).logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    half.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_what_is_missing_is_told() -> None:
    each, (ids, _) = model(), sources()
    with pytest.raises(ValueError, match="input_ids must be given, or encoder_outputs in their place; found neither"):
        each(labels=labels())
    with pytest.raises(ValueError, match="decoder_input_ids must be given, or labels in their place; found neither"):
        each(ids)
    with pytest.raises(ValueError, match="decoder_attention must be one of 'separate', 'add'; found 'merged'"):
        model(decoder_attention="merged")
    with pytest.raises(ValueError, match=r"eos_token_id must be an id, or a list of at least one; found \[\]"):
        model(eos_token_id=[])
    with pytest.raises(ValueError, match="memory must be one of 'top', 'transparent', 'multiscale'; found 'all'"):
        model(memory="all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"input_ids must be a torch\.Tensor; found list"),
        ({"input_ids": torch.full((1, 2), 19)}, "input_ids must hold ids from 0 to 18; found 19"),
        ({"input_ids": torch.ones(1, 33).long()}, "input_ids must have at most max_position_embeddings, 32, tokens; f"),
        ({"decoder_input_ids": torch.ones(1, 33).long()}, "decoder_input_ids must have at most max_position_embedd"),
        ({"decoder_input_ids": torch.full((1, 2), 23)}, "decoder_input_ids must hold ids from 0 to 22; found 23"),
        ({"decoder_input_ids": torch.ones(2, 2).long()}, "decoder_input_ids must have the batch of the sources, 1; fo"),
        ({"attention_mask": torch.ones(1, 3).long()}, r"attention_mask must have shape \(1, 2\); found \(1, 3\)"),
        ({"cache": "a"}, "cache must be an EncoderDecoderCache of transformers; found str"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask must be a torch\.Tensor; found list"),
        ({"decoder_attention_mask": [[1, 1]]}, r"decoder_attention_mask must be a torch\.Tensor; found list"),
        (
            {"decoder_attention_mask": torch.ones(1, 3)},
            r"decoder_attention_mask must have shape \(1, 2\); found \(1, 3\)",
        ),
        ({"labels": [[1, 2]]}, r"labels must be a torch\.Tensor; found list"),
        ({"labels": torch.ones(1, 3).long()}, r"labels must have shape \(1, 2\); found \(1, 3\)"),
        ({"decoder_inputs_embeds": torch.ones(1, 2, 16)}, "decoder_inputs_embeds must be None, because"),
        (
            {"encoder_outputs": torch.ones(1, 2, 16)},
            r"encoder_outputs must be outputs of get_encoder\(\), .*; found Te",
        ),
        ({"encoder_outputs": ()}, r"encoder_outputs must be outputs of get_encoder\(\), .*; found tuple"),
        ({"encoder_outputs": (torch.ones(1, 2, 8),)}, r"encoder_outputs must begin .* \(batch, length, 16\); found"),
        ({"encoder_outputs": (torch.ones(1, 3, 16),)}, r"attention_mask must have shape \(1, 3\); found \(1, 2\)"),
    ],
)
def test_wrong_sources_and_targets_are_named(arguments: Any, message: str) -> None:
    ones = torch.ones(1, 2).long()
    with pytest.raises((TypeError, ValueError), match=message):
        model()(**{"input_ids": ones, "decoder_input_ids": ones, **arguments})
