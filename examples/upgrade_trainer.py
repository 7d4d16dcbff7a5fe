"""Upgrade a gated model of transformers to OSDN and fine-tune it with transformers' own Trainer.

    python examples/upgrade_trainer.py texts.jsonl OUT [--model CHECKPOINT] [--steps 50] [--lr 1e-3]

texts.jsonl has one {"text": ...} a line. CHECKPOINT is a directory or a hub name of Qwen3-Next,
Qwen3.5 or OLMo-Hybrid, with its tokenizer. Without one the script starts from a random Qwen3.5 of
1 million parameters that reads bytes, which a CPU trains in a minute. OUT/finetuned is the upgraded
model after training, for `load_upgraded`; the script loads it again and continues the first text.
Needs the packages accelerate and datasets.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Trainer,
    TrainingArguments,
)

from osdn.data import byte_tokenizer, encode_document
from osdn.integrations.transformers import load_upgraded, upgrade

PROMPT, NEW = 40, 60  # tokens of the first text that are given, and that the model adds


def random_model(tokenizer: Any) -> PreTrainedModel:
    """A Qwen3.5 of four small layers: three with a gated delta rule, one with attention."""
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=32, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(config)


def finetune(
    texts: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    steps: int = 50,
    lr: float = 1e-3,
    documents: int = 8,
    length: int = 256,
) -> Trainer:
    """Upgrade, train and save; each step sees `documents` texts of up to `length` tokens."""
    tokenizer = (
        byte_tokenizer() if checkpoint is None else AutoTokenizer.from_pretrained(checkpoint)
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if checkpoint is None:
        model = random_model(tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    upgrade(model)  # the same function; d_1 is one parameter more in every linear layer

    data = load_dataset("json", data_files=str(texts), split="train")
    data = data.map(
        lambda row: {"input_ids": encode_document(tokenizer, row["text"])[:length]},
        remove_columns=data.column_names,
    )
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=documents,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 10),
        report_to=[],
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out / "finetuned"))
    return trainer


def continue_text(directory: Path, text: str) -> str:
    """What the saved model makes of the first tokens of a text, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load_upgraded(directory).eval()
    ids = torch.tensor([encode_document(tokenizer, text)[:PROMPT]])
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    return tokenizer.decode(made[0], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Upgrade a gated model and fine-tune it.")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a checkpoint; without one, a small random model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    finetune(given.texts, given.out, checkpoint=given.model, steps=given.steps, lr=given.lr)
    first = load_dataset("json", data_files=str(given.texts), split="train")[0]["text"]
    print(continue_text(given.out / "finetuned", first))
