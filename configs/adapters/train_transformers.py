"""Train a model by transformers' own trainer with an objective: `python configs/adapters/train_transformers.py DATA.jsonl`.

Each line of the data: {"prompt": "...", "completion": "..."}.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from bl_trainer.adapters.transformers import attach

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B")


def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
    prompt, completion = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion"))
    completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


data = load_dataset("json", data_files=sys.argv[1], split="train")
data = data.map(tokenized, remove_columns=data.column_names)
args = TrainingArguments("outputs", per_device_train_batch_size=2, gradient_accumulation_steps=8, learning_rate=1e-5)
trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), data)
attach(trainer, "neg_p", threshold=0.2)
trainer.train()
