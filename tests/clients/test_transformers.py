"""Hugging Face's transformers: a wrapper saves, loads, trains and generates; a plain module trains.

The tests were run with transformers 5.24.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from client_helpers import TARGET, assert_equal_dicts, batch, gradients, model
from torch import Tensor, nn

pytest.importorskip("accelerate")  # the Trainer needs it
transformers = pytest.importorskip("transformers", minversion="5")
hf_model = pytest.importorskip("hf_model")

KINDS = [{}, {"tied": False}, {"positions": "learned"}]


def wrapper(**options: Any) -> Any:
    torch.manual_seed(4)
    return hf_model.Model(hf_model.Config(**options))


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "input_ids": torch.randint(3, 19, (6,), generator=generator),
            "labels": torch.randint(3, TARGET, (5,), generator=generator),
        }
        for _ in range(8)
    ]


def arguments(folder: Path, steps: int, **options: Any) -> Any:
    quiet = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }
    kind = (
        transformers.Seq2SeqTrainingArguments if "predict_with_generate" in options else transformers.TrainingArguments
    )
    return kind(
        str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        **quiet,
        **options,
    )


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_saved_model_is_loaded_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    saved = wrapper(**options).eval()
    saved.save_pretrained(tmp_path)
    loaded = hf_model.Model.from_pretrained(tmp_path)
    assert (loaded.model.output.weight is loaded.model.tgt_embedding.weight) == options.get("tied", True)
    torch.testing.assert_close(loaded.model(*batch()), saved.model(*batch()), rtol=0, atol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_its_generate_gives_the_tokens_of_ours(beams: int) -> None:
    wrapped, (source, _) = wrapper().eval(), batch()
    found = wrapped.generate(
        source,
        attention_mask=(source != 0).long(),
        max_new_tokens=6,
        num_beams=beams,
        use_cache=False,
        do_sample=False,
        length_penalty=0.0,
    )
    wanted = wrapped.model.generate(source, max_length=6, beam_size=beams, length_penalty=0.0)
    torch.testing.assert_close(found[:, 1:], wanted)


def test_trainer_saves_and_goes_on(tmp_path: Path) -> None:
    """Check that four steps equal two steps, a checkpoint, and two more."""
    runs = []
    for first in (4, 2):
        folder = tmp_path / str(first)
        for steps in dict.fromkeys((first, 4)):
            wrapped = wrapper()
            trainer = transformers.Trainer(wrapped, arguments(folder, steps), train_dataset=examples())
            trainer.train(resume_from_checkpoint=steps != first)
        runs.append(dict(wrapped.model.named_parameters()))
    untrained = dict(wrapper().model.named_parameters())
    for name, parameter in runs[0].items():
        torch.testing.assert_close(runs[1][name], parameter, rtol=1e-5, atol=1e-6)
    assert not torch.equal(runs[0]["encoder.layers.0.cell.norm.weight"], untrained["encoder.layers.0.cell.norm.weight"])


def test_gradient_checkpointing() -> None:
    wrapped = wrapper()
    wanted = gradients(wrapped.model)
    wrapped.gradient_checkpointing_enable()
    assert wrapped.model.encoder.gradient_checkpointing
    assert wrapped.model.decoder.gradient_checkpointing
    assert_equal_dicts(gradients(wrapped.model), wanted)


def test_seq2seq_trainer_generates(tmp_path: Path) -> None:
    wrapped = wrapper().eval()
    chosen = arguments(tmp_path, 1, predict_with_generate=True, generation_max_length=7, generation_num_beams=1)
    wrapped.generation_config.use_cache = False
    trainer = transformers.Seq2SeqTrainer(wrapped, chosen)
    found = torch.tensor(trainer.predict(examples()).predictions)
    source = torch.stack([example["input_ids"] for example in examples()])
    wanted = wrapped.model.generate(source, max_length=6)
    torch.testing.assert_close(found[:, 1 : 1 + wanted.shape[1]], wanted)


class Plain(nn.Module):
    """The minimum for HF's Trainer: a module whose forward returns a loss."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.model = model(tie_output=tied)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        start = torch.full_like(labels[:, :1], 1)
        logits = self.model(input_ids, torch.cat((start, labels[:, :-1]), 1))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_trainer_saves_a_plain_module_that_ties_nothing(tmp_path: Path) -> None:
    plain = Plain(tied=False)
    transformers.Trainer(plain, arguments(tmp_path, 2), train_dataset=examples()).train()
    from safetensors.torch import load_model

    again = Plain(tied=False)
    load_model(again, tmp_path / "checkpoint-2" / "model.safetensors")
    torch.testing.assert_close(again.model(*batch()), plain.model(*batch()), rtol=0, atol=0)


def test_trainer_refuses_to_save_a_plain_module_with_tied_weights(tmp_path: Path) -> None:
    """Check the Trainer's rule for every tied module but a PreTrainedModel; the error names the two weights."""
    with pytest.raises(RuntimeError, match=r"share memory.*tgt_embedding"):
        transformers.Trainer(Plain(tied=True), arguments(tmp_path, 2), train_dataset=examples()).train()
