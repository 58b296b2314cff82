"""Time and peak memory of measuring a batch for diagnosis, against a bare forward pass and a training step on it.

`python benchmarks/diagnosis.py --help`. Interleaved in one process on a randomly initialised model: a forward pass of the
plain transformers model with its logits, the whole of what diagnosis does with a batch (collating, scoring, statistics), and
a LoRA training step. Reported are medians, and medians of each round's ratios to the bare forward pass.
"""

import argparse
import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from bl_trainer import BLTrainer
from bl_trainer.measurement.forward import score_batch
from bl_trainer.measurement.results import Measurement
from bl_trainer.tokens.annotation import token_batch
from bl_trainer.tokens.collators import Collator
from common import Figures, add_options, interleave, report, set_up
from step import SHAPES, make_model, make_trainer

ARMS = ("forward pass", "diagnosis", "LoRA training step")


def measure(targets: float, options: argparse.Namespace) -> Figures:
    """Return the figures of all arms; `targets`: share of tokens that train."""
    rng = random.Random(0)
    plain = make_model(options.shape, options.device, options.dtype)
    rows: list[dict[str, Any]] = []
    for row in range(options.batch):
        ids = [rng.randrange(10, SHAPES[options.shape].vocab_size) for _ in range(options.length)]
        prompt = round((1 - targets) * options.length)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "bl_row": row, "bl_template": [0] * len(ids)})
    data = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        model: Any = get_peft_model(plain, LoraConfig(r=16, target_modules="all-linear"))
        trainer = make_trainer(BLTrainer, model, data, folder, options.device, {})
        trainer.current_gradient_accumulation_steps = 1
        collate = Collator(trainer.data_collator, None, False)
        measurement = Measurement([1], [0, 1])
        batch = {key: value.to(options.device) for key, value in trainer.data_collator(rows).items()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}

        def forward() -> None:
            with torch.no_grad():
                plain(**inputs, use_cache=False)

        def diagnose() -> None:
            features = collate(rows)
            tokens = token_batch(features)
            measurement.add(tokens, score_batch(trainer, plain, features).cpu())

        def train() -> None:
            model.zero_grad(set_to_none=True)
            trainer.training_step(model, dict(batch), (batch["labels"][:, 1:] != -100).sum())

        def prepare(arm: str) -> None:
            model.zero_grad(set_to_none=True)
            if arm == "LoRA training step":
                model.base_model.enable_adapter_layers()
            else:  # without the adapter in the way, as diagnosis measures the base model
                model.base_model.disable_adapter_layers()
                model.eval()

        return interleave(dict(zip(ARMS, (forward, diagnose, train), strict=True)), options.rounds, options.device, prepare)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=9)
    add_options(parser, "diagnosis")
    options = parser.parse_args()
    set_up(options)
    results = {name: measure(share, options) for name, share in (("all tokens train", 1.0), ("half", 0.5))}
    report("diagnosis", results, ARMS[0], "forward", 2, options)


if __name__ == "__main__":
    main()
