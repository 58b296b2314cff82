"""Write the results in docs/results/default.md, below its rule, which is written by hand: `python tools/default_page.py`."""

import sys
from pathlib import Path

from bl_trainer.cells.choosing import STEPS, Regret, Ruling
from bl_trainer.cells.field import CANDIDATES, stored
from bl_trainer.cells.page import SHOWN, markdown, shown
from bl_trainer.cells.results import Mean, Results, over_models

ROOT = Path(__file__).parents[1]
JUDGED, REFERENCES = (ROOT / "docs" / "results" / f"{name}.json.gz" for name in ("judged", "references"))
PAGE = ROOT / "docs" / "results" / "default.md"
BEGINS = "## What the twelve cells chose"
JUDGE_METRICS = ("greedy", "variation", "sampled", "sampled_1", "format", "kept")
DIFFERENCES = ("greedy", "variation", "sampled", "sampled_1")
CONTROL = "nll"

AFTERWARDS = """The rule and its candidates were committed before these runs. `nll` and `anneal` were judged first, the others
afterwards. Nothing is picked here: the choice is the one above, and this says whether it holds."""

BESIDE = """These were never candidates. `neg_p`, `power 10` and a threshold were known to fail where the model lacks
knowledge. `python studies/cells_study.py --references` runs them on cells of formats and of several valid answers alone.
Intervals are 95 %, over models.

- *Format*: share of questions with the format's tokens, at the best rate for it.
- *Valid*: probability of a valid answer at temperature 1.
- *Beyond share*: probability that valid answers have above their own shares, at temperature 1. Others lose it. It is 0 where
  all stay, and 0.5 (of two) or 0.67 (of three) where one alone is left."""

SMOOTHING = """`label smoothing 0.1` costs 0.9 times `nll`, and 0.1 times the mean of -log p over the vocabulary. That is no
function of p, so recipes do not have it. The cells have all logits, and train it."""

FORMATS, SEVERAL = ("prefix", "suffix", "wrapped"), ("two-even", "three-even")


ADVICE = """## What it means

**The judge does not confirm the choice.** By its cells alone the rule would pick another candidate, whichever model is
left out. Yet over all nine cells, by greedy answers, {apart}. Single cells
decide: `nll` fails on `three-even`, where it learns no form well in 80 steps, and `anneal` on `new-rule`. The intervals of a
worst cell are wide. So no objective needs no choice.

- `nll` stays the default of a recipe: it is what others compare with. Sample at a lower temperature where data are noisy.
- An objective that sharpens saves that choice of temperature, and costs valid answers: see total variation on `two-even`.
- Where known facts train with consistent errors (`confusions`), `nll` repeats more of them than `anneal` or `deft`."""


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
    return f"{measured(results)} {verdict}\n\n{ruled(ruling)}"


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
            f"How much better than `{CONTROL}`, paired by model; above 0 is better:",
            differences(results, [name for name in names if name != CONTROL]),
            "Means, with 95 % intervals over models:",
            markdown(header, rows),
            *(f"**{SHOWN[metric]}**, by cell:\n\n{by_cell(results, metric)}" for metric in ("greedy", "variation")),
        )
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


def valid(results: Results, name: str, cell: str) -> Mean:
    """Return the probability of a valid answer at temperature 1."""
    return results.mean(name, "sampled_1", [cell])


def beyond(results: Results, name: str, cell: str) -> Mean:
    """Return the probability at temperature 1 that valid answers have above their shares, at the rate with the most valid.

    Total variation is what is on wrong answers, which is 1 less the valid, and this.
    """
    rate = results.choice(name, cell, "sampled_1").rate
    rows = [row for row in results.rows if (row["objective"], row["cell"], row["rate"]) == (name, cell, rate)]
    above = {row["model"]: max(0.0, row["test"]["variation_1"] + row["test"]["sampled_1"] - 1) for row in rows}
    return over_models(above, (0.0, 1.0))


def beside() -> str:
    """Return what the references do, beside the control and the one that sharpens, cell by cell."""
    names = [CONTROL, "anneal", *stored(REFERENCES).objectives]
    cells = telling()
    columns = [(f"{cell}: format", in_format, cell) for cell in FORMATS]
    for cell in SEVERAL:
        columns += [(f"{cell}: valid", valid, cell), (f"{cell}: beyond share", beyond, cell)]
    rows = [[f"`{name}`", *(shown(read(cells[cell], name, cell)) for _, read, cell in columns)] for name in names]
    return "\n\n".join((BESIDE, markdown(["objective", *(title for title, *_ in columns)], rows), SMOOTHING))


def page() -> str:
    """Return the page."""
    rule = PAGE.read_text(encoding="utf-8").partition(BEGINS)[0]
    results, judge = stored(), stored(JUDGED)
    parts = [rule.strip(), BEGINS, chosen(results), "## What the judge says", judged(judge)]
    parts += ["## Beside the candidates", beside()]
    return "\n\n".join((*parts, ADVICE.format(apart=apart(judge)))) + "\n"


def main(folder: str) -> None:
    """Write the page into `folder`."""
    (Path(folder) / "default.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
