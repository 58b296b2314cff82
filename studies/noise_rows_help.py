"""Ask whether it helps to drop or weight rows of a high noise score, or to train all of them by another objective.

    python studies/noise_rows_help.py                  # about twelve minutes on one core

Three data sets of `noise_rows.py`, whose wrong rows are known, train the model that half knows their tasks. The 30 % of rows
with the highest noise scores are flagged. Every arm trains an adapter for the same number of steps. Within a seed, arms start
from the same weights and see the same rows in the same order; an arm that drops rows skips them. Judged is the share of right
rows of the same task, with prompts that are not trained on, whose answer greedy decoding gives to the end. Each arm takes the
learning rate with the highest accuracy at a seed of its own, `VALIDATION`. Results go to docs/results/noise_rows_help.json, a
run at a time, and a second start resumes. `make figures` makes the page.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bl_trainer.objectives import Objective
from noise_rows import (
    ALPHA,
    BATCH,
    RANK,
    RATE,
    ROWS,
    SCORES,
    SETS,
    WARMUP,
    Example,
    Reader,
    Row,
    encoded,
    logits,
    read,
    rounded,
    rows_of,
    scored,
    tiny,
    top,
    write,
)

MODEL = "tiny-half"
CHOSEN = "lesser gap, worst token"  # the score of `--noise_steps`
COMPARED = ("a new rule 20 %", "records 30 %", "final numbers 20 %")  # data sets
FLAGGED = 0.3  # share of the rows
LOW = 0.1  # weight of flagged rows, as in the command of rows.html
HELD_OUT = 200  # right rows
STEPS = 90  # three passes over all rows
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
VALIDATION, SEEDS = 1, range(2, 7)


class Set:
    """A data set at a seed, its noise scores, and right rows that nothing trains on."""

    def __init__(self, reader: Reader, name: str, seed: int):
        self.rows, self.seed = rows_of(name, seed, ROWS), seed
        self.examples = [encoded(reader, row) for row in self.rows]
        self.held_out = [encoded(reader, row) for row in held_out(name, seed, {row.prompt for row in self.rows})]
        self.scores = SCORES[CHOSEN](scored(reader, self.rows, seed, RATE), seed)

    @property
    def flagged(self) -> np.ndarray:
        """The numbers of the rows with the highest scores."""
        return top(self.scores, round(FLAGGED * ROWS))


def held_out(name: str, seed: int, seen: set[str]) -> list[Row]:
    """Return right rows of other prompts than those seen."""
    make, _ = SETS[name]
    others = (row for row in make(random.Random(f"{name} held out {seed}"), 0.0) if row.prompt not in seen)
    return list(itertools.islice(others, HELD_OUT))


@dataclass(frozen=True)
class Arm:
    """A way to train. `rows`: those that it weights; `weight`: theirs, 0 to pass over them, None for exp(-score)."""

    rows: str = "none"
    weight: float | None = 0.0
    objective: str = "nll"

    def weights(self, data: Set) -> np.ndarray:
        """Return the weight of each row."""
        if self.weight is None:
            return np.exp(-data.scores)
        found = np.ones(ROWS)
        found[chosen(self.rows, data)] = self.weight
        return found


def chosen(which: str, data: Set) -> Any:
    """Return the numbers of the rows that are flagged, wrong, drawn at random, or none."""
    if which == "flagged":
        return data.flagged
    if which == "wrong":
        return [i for i, row in enumerate(data.rows) if row.kind == "wrong"]
    if which == "random":
        return random.Random(f"random {data.seed}").sample(range(ROWS), round(FLAGGED * ROWS))
    return []


ARMS = {
    "all rows, nll": Arm(),
    "flagged dropped": Arm("flagged"),
    "flagged at weight 0.1": Arm("flagged", LOW),
    "weight exp(-score)": Arm(weight=None),
    "all rows, neg_p": Arm(objective="neg_p"),
    "all rows, anneal": Arm(objective="anneal"),
    "wrong rows dropped": Arm("wrong"),
    "random rows dropped": Arm("random"),
}


def batches(weights: np.ndarray, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each step: whole passes in random order, the same for all weights, without rows of weight 0."""
    rng, order = random.Random(f"order {seed}"), list[int]()
    while True:
        while len(order) < BATCH:
            order += [i for i in rng.sample(range(len(weights)), len(weights)) if weights[i]]
        batch, order = order[:BATCH], order[BATCH:]
        yield batch


