"""Make, train, save, load and sample a depth-wise LSTM language model with Hugging Face's transformers.

Usage:

    python examples/huggingface.py FOLDER

Needs the extra [hf] and accelerate. It learns to count: a minute on two CPU cores, and nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

import depthlstm_fast.hf

FIRST = 3  # ids 0 to 2 are padding, begin and end
NUMBERS = 20


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows that count up from anywhere, and begin anew behind the last number."""
    starts = torch.randint(0, NUMBERS, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = FIRST + (starts + torch.arange(12)) % NUMBERS
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def main(folder: Path) -> None:
    """Train a small model, write it to ``folder``, read it again and let it count."""
    config = transformers.AutoConfig.for_model(
        "depth_lstm",
        vocab_size=FIRST + NUMBERS,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
        dropout=0.0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    settings = transformers.TrainingArguments(
        str(folder / "run"),
        max_steps=150,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    transformers.Trainer(model, settings, train_dataset=rows(512)).train()
    model.save_pretrained(folder / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    prompt = torch.tensor([[FIRST + 5, FIRST + 6, FIRST + 7]])
    tokens = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    print(f"{type(loaded).__name__} of {depthlstm_fast.hf.__name__} counts: {(tokens[0] - FIRST).tolist()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("huggingface.py: FOLDER must be given; found no argument or several", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]))
