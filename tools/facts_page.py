"""Write docs/results/facts.md: `python tools/facts_page.py [docs/results]`."""

import runpy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bl_trainer.cells.page import markdown
from bl_trainer.sweep.differences import LEVEL, Difference, by_item, difference, holm

ROOT = Path(__file__).parents[1]
STUDY: dict[str, Any] = runpy.run_path(str(ROOT / "studies" / "facts.py"))
CONTROL, MARGIN, BEST = "nll", 0.05, "best"
GROUPS = {"known": "known facts", "unknown": "unknown facts", "all": "all test facts", "held out": "facts held out"}
METRICS = {
    "greedy": "right, greedy",
    "right 1": "right, sampled at T = 1",
    f"right {BEST}": "right, sampled at the best T",
    f"variation {BEST}": "total variation, best T",
}


@dataclass(frozen=True)
class Prediction:
    """What `arm` was expected to be beside CONTROL: "above" or "below" it in a metric, or the "same", within MARGIN."""

    cell: str
    metric: str
    group: str
    arm: str
    expected: str


PREDICTIONS = (
    Prediction("random", "right 1", "all", "anneal", "above"),
    Prediction("random", "right 1", "all", "alpha e^-H", "above"),
    Prediction("random", f"right {BEST}", "all", "anneal", "same"),
    Prediction("random", "greedy", "all", "alpha 0.5 e^-H", "same"),
    Prediction("random", "greedy", "unknown", "neg_p", "below"),
    Prediction("random", "greedy", "held out", "neg_p", "above"),
    Prediction("two-forms", f"variation {BEST}", "all", "anneal", "above"),
    Prediction("two-forms", f"variation {BEST}", "all", "neg_p", "above"),
    Prediction("two-forms", f"variation {BEST}", "all", "alpha 0.5 e^-H", "same"),
    Prediction("two-forms", "greedy", "unknown", "neg_p", "below"),
    Prediction("consistent", "greedy", "known", "neg_p", "above"),
    Prediction("clean", "greedy", "all", "anneal", "same"),
    Prediction("suffix", "greedy", "all", "neg_p", "below"),
)
PAGE = """# Facts on SmolLM2-135M

<!-- Written by tools/facts_page.py (`make figures`) from facts.json.gz. -->

> **Question.** Do the findings on small synthetic models hold where a real model has real facts to learn, keep and unlearn?

{answer}

`python studies/facts_study.py` trains SmolLM2-135M-Instruct on {trained} facts about countries: capital, calling code, currency
and ISO code. The model knows half of them: it prefers the true value to {choices} others. Every fact has {copies} rows.

| cell | rows |
|---|---|
| `clean` | all true |
| `random` | 30 % have another country's value, drawn for each row |
| `consistent` | 30 % of facts have the same wrong value in all their rows |
| `two-forms` | each value is written in two ways ("Euro", "EUR"), in half of its rows each |
| `suffix` | answers end in a format that the model never saw |

- **Training**: bfloat16, LoRA of rank {rank}, one epoch in batches of {batch}. Each objective has the rate of {rates} with the
  most right greedy answers to validation facts at seed {pilot}.
- **Judging**: {seeds} other seeds, {test} other facts, half of them known. {held_out} known facts are held out: nothing trains
  on them.
- **Exact**: nothing is sampled. Greedy answers and probabilities at T = 1, 0.5 and 0.25 come from the logits. Validation facts
  choose each objective's best T.
- **Rule**: cells, objectives, steps and predictions were committed before the first run. The study stops after {seeds} seeds.

{tables}

## Predictions

Differences to `{control}` are paired by seed and fact. Their 95 % intervals count seeds and countries. "Above" and "below"
hold if the difference has that sign and its p-value, corrected for all such predictions (Holm), is below {level}. "Same" holds
if the interval is within ±{margin}, and fails if it is outside.

{predictions}

{missing}It is one model of 135M parameters, one adapter rank and one length of training.
"""
ANSWER = "> **Answer.** {held} of {count} predictions hold, {fell} fail, {open} are undecided."


