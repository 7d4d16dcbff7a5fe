"""Fine-tune a DeltaNet checkpoint as OSDN with transformers' own Trainer.

    python examples/finetune_trainer.py CHECKPOINT texts.jsonl OUT [--steps 1000] [--lr 1e-4]

CHECKPOINT is a directory in flash-linear-attention's format with a tokenizer; texts.jsonl has one
{"text": ...} a line. OUT/converted is the checkpoint as OSDN, which computes what it did before;
OUT/finetuned is what came of it, for AutoModelForCausalLM and `osdn generate`. Needs the packages
accelerate and datasets. Several GPUs: torchrun --nproc_per_node=N examples/finetune_trainer.py ...
"""

import argparse
from pathlib import Path

from accelerate import PartialState
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from osdn.data import encode_document
from osdn.model.convert import convert  # and AutoModelForCausalLM knows OSDN from here on


def finetune(
    checkpoint: Path,
    texts: Path,
    out: Path,
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    documents: int = 8,
    length: int = 4096,
) -> Trainer:
    """Convert, train and save; each step of a process sees `documents` texts of `length` tokens.

    The texts of a step are packed end to end: the collator's cu_seqlens keep them apart, so that
    none is padded and none sees another.
    """
    with PartialState().main_process_first():  # one process converts, the others wait
        if not (out / "converted").exists():
            convert(checkpoint, out / "converted")
        tokenizer = AutoTokenizer.from_pretrained(out / "converted")
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
        warmup_steps=steps // 20,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 50),
        report_to=[],
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(out / "converted"),
        arguments,
        train_dataset=data,
        data_collator=DataCollatorWithFlattening(
            return_flash_attn_kwargs=True, return_position_ids=False
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out / "finetuned"))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune a DeltaNet checkpoint as OSDN.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    finetune(given.checkpoint, given.texts, given.out, steps=given.steps, lr=given.lr)
