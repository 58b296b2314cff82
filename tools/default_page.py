"""Write the results in docs/results/default.md, below its rule, which is written by hand: `python tools/default_page.py`."""

import sys
from pathlib import Path

from bl_trainer.cells.choosing import STEPS, Regret, Ruling
from bl_trainer.cells.field import CANDIDATES, stored
from bl_trainer.cells.page import SHOWN, markdown, shown
from bl_trainer.cells.results import Mean, Results

ROOT = Path(__file__).parents[1]
JUDGED = ROOT / "docs" / "results" / "judged.json.gz"
PAGE = ROOT / "docs" / "results" / "default.md"
BEGINS = "## What the twelve cells chose"
JUDGE_METRICS = ("greedy", "variation", "sampled", "sampled_1", "format", "kept")
DIFFERENCES = ("greedy", "variation", "sampled", "sampled_1")

ADVICE = """## What it means

**The judge does not confirm the choice.** On its cells `nll` and `anneal` do not differ beyond chance by greedy answers and
total variation. Sampled at its best temperature, `anneal` is slightly ahead. Each fails in a cell of its own: `nll` on
`three-even`, where it learns no form well in 80 steps, and `anneal` on `new-rule`. So no objective needs no choice.

- `nll` stays the default of a recipe: it is what others compare with. Sample at a lower temperature where data are noisy.
- An objective that sharpens saves that choice of temperature, and costs valid answers: see total variation on `two-even`.
- Where known facts train with consistent errors (`confusions`), `nll` repeats more of them than `anneal` or `deft`.
- Only `nll` and `anneal` have been judged. The others of the field have not."""


def signed(mean: Mean) -> str:
    """Return a difference with its interval."""
    low, high = mean.interval or (mean.mean, mean.mean)
    return f"{mean.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def worst(regret: Regret) -> str:
    """Return the regret in the worst cell, and which one it is."""
    return f"{regret.most:.3f} {regret.worst}"


def chosen(results: Results) -> str:
    """Return what the rule says of the twelve cells."""
    ruling = Ruling(results, CANDIDATES)
    header = ["candidate", "greedy: mean regret", *(f"{SHOWN[metric]}: worst cell" for metric in STEPS), "stays after steps"]
    rows = []
    for name in CANDIDATES:
        steps = [str(number) for number, left in enumerate(ruling.rounds, 1) if name in left]
        found = [ruling.regrets[metric][name] for metric in STEPS]
        rows.append([f"`{name}`", signed(found[0].mean), *map(worst, found), ", ".join(steps) or "none"])
    verdict = (
        f"**The rule picks `{ruling.winner}`.** {len(ruling.rounds[-1])} candidates tie by their worst cells. Among them "
        "it has the smallest mean greedy regret."
    )
    return f"{len(results.models)} models, {len(results.cells)} cells. {verdict}\n\n{markdown(header, rows)}"


def judged(results: Results, control: str) -> str:
    """Return what the nine cells say: every metric of each objective, and how much better it is than a control."""
    names = tuple(results.objectives)
    behind = Ruling(results, names).regrets
    header = ["objective", *(SHOWN[metric] for metric in JUDGE_METRICS)]
    rows = [
        [f"`{name}`", *(shown(results.mean(name, metric, results.cells_of(metric))) for metric in JUDGE_METRICS)]
        for name in names
    ]
    against = ["objective", *(SHOWN[metric] for metric in DIFFERENCES), *(f"{SHOWN[metric]}: worst cell" for metric in STEPS)]
    differences = [
        [
            f"`{name}`",
            *("" if name == control else signed(results.difference(name, control, metric)) for metric in DIFFERENCES),
            *(worst(behind[metric][name]) for metric in STEPS),
        ]
        for name in names
    ]
    cells = [
        [cell, *(f"{results.mean(name, metric, [cell]).mean:.3f}" for metric in ("greedy", "variation") for name in names)]
        for cell in results.cells
    ]
    by_cell = ["cell", *(f"{metric}: `{name}`" for metric in ("greedy", "variation") for name in names)]
    return "\n\n".join(
        (
            f"{len(results.models)} models, {len(results.cells)} cells. Means, with 95 % intervals over models:",
            markdown(header, rows),
            f"How much better than `{control}`, paired by model; above 0 is better. Then the regret in the worst cell, among "
            "these objectives:",
            markdown(against, differences),
            "By cell, greedy answers and total variation at the best temperature:",
            markdown(by_cell, cells),
        )
    )


def page() -> str:
    """Return the page."""
    rule = PAGE.read_text(encoding="utf-8").partition(BEGINS)[0]
    parts = [rule.strip(), BEGINS, chosen(stored()), "## What the judge says"]
    parts.append(judged(stored(JUDGED), "nll"))
    return "\n\n".join((*parts, ADVICE)) + "\n"


def main(folder: str) -> None:
    """Write the page into `folder`."""
    (Path(folder) / "default.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
