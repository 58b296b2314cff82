"""Measure where trained models come to rest, beside the effective temperature that theory predicts.

    python studies/temperature_study.py

trains one small transformer per objective, all as one stack, on three contexts whose next token has a known distribution T:
first with `nll` until p = T, then with the objective. Each batch holds every token as often as T says. It writes
docs/results/temperature.json, of which `make figures` makes the page. About a minute on one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bl_trainer.cells.training import Arm, Course, Rows, train
from bl_trainer.cells.transformer import Shape, initial, logits, unpack
from bl_trainer.objectives import Objective, Threshold, effective_temperature

OBJECTIVES: dict[str, Any] = {
    "nll": "nll",
    "power -0.5": {"name": "power", "alpha": -0.5},
    "power 0.25": {"name": "power", "alpha": 0.25},
    "power 0.5": {"name": "power", "alpha": 0.5},
    "neg_p": "neg_p",
    "anneal": "anneal",
    "alpha 0.25 e^-H": {"name": "anneal", "start": 0.25, "end": 0.25},
    "alpha 0.5 e^-H": {"name": "anneal", "start": 0.5, "end": 0.5},
    "neg_p + 0.1 nll": {"name": "neg_p", "mix": {"nll": 0.1}},
    "neg_p floor 0.1": {"name": "neg_p", "floor": 0.1},
    "deft": "deft",
    "deft_cayley 0.5": {"name": "deft_cayley", "mean_p": 0.5},
    "eaft": "eaft",
    "focal 2": "focal",
    "infosft": "infosft",
    "talr 1.5": {"name": "talr", "tau": 1.5},
}
SHAPE = Shape(width=16, heads=1, layers=1, vocabulary=30, length=1)
FIRST = 3  # the id of the first token; before it those of the contexts
CHOICES = ((0.7, 1), (0.52, 1), (0.9, 25))  # a little off one half, so that what is not stable moves
ROWS = (20, 25, 250)  # of each context in a batch
LEARN, REST = (Course(steps, sum(ROWS), 10, 1.0) for steps in (200, 600))


def rows(steps: int) -> Rows:
    """Return batches in which every token stands as often as T says."""
    batch = []
    for context, (count, (truth, others)) in enumerate(zip(ROWS, CHOICES, strict=True)):
        first = round(count * truth)
        each = (count - first) // others
        tokens = [FIRST] * first + [FIRST + 1 + i for i in range(others) for _ in range(each)]
        batch += [[context, token] for token in tokens]
    pairs = torch.tensor(batch)[None].expand(1, -1, -1).repeat(1, steps, 1)
    return Rows(pairs, torch.ones(1, pairs.shape[1], 1, dtype=torch.bool))


def measured(stack: Tensor) -> list[list[float]]:
    """Return p of the first token in each context, by model."""
    contexts = torch.arange(len(CHOICES)).view(1, -1, 1).expand(len(stack), -1, -1)
    return logits(SHAPE, unpack(SHAPE, stack), contexts).softmax(-1)[:, :, 0, FIRST].tolist()


def main() -> None:
    """Train, and write what came out beside what was predicted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/temperature.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    start = train(SHAPE, initial(SHAPE, 0)[None], rows(LEARN.steps), [Arm(Objective("nll"), Threshold(), 3e-2, 0)], LEARN)
    parsed = [Objective.parse(spec) for spec in OBJECTIVES.values()]
    arms = [Arm(objective, Threshold(), 1e-2, 0) for objective in parsed]
    found = measured(train(SHAPE, start.expand(len(arms), -1), rows(REST.steps), arms, REST))
    results = {
        name: {"predicted": [rest.p for rest in effective_temperature(objective, choices=CHOICES).rests], "measured": p}
        for name, objective, p in zip(OBJECTIVES, parsed, found, strict=True)
    }
    text = json.dumps(
        {name: {key: [round(p, 4) for p in each] for key, each in one.items()} for name, one in results.items()}, indent=1
    )
    options.output.write_text(text + "\n", encoding="utf-8")
    worst = max((abs(a - b), name) for name, one in results.items() for a, b in zip(*one.values(), strict=True))
    print(f"{text}\nLargest difference: {worst[0]:.3f}, of {worst[1]}")


if __name__ == "__main__":
    main()
