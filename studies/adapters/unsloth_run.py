"""Train by Unsloth's trainer, on its CPU backend, and record it: `python unsloth_run.py WORK single`."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["UNSLOTH_RETURN_LOGITS"] = "1"

from unsloth import FastLanguageModel  # isort: skip  # before transformers, which it patches
from datasets import load_dataset
from record import STEPS, record
from trl import SFTConfig, SFTTrainer

from bl_trainer.adapters.unsloth import attach

WORK = Path(sys.argv[1])


def run(case: dict[str, Any], output: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(WORK / "model"), max_seq_length=512, dtype="float32", load_in_4bit=False, full_finetuning=True
    )
    data = load_dataset("json", data_files=str(WORK / "chats.jsonl"), split="train")
    args = SFTConfig(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.0, max_grad_norm=0.0, report_to="none", save_strategy="no", bf16=False, fp16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=args)
    attach(trainer, **case)
    trainer.train()


if __name__ == "__main__":
    record("unsloth", {name: version(name) for name in ("unsloth", "trl", "transformers", "torch")}, run)
