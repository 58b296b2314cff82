"""Does sharpening in fine-tuning cost what reinforcement learning gains? Fine-tune on two valid forms, then reward one of them.

    python studies/ready_for_rl_study.py --folder cells

Models 100 to 107 learn the cell `two-even` under each objective, at the learning rate that models 0 to 7 chose on it. Then
REINFORCE rewards one of the two forms: groups of eight answers at temperature 1, 200 steps, once for either form. The advantage
is the reward less the group's mean. Models are measured before, after 200 steps and between. Writes
docs/results/ready-for-rl.json. `folder` keeps each objective: the same command resumes. About a minute of one core per
objective.
"""

import argparse
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bl_trainer._util.files import write_text
from bl_trainer.cells.cells import CELLS, Cell, Item
from bl_trainer.cells.engine import COURSE, digest
from bl_trainer.cells.field import entries, stored
from bl_trainer.cells.pretraining import SIZES, Model, design, models_of, pretrained
from bl_trainer.cells.scores import questions, score, stacked
from bl_trainer.cells.training import Arm, Course, train
from bl_trainer.cells.transformer import Shape, logits, unpack
from bl_trainer.cells.vocabulary import END
from bl_trainer.cells.world import LENGTH, Tokens, World

DOCS = Path(__file__).parents[1] / "docs" / "results"
RESULT, REFERENCES = DOCS / "ready-for-rl.json", DOCS / "references.json.gz"
OBJECTIVES = ("nll", "alpha 0.5 e^-H", "alpha e^-H", "anneal", "power 0.5", "neg_p", "label smoothing 0.1")
SEEDS = range(100, 108)
CELL, FORMS, GROUP = "two-even", 2, 8
RL = Course(steps=200, batch=4, warmup=5)  # a batch is questions, each with a group of answers
RATE = 1e-3
MOMENTS = (0, 10, 25, 50, 100, 200)  # steps of REINFORCE after which models are measured
ANSWER = LENGTH + 1  # tokens that are sampled, with the end


@dataclass(frozen=True)
class Rollouts:
    """What REINFORCE is given, arm by arm. `prompts`: (arms, steps, questions, length); `rewarded`: (..., ANSWER), the answer
    that counts; `chances`: uniform draws, (arms, steps, questions x GROUP, ANSWER), of each arm's own generator."""

    prompts: Tensor
    rewarded: Tensor
    chances: Tensor


def rollouts(cells: Sequence[Cell], arms: Sequence[tuple[int, int]], course: Course) -> Rollouts:
    """Return the rollouts of `arms`: which cell, and which form is rewarded."""
    prompts, rewarded, chances = [], [], []
    for which, form in arms:
        asked = questions_of(cells[which], course.steps * course.batch)
        prompts.append([item.prompt for item in asked])
        rewarded.append([(*item.answers[form][0], END) for item in asked])
        generator = torch.Generator().manual_seed(1000 * which + form)
        chances.append(torch.rand(course.steps, course.batch * GROUP, ANSWER, generator=generator))
    steps = (course.steps, course.batch)
    return Rollouts(torch.tensor(prompts).unflatten(1, steps), torch.tensor(rewarded).unflatten(1, steps), torch.stack(chances))


def questions_of(cell: Cell, count: int) -> list[Item]:
    """Return new questions with both forms of their answers, none of a split."""
    rng = random.Random("questions")
    forms: list[Item] = []
    while len(forms) < count:
        prompt, _ = cell.row(rng)
        forms.append(Item(prompt, answers_to(prompt)))
    return forms


def answers_to(prompt: Tokens) -> tuple[tuple[Tokens, float], ...]:
    """Return both forms: the string itself, and rotated."""
    letters = prompt[1:-1]
    return (letters, 0.5), (letters[1:] + letters[:1], 0.5)


@torch.no_grad()
def sample(shape: Shape, stack: Tensor, prompts: Tensor, chances: Tensor) -> Tensor:
    """Return prompts with sampled answers, (arms, rows, length + ANSWER): at temperature 1, END after the first END."""
    tokens, weights = prompts, unpack(shape, stack)
    for place in range(ANSWER):
        last = logits(shape, weights, tokens, tokens.shape[-1] - 1)[:, :, 0]
        reached = last.softmax(-1).cumsum(-1) < chances[..., place : place + 1]
        chosen = reached.sum(-1).clamp(max=shape.vocabulary - 1)
        if place:
            chosen = torch.where(tokens[..., -1] == END, END, chosen)
        tokens = torch.cat([tokens, chosen[..., None]], -1)
    return tokens


