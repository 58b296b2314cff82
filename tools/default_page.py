"""Write the results in docs/results/default.md, below its rule, which is written by hand: `python tools/default_page.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bl_trainer.cells.choosing import STEPS, Regret, Ruling
from bl_trainer.cells.field import CANDIDATES, stored
from bl_trainer.cells.page import SHOWN, markdown, shown
from bl_trainer.cells.results import Mean, Results, over_models

ROOT = Path(__file__).parents[1]
JUDGED, REFERENCES = (ROOT / "docs" / "results" / f"{name}.json.gz" for name in ("judged", "references"))
PAGE = ROOT / "docs" / "results" / "default.md"
BEGINS = "## What the twelve cells chose"
JUDGE_METRICS = ("greedy", "variation", "sampled", "sampled_1", "format", "kept")
LIMITS = (0.01, 0.02, 0.04, 0.05, 0.1)
DIFFERENCES = ("greedy", "variation", "sampled", "sampled_1")
CONTROL = "nll"

AFTERWARDS = """The rule and its candidates were committed before these runs. `nll` and `anneal` were judged first, the others
afterwards. Nothing is picked here: the choice is the one above, and this says whether it holds."""

BESIDE = """These were never candidates. `neg_p`, `power 10` and a threshold were known to fail where the model lacks
knowledge. `python studies/cells_study.py --store --references` runs them on cells of formats and of several valid answers.
Intervals are 95 %, over models.

- *Format*: share of questions with the format's tokens, at the best rate for it.
- *Valid*: probability of a valid answer at temperature 1.
- *Above share*: probability that valid answers have above their own shares, at temperature 1. Others lose it. It is 0.5 (of
  two) or 0.67 (of three) where one alone is left. It is 0 where all keep their shares, and where none was learnt: read it
  beside *valid*. Total variation is the sum of this and the probability of answers that are not valid.

`nll` at T = 0.5 is the same runs, sampled at temperature 0.5."""

SMOOTHING = """`label smoothing 0.1` costs 0.9 times `nll`, and 0.1 times the mean of -log p over the vocabulary. That is no
function of p, so recipes do not have it. It was meant to be a candidate, and the rule left it out for that. The cells have all
logits, and train it. It and `neg_p` ran on all cells and models. Less `nll`, paired by model; above 0 is better:"""

FORMATS, SEVERAL = ("prefix", "suffix", "wrapped"), ("two-even", "three-even")


ADVICE = """## What it means

**The judge does not confirm the choice.** By its cells alone the rule would pick another candidate, whichever model is
left out. Yet over all nine cells, by greedy answers, {apart}. Single cells
decide: `nll` fails on `three-even`, where it learns no form well in 80 steps, and `anneal` on `new-rule`. Without `three-even`
the rule would pick `{without}` there. The intervals of a worst cell are wide. So no objective needs no choice.

- `nll` stays the default of a recipe: it is what others compare with. Sample at a lower temperature where data are noisy.
- An objective that sharpens saves that choice of temperature, and costs valid answers, as a lower temperature does: see *above
  share*.
- Where known facts train with consistent errors, `nll` repeats more of them than `anneal` on `confusions`. The judge's
  `confusions-half` does not confirm it.

**What limits this.** {edges} There the cells measure how fast an objective learns in 80 steps. Most objectives forget over
half of the old tasks at their best rates. [What we claim](claims.md) has `anneal` less `nll` at rates that keep half. Rates and
temperatures are chosen on other questions of the same models. Intervals count models, not cells."""


def signed(mean: Mean) -> str:
    """Return a difference with its interval."""
    low, high = mean.interval or (mean.mean, mean.mean)
    return f"{mean.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def worst(regret: Regret) -> str:
    """Return the regret in the worst cell with its interval, and which one it is."""
    return f"{shown(regret.cells[regret.worst])} {regret.worst}"


def ruled(ruling: Ruling) -> str:
    """Return the table of what the rule says of its candidates, the smallest mean greedy regret first."""
    header = ["candidate", "greedy: mean regret", *(f"{SHOWN[metric]}: worst cell" for metric in STEPS), "stays after steps"]
    rows = []
    for name in sorted(ruling.candidates, key=lambda name: ruling.regrets["greedy"][name].mean.mean):
        steps = [str(number) for number, left in enumerate(ruling.rounds, 1) if name in left]
        found = [ruling.regrets[metric][name] for metric in STEPS]
        rows.append([f"`{name}`", signed(found[0].mean), *map(worst, found), ", ".join(steps) or "none"])
    return markdown(header, rows)


def without_one(ruling: Ruling) -> str:
    """Return what the rule picks when one model at a time is left out."""
    winners = ruling.winners_without_one
    counts = {name: winners.count(name) for name in sorted({*winners}, key=lambda name: -winners.count(name))}
    return "With one model left out, it picks " + ", ".join(
        f"`{name}` in {count} of {len(winners)} cases" for name, count in counts.items()
    )


def measured(results: Results) -> str:
    """Return how many models and cells there are."""
    return f"{len(results.models)} models, {len(results.cells)} cells."


def chosen(results: Results) -> str:
    """Return what the rule says of the twelve cells."""
    ruling = Ruling(results, CANDIDATES)
    count = len(ruling.rounds[-1])
    verdict = (
        f"**The rule picks `{ruling.winner}`.** {count} candidates tie by their worst cells. Among them it has the smallest "
        f"mean greedy regret. {without_one(ruling)}."
    )
    return f"{measured(results)} {verdict} {by_limit(results)}\n\n{ruled(ruling)}\n\n{biased(results, CANDIDATES)}"


def judged(results: Results) -> str:
    """Return what the nine cells say: the rule, each candidate's metrics, and how much better it is than a control."""
    names = tuple(name for name in CANDIDATES if name in results.objectives)
    ruling = Ruling(results, names)
    missing = ", ".join(f"`{name}`" for name in CANDIDATES if name not in names)
    header = ["objective", *(SHOWN[metric] for metric in JUDGE_METRICS)]
    rows = [
        [f"`{name}`", *(shown(results.mean(name, metric, results.cells_of(metric))) for metric in JUDGE_METRICS)]
        for name in names
    ]
    return "\n\n".join(
        (
            AFTERWARDS + (f" Not judged yet: {missing}. The rule dropped these at its first step." if missing else ""),
            f"{measured(results)} By these alone the rule would pick `{ruling.winner}`. {without_one(ruling)}.",
            ruled(ruling),
            biased(results, names),
            f"How much better than `{CONTROL}`, paired by model; above 0 is better:",
            differences(results, [name for name in names if name != CONTROL]),
            "Means, with 95 % intervals over models:",
            markdown(header, rows),
            *(f"**{SHOWN[metric]}**, by cell:\n\n{by_cell(results, metric)}" for metric in ("greedy", "variation")),
        )
    )


