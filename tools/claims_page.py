"""Write docs/results/claims.md, what the project claims with its evidence: `python tools/claims_page.py [docs/results]`."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from bl_trainer.cells.field import CANDIDATES, stored
from bl_trainer.cells.page import LEAST_KEPT, markdown, shown
from bl_trainer.cells.results import Results, over_models

ROOT = Path(__file__).parents[1]
DEFAULT: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "default_page.py"))
READY: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "ready_page.py"))
FACTS: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "facts_page.py"))
PRETRAINED: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "pretrained_page.py"))
VERDICT: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "verdict_page.py"))
CELLS_COMMAND = "`python studies/cells_study.py --store`"
JUDGE_COMMAND, REFERENCES_COMMAND = f"{CELLS_COMMAND[:-1]} --judge`", f"{CELLS_COMMAND[:-1]} --references`"
STEADY = "alpha 0.5 e^-H"
KNOWN = f"`nll`, `anneal` and `{STEADY}`"  # whose results on the twelve cells were known when the rule was written
PAGE = """# What we claim

<!-- Written by tools/claims_page.py (`make figures`) from the results of the studies. -->

Each claim has its figure, a 95 % interval, the number of pretrained models behind it, and the command that makes it. With
several models, they are the units of the interval, and the cells are fixed. With one, the interval is over seeds and examples,
and says nothing of other models. Intervals are not corrected for the number of claims, nor for the choice of rates and
temperatures, which other questions of the same models made.

All cells are synthetic tasks on models of 0.06M to 0.1M parameters. [Facts](facts.md) are real, and
[noisy records](pretrained.md) too, on SmolLM2-135M. We claim nothing of large models. Figures of `make continuum` and
[anneal](anneal.md) are copied from those pages: their raw results are not in the repository.

{claims}

Differences of shares are paired by model. Positive is better, for total variation too. Where a row names wrong answers
or what is above shares, lower is better. For facts lower variation is better, and intervals count seeds and countries.
T is the temperature.

## Claims that fell

{fallen}

## What an outside reader found

A reader ran 18 cells of their own on three pretrained models, which are not in this repository. So these findings have no
command here.

