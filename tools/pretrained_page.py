"""Write docs/results/pretrained.md: `python tools/pretrained_page.py [docs/results]`."""

import runpy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "studies"))

import pretrained_study as study
from anneal_study import name_of
from bl_trainer.cells.page import markdown
from bl_trainer.sweep.differences import Difference
from bl_trainer.sweep.leaderboard import compare
from continuum import Scored, means, values_of

ROOT = Path(__file__).parents[1]
signed = runpy.run_path(str(ROOT / "tools" / "facts_page.py"))["signed"]
CONTROL = study.ARMS[0]
METRICS = {
    "greedy": "right, greedy",
    "sampled": "right, T = 1",
    "cooler": "right, T = 0.5",
    "accuracy": "most probable",
    "target_prob": "mean p",
    "nll": "nll",
    "calibration_error": "calibration error",
    "drift": "drift",
}
ANSWERS = ("greedy", "sampled", "cooler")
SETS = {
    "records": "the quickstart's records, which the model nearly knows; 30 % have the age and the city of nobody in particular",
    "codes": "the same with a code in place of each city, which the model cannot know; 30 % are as wrong",
}
PAGE = """# Noisy records on SmolLM2-135M

<!-- Written by tools/pretrained_page.py (`make figures`) from pretrained.json.gz. -->

> **Question.** Sampled at temperature 1, objectives that sharpen answer more right than `nll` where training rows are wrong.
> On a real model, is that more than a lower temperature of `nll`?

{answer}

`python studies/pretrained_study.py` fine-tunes SmolLM2-135M-Instruct in bfloat16 with a LoRA adapter of rank {rank} and batches
of {batch}.

| set | training rows | steps | seeds | options |
|---|---|---|---|---|
{sets}

- **Objectives**: `nll`, `anneal`, and a = c e^-H without its schedule, c = 0.5 or 1; on `records` `power 0.5` and `neg_p` too.
- **Learning rate**: of {rates} the one with most right greedy answers at seed {pilot}, on the same test examples. In brackets:
  these shares of right answers, in this order. A better rate may lie outside of the two. On `codes` the pilot's runs have
  {short} steps. They answer so little right that they hardly tell the rates apart, and that the judged runs were made longer.
- **Judging**: other seeds and {examples} other rows, all right. An answer is right if its record is. T is the temperature, and
  one answer is sampled for each row.
- **Intervals** are 95 %, paired by seed and row, over seeds and cities. They say nothing of other models, and are not
  corrected for the number of comparisons. Seeds from 103 on were added when three on
  `records` had left them too wide to tell anything.

{tables}

{missing}Most probable, mean p, `nll` (nats) and drift, KL(base, tuned) in nats, are means per target token, without the end
token.
"""


def name(arm: dict[str, Any]) -> str:
    """Return an objective for people."""
    if arm in study.TEMPERED:
        scale = arm["objective"]["start"]
        return "`alpha e^-H`" if scale == 1 else f"`alpha {scale:g} e^-H`"
    return f"`{name_of(arm)}`"


class Task:
    """A task's runs."""

    def __init__(self, option: str, found: dict[str, Any]):
        self.base, self.pilot = found["base"], found["pilot"]
        self.runs = [
            Scored(i, each["setting"], means(each["items"]), items=each["items"]) for i, each in enumerate(found["arms"])
        ]
        self.seeds = sorted({run.setting["seed"] for run in self.runs})
        self.options = f"--tasks {option} --seeds {len(self.seeds)}"

    @property
    def others(self) -> list[dict[str, Any]]:
        """The objectives beside CONTROL."""
        return [arm for arm in study.ARMS[1:] if self.of(arm)]

    def of(self, arm: dict[str, Any]) -> list[Scored]:
        """Return an objective's runs."""
        return [run for run in self.runs if run.setting == run.setting | arm]

    def shown(self, arm: dict[str, Any], metric: str) -> str:
        """Return an objective's mean and the range of its seeds."""
        values = [run.rulers[metric] for run in self.of(arm)]
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    def apart(self, arm: dict[str, Any], metric: str, control: str = "") -> Difference:
        """Return by how much an objective exceeds CONTROL in a metric, or in another metric of it."""
        ours, theirs = self.of(arm), self.of(CONTROL)
        if control:
            theirs = [as_if(run, control, metric) for run in theirs]
        runs = dict(enumerate([*ours, *theirs]))
        better, worse = list(range(len(ours))), list(range(len(ours), len(runs)))
        return compare(metric, runs, lambda i: values_of(runs[i], metric), better, worse)


