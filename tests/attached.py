"""Rows and settings of `test_adapters.py`, and its training and evaluation on several processes."""

import json
import logging

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bl_trainer._util.logs import warn_once
from bl_trainer.adapters.transformers import attach

CASES = {
    "nll": {"objective": "nll"},
    "neg_p": {"objective": "neg_p"},
    "power": {"objective": {"name": "power", "alpha": 10}},
    "anneal": {"objective": {"name": "anneal", "start": 0.1}},
    "threshold": {"objective": "neg_p", "threshold": {"above": 0.01, "below": 0.3}},
}


class Kept(TrainerCallback):
    """Keeps the gradient of each optimizer step, one tensor."""

    def __init__(self):
        self.all = []

    @property
    def first(self):
        return self.all[0]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.all.append(torch.cat([p.grad.flatten() for p in model.parameters()]))


def rows(vocabulary):
    """Return two steps of eight rows of unequal lengths; one has no target, one has its first token as a label."""
    torch.manual_seed(0)
    made = []
    for i in range(16):
        tokens = torch.randint(4, vocabulary, (5 + 3 * (i % 7),)).tolist()
        prompt = 0 if i == 3 else len(tokens) if i == 6 else 1 + i % 4
        made.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return made


def options(output, processes=1):
    return {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // processes, "learning_rate": 0.0, "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def main(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = Dataset.from_list(rows(len(tokenizer)))
    for name in ("neg_p", "anneal", "threshold"):
        model, seen = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64), Kept()
        args = TrainingArguments(**options(folder / "out", processes=2))
        trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), data, callbacks=[seen])
        trainer._get_train_sampler = lambda *args: SequentialSampler(data)
        attach(trainer, **CASES[name])
        trainer.train()
        if args.process_index == 0:
            torch.save(seen.all, folder / f"{name}.pt")


def packed(row):
    """A row of two examples, which `position_ids` tells apart."""
    half = len(row["input_ids"]) // 2
    return {**row, "position_ids": [*range(half), *range(len(row["input_ids"]) - half)]}


def flattened(tokenizer):
    """A collator that joins packed rows to one, with their positions."""
    return lambda rows: {key: torch.tensor([[x for row in rows for x in row[key]]]) for key in rows[0]}


def streamed(rows):
    return IterableDataset.from_generator(rows.copy)


def to_one_length(tokenizer):
    return DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=32)


# name -> rows of a process's batch, how they are collated, what becomes of the set, whether one process reads it for all
EVALUATIONS = {
    "padded": (1, DataCollatorForSeq2Seq, Dataset.from_list, False),
    "pairs": (2, DataCollatorForSeq2Seq, Dataset.from_list, False),
    "flat": (2, lambda tokenizer: DataCollatorWithFlattening(), Dataset.from_list, False),
    "packed": (1, flattened, lambda rows: Dataset.from_list([*map(packed, rows)]), False),
    "joined": (2, flattened, lambda rows: Dataset.from_list([*map(packed, rows)]), False),
    "stream": (1, DataCollatorForSeq2Seq, streamed, False),
    "dispatched": (1, to_one_length, streamed, True),
}


def evaluate(folder):
    """Write the metrics of an evaluation of five rows, by the name of each way, and who has warned of repeated rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    found, warned = {}, []
    logging.getLogger("bl_trainer").addFilter(lambda record: warned.append(record.getMessage()) or True)
    for name, (size, collate, made, dispatch) in EVALUATIONS.items():
        warn_once.cache_clear()
        args = TrainingArguments(
            **options(folder / "out"), per_device_eval_batch_size=size, remove_unused_columns=False,
            accelerator_config={"dispatch_batches": dispatch},
        )  # fmt: skip
        trainer = Trainer(model, args, collate(tokenizer), eval_dataset=made(rows(len(tokenizer))[:5]))
        attach(trainer, "neg_p")
        found[name] = {**trainer.evaluate(), "warned": warned.copy()}
        warned.clear()
    if args.process_index == 0:
        (folder / "evaluations.json").write_text(json.dumps(found))
