"""depthlstm_fast.hf: the language model in transformers. Files, generation, training, adapters, compilation.

The tests were run with transformers 5.24.0, peft 0.21.2 and accelerate 1.15.0.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HAS_CPP
from torch import Tensor

import depthlstm_fast as dl

transformers = pytest.importorskip("transformers", minversion="5.24")

from hf_helpers import CAUSAL as SMALL  # noqa: E402
from hf_helpers import VOCAB, prompts  # noqa: E402
from hf_helpers import causal as model  # noqa: E402

from depthlstm_fast.hf import DepthLSTMConfig, DepthLSTMForCausalLM  # noqa: E402

KINDS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "positions": "learned", "feed_forward": True, "ffn": "swiglu"},
    {"connection_options": {"share_cell": True, "init_cell": "learned"}, "positions": "sinusoidal"},
    {"connection": "attention-residuals", "connection_options": {"block_size": 2}, "norm": "rms", "bias": False},
    {"connection": "pre-norm", "num_key_value_heads": None, "positions": "none"},
]


def test_the_package_does_not_import_it() -> None:
    code = "import sys, depthlstm_fast; print(any(name.split('.')[0] == 'transformers' for name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_values_are_those_of_the_package(options: dict[str, Any]) -> None:
    each, (ids, mask) = model(**options), prompts()
    own = dl.LanguageModel(**each.config.model_arguments()).eval()
    own.load_state_dict(each.model.state_dict())  # each loads the other's files
    wanted = own(ids, mask)
    found = each(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=1e-5, atol=1e-5)
    loss, _ = own(ids, labels=ids)
    output = each(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(own.output(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(each(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    torch.testing.assert_close(each(inputs_embeds=own.embedding(ids)).logits, output.logits)
    assert torch.equal(each(ids, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_files(options: dict[str, Any], tmp_path: Path) -> None:
    each, (ids, _) = model(**options), prompts()
    each.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("depth_lstm", ["DepthLSTMForCausalLM"])
    assert "auto_map" not in config  # no code travels with the file
    for auto in (transformers.AutoModelForCausalLM, DepthLSTMForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is DepthLSTMForCausalLM
        assert torch.equal(loaded(ids).logits, each(ids).logits)
        assert (loaded.model.output.weight is loaded.model.embedding.weight) == each.config.tie_word_embeddings
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert (half(ids).logits.float() - each(ids).logits).abs().max() < 0.1 * each(ids).logits.abs().max()


def test_configurations_make_models_that_are_drawn_as_the_package_draws() -> None:
    config = DepthLSTMConfig(**SMALL)
    torch.manual_seed(3)
    wanted = dl.LanguageModel(**config.model_arguments()).state_dict()
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config)
    assert all(torch.equal(wanted[name], value) for name, value in made.model.state_dict().items())
    again = transformers.AutoConfig.for_model("depth_lstm", **SMALL)
    assert again.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="connection must be one of"):
        DepthLSTMForCausalLM(DepthLSTMConfig(**SMALL, connection="residual"))


def test_what_a_file_lacks_is_drawn(tmp_path: Path) -> None:
    """A missing matrix is neither what memory held nor normal of deviation 0.02."""
    import safetensors.torch

    each = model()
    each.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    lost = ("model.decoder.layers.1.self_attn.in_proj.weight", "model.decoder.connection.cells.0.norm.bias")
    for name in lost:
        del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    loaded = DepthLSTMForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        if name not in lost:
            assert torch.equal(value, each.state_dict()[name]), name
    weight = loaded.model.decoder.layers[1].self_attn.in_proj.weight
    assert 0.23 < weight.abs().max() <= 0.25
    norm = loaded.model.decoder.connection.cells[0].norm.bias
    assert norm[1].tolist() == [3.0] * 16
    assert norm[0].tolist() == [0.0] * 16


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_its_generate_gives_the_tokens_of_ours(options: dict[str, Any]) -> None:
    each, (ids, mask) = model(**options, eos_token_id=None, bos_token_id=None), prompts()
    for cached in (True, False):
        common = {"attention_mask": mask, "max_new_tokens": 9, "use_cache": cached}
        found = each.generate(ids, **common, do_sample=False)
        assert torch.equal(found[:, 6:], each.model.generate(ids, 9, attention_mask=mask))
        found = each.generate(ids, **common, do_sample=False, num_beams=4, length_penalty=0.0)
        assert torch.equal(found[:, 6:], each.model.generate(ids, 9, 4, 0.0, attention_mask=mask))
        torch.manual_seed(7)
        found = each.generate(ids, **common, do_sample=True, temperature=0.9, top_k=12, top_p=0.8)
        torch.manual_seed(7)
        drawn = each.model.generate(ids, 9, attention_mask=mask, temperature=0.9, top_k=12, top_p=0.8)
        assert torch.equal(found[:, 6:], drawn)


def test_rows_end_as_ours_do() -> None:
    each, (ids, mask) = model(), prompts()
    greedy = each.model.generate(ids, 9, attention_mask=mask)
    end = int(greedy[0, 3])
    each.config.eos_token_id = each.generation_config.eos_token_id = each.model.eos_id = end
    found = each.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)[:, 6:]
    assert torch.equal(found, each.model.generate(ids, 9, attention_mask=mask))


def test_stock_caches_serve() -> None:
    each, (ids, mask) = model(eos_token_id=None), prompts()
    wanted = each.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    static = transformers.StaticCache(config=each.config, max_cache_len=20)
    found = each.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, cache=static, disable_compile=True
    )
    assert torch.equal(found, wanted)
    cache, logits = transformers.DynamicCache(config=each.config), []
    for first, last in ((0, 4), (4, 5), (5, 6)):
        logits.append(each(ids[:, first:last], attention_mask=mask[:, :last], cache=cache).logits)
    whole = each(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(logits, 1)[mask == 1], whole[mask == 1], rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 6
    assert len(cache.layers) == 2


def test_a_static_cache_is_compiled_once() -> None:
    torch.compiler.reset()
    each, (ids, mask) = model(eos_token_id=None), prompts()
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    wanted = each.generate(ids, **common)
    compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True  # else on GPUs alone
    torch._dynamo.utils.counters.clear()
    found = each.generate(ids, **common, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of all steps behind the prompt
    torch.compiler.reset()


def test_assisted_decoding() -> None:
    each, small, (ids, _) = model(eos_token_id=None), model(num_hidden_layers=1, eos_token_id=None), prompts()
    wanted = each.generate(ids[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(each.generate(ids[:1], max_new_tokens=12, do_sample=False, assistant_model=small), wanted)


def test_packed_rows_by_their_positions() -> None:
    each, (ids, _) = model(), prompts()
    packed = torch.cat((ids[0], ids[0, :4]))[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    found = each(packed, position_ids=positions, use_cache=False).logits[0]
    whole = each(ids[:1]).logits[0]
    torch.testing.assert_close(found, torch.cat((whole, whole[:4])), rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    each, (ids, mask) = model(dropout=0.2).train(), prompts()
    found, calls = [], []
    each.model.decoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True):
        if on:
            each.gradient_checkpointing_enable()
        assert each.is_gradient_checkpointing == on == each.model.decoder.gradient_checkpointing
        torch.manual_seed(1)
        loss = each(ids, attention_mask=mask, labels=ids).loss
        found.append(torch.autograd.grad(loss, list(each.parameters())))
    assert len(calls) == 1 + 2  # once more in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_without_a_break() -> None:
    torch.compiler.reset()
    each, (ids, mask) = model(), prompts()
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    found = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
    wanted = each(ids, attention_mask=mask, labels=ids, use_cache=False)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.compiler.reset()


def test_a_larger_vocabulary(tmp_path: Path) -> None:
    each, (ids, _) = model(eos_token_id=None), prompts()
    wanted = each(ids).logits
    each.resize_token_embeddings(VOCAB + 3)
    assert each.model.output.weight is each.model.embedding.weight
    torch.testing.assert_close(each(ids).logits[..., :VOCAB], wanted)
    more = torch.full((1, 2), VOCAB + 2)
    assert torch.equal(each.generate(more, max_new_tokens=3, do_sample=False)[:, 2:], each.model.generate(more, 3))
    each.save_pretrained(tmp_path)
    assert torch.equal(DepthLSTMForCausalLM.from_pretrained(tmp_path)(more).logits, each(more).logits)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(ValueError, match="input_ids must be given, or inputs_embeds in their place"):
        model()()


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCAB, (7,), generator=generator) for _ in range(8)]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def test_trainer_trains_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def run(folder: Path, steps: int, resume: bool = False) -> tuple[list[float], Any]:
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
        given = transformers.TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, logging_steps=1, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", **quiet,
        )  # fmt: skip
        torch.manual_seed(6)
        each = DepthLSTMForCausalLM(DepthLSTMConfig(**SMALL))
        trainer = transformers.Trainer(each, given, train_dataset=examples())
        trainer.train(resume_from_checkpoint=resume)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line], each

    losses, whole = run(tmp_path / "whole", 4)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    run(tmp_path / "parts", 2)
    again, continued = run(tmp_path / "parts", 4, resume=True)
    assert again == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


FFN = {"feed_forward": True, "ffn": "swiglu"}
TARGETS: list[tuple[Any, dict[str, Any], int]] = [  # and how many linears of a layer they are
    (["gates"], {}, 1),
    (["in_proj", "out_proj"], {}, 2),
    (["gates", "in_proj", "out_proj"], {}, 3),
    (["linear1", "linear2"], FFN, 2),
    ("all-linear", FFN, 6),  # with the cell of the network, too
    ("all-linear", {"connection": "pre-norm"}, 4),
]


@pytest.mark.parametrize(("targets", "options", "count"), TARGETS, ids=str)
def test_lora(targets: Any, options: dict[str, Any], count: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    each, (ids, mask) = model(eos_token_id=None, **options), prompts()
    plain = each(ids, attention_mask=mask).logits
    adapted = peft.get_peft_model(
        each, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    )
    adapters = [name for name, part in adapted.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    assert len(adapters) == 2 * count
    known = ("gates", "in_proj", "out_proj", "linear1", "linear2")
    assert all(name.endswith(known if targets == "all-linear" else tuple(targets)) for name in adapters)
    fused = "cpp" if HAS_CPP else "reference"
    output = backend_of(fused, lambda: adapted(input_ids=ids, attention_mask=mask, labels=ids))
    assert (output.logits - plain)[mask == 1].abs().max() > 0.01  # the adapters act
    output.loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in adapted.named_parameters() if "lora_" in name}
    adapted.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(model(eos_token_id=None, **options), tmp_path)
    assert torch.equal(fresh(input_ids=ids, attention_mask=mask).logits, output.logits)
    tokens = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    merged = adapted.merge_and_unload()
    found = backend_of(fused, lambda: merged(ids, attention_mask=mask).logits)
    torch.testing.assert_close(found, output.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), tokens)
    assert torch.equal(merged.model.generate(ids, 5, attention_mask=mask), tokens[:, 6:])


def backend_of(wanted: str, run: Any) -> Any:
    """What ``run`` returns, on this backend; what follows an adapted product stays fused."""
    with dl.use_backend("reference"):
        dl.norm_step(torch.ones(1, 4), torch.ones(1, 4), weight1=torch.ones(4))
    assert dl.last_backend() == "reference"
    found = run()
    assert dl.last_backend() == wanted
    return found


def test_adapters_under_checkpointing() -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    adapted, (ids, mask) = peft.get_peft_model(model(), given).train(), prompts()
    trained, found = [each for each in adapted.parameters() if each.requires_grad], []
    for on in (False, True):
        if on:
            adapted.gradient_checkpointing_enable()
        loss = adapted(input_ids=ids, attention_mask=mask, labels=ids).loss
        found.append(torch.autograd.grad(loss, trained))
    assert len(trained) == 2 * 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pipeline(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    each = model()
    each.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    found = write(["a b c", "d e"], max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    batch = tokenizer(["a b c", "d e"], return_tensors="pt", padding=True)
    tokens = each.model.generate(batch["input_ids"], 4, attention_mask=batch["attention_mask"])
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert [row[0]["generated_text"].strip() for row in found] == texts


def test_the_page() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "hugging_face.md"
    if not page.is_file():
        pytest.skip("no checkout")
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, page.name, "exec"), names)
    assert names["tokens"].shape == (2, 16)
    named = {name.strip() for group in re.findall(r"\[(test_[^\]]+)\]", text) for name in group.split(",")}
    assert len(named) > 10
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_hf_*.py"))
    assert not sorted(name for name in named if f"def {name}(" not in tests)


def test_the_example_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    program = Path(__file__).resolve().parents[2] / "examples" / "huggingface.py"
    if not program.is_file():
        pytest.skip("no checkout")
    runpy.run_path(str(program))["main"](tmp_path)
    assert "counts: [5, 6, 7, 8, 9, 10, 11, 12, 13]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"input_ids must be a torch\.Tensor; found list"),
        ({"input_ids": torch.ones(1, 2)}, "input_ids must be int64; found torch.float32"),
        ({"input_ids": torch.ones(2).long()}, r"input_ids must have shape \(batch, length\)"),
        ({"input_ids": -torch.ones(1, 2).long()}, "input_ids must hold ids from 0 to 49; found -1"),
        ({"input_ids": torch.ones(1, 40).long()}, "input_ids must have at most max_position_embeddings, 32, tokens"),
        ({"attention_mask": torch.ones(1, 3).long()}, r"attention_mask must have shape \(1, 2\); found \(1, 3\)"),
        ({"position_ids": torch.ones(1, 3).long()}, r"position_ids must have shape \(1, 2\); found \(1, 3\)"),
        ({"labels": torch.full((1, 2), 50)}, "labels must hold ids from 0 to 49, or -100; found 50"),
        ({"cache": "a"}, "cache must be a Cache of transformers; found str"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask must be a torch\.Tensor; found list"),
        ({"position_ids": [[0, 1]]}, r"position_ids must be a torch\.Tensor; found list"),
        ({"position_ids": torch.ones(1, 2)}, r"position_ids must be int64 or int32; found torch\.float32"),
        ({"logits_to_keep": "a"}, "logits_to_keep must be an int or a tensor; found str"),
    ],
)
def test_wrong_tensors_are_named(arguments: Any, message: str) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 32}
    config = transformers.AutoConfig.for_model("depth_lstm", vocab_size=50, positions="learned", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises((TypeError, ValueError), match=message):
        model(**{"input_ids": torch.ones(1, 2).long(), **arguments})