class Cell:
    """A cell's runs at the objectives' own rates."""

    def __init__(self, results: dict[str, Any], name: str):
        self.facts, self.name = results["facts"], name
        self.rates = {arm: STUDY["best_rate"](results, name, arm) for arm in STUDY["ARMS"]}
        self.runs = {
            arm: [results["runs"][STUDY["key_of"](name, arm, rate, seed)] for seed in STUDY["SEEDS"]]
            for arm, rate in self.rates.items()
        }

    def chosen(self, group: str) -> list[int]:
        """Return the numbers of a group's facts; "validation" is one of them."""
        part = group if group in ("validation", "held out") else "test"
        own = [i for i, fact in enumerate(self.facts) if fact["part"] == part]
        return [i for i in own if group not in ("known", "unknown") or self.facts[i]["is_known"] == (group == "known")]

    def temperature(self, arm: str, metric: str) -> str:
        """Return the temperature at which an objective does best on validation facts."""
        sign = -1 if metric == "variation" else 1
        items = self.chosen("validation")

        def mean(temperature: float) -> float:
            return statistics.mean(run[f"{metric} {temperature:g}"][i] for run in self.runs[arm] for i in items)

        return f"{max(STUDY['TEMPERATURES'], key=lambda each: sign * mean(each)):g}"

    def column(self, arm: str, metric: str) -> str:
        """Return the name of the numbers by which a metric judges an objective."""
        kind, _, which = metric.partition(" ")
        return f"{kind} {self.temperature(arm, kind)}" if which == BEST else metric

    def values(self, arm: str, metric: str, group: str) -> list[dict[str, tuple[float, float]]]:
        """Return for each seed the number of facts and their sum, by country."""
        column, found = self.column(arm, metric), []
        for run in self.runs[arm]:
            sums: dict[str, tuple[float, float]] = {}
            for i in self.chosen(group):
                count, total = sums.get(self.facts[i]["country"], (0.0, 0.0))
                sums[self.facts[i]["country"]] = (count + 1, total + run[column][i])
            found.append(sums)
        return found

    def mean(self, arm: str, metric: str, group: str) -> Difference:
        """Return an objective's mean."""
        own = self.values(arm, metric, group)
        return _difference(own, [{key: (count, 0.0) for key, (count, _) in each.items()} for each in own])

    def apart(self, arm: str, metric: str, group: str) -> Difference:
        """Return by how much an objective exceeds the control."""
        return _difference(self.values(arm, metric, group), self.values(CONTROL, metric, group))


def _difference(ours: list[dict[str, tuple[float, float]]], control: list[dict[str, tuple[float, float]]]) -> Difference:
    def mean(values: dict[str, tuple[float, float]]) -> float:
        return sum(total for _, total in values.values()) / sum(count for count, _ in values.values())

    by_seed = np.array([mean(a) - mean(b) for a, b in zip(ours, control, strict=True)])
    items = by_item(list(zip(ours, control, strict=True)), 1)
    if items is None:
        raise ValueError("two objectives were judged on different facts")
    return difference(float(by_seed.mean()), {"seeds": by_seed, "examples": items[0]}, 1.0, items[1])


def is_complete(results: dict[str, Any], cell: str) -> bool:
    """Whether all runs of a cell are there."""
    key, runs = STUDY["key_of"], results["runs"]
    pilots = all(key(cell, arm, rate, STUDY["PILOT"]) in runs for arm in STUDY["ARMS"] for rate in STUDY["RATES"])
    return pilots and all(
        key(cell, arm, STUDY["best_rate"](results, cell, arm), seed) in runs for arm in STUDY["ARMS"] for seed in STUDY["SEEDS"]
    )


