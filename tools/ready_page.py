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
> **Answer.** {answer}

`python studies/ready_for_rl_study.py` fine-tunes {models} pretrained models on a question with two valid forms,
half of the rows each. Then REINFORCE rewards one form alone, once for either form: {steps} steps of {batch} questions, {group}
answers each at temperature 1, learning rate {rate:g}. The models are those that [judge](default.md). Other models chose the
learning rate of fine-tuning. All figures are exact probabilities on test questions.

Probability of the rewarded form, by the number of REINFORCE steps:

{course}

{table}

- *Valid*: probability of either form.
- *Signal*: probability that a group of {group} answers has both a rewarded and an unrewarded one. Without it, REINFORCE has no
  gradient.
- *Lost*: share of runs in which the rewarded form has a probability below {collapsed:g}.
- *Against `{control}`*: difference in the rewarded form after RL, paired by model. Above 0 is better. A model's figure is the
  mean of its two runs.
- Intervals are 95 %, over models, and not corrected for the number of objectives.

It is one task, one form of reward, one length of RL and one learning rate, on models of 0.06M and 0.1M parameters. Whether a
form is lost hangs on rounding too: on another processor `anneal` lost one run of 16 before RL and none after it.
"""


def course(rows: list[dict[str, Any]]) -> str:
    """Return the rewarded form's probability by step, a row for each objective."""
    moments = list(rows[0]["steps"])
    lines = []
    for name in dict.fromkeys(row["objective"] for row in rows):
        own = [row for row in rows if row["objective"] == name]
        lines.append([f"`{name}`", *(f"{mean(by_model(own, moment, 'rewarded')):.3f}" for moment in moments)])
    return markdown(["fine-tuned by", *moments], lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Return what each objective has before RL, and what is left of it: a row for each."""
    first, *_, last = rows[0]["steps"]
    lines = []
    for name, apart in against(rows).items():
        own = [row for row in rows if row["objective"] == name]
        wanted, other, signal = (by_model(own, first, metric) for metric in ("rewarded", "other", "signal"))
        valid = {model: wanted[model] + other[model] for model in wanted}
        lost = [sum(row["steps"][moment]["rewarded"] < COLLAPSED for row in own) / len(own) for moment in (first, last)]
        shares = [shown(over_models(each, (0.0, 1.0))) for each in (valid, signal)]
        found = "" if name == CONTROL else SIGNED(apart)
        lines.append([f"`{name}`", *shares, f"{lost[0]:.2f}, {lost[1]:.2f}", found])
    header = ["fine-tuned by", "valid before RL", "signal before RL", "lost: before, after RL"]
    return markdown([*header, f"against `{CONTROL}`"], lines)


def against(rows: list[dict[str, Any]]) -> dict[str, Mean]:
    """Return by how much each objective's rewarded form exceeds the control's after RL."""
    (*_, last), found = rows[0]["steps"], {}
    for name in dict.fromkeys(row["objective"] for row in rows):
        ours, theirs = (
            by_model([row for row in rows if row["objective"] == each], last, "rewarded") for each in (name, CONTROL)
        )
        found[name] = over_models({model: ours[model] - theirs[model] for model in ours}, (-1.0, 1.0))
    return found


def answer(rows: list[dict[str, Any]]) -> str:
    """Return which objectives end elsewhere than the control, and which lose a form for good."""
    first, *_, last = rows[0]["steps"]
    apart = {name: found.interval or (-1.0, 1.0) for name, found in against(rows).items() if name != CONTROL}
    lost = {
        name: [
            sum(row["steps"][moment]["rewarded"] < COLLAPSED for row in rows if row["objective"] == name)
            for moment in (first, last)
        ]
        for name in apart
    }
    runs = sum(row["objective"] == CONTROL for row in rows)
    below, beyond = ([f"`{name}`" for name, ends in apart.items() if ends[side] * sign > 0] for side, sign in ((1, -1), (0, 1)))
    gone = [f"`{name}` {after} (before RL {before})" for name, (before, after) in lost.items() if after]
    return (
        f"It can. Where a form is lost before RL, {last} steps do not always bring it back. Of {runs} runs it stays lost "
        f"in: {', '.join(gone) or 'none'}. On average, beyond chance, below `{CONTROL}`: {', '.join(below) or 'none'}. Above "
        f"it: {', '.join(beyond) or 'none'}."
    )


def mean(values: dict[Any, float]) -> float:
    """Return the mean of values."""
    return sum(values.values()) / len(values)


def by_model(rows: list[dict[str, Any]], moment: str, metric: str) -> dict[str, float]:
    """Return the mean over forms for each model."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row["steps"][moment][metric])
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
        course=course(rows),
        answer=answer(rows),
        collapsed=COLLAPSED,
        control=CONTROL,
    )
    (Path(folder) / "ready-for-rl.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
