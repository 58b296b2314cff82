"""Write docs/results/ready-for-rl.md: `python tools/ready_page.py [docs/results]`."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bl_trainer.cells.page import markdown, shown
from bl_trainer.cells.results import Mean, over_models

ROOT = Path(__file__).parents[1]
SIGNED: Callable[[Mean], str] = runpy.run_path(str(ROOT / "tools" / "default_page.py"))["signed"]
ROWS = ROOT / "docs" / "results" / "ready-for-rl.json"
CONTROL, COLLAPSED = "nll", 0.01  # below this probability a form counts as lost
PAGE = """# Ready for RL?

<!-- Written by tools/ready_page.py (`make figures`) from ready-for-rl.json. -->

> **Question.** Sharpening in fine-tuning removes valid answers. Does that cost what reinforcement learning gains afterwards?
>
> **Answer.** Not here. `anneal` leaves fewer groups with a signal, and after 200 steps both are at the same end. Whether it
> costs time was not measured.

`python studies/ready_for_rl_study.py` fine-tunes {models} pretrained models on a question with two valid forms,
half of the rows each. Then REINFORCE rewards one form alone, once for either form: {steps} steps of {batch} questions, {group}
answers each at temperature 1, learning rate {rate:g}. The models are those that [judge](default.md). Other models chose the
learning rate of fine-tuning. All figures are exact probabilities on test questions.

{table}

- *Signal*: probability that a group of {group} answers has both a rewarded and an unrewarded one. Without it, REINFORCE has no
  gradient.
- *Lost*: share of runs in which the rewarded form has a probability below {collapsed:g}.
- *Against `{control}`*: difference after RL, paired by model. Above 0 is better. A model's figure is the mean of its two runs.
- Intervals are 95 %, over models, and not corrected for the number of objectives.

It is one task, one form of reward, one length of RL and one learning rate, on models of 0.06M and 0.1M parameters.
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Return a row for each objective."""
    lines = []
    for name in dict.fromkeys(row["objective"] for row in rows):
        own = [row for row in rows if row["objective"] == name]
        before, signal, after = (
            by_model(own, *key) for key in (("before", "rewarded"), ("before", "signal"), ("after", "rewarded"))
        )
        control = by_model([row for row in rows if row["objective"] == CONTROL], "after", "rewarded")
        apart = over_models({model: after[model] - control[model] for model in control}, (-1.0, 1.0))
        lost = [sum(row[moment]["rewarded"] < COLLAPSED for row in own) / len(own) for moment in ("before", "after")]
        means = (shown(over_models(each, (0.0, 1.0))) for each in (before, signal, after))
        lines.append([f"`{name}`", *means, f"{lost[0]:.2f}, {lost[1]:.2f}", "" if name == CONTROL else SIGNED(apart)])
    header = [
        "fine-tuned by",
        "rewarded form before RL",
        "signal before RL",
        "rewarded form after RL",
        "lost: before, after RL",
    ]
    return markdown([*header, f"against `{CONTROL}`"], lines)


def by_model(rows: list[dict[str, Any]], moment: str, metric: str) -> dict[str, float]:
    """Return the mean over forms for each model."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row[moment][metric])
    return {model: sum(values) / len(values) for model, values in found.items()}


def main(folder: str) -> None:
    """Write the page into `folder`."""
    study = runpy.run_path(str(ROOT / "studies" / "ready_for_rl_study.py"))
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    text = PAGE.format(
        models=len({row["model"] for row in rows}),
        group=study["GROUP"],
        steps=study["RL"].steps,
        batch=study["RL"].batch,
        rate=study["RATE"],
        table=table(rows),
        collapsed=COLLAPSED,
        control=CONTROL,
    )
    (Path(folder) / "ready-for-rl.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