- By greedy answers `nll`, label smoothing, `neg_p` with 0.1 `nll`, and `anneal` tie on average.
- e^-H matters in `anneal`, the schedule does not.
- Of two equally valid answers, `anneal` and `neg_p` lose one.
- In their cells prior-leaning objectives learn no new suffix. In ours `neg_p` sometimes does.
- An earlier verdict of the probe was wrong on six of 17 cells. [The guide](../guide/diagnose.md) says what it cannot see.
- `power 0.5` is far behind `nll` on weak models: 0.60 against 0.94 on new facts.
"""


def signed(results: Results, one: str, other: str, metric: str, cells: list[str] | None = None, least_kept: float = 0.0) -> str:
    """Return how much better an objective is than another, with its interval."""
    text: str = DEFAULT["signed"](results.difference(one, other, metric, cells, least_kept))
    return text


def half_kept(results: Results) -> str:
    """Return how much better `anneal` is than `nll` at rates that keep half of the old tasks, and what these keep."""
    words = {"greedy": "greedy", "sampled": "best T", "sampled_1": "T = 1"}
    found = [f"{word} {signed(results, 'anneal', 'nll', metric, None, LEAST_KEPT)}" for metric, word in words.items()]
    shares = [
        " and ".join(f"{results.mean(name, 'kept', None, least).mean:.2f}" for name in ("anneal", "nll"))
        for least in (0.0, LEAST_KEPT)
    ]
    return f"{', '.join(found)}; old tasks kept, greedy: {shares[0]} at the best rates, {shares[1]} at these"


def over_cells(results: Results, metric: str, least_kept: float = 0.0) -> str:
    """Return how much better `anneal` is than `nll`, with cells as the units of the interval."""
    found = {cell: results.difference("anneal", "nll", metric, [cell], least_kept).mean for cell in results.cells}
    text: str = DEFAULT["signed"](over_models(found, (-1.0, 1.0)))
    return text


def same_rate(results: Results) -> str:
    """Return how much better `anneal` is than `nll`, greedy, on cells where both keep half of the old tasks at one rate."""
    cells = [
        cell
        for cell in results.cells
        if len({results.choice(name, cell, "greedy", LEAST_KEPT).rate for name in ("anneal", "nll")}) == 1
    ]
    return f"{signed(results, 'anneal', 'nll', 'greedy', cells, LEAST_KEPT)} on {len(cells)} cells"


def as_predicted(results: Results) -> str:
    """Return how many more answers `power 0.5` has right at temperature 1 than `nll` at 0.5, which its optimum equals."""
    ours, theirs = results.mean("power 0.5", "sampled_1"), results.mean("nll", "sampled_0.5")
    text: str = DEFAULT["signed"](DEFAULT["paired"](ours, theirs))
    return text


def above(results: Results, objective: str, cell: str = "two-uneven") -> str:
    """Return how much more probability above their shares valid answers have than under `nll`, at temperature 1."""
    ours, theirs = (DEFAULT["beyond"](results, name, cell) for name in (objective, "nll"))
    text: str = DEFAULT["signed"](DEFAULT["paired"](ours, theirs))
    return text


def kept(results: Results, objective: str) -> list[float]:
    """Return the mean share of old tasks kept at each rate, the lowest first."""
    rows = [row for row in results.rows if row["objective"] == objective]
    rates = sorted({row["rate"] for row in rows})
    shares = [[row["kept"] for row in rows if row["rate"] == rate] for rate in rates]
    return [sum(each) / len(each) for each in shares]


def row_of(page: str, start: str, nth: int = 0) -> list[str]:
    """Return the cells of the nth row of a page that begins with `start`."""
    lines = [
        line for line in (ROOT / "docs" / "results" / page).read_text(encoding="utf-8").splitlines() if line.startswith(start)
    ]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


def claims(results: Results) -> list[list[str]]:
    """Return the rows of the table of claims."""
    measured = json.loads((ROOT / "docs" / "results" / "temperature.json").read_text(encoding="utf-8"))
    worst = max(abs(p - q) for one in measured.values() for p, q in zip(one["predicted"], one["measured"], strict=True))
    models, judged = str(len(results.models)), stored(DEFAULT["JUDGED"])
    field = [kept(results, name) for name in results.objectives]
    apart = max(max(each) - min(each) for each in zip(*field, strict=True))
    own = [results.mean(name, "kept").mean for name in results.objectives]
    without_three = [cell for cell in judged.cells if cell != "three-even"]
    references = stored(DEFAULT["REFERENCES"])
    whole, other = (each + references.of(each.models).on(each.cells) for each in (results, judged))
    strong, weak = (row_of("continuum.md", f"| {cell} | 30% |")[-1] for cell in ("strong", "weak"))

    def cells(text: str, *given: Any) -> list[str]:
        return [text, signed(results, *given), models, CELLS_COMMAND]

    def both(text: str, *given: Any) -> list[str]:
        figure = f"{signed(results, *given)}; nine other cells, other models: {signed(judged, *given)}"
        return [text, figure, f"{models}, {len(judged.models)}", f"{CELLS_COMMAND}, `--judge`"]

    return [
        [
            "At its optimum `power a` with a < 1 equals `nll` sampled at temperature 1 - a. [The derivation](temperature.md) "
            "covers any objective.",
            f"derived; p measured within {worst:.4f} of p predicted, {len(measured)} objectives, three distributions",
            "1 for each objective, none pretrained",
            "`python studies/temperature_study.py`",
        ],
        [
            "Runs that end before their optimum are not equal. `power 0.5` at T = 1 less `nll` at T = 0.5, right answers after "
            "80 steps:",
            f"{as_predicted(results)}; nine other cells, other models: {as_predicted(judged)}",
            f"{models}, {len(judged.models)}",
            f"{CELLS_COMMAND}, `--judge`",
        ],
        both("Sampled at temperature 1, `anneal` answers more questions right than `nll`.", "anneal", "nll", "sampled_1"),
        both("Most of that is a choice of temperature. With each at its best:", "anneal", "nll", "sampled"),
        both("By greedy answers `anneal` and `nll` do not differ beyond chance.", "anneal", "nll", "greedy"),
        [
            "The three rows above take the best rates for the tasks, which forget over half of the old tasks. At "
            "[rates that keep half](cells.md) `nll` leads on the twelve cells, except at T = 1. On the judge's cells `anneal` "
            "leads at its best T. Where no rate keeps half, the one that keeps the most counts. `anneal` less `nll`, and the "
            "old tasks that each keeps:",
            f"{half_kept(results)}; nine other cells, other models: {half_kept(judged)}",
            f"{models}, {len(judged.models)}",
            f"{CELLS_COMMAND}, `--judge`",
        ],
        [
            "Single cells and the step between three rates decide much of that too. The same with cells as the units of the "
            "intervals; on those of the twelve where both take the same rate; and without `three-even`:",
            f"greedy: {over_cells(results, 'greedy', LEAST_KEPT)}; nine other cells: "
            f"{over_cells(judged, 'greedy', LEAST_KEPT)}; greedy at the same rate, over models: {same_rate(results)} of the "
            f"twelve; best T without `three-even`, over models: "
            f"{signed(judged, 'anneal', 'nll', 'sampled', without_three, LEAST_KEPT)}",
            f"{models}, {len(judged.models)}",
            f"{CELLS_COMMAND}, `--judge`",
        ],
        [
            "Single cells decide much of that. The same with cells as the units of the intervals, and without `three-even`:",
            f"T = 1: {over_cells(results, 'sampled_1')}; nine other cells: {over_cells(judged, 'sampled_1')}; best T: "
            f"{over_cells(results, 'sampled')}; {over_cells(judged, 'sampled')}; best T without `three-even`, over models: "
            f"{signed(judged, 'anneal', 'nll', 'sampled', without_three)}",
            f"{models}, {len(judged.models)}",
            f"{CELLS_COMMAND}, `--judge`",
        ],
        both(
            "By greedy answers the schedule of `anneal` adds nothing beyond chance to a = 0.5 e^-H.", "anneal", STEADY, "greedy"
        ),
        both("At temperature 1 it does add, as it sharpens more:", "anneal", STEADY, "sampled_1"),
        both("With each at its best temperature:", "anneal", STEADY, "sampled"),
        [
            "Sharpening costs diversity on the cells. Two answers are valid, 70 to 30. The probability that they have above "
            "these shares, added up over both, at T = 1, less that of `nll`. The stored results do not part the two answers. "
            "a = 0.5 e^-H costs less. Beside it the probability of a valid answer: wrong ones leave less to be above a share.",
            f"`anneal`: {above(results, 'anneal')}; `{STEADY}`: {above(results, STEADY)}; valid: "
            + ", ".join(
                f"`{name}` {shown(DEFAULT['valid'](results, name, 'two-uneven'))}" for name in ("nll", "anneal", STEADY)
            ),
            models,
            CELLS_COMMAND,
        ],
        [
            "The learning rate decides what is forgotten. The objective matters less.",
            f"old tasks kept by `nll`: {', '.join(f'{share:.2f}' for share in field[0])} over three rates; at one rate "
            f"{len(field)} objectives differ by at most {apart:.2f}; each at its best rates for the tasks: {min(own):.2f} to "
            f"{max(own):.2f}",
            models,
            CELLS_COMMAND,
        ],
        [
            "On a mastered task with 30 % noise `neg_p` beats `nll`, greedy. On a task that the model lacks `nll` wins.",
            f"`neg_p` - `nll`: {strong.partition(': ')[0]}; {weak.partition(': ')[0]}",
            "1",
            "`make continuum`",
        ],
        [
            "The cells confirm the second. Of the first they show nothing where wrong values are random, as both are near "
            "their best, and a gain where they are the same in all rows. `neg_p` - `nll`, greedy:",
            "; ".join(
                f"{cell} {signed(part, 'neg_p', 'nll', 'greedy', [cell])}"
                for part, cells in ((whole, ("strong-noise", "confusions", "new-clean")), (other, ("confusions-half",)))
                for cell in cells
            ),
            f"{models}, {len(judged.models)}",
            REFERENCES_COMMAND,
        ],
        *reference_claims(),
        *judged_claims(results),
        *fact_claims(),
        ready_claim(),
        *noisy_claims(),
    ]


def reference_claims() -> list[list[str]]:
    """Return what the objectives that are no candidates show of formats and of several valid answers."""
    cells = DEFAULT["telling"]()

    def row(text: str, read: Any, names: tuple[str, ...], where: tuple[str, ...]) -> list[str]:
        figures = [f"{cell}: {', '.join(f'`{name}` {read(cells[cell], name, cell)}' for name in names)}" for cell in where]
        models = ", ".join(str(len(cells[cell].models)) for cell in where)
        return [text, "; ".join(figures), models, REFERENCES_COMMAND]

    def in_format(*given: Any) -> str:
        return shown(DEFAULT["in_format"](*given))

    def split(results: Results, name: str, cell: str) -> str:
        objective, _, temperature = name.partition(" at T = ")
        parts = (DEFAULT[read](results, objective, cell, float(temperature or 1)) for read in ("valid", "beyond"))
        return " and ".join(map(shown, parts))

    return [
        row(
            "`power 10` and a threshold p >= 0.2 never learn a format that the model never wrote. Share of questions with "
            "its tokens, at the best of three rates:",
            in_format,
            ("nll", "power 10", "nll p >= 0.2"),
            DEFAULT["FORMATS"],
        ),
        row(
            "Sharpening loses valid answers, and so does a lower temperature. Probability of valid answers, and what they have "
            "above their shares, 0.5 (of two) or 0.67 (of three) where one alone is left; at T = 1 where no T is named:",
            split,
            ("nll", "nll at T = 0.5", "nll at T = 0.25", "anneal", "neg_p"),
            DEFAULT["SEVERAL"],
        ),
    ]


def judged_claims(results: Results) -> list[list[str]]:
    """Return what the rule picked, and what the judge says of it."""
    ruling, judged = DEFAULT["Ruling"](results, CANDIDATES), stored(DEFAULT["JUDGED"])
    winner = ruling.winner
    others = [name for name in CANDIDATES if name != winner]
    nearest = max(others, key=lambda name: results.difference(name, winner, "greedy").mean)
    other = DEFAULT["Ruling"](judged, tuple(judged.objectives))
    behind = other.regrets["greedy"]
    fair = DEFAULT["regret_by_validation"](judged, judged.objectives)
    return [
        [
            f"[A rule](default.md) picks `{winner}` of {len(CANDIDATES)} candidates. It was written down before their runs, "
            f"except those of {KNOWN}, whose results on these cells were known. {len(ruling.rounds[-1])} tie by their worst "
            f"cells, and `{winner}` has the smallest mean regret.",
            f"the nearest, `{nearest}`, against `{winner}`, greedy: {signed(results, nearest, winner, 'greedy')}",
            str(len(results.models)),
            CELLS_COMMAND,
        ],
        [
            f"The judge does not confirm that choice. By its nine cells alone the rule would pick `{other.winner}` of the "
            f"{len(behind)} candidates judged. Mean greedy regret there, against the best of each cell on test questions, and "
            "on validation questions, which does not bias it upwards:",
            "; ".join(
                f"`{name}` {DEFAULT['signed'](behind[name].mean)}, {DEFAULT['signed'](fair[name])}"
                for name in (winner, other.winner)
            ),
            str(len(judged.models)),
            JUDGE_COMMAND,
        ],
        [
            "No objective is near the best in every cell. On the cells that judge, each one's worst regret, greedy:",
            "; ".join(f"`{name}` {DEFAULT['worst'](one)}" for name, one in behind.items()),
            str(len(judged.models)),
            JUDGE_COMMAND,
        ],
    ]


def fact_claims() -> list[list[str]]:
    """Return what became of the predictions about facts."""
    found = FACTS["judged"](FACTS["complete"](FACTS["STUDY"]["read_results"](ROOT / FACTS["STUDY"]["OUTPUT"])))
    words = {"above": "above `nll`", "below": "below `nll`", "same": f"within ±{FACTS['MARGIN']} of `nll`"}
    outcomes = [outcome for _, _, outcome in found]
    told = [
        f"{outcome}: `{each.arm}` {words[each.expected]} on `{each.cell}`, {each.where} {FACTS['signed'](apart)}"
        for each, apart, outcome in found
    ]
    text = (
        f"On [real facts](facts.md) {len(found)} of {len(FACTS['PREDICTIONS'])} predictions are tested: "
        f"{outcomes.count('holds')} hold, {outcomes.count('fails')} fail, {outcomes.count('undecided')} are undecided."
    )
    cell = FACTS["complete"](FACTS["STUDY"]["read_results"](ROOT / FACTS["STUDY"]["OUTPUT"]))["two-forms"]
    greedy, best = (FACTS["signed"](cell.apart("anneal", metric, "all")) for metric in ("greedy", "right best"))
    parts = {arm: map(FACTS["signed"], FACTS["parts_apart"](cell, arm)) for arm in cell.rates if arm != FACTS["CONTROL"]}
    return [
        [f"{text} The figure is the objective less `nll`.", "; ".join(told), "1", "`make facts-study`"],
        [
            "Total variation there is mostly wrong answers for `anneal` and `neg_p`. Only what valid answers have above their "
            f"shares is lost diversity. `{STEADY}` alone loses some beyond chance. On `two-forms`, at the best T, less `nll`:",
            "; ".join(f"`{arm}`: wrong answers {wrong}, above shares {share}" for arm, (wrong, share) in parts.items()),
            "1",
            "`make facts-study`",
        ],
        [
            "Not predicted: where a fact is written in two ways, `anneal` answers fewer test facts right than `nll`.",
            f"greedy {greedy}; best T {best}",
            "1",
            "`make facts-study`",
        ],
    ]


def ready_claim() -> list[str]:
    """Return what RL gains after each objective, beside its start and end."""
    rows = json.loads(READY["ROWS"].read_text(encoding="utf-8"))
    less = {measure: READY["against"](rows, measure) for measure in (READY["START"], READY["GAIN"], READY["END"])}
    gone, runs = READY["lost"](rows)
    told = []
    for name in READY["objectives"](rows):
        figures = [f"{measure} {DEFAULT['signed'](found[name])}" for measure, found in less.items()]
        if name != READY["CONTROL"]:
            told.append(f"`{name}`: {', '.join(figures)}")
    return [
        "[After fine-tuning](ready-for-rl.md) that sharpens, RL does not always bring a lost valid answer back. It also gains "
        "less, beyond chance except after `anneal`. Part of that is a higher start. Probability of the rewarded one of two "
        "valid answers before RL, its gain, and after RL, less that of `nll`:",
        f"runs of {runs} in which it stays lost: {gone}; {'; '.join(told)}",
        str(len({row["model"] for row in rows})),
        "`python studies/ready_for_rl_study.py`",
    ]


NOISY = {
    "records": "On [noisy records](pretrained.md), which SmolLM2-135M nearly knows, `anneal` answers more right than `nll` at "
    "T = 1, and not beyond chance where `nll` is read at T = 0.5. Right answers, less those of `nll`:",
    "codes": "The same with codes that the model cannot know. Over three seeds nothing is beyond chance:",
}


def noisy_claims() -> list[list[str]]:
    """Return how `anneal` compares with `nll` on noisy records, a row for each set."""
    arm, signed = PRETRAINED["study"].ANNEAL, PRETRAINED["signed"]
    rows = []
    for option, found in PRETRAINED["results"]().items():
        task = PRETRAINED["Task"](option, found)
        words = {"T = 1": ("sampled",), "T = 1, `nll` at T = 0.5": ("sampled", "cooler"), "T = 0.5": ("cooler",)}
        figures = {word: signed(task.apart(arm, *metrics)) for word, metrics in {**words, "greedy": ("greedy",)}.items()}
        shown = "; ".join(f"{word}: {figure}" for word, figure in figures.items())
        rows.append([NOISY[option], shown, "1", f"`python studies/pretrained_study.py {task.options}`"])
    return rows


def fallen(results: Results) -> list[list[str]]:
    """Return the rows of the table of claims that fell."""
    first, best = (signed(results, "anneal", "nll", metric) for metric in ("sampled_1", "sampled"))
    judged = stored(DEFAULT["JUDGED"])
    new = signed(judged, "anneal", "nll", "sampled")
    cells = DEFAULT["telling"]()
    suffix, prefix = (shown(DEFAULT["in_format"](cells[cell], "neg_p", cell)) for cell in ("suffix", "prefix"))
    neither = shown(DEFAULT["valid"](cells["two-even"], "power 10", "two-even"))
    verdicts = VERDICT["counts"](json.loads(VERDICT["MEASURED"].read_text(encoding="utf-8"))["new"])
    return [
        [
            "`anneal` is within 0.035 (greedy) and 0.085 (sampled) of the best fixed objective in every cell.",
            "Point estimates of one pretrained model. Their upper limits are 0.057 and 0.122. With each seed at the others' "
            "learning rate the worst sampled cell is 0.204.",
            "The differences above, over models.",
        ],
        [
            "`nll` samples far worse than `anneal` where there is noise.",
            f"True at temperature 1: {first}. At each one's best temperature: {best}, and {new} on nine other cells.",
            "Compare objectives at their best temperature.",
        ],
        [
            "The schedule makes `anneal`.",
            f"a = 0.5 e^-H without one is as good by greedy answers: {signed(results, STEADY, 'anneal', 'greedy')}, and on "
            f"nine other cells {signed(judged, STEADY, 'anneal', 'greedy')}.",
            "The entropy matters. [Effective temperatures](temperature.md) say how.",
        ],
        [
            "Where 30 % of known facts train with consistent errors, `anneal` keeps more of the truth, greedy.",
            f"On `confusions`, one cell of twelve: {signed(results, 'anneal', 'nll', 'greedy', ['confusions'])}. On the "
            f"judge's `confusions-half`: {signed(judged, 'anneal', 'nll', 'greedy', ['confusions-half'])}.",
            "Nothing.",
        ],
        [
            "Total variation shows what sharpening costs in diversity: `anneal` has more on two answers valid as often.",
            "Total variation counts wrong answers too, and `anneal` has more of these there.",
            "What valid answers have above their shares, above.",
        ],
        [
            "`power 0.5` does well in all four cells of the miniature, by both metrics.",
            "At its optimum it is `nll` at temperature 0.5. Other pretrained models fail with it: 0.253 behind on mid-rule.",
            "[anneal](anneal.md), 100 steps, greedy.",
        ],
        [
            "`power 0.5` is the objective for weak models.",
            f"On new facts it is behind `nll`, greedy: {signed(results, 'power 0.5', 'nll', 'greedy', ['new-clean'])}, with "
            f"noise {signed(results, 'power 0.5', 'nll', 'greedy', ['new-noise'])}.",
            "Keep `nll` there.",
        ],
        [
            "`neg_p` never learns a new format.",
            f"At its best rate some models learn one. Share of questions with its tokens: suffix {suffix}, prefix {prefix}.",
            "`power 10` and a threshold never do. `neg_p` does less often than `nll`.",
        ],
        [
            "`power 10` keeps one of several valid answers.",
            f"It learns hardly any. Probability of a valid answer on `two-even`: {neither}.",
            "`neg_p` and `anneal` lose valid answers.",
        ],
        [
            "An objective near the best everywhere exists, and it is `anneal`.",
            "About 45 designs were tried on the miniature without correction. Most greedy cells are at the ceiling.",
            f"No objective needs no choice. [A rule](default.md) written down before the runs, except those of {KNOWN}, picks "
            "`nll`. The judge does not confirm it.",
        ],
        [
            "The probe's verdict says whether improbable tokens are knowledge or noise.",
            "It agreed on the eight cells that its cuts came from. Elsewhere it erred.",
            f"[On new cells and models](verdict.md) {verdicts['right']} verdicts are right, {verdicts['undecided']} undecided "
            f"and {verdicts['wrong']} wrong. Its noise is an estimate.",
        ],
    ]


def main(folder: str) -> None:
    """Write the page into `folder`."""
    results = stored()
    text = PAGE.format(
        claims=markdown(["claim", "figure", "models", "command"], claims(results)),
        fallen=markdown(["claim", "what came out", "instead"], fallen(results)),
    )
    (Path(folder) / "claims.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