def as_if(run: Scored, metric: str, name: str) -> Scored:
    """Return a run with a metric under another one's name."""
    return replace(run, rulers={name: run.rulers[metric]}, items={**run.items, name: run.items[metric]})


def rate(task: Task, arm: dict[str, Any]) -> str:
    """Return an objective's learning rate, and what the pilot found at each."""
    tried = {
        each["setting"]["learning_rate"]: each["greedy"] for each in task.pilot if each["setting"] == each["setting"] | arm
    }
    return f"{task.of(arm)[0].setting['learning_rate']:g} ({', '.join(f'{tried[rate]:.3f}' for rate in sorted(tried))})"


def levels(task: Task) -> str:
    """Return a table of what each objective comes to."""
    base = ["*untrained*", "", *(f"{task.base[metric]:.3f}" for metric in METRICS)]
    lines = [[name(arm), rate(task, arm), *(task.shown(arm, metric) for metric in METRICS)] for arm in [CONTROL, *task.others]]
    return markdown(["objective", "learning rate", *METRICS.values()], [base, *lines])


def differences(task: Task) -> str:
    """Return a table of how much more each objective answers right than CONTROL."""
    lines = []
    for arm in task.others:
        found = [*(task.apart(arm, metric) for metric in ANSWERS), task.apart(arm, "sampled", "cooler")]
        lines.append([name(arm), *map(signed, found)])
    control = name(CONTROL)
    return markdown(["objective", *(METRICS[metric] for metric in ANSWERS), f"T = 1, less {control} at T = 0.5"], lines)


def beyond(tasks: Sequence[Task], metric: str) -> tuple[int, int]:
    """Return how many objectives answer more right than CONTROL beyond chance, and how many less, over tasks."""
    found = [task.apart(arm, metric).interval for task in tasks for arm in task.others]
    known = [interval for interval in found if interval is not None]
    return sum(low > 0 for low, _ in known), sum(high < 0 for _, high in known)


def answer(tasks: dict[str, Task]) -> str:
    """Return the answer, in figures."""
    own = list(tasks.values())
    count = sum(len(task.others) for task in own)
    parts = []
    for metric, words in (("sampled", "At T = 1"), ("cooler", "At T = 0.5"), ("greedy", "Greedy")):
        each = "; ".join(f"{signed(task.apart(study.ANNEAL, metric))} on {option}" for option, task in tasks.items())
        above, below = beyond(own, metric)
        parts.append(
            f"> {words}, `anneal` less `nll`: {each}. Of {count} comparisons with `nll` {above} are above it beyond chance, "
            f"{below} below."
        )
    return "> **Answer.** " + "\n".join(parts).removeprefix("> ")


def results() -> dict[str, Any]:
    """Return the stored results of the sets of this page."""
    found = study.read_results(ROOT / "docs" / "results" / "pretrained.json.gz")
    return {option: found[option] for option in SETS if option in found}


def text(results: dict[str, Any]) -> str:
    """Return the page."""
    tasks = {option: Task(option, results[option]) for option in SETS if option in results}
    own = [each for each in study.TASKS if each.option in tasks]
    parts = []
    for option, task in tasks.items():
        parts += [
            f"**`{option}`**: mean, and in brackets the range over seeds",
            levels(task),
            f"**`{option}`**: share of right answers, less that of `nll`",
            differences(task),
        ]
    return PAGE.format(
        answer=answer(tasks),
        rank=study.RANK,
        batch=study.TRAINING["per_device_train_batch_size"],
        sets="\n".join(
            f"| `{each.option}` | {SETS[each.option]} | {each.steps} | {seeds[0]} to {seeds[-1]} | `{task.options}` |"
            for each, task, seeds in ((each, tasks[each.option], tasks[each.option].seeds) for each in own)
        ),
        rates=" and ".join(f"{rate:g}" for rate in own[0].rates),
        pilot=study.PILOT_SEED,
        short=study.task_of("codes", 0.3).pilot_steps,
        examples=own[0].examples,
        tables="\n\n".join(parts),
        missing="".join(f"Not run: `{each}`, {SETS[each]}.\n\n" for each in SETS if each not in tasks),
    )


def main(folder: str) -> None:
    """Write the page into `folder`."""
    (Path(folder) / "pretrained.md").write_text(text(results()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
