"""Write docs/results/noise-rows.md from the two files beside it: `python tools/noise_rows_page.py [docs/results]`."""

import json
import math
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

from bl_trainer._util.intervals import t_quantile

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SECTION: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("noise_rows_section.py")))
FILES = ("noise_rows.json", "noise_rows_help.json")
CHOSEN = "lesser gap, worst token"
TINY = {"tiny-half": "half knows these tasks", "tiny-strong": "nearly knows these tasks"}
OTHER = "SmolLM2-135M-Instruct"
MODELS = (*TINY, OTHER)
SETS = {
    "a new rule 20 %": "new rule",
    "records 10 %": "records 10 %",
    "records 30 %": "records 30 %",
    "final numbers 20 %": "final numbers",
    "swapped answers 20 %": "swapped",
    "reasoning-gym chain_sum 20 %": "chain_sum",
    "records 20 %, hard rows 10 %": "hard rows",
    "consistent mistakes 20 %": "consistent",
    "GSM8K final numbers 20 %": "GSM8K final numbers",
    "GSM8K swapped answers 20 %": "GSM8K swapped",
}
HARD = {"rare": "rare names", "long": "longer answers", "fact": "facts told once"}
LARGER = """ `{name}` is a pretrained model of 135M parameters, at the
  quickstart's learning rate, 3e-4: `--models PATH --dtype bfloat16 --seeds {seeds} --sets {sets}`."""
GSM8K = {"GSM8K final numbers 20 %": "wrong final numbers", "GSM8K swapped answers 20 %": "swapped answers"}
PAGE = """# Which score finds wrong rows

<!-- Written by tools/noise_rows_page.py (`make figures`). -->

`python studies/noise_rows.py` makes training sets whose wrong rows are known, and asks which score puts them on top. It adds
to the results the models, sets and seeds that they lack. The
score of [`--noise_steps`](../guide/rows.md) is **{chosen}**. Over the sets that several seeds have judged, its AUROC averages
{own}. The others with the highest averages are {others}.

## What was run

- **Models**: {models}. Each is a Llama of 0.18M parameters with a vocabulary of words and digits. It was pretrained on
  right rows of these tasks, except the new rule: 200 steps for the first, 900 for the second.{larger}
- **Data**: 240 rows per set. Number of seeds: {seeds}. Each seed makes new rows and adapters.
- **Cross-fitting**: two LoRA adapters of rank 16 train 80 steps of 8 rows by `nll`. The tiny models train at learning rate
  1e-3. Of 1e-3, 3e-3 and 1e-2 this rate has the lowest cross-fitted loss on three sets of another seed.
- **Development**: the candidates were developed on seeds 0 and 1, which are not among the results. The gaps, the lesser of
  two and the set of the new rule were added there. The final choice between "lesser gap" and "lesser loss" was made on the
  first of the seeds below.

| set | what is wrong |
|---|---|
| new rule | each job has a number that the data alone teach; 20 % have another one |
| records | the quickstart's task; 10 or 30 % have the age and the city of nobody in particular |
| final numbers | a worked sum; 20 % end with another final number |
| swapped | a worked sum; 20 % have the answer to another problem |
| chain_sum | reasoning-gym's `chain_sum` of two terms; 20 % have another number |
| hard rows | records, 20 % wrong, and 10 % right but hard: rare names, longer answers, facts told once |
| consistent | records; those of two jobs in ten have the city changed by one rule |
| GSM8K final numbers | problems of GSM8K with short answers; 20 % end with another number, up to 20 away, perhaps negative |
| GSM8K swapped | the same; 20 % have the answer to another problem |

A loss is the mean over a row's target tokens. A gap is log p of the most probable other token less log p of the target, at
least 0. "Worst token" takes the largest of the row. "Lesser" takes per token the smaller one of base model and cross-fitted
adapter.

## AUROC

The probability that a wrong row scores higher than a right one, with 95 % intervals over seeds. 0.5 is chance.

{auroc}

## Precision at k

The share of wrong rows among the k highest scores. k is the number of wrong rows.

{precision}

## Hard but right rows

The share of hard rows that are among the k highest scores. A good score flags few.

{hard}

{helps}
## Reading

What is not said of `SmolLM2-135M-Instruct` is of the tiny models.

- **Where the model knows the task, its own loss is enough.** On the new rule the base model is at chance, and cross-fitting
  finds the wrong rows. The lesser of both does well on either side.
- **"Lesser gap" and "lesser loss" are equally good on average**, within the intervals. The hard rows decided: the mean loss of
  a row depends on its length and form, and flags every rare name, longer answer and fact. The gap of the worst token flags few
  facts told once, but still most rare names and longer answers.
- **Wrong sums stay hidden from a model that cannot add.** On `chain_sum` no score has an average above {sums} with
  `tiny-half`.
- **Consistent mistakes** are found here because these models know the right rule, and 80 steps teach too little of the
  wrong one. A model that does not know the right rule has nothing to compare with. This study has no such case.
{larger_reads}{gsm8k}
## What did not work

- **Loss gained over the base model**, in sample or cross-fitted, as Rho-1's excess loss with the adapter as its reference.
  It is below chance wherever the model knows the task. Wrong rows begin with a high loss and have the most to gain, as
  training on noise makes the model less sure.
- **The probe's control, averaged per row.** It is near chance. Its sign per token is meant for thousands of tokens, not for
  a row's few.
- **Improbable tokens that stay improbable.** A row's count takes few values.
- **Area under the margin.** It needs every row to train, which a probe of 80 steps does not do on larger sets. With the tiny
  models it is best among hard rows, and no better elsewhere.
- **IFD.** It costs another pass, and is near the base model's loss on most sets. On the swapped answers of GSM8K it is best.
"""
BASE, RIVALS = "base loss", ("lesser loss", "cross-fitted loss", "base loss", "IFD")


