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

`python studies/verdict_study.py` judges the [learnability probe](../guide/diagnose.md#knowledge-or-noise) on {cells} cells
of {models} small pretrained models. Their noise and knowledge are known. {clean} cells are clean. In {noisy}, 30 % of the
answers have random letters. Some of the cells are those of [`bl-trainer score`](../guide/score.md).

All weights of a model train, at one learning rate, in place of the LoRA adapter of `diagnose`. The measurement and the verdict
are the probe's own functions. The cuts were chosen on these cells of small-0 and large-1. They were not changed after the other
models ran. No cell is new to the cuts.

{table}

Each figure is the mean over models, as a share of the content's tokens. *Improbable, not random* counts as knowledge: values of
`confusions` too, which are wrong in the same way in all rows.
*Random letters* is the noise. *Predictable*, *at most noise* and *contradicted* are what the probe says.

- **{right} right, {undecided} undecided, {wrong} wrong** of {count} verdicts.{mistakes}
- On models that no cut was chosen on: {fresh_wrong} wrong of {fresh_count}.
- **Clean cells with more than {flagged:.0%} noise**: {contradicted} of {of_clean} by what rows contradict, {bound} of
  {of_clean} by the upper bound.
- **Noisy cells found noisy**: {found} of {of_noisy}. The others are undecided. In three of these cells no two rows have the
  same question, so nothing but training can tell.

A verdict is wrong in these cases:

- `noise` or `both` where there is less than {some_noise:g} noise.
- `knowledge` or `little` where there is {noise:g} noise or more.
- `knowledge` or `both` where less than {some:g} is improbable and not random.
- `noise` where {learnable:g} or more is improbable and not random, `little` where {some:g} or more is.

`undecided` is never wrong.

## What the probe can't see

- **Consistent errors.** `confusions` trains with values that are always wrong. They count as knowledge.
- **Rare valid answers.** Where many rows have the same context, an answer in fewer than a quarter of them counts as noise.
- **Facts that one row alone states.** No other row predicts them, so they stay within the upper bound.
"""


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


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each cell."""
    lines = ["| cell | random letters | improbable, not random | predictable | at most noise | contradicted | verdicts |"]
    lines.append("|---|" + "---|" * 6)
    for cell in dict.fromkeys(row["cell"] for row in rows):
        own = [row for row in rows if row["cell"] == cell]
        true = [_mean(row["true"][key] for row in own) for key in ("noise", "knowledge")]
        said = [_mean(row[key] for row in own) for key in ("learnable", "noise", "contradicted")]
        verdicts = Counter(row["verdict"] for row in own).most_common()
        lines.append(
            f"| {cell} | {' | '.join(true + said)} | {', '.join(f'{verdict} {count}' for verdict, count in verdicts)} |"
        )
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.fmean(values):.2f}"


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page."""
    noisy = [row for row in rows if row["cell"].endswith("noise")]
    clean = [row for row in rows if row not in noisy]
    wrong = [row for row in rows if is_wrong(row)]
    undecided = sum(row["verdict"] == "undecided" for row in rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    said = Counter(f"`{row['verdict']}` on {row['cell']}" for row in wrong)
    return PAGE.format(
        cells=len({row["cell"] for row in rows}),
        models=len(models),
        clean=len({row["cell"] for row in clean}),
        noisy=len({row["cell"] for row in noisy}),
        fresh_wrong=sum(row["model"] not in CHOSEN_ON for row in wrong),
        fresh_count=sum(row["model"] not in CHOSEN_ON for row in rows),
        table=table(rows),
        right=len(rows) - undecided - len(wrong),
        undecided=undecided,
        wrong=len(wrong),
        count=len(rows),
        mistakes="".join(f" Wrong: {what}, {count} times." for what, count in said.items()),
        flagged=FLAGGED,
        contradicted=sum(row["contradicted"] > FLAGGED for row in clean),
        bound=sum(row["noise"] > FLAGGED for row in clean),
        of_clean=len(clean),
        of_noisy=len(noisy),
        found=sum(row["verdict"] in ("noise", "both") for row in noisy),
        noise=NOISE,
        some_noise=CONTRADICTED,
        some=SOME,
        learnable=LEARNABLE,
    )


def main(folder: str) -> None:
    """Write the page into `folder`."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))
    (Path(folder) / "verdict.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
