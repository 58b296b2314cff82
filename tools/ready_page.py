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
START, GAIN, END = "start", "gain", "end"
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

What RL gains is the rewarded form's probability after RL less that before. Part of a smaller gain is a higher start, which
leaves less to gain: read the start and the end beside it.

{gained}

- *Less `{control}`*: paired by model. A model's figure is the mean of its two runs. The end is the start and the gain together.
- Intervals are 95 %, over models, and not corrected for the number of objectives.

It is one task, one form of reward, one length of RL and one learning rate, on models of 0.06M and 0.1M parameters.
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
    for name in objectives(rows):
        own = [row for row in rows if row["objective"] == name]
        wanted, other, signal = (by_model(own, first, metric) for metric in ("rewarded", "other", "signal"))
        valid = {model: wanted[model] + other[model] for model in wanted}
        gone = [sum(row["steps"][moment]["rewarded"] < COLLAPSED for row in own) / len(own) for moment in (first, last)]
        shares = [shown(over_models(each, (0.0, 1.0))) for each in (valid, signal)]
        lines.append([f"`{name}`", *shares, f"{gone[0]:.2f}, {gone[1]:.2f}"])
    return markdown(["fine-tuned by", "valid before RL", "signal before RL", "lost: before, after RL"], lines)


def gains(rows: list[dict[str, Any]]) -> str:
    """Return what RL gains after each objective, and its start, gain and end beside the control's: a row for each."""
    less = [against(rows, measure) for measure in (START, GAIN, END)]
    lines = []
    for name in objectives(rows):
        gain = SIGNED(over_models(measured(rows, name, GAIN), (-1.0, 1.0)))
        lines.append([f"`{name}`", gain, *("" if name == CONTROL else SIGNED(found[name]) for found in less)])
    return markdown(["fine-tuned by", "gain", *(f"{measure}, less `{CONTROL}`" for measure in (START, GAIN, END))], lines)


def objectives(rows: list[dict[str, Any]]) -> list[str]:
    """Return the objectives, in the order of the rows."""
    return list(dict.fromkeys(row["objective"] for row in rows))


def measured(rows: list[dict[str, Any]], name: str, measure: str) -> dict[str, float]:
    """Return the rewarded form's probability before RL, after it, or its gain, of each model under one objective."""
    first, *_, last = rows[0]["steps"]
    start, end = (by_model([row for row in rows if row["objective"] == name], moment, "rewarded") for moment in (first, last))
    return {model: {START: start[model], END: end[model], GAIN: end[model] - start[model]}[measure] for model in start}


def against(rows: list[dict[str, Any]], measure: str) -> dict[str, Mean]:
    """Return by how much each objective exceeds the control in a measure, paired by model."""
    theirs = measured(rows, CONTROL, measure)
    found = {name: measured(rows, name, measure) for name in objectives(rows)}
    return {
        name: over_models({model: value - theirs[model] for model, value in ours.items()}, (-1.0, 1.0))
        for name, ours in found.items()
    }


def lost(rows: list[dict[str, Any]]) -> tuple[str, int]:
    """Return in how many runs of each objective a form stays lost, with how many lost it before RL, and the number of runs."""
    first, *_, last = rows[0]["steps"]
    found = []
    for name in objectives(rows):
        own = [row["steps"] for row in rows if row["objective"] == name]
        before, after = (sum(steps[moment]["rewarded"] < COLLAPSED for steps in own) for moment in (first, last))
        found += [f"`{name}` {after} (before RL {before})"] * bool(after)
    return ", ".join(found) or "none", sum(row["objective"] == CONTROL for row in rows)


def beyond_chance(rows: list[dict[str, Any]], measure: str) -> tuple[list[str], list[str]]:
    """Return which objectives are below and above the control in a measure by more than their interval."""
    ends = {name: found.interval or (-1.0, 1.0) for name, found in against(rows, measure).items() if name != CONTROL}
    return [name for name, (_, high) in ends.items() if high < 0], [name for name, (low, _) in ends.items() if low > 0]


def answer(rows: list[dict[str, Any]]) -> str:
    """Return after which objectives RL gains or ends elsewhere than after the control, and which lose a form for good."""
    (gone, runs), last = lost(rows), list(rows[0]["steps"])[-1]
    (less, more), (below, above) = (beyond_chance(rows, measure) for measure in (GAIN, END))

    def listed(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "none"

    return (
        f"It can. Where a form is lost before RL, {last} steps do not always bring it back. Of {runs} runs it stays lost "
        f"in: {gone}. Compared with `{CONTROL}`, beyond chance, RL gains less after: {listed(less)}. It gains more after: "
        f"{listed(more)}. Part of a smaller gain is a higher start. RL ends lower, beyond chance, after: {listed(below)}. It "
        f"ends higher after: {listed(above)}."
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
        gained=gains(rows),
        course=course(rows),
        answer=answer(rows),
        collapsed=COLLAPSED,
        control=CONTROL,
    )
    (Path(folder) / "ready-for-rl.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