def regret_by_validation(results: Results, names: Sequence[str]) -> dict[str, Mean]:
    """Return each objective's mean greedy regret against the one of each cell that is best on validation questions."""
    seen = Results(tuple({**row, "test": row["validation"]} for row in results.rows))
    found: dict[str, dict[str, list[float]]] = {name: {model: [] for model in results.models} for name in names}
    for cell in results.cells:
        best = results.by_model(max(names, key=lambda name: seen.mean(name, "greedy", [cell]).mean), cell, "greedy")
        for name in names:
            for model, value in results.by_model(name, cell, "greedy").items():
                found[name][model].append(best[model] - value)
    return {
        name: over_models({model: sum(each) / len(each) for model, each in values.items()}, (-1.0, 1.0))
        for name, values in found.items()
    }


def biased(results: Results, names: Sequence[str]) -> str:
    """Return what becomes of the mean regrets if validation questions name the best candidate of each cell."""
    found = regret_by_validation(results, names)
    listed = ", ".join(f"`{name}` {signed(mean)}" for name, mean in sorted(found.items(), key=lambda each: each[1].mean))
    return (
        "Here regret is measured against the candidate that is best on test questions. That biases it upwards. Against the one "
        f"that is best on validation questions, the mean greedy regrets are: {listed}."
    )


def differences(results: Results, names: list[str]) -> str:
    """Return the table of what objectives gain over the control."""
    header = ["objective", *(SHOWN[metric] for metric in DIFFERENCES)]
    rows = [[f"`{name}`", *(signed(results.difference(name, CONTROL, metric)) for metric in DIFFERENCES)] for name in names]
    return markdown(header, rows)


def by_cell(results: Results, metric: str) -> str:
    """Return the table of a metric's means, a row for each objective."""
    values = [[f"{results.mean(name, metric, [cell]).mean:.3f}" for cell in results.cells] for name in results.objectives]
    rows = [[f"`{name}`", *each] for name, each in zip(results.objectives, values, strict=True)]
    return markdown(["objective", *results.cells], rows)


def telling() -> dict[str, Results]:
    """Return the results of candidates and references by cell of formats and of several valid answers."""
    others = stored(REFERENCES)
    found: dict[str, Results] = {}
    for results in (stored(), stored(JUDGED)):
        both = results + others.of(results.models)
        found |= {cell: both for cell in results.cells if cell in FORMATS + SEVERAL}
    return found


def in_format(results: Results, name: str, cell: str) -> Mean:
    """Return the share of questions whose format tokens are the most probable ones, at the rate with the most in validation."""
    rows = [row for row in results.rows if (row["objective"], row["cell"]) == (name, cell)]
    shares = {rate: [row for row in rows if row["rate"] == rate] for rate in {row["rate"] for row in rows}}
    best = max(sorted(shares), key=lambda rate: sum(row["validation"]["format"] for row in shares[rate]))
    return over_models({row["model"]: row["test"]["format"] for row in shares[best]}, (0.0, 1.0))


def apart(results: Results) -> str:
    """Return which objectives differ from the control in greedy answers by more than their interval."""
    others = [name for name in results.objectives if name != CONTROL]
    found = {name: results.difference(name, CONTROL, "greedy").interval or (-1.0, 1.0) for name in others}
    better, worse = ([f"`{name}`" for name in others if found[name][side] * sign > 0] for side, sign in ((0, 1), (1, -1)))
    says = [
        f"{' and '.join(names) or 'none'} {verb} {how}"
        for names, verb, how in (
            (better, "are" if len(better) > 1 else "is", f"better than `{CONTROL}` beyond chance"),
            (worse, "are" if len(worse) > 1 else "is", "worse"),
        )
    ]
    return ", and ".join(says)


