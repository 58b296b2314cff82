"""Write docs/results/verdict.md, how right the probe's verdict is: `python tools/verdict_page.py [docs/results]`.

The figures in docs/results/verdict.json are those of studies/verdict_study.py.
"""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bl_trainer.diagnosis.advice import CONTRADICTED, LEARNABLE, NOISE, SOME

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "verdict.json"
FLAGGED = 0.05
CHOSEN_ON = ("small-0", "large-1")
PAGE = """# How right the probe's verdict is

<!-- Written by tools/verdict_page.py (`make figures`) from verdict.json. -->

`python studies/verdict_study.py` judges the [learnability probe](../guide/diagnose.md#knowledge-or-noise) on small pretrained
models. Their noise and knowledge are known. It has two parts:

| part | cells, clean and noisy | models | right | undecided | wrong |
|---|---|---|---|---|---|
{parts}

- The cuts were chosen on the cells of the first part, with {chosen_on}. They did not change afterwards.
- The second part has new cells and new models. Its cells and the counting rule were written down before its first run. Nothing
  was chosen on it.

All weights of a model train, at one learning rate, in place of the LoRA adapter of `diagnose`. The measurement and the verdict
are the probe's own functions. Some of the first cells are those of [`bl-trainer score`](../guide/score.md). Another
processor pretrains slightly other models, so single verdicts may differ there.

## New cells and models

{new_table}

{new_summary}

## Cells that the cuts were chosen on

{chosen_table}

{chosen_summary}
- On models that no cut was chosen on: {fresh_wrong} wrong of {fresh_count}.

## How to read the tables

Each figure is the mean over models, as a share of the content's tokens.

- *Noise* is what the noise of a cell has written. In most noisy cells that is random letters in some of the rows. In
  `letters-noise` single letters are random. In `same-noise` the wrong value is the same in all noisy rows.
- *Improbable noise* is the part with p < 0.1 under the base model. The probe sees no other.
- *Knowledge* is improbable and not noise. It includes values of `confusions`, which are wrong in the same way in all rows.
- *Predictable*, *not predictable* and *contradicted* are what the probe reports.

A verdict is wrong in these cases:

- `noise` or `both` where there is less than {some_noise:g} noise.
- `knowledge` or `little` where there is {noise:g} noise or more.
- `knowledge` or `both` where there is less than {some:g} knowledge.
- `noise` where there is {learnable:g} knowledge or more, `little` where there is {some:g} or more.

`undecided` is never wrong.

## What is not predictable is no bound

The share that is not predictable estimates the improbable noise. The table counts the verdicts on noisy cells where there is
more noise than that, and than the upper end of its interval.

| | verdicts | noise is more | by more than {flagged:g} | more than the interval's end | at most by | on average by |
|---|---|---|---|---|---|---|
{exceeded}

Training can learn where random letters are likely. For example, it learns the positions of letters among a format's tokens.
There random letters gain more than at their controls, and some pass for predictable. `plain-noise` has
{plain_knowledge:.3f} knowledge, and {plain:.3f} is predictable.

## What the probe can't see

- **Consistent errors.** `confusions` trains with values that are always wrong. They count as knowledge. A wrong value that many
  rows share passes for a valid answer, as in `same-noise`.
- **Rare valid answers.** Where many rows have the same context, an answer in fewer than a quarter of them counts as noise.
- **Facts that one row alone states.** No other row predicts them, so they pass for noise.
- **Noise that the model finds probable.** Only targets with p < 0.1 count.
"""
HEADER = ["cell", "noise", "improbable noise", "knowledge", "predictable", "not predictable", "contradicted", "verdicts"]


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a verdict claims what is not so."""
    noise, knowledge, verdict = row["true"]["noise"], row["true"]["knowledge"], row["verdict"]
    return (
        (verdict in ("noise", "both") and noise < CONTRADICTED)
        or (verdict in ("knowledge", "little") and noise >= NOISE)
        or (verdict in ("knowledge", "both") and knowledge < SOME)
        or (verdict == "noise" and knowledge >= LEARNABLE)
        or (verdict == "little" and knowledge >= SOME)
    )


def is_noisy(row: dict[str, Any]) -> bool:
    """Whether a row's cell has noise."""
    return row["cell"].endswith("noise")


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many verdicts are right, undecided and wrong."""
    wrong = sum(map(is_wrong, rows))
    undecided = sum(row["verdict"] == "undecided" for row in rows)
    return {"right": len(rows) - undecided - wrong, "undecided": undecided, "wrong": wrong}


def _improbable(row: dict[str, Any]) -> float:
    return row["low"] - row["true"]["knowledge"]


def _table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each cell."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        own = [row for row in rows if row["cell"] == cell]
        values = [
            [
                row["true"]["noise"],
                _improbable(row),
                row["true"]["knowledge"],
                *map(row.get, ("learnable", "noise", "contradicted")),
            ]
            for row in own
        ]
        means = [_mean(column) for column in zip(*values, strict=True)]
        verdicts = Counter(row["verdict"] for row in own).most_common()
        said = ", ".join(f"{verdict} {count}" for verdict, count in verdicts)
        lines.append(f"| {cell} | {' | '.join(means)} | {said} |")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.fmean(values) + 0.0:.2f}".replace("-0.00", "0.00")


def _part(name: str, rows: list[dict[str, Any]]) -> str:
    cells = {row["cell"]: is_noisy(row) for row in rows}
    noisy = sum(cells.values())
    return f"| {name} | {len(cells) - noisy} and {noisy} | {_models(rows)} | {' | '.join(map(str, counts(rows).values()))} |"


def _summary(rows: list[dict[str, Any]]) -> str:
    noisy, clean = ([row for row in rows if is_noisy(row) == which] for which in (True, False))
    found = counts(rows)
    wrong = Counter(f"`{row['verdict']}` on {row['cell']}" for row in rows if is_wrong(row))
    return "\n".join(
        [
            f"- **{found['right']} right, {found['undecided']} undecided, {found['wrong']} wrong** of {len(rows)} verdicts.",
            *(f"    - Wrong: {what}, {count} of {_models(rows)} models." for what, count in wrong.most_common()),
            f"- **Clean cells with more than {FLAGGED:.0%} noise**: {sum(row['contradicted'] > FLAGGED for row in clean)} of "
            f"{len(clean)} by what rows contradict, {sum(row['noise'] > FLAGGED for row in clean)} by what is not predictable.",
            f"- **Noisy cells found noisy**: {sum(row['verdict'] in ('noise', 'both') for row in noisy)} of {len(noisy)}. "
            f"Undecided: {counts(noisy)['undecided']}.",
        ]
    )


def _models(rows: list[dict[str, Any]]) -> int:
    return len({row["model"] for row in rows})


def _exceeded(parts: dict[str, list[dict[str, Any]]]) -> str:
    """Return a line for each part and kind of noise: how often and by how much there is more than is not predictable."""
    lines = []
    for name, rows in parts.items():
        noisy = [row for row in rows if is_noisy(row)]
        for kind, of in {"all noise": lambda row: row["true"]["noise"], "improbable noise": _improbable}.items():
            more = [of(row) - row["noise"] for row in noisy]
            numbers = [len(more), sum(each > 0 for each in more), sum(each > FLAGGED for each in more)]
            numbers.append(sum(of(row) > row["noise_high"] for row in noisy))
            most, cell = max(zip(more, (row["cell"] for row in noisy), strict=True))
            shown = f"{' | '.join(map(str, numbers))} | {most:.3f}, {cell} | {statistics.fmean(more):+.3f}"
            lines.append(f"| {name}, {kind} | {shown} |")
    return "\n".join(lines)


def page(stored: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page."""
    chosen, new = stored["chosen"], stored["new"]
    fresh = [row for row in chosen if row["model"] not in CHOSEN_ON]
    plain = [row for row in chosen if row["cell"] == "plain-noise"]
    names = {"first cells": chosen, "new cells": new}
    return PAGE.format(
        parts="\n".join(_part(name, rows) for name, rows in names.items()),
        chosen_on=" and ".join(CHOSEN_ON),
        new_table=_table(new),
        new_summary=_summary(new),
        chosen_table=_table(chosen),
        chosen_summary=_summary(chosen),
        fresh_wrong=sum(map(is_wrong, fresh)),
        fresh_count=len(fresh),
        exceeded=_exceeded(names),
        plain=statistics.fmean(row["learnable"] for row in plain),
        plain_knowledge=statistics.fmean(row["true"]["knowledge"] for row in plain),
        flagged=FLAGGED,
        noise=NOISE,
        some_noise=CONTRADICTED,
        some=SOME,
        learnable=LEARNABLE,
    )


def main(folder: str) -> None:
    """Write the page into `folder`."""
    stored = json.loads(MEASURED.read_text(encoding="utf-8"))
    (Path(folder) / "verdict.md").write_text(page(stored), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