def main(folder: str) -> None:
    """Write the page into `folder`."""
    cells, helps = (json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in FILES)
    (Path(folder) / "noise-rows.md").write_text(page(cells, SECTION["section"](helps)), encoding="utf-8")


def page(cells: dict[str, Any], helps: str) -> str:
    """Return the page. `cells`: the study's, by `model | set | seed`. `helps`: the section on whether the score helps."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        model, name, _ = key.split(" | ")
        found.setdefault((model, name), []).append(cell)
    scores = list(next(iter(cells.values()))["scores"])
    averages = {score: average(found, score) for score in scores}
    counts = {model: sorted({len(each) for key, each in found.items() if key[0] == model}) for model in MODELS}
    hidden = found.get(("tiny-half", "reasoning-gym chain_sum 20 %"), [])
    sums = [statistics.mean(cell["scores"][score]["auroc"] for cell in hidden) for score in scores]
    return PAGE.format(
        chosen=CHOSEN,
        own=f"{averages[CHOSEN]:.3f}",
        others=runners(averages),
        models=", and ".join(f"`{model}`, which {what}" for model, what in TINY.items() if counts[model]),
        larger=LARGER.format(
            name=OTHER, seeds=max(counts[OTHER]), sets=" ".join(f"'{name}'" for name in SETS if (OTHER, name) in found)
        )
        if counts[OTHER]
        else "",
        seeds=", ".join(f"{' or '.join(map(str, each))} of `{model}`" for model, each in counts.items() if each),
        auroc=tables(found, scores, "auroc"),
        precision=tables(found, scores, "precision"),
        hard=hard(found, scores),
        helps=helps,
        larger_reads=of_larger({name: each[0]["scores"] for (model, name), each in found.items() if model == OTHER}),
        gsm8k=of_gsm8k({what: found[OTHER, name] for name, what in GSM8K.items() if (OTHER, name) in found}),
        sums=f"{math.ceil(100 * max(sums)) / 100:.2f}",
    )


def of_larger(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the lines on OTHER. `found`: set -> score -> what it comes to."""
    if not found:
        return ""
    means = {name: statistics.mean(scores[name]["auroc"] for scores in found.values()) for name in (CHOSEN, *RIVALS)}
    rivals = ", ".join(f"{name} {means[name]:.2f}" for name in RIVALS)
    behind = [SETS[name] for name, scores in found.items() if scores[CHOSEN]["auroc"] < scores[BASE]["auroc"]]
    return (
        f"- **`{OTHER}`**, one seed: over {len(found)} sets the score's AUROC averages {means[CHOSEN]:.2f}; {rivals}. One seed "
        "does not\n  rank these. "
        f"{BASE.capitalize()} alone, without any training, is better on: {', '.join(behind)}.\n"
    )


def of_gsm8k(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the lines on GSM8K. `found`: what is wrong -> its cells."""
    lines = []
    for what, cells in found.items():
        values = {score: statistics.mean(cell["scores"][score]["auroc"] for cell in cells) for score in cells[0]["scores"]}
        best = max(values, key=lambda score: values[score])
        lines.append(f"- **{what.capitalize()} of GSM8K**, `{OTHER}`, one seed: AUROC {values[CHOSEN]:.2f}.\n")
        lines.append(f"  The best score there is {best}, {values[best]:.2f}.\n")
    return "".join(lines)


def average(found: dict[Any, list[dict[str, Any]]], score: str) -> float:
    judged = [cells for cells in found.values() if len(cells) > 1]
    return statistics.mean(statistics.mean(cell["scores"][score]["auroc"] for cell in cells) for cells in judged)


def runners(averages: dict[str, float]) -> str:
    others = sorted((score for score in averages if score != CHOSEN), key=lambda score: -averages[score])[:2]
    return " and ".join(f"{score} ({averages[score]:.3f})" for score in others)


def tables(found: dict[Any, list[dict[str, Any]]], scores: list[str], what: str) -> str:
    """Return a table per model: a row for each score, a column for each set."""
    parts = []
    for model in [each for each in MODELS if any(key[0] == each for key in found)]:
        names = [name for name in SETS if (model, name) in found]
        lines = [f"| `{model}` | {' | '.join(SETS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
        for score in scores:
            values = [spelled([cell["scores"][score][what] for cell in found[model, name]]) for name in names]
            lines.append(f"| {f'**{score}**' if score == CHOSEN else score} | {' | '.join(values)} |")
        p = [f"{statistics.mean(cell['mean_p']['base'] for cell in found[model, name]):.2f}" for name in names]
        parts.append("\n".join([*lines, f"| *mean p of the base model* | {' | '.join(p)} |"]))
    return "\n\n".join(parts)


def spelled(values: list[float]) -> str:
    """Return a mean with its 95 % interval over seeds."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def hard(found: dict[Any, list[dict[str, Any]]], scores: list[str]) -> str:
    keys = [(model, "records 20 %, hard rows 10 %") for model in MODELS]
    keys = [key for key in keys if key in found]
    header = [f"{what}, `{model}`" for model, _ in keys for what in HARD.values()]
    lines = [f"| score | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for score in scores:
        values = [
            f"{statistics.mean(cell['scores'][score][kind] for cell in found[key] if kind in cell['scores'][score]):.2f}"
            for key in keys
            for kind in HARD
        ]
        lines.append(f"| {f'**{score}**' if score == CHOSEN else score} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
