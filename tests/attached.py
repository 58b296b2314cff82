"""Rows and settings of `test_adapters.py`, and its training on several processes."""

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

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