def reinforce(
    shape: Shape, start: Tensor, given: Rollouts, course: Course, rate: float, moments: Collection[int]
) -> dict[int, Tensor]:
    """Return the weights, (arms, count), that REINFORCE with a group's mean as the baseline makes of `start`.

    `moments`: the numbers of steps after which they are returned, 0 for `start` itself.
    """
    found = {0: start} if 0 in moments else {}
    stack = start.detach().clone()
    weights = {name: view.requires_grad_() for name, view in unpack(shape, stack).items()}
    models = [torch.nn.Parameter(row) for row in stack]
    optimizer = torch.optim.AdamW(models, lr=rate, weight_decay=0.0, fused=True)
    for step in range(course.steps):
        prompts, right = (each[:, step].repeat_interleave(GROUP, 1) for each in (given.prompts, given.rewarded))
        tokens = sample(shape, stack, prompts, given.chances[:, step])
        first = prompts.shape[-1]
        gain = advantages((tokens[..., first:] == right).all(-1))
        said = logits(shape, weights, tokens[..., :-1], first - 1)
        gradients = torch.autograd.grad(said, list(weights.values()), slopes(said.detach(), tokens[..., first:], gain))
        gradient = torch.cat([each.flatten(1) for each in gradients], dim=1)
        gradient *= (course.clip / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        for model, own in zip(models, gradient, strict=True):
            model.grad = own
        optimizer.param_groups[0]["lr"] = rate * course.factor(step)
        optimizer.step()
        if step + 1 in moments:
            found[step + 1] = stack.detach().clone()
    return found


def advantages(is_right: Tensor) -> Tensor:
    """Return rewards less their group's mean, of the same shape (arms, questions x GROUP)."""
    groups = is_right.float().unflatten(1, (-1, GROUP))
    return (groups - groups.mean(-1, keepdim=True)).flatten(1)


def slopes(found: Tensor, labels: Tensor, gain: Tensor) -> Tensor:
    """Return the gradient in the logits of -mean over rows of gain * log p of the sampled answer, to its first END."""
    ended = (labels == END).cumsum(-1) - (labels == END).long()
    wanted = torch.nn.functional.one_hot(labels, found.shape[-1])
    weight = gain[..., None] * (ended == 0) / gain.shape[1]
    return (found.softmax(-1) - wanted) * weight[..., None]


def study(objective: str, size: str, folder: Path, rate: float, models: list[Model], course: Course, fine: Course) -> list[Any]:
    """Fine-tune models of one size, reward each form of each, and return a row for each model and form."""
    shape, made = SIZES[size], [CELLS[CELL](World(model.seed)) for model in models]
    (entry,) = entries([objective])
    sets = [rows_of(cell, model, fine.steps * fine.batch) for cell, model in zip(made, models, strict=True)]
    own = [Arm(entry.objective, entry.threshold, rate, i, entry.smoothing) for i in range(len(models))]
    tuned = train(shape, pretrained(models, folder / "models"), stacked(sets), own, fine)
    arms = [(which, form) for which in range(len(models)) for form in range(FORMS)]
    start = tuned[[which for which, _ in arms]]
    stacks = reinforce(shape, start, rollouts(made, arms, course), course, RATE, MOMENTS)
    steps = {moment: measured(shape, stack, made, arms) for moment, stack in stacks.items()}
    return [
        {
            "objective": objective,
            "model": models[which].name,
            "form": form,
            "steps": {str(moment): found[i] for moment, found in steps.items()},
        }
        for i, (which, form) in enumerate(arms)
    ]


def rows_of(cell: Cell, model: Model, count: int) -> list[tuple[Tokens, Tokens]]:
    """Return the training rows of a model, the same as in the study of the cells."""
    rng = random.Random(f"rows {CELL} {model.seed} 0")
    return [cell.row(rng) for _ in range(count)]


def measured(shape: Shape, stack: Tensor, cells: Sequence[Cell], arms: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Return for each arm, on test questions at temperature 1: the probability of the rewarded form and of the other one, and
    the probability that a group has both a reward and none."""
    forms = [
        [[Item(item.prompt, ((item.answers[shift ^ form][0], 1.0),)) for item in cells[which].test] for which, form in arms]
        for shift in range(FORMS)
    ]
    wanted, other = (score(shape, stack, questions(each))["sampled_1"] for each in forms)
    signal = 1 - wanted**GROUP - (1 - wanted) ** GROUP
    return [
        {"rewarded": round(float(a), 4), "other": round(float(b), 4), "signal": round(float(c), 4)}
        for a, b, c in zip(wanted.mean(1), other.mean(1), signal.mean(1), strict=True)
    ]


def kept(objective: str, size: str, folder: Path) -> list[Any]:
    """Return the rows of an objective, from `folder` if it has them."""
    models = [model for model in models_of(SEEDS) if model.size == size]
    rate = (stored() + stored(REFERENCES)).choice(objective, CELL, "greedy").rate
    key = digest(repr((objective, size, rate, RATE, RL, MOMENTS, COURSE, models, design())))
    path = folder / "results" / f"rl-{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(study(objective, size, folder, rate, models, RL, COURSE)))
    rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def main() -> None:
    """Run what is left, and write all rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cells"))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows: list[Any] = []
    for objective in OBJECTIVES:
        for size in SIZES:
            rows += kept(objective, size, options.folder)
        print(objective, flush=True)
    write_text(options.output, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
