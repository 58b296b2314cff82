"""The section of docs/results/noise-rows.md on whether a noise score helps, from noise_rows_help.json."""

import math
import statistics
from typing import Any

from bl_trainer._util.intervals import t_quantile

VALIDATION = 1  # the seed that chooses learning rates
EDGES = (1e-3, 3e-2)  # the lowest and the highest rate tried: the best one may lie beyond
SEEDS = 5  # others, of a complete set
CONTROL, RANDOM, BOUND = "all rows, nll", "random rows dropped", "wrong rows dropped"
ARMS = {
    CONTROL: "the control",
    "flagged dropped": "the 30 % of rows with the highest scores do not train, as by `drop_rows`",
    "flagged at weight 0.1": "they train at a tenth of their weight, as by the second command of `rows.html`",
    "weight exp(-score)": "every row has this `objective_weight`; there is no cut",
    "all rows, neg_p": "no score is needed",
    "all rows, anneal": "no score is needed",
    BOUND: "exactly the wrong rows do not train: the most that a score could do",
    RANDOM: "as many rows as are flagged, drawn at random, do not train: the price of fewer rows",
}
ACTING = tuple(ARMS)[1:4]  # on the score
SETS = {"a new rule 20 %": "new rule", "records 30 %": "records 30 %", "final numbers 20 %": "final numbers"}
SECTION = """## Does it help?

`python studies/noise_rows_help.py` trains `tiny-half` on three of the sets, in each of these ways:

| arm | what trains |
|---|---|
{arms}

- **Training**: an adapter of rank 16 trains 90 steps of 8 rows, three epochs of all 240 rows. The learning rate warms up over
  5 steps and then falls to 0. Arms with fewer rows train as many steps.
- **Pairs**: within a seed all arms start from the same weights and see the same rows in the same order, without those dropped.
- **Metric**: the share of 200 right rows with other prompts whose answer greedy decoding gives to the end.
- **Learning rate**: each arm has the best of 1e-3, 3e-3, 1e-2 and 3e-2 at seed 1. Seeds 2 to 6 judge it. At an
  edge the best one may lie beyond.

The rule was written down before the first run. An arm **helps** on a set if the 95 % interval of its difference to
`{control}` lies above 0, paired over five seeds. It **harms** if that interval lies below 0. **The score helps** on a set if
an arm that acts on it helps, and is above `{random}` by the same rule. Intervals are not corrected for the number of
comparisons.

{results}
"""
MISSING = "Not run yet, or not to the end: {sets}. The same command continues."
UNDECIDED = f" Not even `{BOUND}` is shown to help, so five seeds are too few to decide on this set."


def section(cells: dict[str, Any]) -> str:
    """Return the section. `cells`: the study's, by `set | seed` and `set | seed | arm | learning rate`."""
    runs: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    rates: dict[tuple[str, str], str] = {}
    for key, cell in cells.items():
        name, seed, *rest = key.split(" | ")
        if rest and int(seed) != VALIDATION:
            runs.setdefault((name, rest[0]), {})[int(seed)] = cell
            rates[name, rest[0]] = rest[1]
    names = [name for name in SETS if all(len(runs.get((name, arm), {})) == SEEDS for arm in ARMS)]
    parts = [_accuracies(cells, runs, names), _rates(rates, names), _verdicts(runs, names)] if names else []
    left = [each for name, each in SETS.items() if name not in names]
    parts += [MISSING.format(sets=", ".join(left))] if left else []
    arms = "\n".join(f"| {arm} | {what} |" for arm, what in ARMS.items())
    return SECTION.format(arms=arms, control=CONTROL, random=RANDOM, results="\n\n".join(parts))


def difference(runs: dict[Any, dict[int, dict[str, float]]], name: str, arm: str, other: str) -> tuple[float, float]:
    """Return the mean of the seeds' differences in accuracy and the half of its 95 % interval."""
    found = [runs[name, arm][seed]["accuracy"] - runs[name, other][seed]["accuracy"] for seed in sorted(runs[name, other])]
    return statistics.mean(found), t_quantile(len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))


def _accuracies(cells: dict[str, Any], runs: dict[Any, Any], names: list[str]) -> str:
    lines = [_row("arm", [SETS[name] for name in names]), "|---" * (len(names) + 1) + "|"]
    of = {name: [cell for key, cell in cells.items() if _is_test(key, name)] for name in names}
    lines.append(_row("*before training*", [f"{_mean(of[name], 'accuracy'):.3f}" for name in names]))
    for arm in ARMS:
        values = []
        for name in names:
            mean, (change, half) = _mean(runs[name, arm].values(), "accuracy"), difference(runs, name, arm, CONTROL)
            values.append(f"{mean:.3f}" + ("" if arm == CONTROL else f" ({change:+.3f} ± {half:.3f})"))
        lines.append(_row(arm, values))
    lines.append(_row("*wrong rows among the flagged*", [f"{_mean(of[name], 'precision'):.2f}" for name in names]))
    lines.append(_row("*flagged rows among the wrong*", [f"{_mean(of[name], 'recall'):.2f}" for name in names]))
    return "Accuracy, and in brackets the difference to the control:\n\n" + "\n".join(lines)


def _rates(rates: dict[tuple[str, str], str], names: list[str]) -> str:
    lines = [_row("learning rate", [SETS[name] for name in names]), "|---" * (len(names) + 1) + "|"]
    shown = {key: rate + (" (edge)" if float(rate) in EDGES else "") for key, rate in rates.items()}
    return "\n".join([*lines, *(_row(arm, [shown[name, arm] for name in names]) for arm in ARMS)])


def _verdicts(runs: dict[Any, Any], names: list[str]) -> str:
    """Return what the rule says of each set."""
    lines = []
    for name in names:
        helps, harms, acts = [], [], []
        for arm in [each for each in ARMS if each != CONTROL]:
            change, half = difference(runs, name, arm, CONTROL)
            helps += [f"`{arm}`"] if change > half else []
            harms += [f"`{arm}`"] if change < -half else []
            above, its = difference(runs, name, arm, RANDOM) if arm in ACTING else (0.0, 0.0)
            acts += [arm] if change > half and above > its else []
        said = f"**The score {'helps' if acts else 'is not shown to help'}.** Helps: {_listed(helps)}. Harms: {_listed(harms)}."
        lines.append(f"- **{SETS[name]}**: {said}{'' if f'`{BOUND}`' in helps else UNDECIDED}")
    return "By the rule:\n\n" + "\n".join(lines)


def _is_test(key: str, name: str) -> bool:
    parts = key.split(" | ")
    return parts[0] == name and len(parts) == 2 and int(parts[1]) != VALIDATION


def _mean(cells: Any, what: str) -> float:
    return statistics.mean(cell[what] for cell in cells)


def _row(first: str, values: list[str]) -> str:
    return f"| {first} | {' | '.join(values)} |"


def _listed(arms: list[str]) -> str:
    return ", ".join(arms) or "none"
