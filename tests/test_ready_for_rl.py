"""The study of REINFORCE after fine-tuning: its gradient, its draws, and a run of it."""

import json
import math
import runpy
import statistics
from pathlib import Path

import pytest
import torch
from scipy.stats import t as student

from bl_trainer.cells.cells import CELLS
from bl_trainer.cells.pretraining import models_of
from bl_trainer.cells.training import Course
from bl_trainer.cells.transformer import Shape, initial, logits, unpack
from bl_trainer.cells.vocabulary import END
from bl_trainer.cells.world import World

ROOT = Path(__file__).parents[1]
STUDY = runpy.run_path(str(ROOT / "studies" / "ready_for_rl_study.py"))
SHAPE = Shape(width=16, heads=2, layers=1, vocabulary=4, length=9)
GROUP, ANSWER = STUDY["GROUP"], STUDY["ANSWER"]


def starts(count: int) -> torch.Tensor:
    return torch.stack([initial(SHAPE, seed, torch.float64) for seed in range(count)])


def given(arms: int, course: Course):
    """Prompts of two tokens, for which an answer that ends at once is right."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 4, (arms, course.steps, course.batch, 2), generator=generator)
    rewarded = torch.full((arms, course.steps, course.batch, ANSWER), END)
    chances = torch.rand(arms, course.steps, course.batch * GROUP, ANSWER, generator=generator, dtype=torch.float64)
    return STUDY["Rollouts"](prompts, rewarded, chances)


def test_advantages_are_zero_on_average_in_a_group() -> None:
    is_right = torch.tensor([[True] * 2 + [False] * (GROUP - 2) + [True] * GROUP])
    found = STUDY["advantages"](is_right)
    assert found[0, 0] == pytest.approx(1 - 2 / GROUP)
    assert found[0, GROUP:].abs().max() == 0
    assert abs(float(found[0, :GROUP].sum())) < 1e-6


def test_slopes_are_the_gradient_of_the_policy_loss_up_to_the_end() -> None:
    found = torch.randn(2, 3, ANSWER, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([[[1, 2, END, END, END], [END] * 5, [1, 2, 3, 1, 2]]] * 2)
    gain = torch.tensor([[0.5, -0.25, 1.0], [0.0, 2.0, -1.0]], dtype=torch.float64)
    counted = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    logp = found.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    (-(gain * (logp * counted).sum(-1)).mean(1).sum()).backward()
    assert torch.allclose(STUDY["slopes"](found.detach(), labels, gain), found.grad, atol=1e-12)


def test_draws_follow_the_models_probabilities_and_stop_at_the_end() -> None:
    stack = starts(1) + torch.randn(1, SHAPE.count, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 5
    prompts = torch.tensor([[1, 2]]).expand(1, 4000, 2)
    chances = torch.rand(1, 4000, ANSWER, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens = STUDY["sample"](SHAPE, stack, prompts, chances)
    expected = logits(SHAPE, unpack(SHAPE, stack), torch.tensor([[[1, 2]]]))[0, 0, -1].softmax(-1)
    shares = torch.bincount(tokens[0, :, 2], minlength=4) / 4000
    assert torch.allclose(shares.double(), expected, atol=0.04)
    ended = (tokens[0, :, 2:] == END).cumsum(-1) > 0
    assert (tokens[0, :, 2:][ended] == END).all()
    assert tokens.shape == (1, 4000, 2 + ANSWER)


def test_reinforce_raises_what_is_rewarded_and_each_arm_is_what_it_is_alone() -> None:
    course, start = Course(steps=25, batch=2, warmup=1), starts(2)
    all_of, prompt = given(2, course), torch.tensor([[[1, 2]]])
    stacks = STUDY["reinforce"](SHAPE, start, all_of, course, 0.03, (0, 5, 25))
    assert list(stacks) == [0, 5, 25]
    assert torch.equal(stacks[0], start)
    trained = stacks[25]
    assert not torch.equal(stacks[5], trained)
    for i in range(2):
        p = [float(logits(SHAPE, unpack(SHAPE, s[i : i + 1]), prompt)[0, 0, -1].softmax(-1)[END]) for s in (start, trained)]
        assert p[0] == pytest.approx(0.25)
        assert p[1] > 0.8
    one = STUDY["Rollouts"](all_of.prompts[1:], all_of.rewarded[1:], all_of.chances[1:])
    assert torch.allclose(STUDY["reinforce"](SHAPE, start[1:], one, course, 0.03, [25])[25][0], trained[1], atol=1e-9)


def test_forms_and_questions_are_those_of_the_cell() -> None:
    cell = CELLS[STUDY["CELL"]](World(5))
    items = {item.prompt: item.answers for item in (*cell.validation, *cell.test)}
    assert all(STUDY["answers_to"](prompt) == answers for prompt, answers in items.items())
    asked = STUDY["questions_of"](cell, 20)
    assert not {item.prompt for item in asked} & items.keys()
    found = STUDY["rollouts"]([cell], [(0, 0), (0, 1)], Course(steps=5, batch=4))
    assert found.prompts.shape[:3] == (2, 5, 4)
    assert torch.equal(found.rewarded[0, ..., 1:4], found.rewarded[1, ..., :3])


def test_a_row_for_each_model_and_form(tmp_path) -> None:
    small = runpy.run_path(str(ROOT / "studies" / "ready_for_rl_study.py"))
    shapes = {"small": Shape(16, 2, 1, 36, 14)}
    small["study"].__globals__["SIZES"] = shapes
    small["study"].__globals__["pretrained"] = lambda models, folder: torch.stack(
        [initial(shapes["small"], model.seed) for model in models]
    )
    small["study"].__globals__["MOMENTS"] = (0, 2)
    models = [model for model in models_of((3, 4, 5)) if model.size == "small"]
    rows = small["study"]("nll", "small", tmp_path, 1e-3, models, Course(steps=2, batch=2), Course(steps=2, batch=4))
    assert [(row["model"], row["form"]) for row in rows] == [("small-3", 0), ("small-3", 1), ("small-5", 0), ("small-5", 1)]
    for row in rows:
        assert list(row["steps"]) == ["0", "2"]
        for found in row["steps"].values():
            assert 0 <= found["rewarded"] + found["other"] <= 1
    assert rows[0]["steps"]["0"]["rewarded"] == rows[1]["steps"]["0"]["other"]
    assert json.loads(json.dumps(rows)) == rows


def test_start_gain_and_end_are_what_the_runs_give() -> None:
    """Recomputed from the stored runs: two of each model, paired with those of `nll` by model and form."""
    results = ROOT / "docs" / "results"
    page, claims = ((results / f"{name}.md").read_text(encoding="utf-8") for name in ("ready-for-rl", "claims"))
    runs = {
        (row["objective"], row["model"], row["form"]): (row["steps"]["0"]["rewarded"], row["steps"]["200"]["rewarded"])
        for row in json.loads((results / "ready-for-rl.json").read_text(encoding="utf-8"))
    }
    models = sorted({model for _, model, _ in runs})
    for name in {name for name, *_ in runs} - {"nll"}:
        texts = []
        for measure in (lambda run: run[0], lambda run: run[1] - run[0], lambda run: run[1]):
            values = [
                statistics.fmean(measure(runs[name, model, form]) - measure(runs["nll", model, form]) for form in (0, 1))
                for model in models
            ]
            mean, reach = statistics.fmean(values), student.ppf(0.975, len(values) - 1) * statistics.stdev(values)
            low, high = (mean + sign * reach / math.sqrt(len(values)) for sign in (-1, 1))
            texts.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        assert f"| {' | '.join(texts)} |" in next(line for line in page.splitlines() if line.startswith(f"| `{name}` | +"))
        assert f"`{name}`: start {texts[0]}, gain {texts[1]}, end {texts[2]}" in claims
