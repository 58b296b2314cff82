"""What composing an objective adds to a training step: `python benchmarks/composition.py --help`.

As `step.py`, round by round in rotating order: a plain objective, the same once more, which shows the noise, and composed.
The composed arms train every token that the plain one does, so that what is measured is the composition. `anneal` asks for one
more sum over the vocabulary.
"""

from typing import Any

import torch

import step
from bl_trainer import BLTrainer

POWER = {"name": "power", "alpha": 0.5}
SCHEDULED = {"name": "power", "alpha": {"from": 0.5, "to": 1}}
COMPOSED = {**SCHEDULED, "floor": 0.1, "mix": {"nll": 0.1}, "special_tokens": "nll"}


class Columns(BLTrainer):
    """Gets batches with both columns, as the collator makes them."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        ones = torch.ones_like(inputs["labels"], dtype=torch.float32)
        return super().training_step(model, {**inputs, "objective_weight": ones, "bl_template": 1 - ones}, *args)


step.ARMS = {
    "power 0.5": (BLTrainer, {"objective": POWER}),
    "power 0.5 again": (BLTrainer, {"objective": POWER}),
    "scheduled": (BLTrainer, {"objective": SCHEDULED}),
    "anneal": (BLTrainer, {"objective": "anneal"}),
    "scheduled, floor, mix, special tokens, weights": (Columns, {"objective": COMPOSED}),
}

if __name__ == "__main__":
    step.main("composition", "power 0.5")