def table(cell: Cell) -> str:
    """Return a row for each objective."""
    columns = [("greedy", "known"), ("greedy", "unknown"), ("greedy", "held out"), *((each, "all") for each in METRICS)]
    lines = []
    for arm, rate in cell.rates.items():
        best = cell.temperature(arm, "right"), cell.temperature(arm, "variation")
        lines.append([f"`{arm}`", f"{rate:g}", ", ".join(best), *(_plain(cell.mean(arm, *each)) for each in columns)])
    header = ["objective", "learning rate", "best T: right, variation"]
    return markdown([*header, *(f"{METRICS[metric]}: {GROUPS[group]}" for metric, group in columns)], lines)


def _plain(found: Difference) -> str:
    return f"{found.mean:.3f}" + (f" ({found.interval[0]:.3f} to {found.interval[1]:.3f})" if found.interval else "")


def verdict(expected: str, found: Difference) -> str:
    """Return whether a prediction holds, fails, or is undecided."""
    low, high = found.interval or (-1.0, 1.0)
    if expected == "same":
        return "holds" if -MARGIN < low and high < MARGIN else "fails" if low > MARGIN or high < -MARGIN else "undecided"
    if found.p_value is None or found.p_value >= LEVEL:
        return "undecided"
    return "holds" if (found.mean > 0) == (expected == "above") else "fails"


def judged(cells: dict[str, Cell]) -> list[tuple[Prediction, Difference, str]]:
    """Return what became of the predictions about these cells."""
    own = [each for each in PREDICTIONS if each.cell in cells]
    found = [cells[each.cell].apart(each.arm, each.metric, each.group) for each in own]
    holm([apart for each, apart in zip(own, found, strict=True) if each.expected != "same"])
    return [(each, apart, verdict(each.expected, apart)) for each, apart in zip(own, found, strict=True)]


def text(results: dict[str, Any]) -> str:
    """Return the page."""
    cells = {name: Cell(results, name) for name in STUDY["CELLS"] if is_complete(results, name)}
    found = judged(cells)
    lines = []
    for each, apart, outcome in found:
        low, high = apart.interval or (float("nan"), float("nan"))
        p = "" if each.expected == "same" or apart.p_value is None else f"{apart.p_value:.3f}"
        shown = f"{apart.mean:+.3f} ({low:+.3f} to {high:+.3f})"
        where = f"{METRICS[each.metric]}: {GROUPS[each.group]}"
        lines.append([f"`{each.cell}`", f"`{each.arm}`", where, each.expected, shown, p, outcome])
    header = ["cell", "objective", "metric", "expected", f"difference to `{CONTROL}`", "p (Holm)", "outcome"]
    outcomes = [outcome for _, _, outcome in found]
    counts = {name: outcomes.count(key) for name, key in (("held", "holds"), ("fell", "fails"), ("open", "undecided"))}
    left = [f"`{name}`" for name in STUDY["CELLS"] if name not in cells]
    missing = f"Not run: {', '.join(left)} (`python studies/facts_study.py --cells ...`). " if left else ""
    return PAGE.format(
        answer=ANSWER.format(count=len(found), **counts),
        trained=2 * sum(STUDY["PARTS"].values()),
        choices=STUDY["CHOICES"],
        copies=STUDY["COPIES"],
        rank=STUDY["RANK"],
        batch=STUDY["BATCH"],
        rates=", ".join(f"{rate:g}" for rate in STUDY["RATES"]),
        pilot=STUDY["PILOT"],
        seeds=len(STUDY["SEEDS"]),
        test=2 * STUDY["PARTS"]["test"],
        held_out=STUDY["HELD_OUT"],
        tables="\n\n".join(f"**`{name}`**\n\n{table(cell)}" for name, cell in cells.items()),
        control=CONTROL,
        level=LEVEL,
        margin=MARGIN,
        predictions=markdown(header, lines),
        missing=missing,
    )


def main(folder: str) -> None:
    """Write the page into `folder`."""
    results = STUDY["read_results"](ROOT / STUDY["OUTPUT"])
    (Path(folder) / "facts.md").write_text(text(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