def loss_of(reader: Reader, batch: list[Example], weights: list[float], objective: Objective, progress: float) -> Tensor:
    """Return the mean cost of a batch's tokens, each times its row's weight."""
    costs = []
    for rows, each, weight in zip(logits(reader, batch), batch, weights, strict=True):
        logp = rows.gather(1, torch.tensor(each.ids[each.start :])[:, None])[:, 0]
        entropy = -(rows.detach().exp() * rows.detach()).sum(1)
        costs.append(weight * objective(logp, entropy=entropy, progress=progress))
    return torch.cat(costs).mean()


def trained(reader: Reader, data: Set, arm: Arm, rate: float) -> dict[str, float]:
    """Train an adapter, and return accuracy and mean p on the rows held out. The reader's model is as before."""
    torch.manual_seed(data.seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(reader.model, config)
    here = Reader(adapted.base_model.model, reader.encode, reader.end)
    parameters = [p for p in here.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0, fused=True)
    weights, objective = arm.weights(data), Objective.parse(arm.objective)
    for step, rows in zip(range(STEPS), batches(weights, data.seed), strict=False):
        here.model.train()
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARMUP, 1 - step / STEPS)
        loss_of(here, [data.examples[i] for i in rows], [float(weights[i]) for i in rows], objective, step / STEPS).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = judged(here, data.held_out)
    adapted.unload()
    return found


def judged(reader: Reader, examples: list[Example]) -> dict[str, float]:
    """Return the share of answers that greedy decoding gives to the end, and the mean p of their tokens."""
    answers = read(reader, examples)
    right = [bool((margin > 0).all()) for margin in answers.margin]
    return {"accuracy": float(np.mean(right)), "mean_p": float(np.exp(np.concatenate(answers.logp)).mean())}


def described(reader: Reader, data: Set) -> dict[str, float]:
    """Return the accuracy before training, and what is flagged: the share of wrong rows in it, and how many of them it has."""
    wrong = np.array([row.kind == "wrong" for row in data.rows])
    shares = {"wrong": wrong.mean(), "precision": wrong[data.flagged].mean(), "recall": wrong[data.flagged].sum() / wrong.sum()}
    return {**judged(reader, data.held_out), **shares}


def best_rate(results: dict[str, Any], name: str, arm: str) -> float:
    """Return the rate of the highest accuracy at the validation seed; of several, that of the highest mean p."""

    def judgement(rate: float) -> tuple[float, float]:
        found = results[f"{name} | {VALIDATION} | {arm} | {rate:g}"]
        return found["accuracy"], found["mean_p"]

    return max(RATES, key=judgement)


def run(path: Path, folder: Path, names: list[str]) -> None:
    """Run what the results lack."""
    results = json.loads(path.read_text()) if path.exists() else {}
    reader = tiny(folder, MODEL)
    for name, seed in itertools.product(names, (VALIDATION, *SEEDS)):
        runs = {f"{name} | {seed} | {arm} | {rate:g}": (arm, rate) for arm in ARMS
                for rate in (RATES if seed == VALIDATION else [best_rate(results, name, arm)])}  # fmt: skip
        if {*runs} <= {*results}:
            continue
        data = Set(reader, name, seed)
        results[f"{name} | {seed}"] = rounded(described(reader, data))
        for key, (arm, rate) in runs.items():
            if key not in results:
                results[key] = rounded(trained(reader, data, ARMS[arm], rate))
                write(path, results)
                print(key, results[key], flush=True)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/noise_rows_help.json"))
    parser.add_argument("--folder", type=Path, default=Path("noise_rows"), help="where the tiny model is kept")
    parser.add_argument("--sets", nargs="*", default=list(COMPARED), choices=list(SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    run(options.output, options.folder, options.sets)


if __name__ == "__main__":
    main()
