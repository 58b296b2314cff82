"""Train with an objective of your own: `python examples/own_objective.py MODEL DATA.jsonl OUTPUT`.

After `make quickstart` on a CPU:
    python examples/own_objective.py quickstart/SmolLM2-135M-Instruct quickstart/data/train.jsonl out/own
"""

import sys

import torch
from datasets import load_dataset

from bl_trainer import BLConfig, BLTrainer


def gated(logp, entropy, *, gamma=1.0):
    """-log p, less where the model is undecided: the weight is e^(-gamma H)."""
    return -logp * torch.exp(-gamma * entropy.detach())


def main(model: str, data: str, output: str) -> None:
    """Train `model` on the JSONL file `data` for 10 steps, and save it in `output`."""
    cuda = torch.cuda.is_available()
    args = BLConfig(
        output, objective={"name": gated, "gamma": 2.0}, max_steps=10, learning_rate=1e-4, logging_steps=5,
        per_device_train_batch_size=4, use_cpu=not cuda, bf16=cuda, report_to="none",
    )  # fmt: skip
    trainer = BLTrainer(model, args, train_dataset=load_dataset("json", data_files=data, split="train"))
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
