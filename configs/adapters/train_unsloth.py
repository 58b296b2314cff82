"""Train Unsloth's model with an objective: `python configs/adapters/train_unsloth.py DATA.jsonl`, on a GPU."""

import os
import sys

os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # before the trainer is made

from unsloth import FastLanguageModel  # isort: skip  # before TRL, which it patches
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from bl_trainer.adapters.unsloth import attach

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen2.5-0.5B-Instruct", max_seq_length=2048, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
data = load_dataset("json", data_files=sys.argv[1], split="train")
args = SFTConfig(output_dir="outputs", per_device_train_batch_size=2, gradient_accumulation_steps=8, learning_rate=2e-4)
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=args)
attach(trainer, "neg_p", threshold=0.2)
trainer.train()