def valid(results: Results, name: str, cell: str, temperature: float = 1.0) -> Mean:
    """Return the probability of a valid answer, at the rate with the most at temperature 1."""
    rows = at_the_rate(results, name, cell)
    return over_models({row["model"]: row["test"][f"sampled_{temperature:g}"] for row in rows}, (0.0, 1.0))


def beyond(results: Results, name: str, cell: str, temperature: float = 1.0) -> Mean:
    """Return the probability that valid answers have above their shares, at the rate with the most valid at temperature 1.

    Total variation is what is on wrong answers, which is 1 less the valid, and this.
    """
    kinds = (f"variation_{temperature:g}", f"sampled_{temperature:g}")
    found = {row["model"]: [row["test"][kind] for kind in kinds] for row in at_the_rate(results, name, cell)}
    return over_models({model: max(0.0, sum(values) - 1) for model, values in found.items()}, (0.0, 1.0))


def at_the_rate(results: Results, name: str, cell: str) -> list[dict[str, Any]]:
    """Return an objective's rows in a cell, at the rate with the most valid answers at temperature 1."""
    rate = results.choice(name, cell, "sampled_1").rate
    return [row for row in results.rows if (row["objective"], row["cell"], row["rate"]) == (name, cell, rate)]


def paired(ours: Mean, theirs: Mean) -> Mean:
    """Return the difference of two means, paired by model."""
    return over_models({model: value - theirs.by_model[model] for model, value in ours.by_model.items()}, (-1.0, 1.0))


def edges(results: Results) -> str:
    """Return for how many objectives and cells the rate that greedy answers choose is the highest tried."""
    highest = max(row["rate"] for row in results.rows)
    pairs = [(name, cell) for name in results.objectives for cell in results.cells]
    count = sum(results.choice(*pair, "greedy").rate == highest for pair in pairs)
    return f"In {count} of {len(pairs)} cases the learning rate that is best, greedy, is the highest tried, {highest:g}."


def by_limit(results: Results) -> str:
    """Return what the rule picks by other limits."""
    picked: dict[str, list[str]] = {}
    for limit in LIMITS:
        picked.setdefault(Ruling(results, CANDIDATES, limit).winner, []).append(f"{limit:g}")
    return "By other limits than 0.03 it picks " + ", ".join(f"`{name}` ({', '.join(at)})" for name, at in picked.items()) + "."


def beside() -> str:
    """Return what the references do, beside the control and the one that sharpens, cell by cell."""
    names = [CONTROL, "anneal", *stored(REFERENCES).objectives]
    cells = telling()
    columns: list[tuple[str, Any, str]] = [(f"{cell}: format", in_format, cell) for cell in FORMATS]
    for cell in SEVERAL:
        columns += [(f"{cell}: valid", valid, cell), (f"{cell}: above share", beyond, cell)]
    rows = [[f"`{name}`", *(shown(read(cells[cell], name, cell)) for _, read, cell in columns)] for name in names]
    cold = ["", *(shown(read(cells[cell], CONTROL, cell, 0.5)) for _, read, cell in columns[len(FORMATS) :])]
    rows.insert(1, [f"`{CONTROL}` at T = 0.5", *[""] * (len(FORMATS) - 1), *cold])
    whole = [name for name in stored(REFERENCES).objectives if {*stored().cells} <= {*stored(REFERENCES).cells_with(name)}]
    parts = [BESIDE, markdown(["objective", *(title for title, *_ in columns)], rows), SMOOTHING]
    for title, results in (("Twelve cells", stored()), ("Nine cells of the judge", stored(JUDGED))):
        both = results + stored(REFERENCES).of(results.models).on(results.cells)
        parts += [f"**{title}**", differences(both, whole)]
        known = [name for name in CANDIDATES if name in results.objectives]
        picked = [f"`{Ruling(both, (*known, name)).winner}` with `{name}`" for name in whole]
        picked.append(f"`{Ruling(both, (*known, *whole)).winner}` with both")
        parts.append(f"With more candidates the rule would pick {', '.join(picked)}.")
    return "\n\n".join(parts)


def page() -> str:
    """Return the page."""
    rule = PAGE.read_text(encoding="utf-8").partition(BEGINS)[0]
    results, judge = stored(), stored(JUDGED)
    parts = [rule.strip(), BEGINS, chosen(results), "## What the judge says", judged(judge)]
    parts += ["## Beside the candidates", beside()]
    without = Ruling(judge.on([cell for cell in judge.cells if cell != "three-even"]), tuple(judge.objectives)).winner
    return "\n\n".join((*parts, ADVICE.format(apart=apart(judge), without=without, edges=edges(results)))) + "\n"


def main(folder: str) -> None:
    """Write the page into `folder`."""
    (Path(folder) / "default.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
