"""What composing an objective adds to a training step: `python benchmarks/composition.py --help`.

As `step.py`, round by round in rotating order: a plain objective, the same once more, which shows the noise, and composed.
The composed arms train every token that the plain one does, so that what is measured is the composition.
"""

import statistics
import time
from typing import Any

import torch

import step
from bl_trainer import BLTrainer, Objective, Threshold
from bl_trainer.objectives.pricing import price

BASE = "power 0.5"

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


def pricing(options: Any, times: int = 50) -> dict[str, float]:
    """Return the median seconds that it takes to price a step's tokens, for each arm."""
    tokens = options.batch * options.length
    logp = torch.rand(tokens, device=options.device).log()
    statistics_ = {"logp": logp, "entropy": -logp, "progress": 0.75, "objective_weight": torch.ones_like(logp)}
    statistics_ |= {"is_special": torch.zeros_like(logp, dtype=torch.bool)}
    seconds: dict[str, list[float]] = {name: [] for name in step.ARMS}
    objectives = {name: Objective.parse(keys["objective"]) for name, (_, keys) in step.ARMS.items()}
    for _ in range(times + 5):
        for name, objective in objectives.items():
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            price(objective, Threshold(), statistics_)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[5:]) for name, each in seconds.items()}


def main() -> None:
    """Measure whole steps, whose noise is greater than what is looked for, and the part of them that composing changes."""
    results, options = step.main("composition", BASE)
    found = pricing(options)
    whole = statistics.median(results["LoRA"][BASE]["seconds"])
    lines = ["| arm | pricing the tokens: ms | % of a LoRA step |", "|---|---|---|"]
    lines += [f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / whole:.2f} |" for name, seconds in found.items()]
    print("\n" + "\n".join(lines))
    if options.output:
        with (options.output / f"composition-{options.device}.md").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
