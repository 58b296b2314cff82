"""Cells: stacks against models alone, exact metrics against enumeration, and what the cells hold."""

import itertools
import math
import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from bl_trainer import as_loss
from bl_trainer.cells import engine, pretraining
from bl_trainer.cells.cells import CELLS, Item, old_items
from bl_trainer.cells.engine import Entry, run
from bl_trainer.cells.judging import JUDGING
from bl_trainer.cells.pretraining import models_of, pretrained
from bl_trainer.cells.results import Results
from bl_trainer.cells.scores import TEMPERATURES, questions, score, stacked
from bl_trainer.cells.training import Arm, Course, Rows, losses_of, train
from bl_trainer.cells.transformer import Norm, Shape, SquaredRelu, initial, logits, unpack
from bl_trainer.cells.vocabulary import END
from bl_trainer.cells.world import RULES, SHOWN, World
from bl_trainer.objectives import Objective, Threshold

SHAPE = Shape(width=16, heads=2, layers=2, vocabulary=9, length=7)
COURSE = Course(steps=6, batch=3, warmup=2, clip=0.05)
ARMS = [
    ("nll", None, 3e-3, 0),
    ("anneal", None, 1e-2, 1),
    ({"name": "power", "alpha": 10}, None, 1e-3, 0),
    ("nll", {"above": 0.1, "normalize": "kept"}, 3e-3, 1),
    ("neg_p", 0.1, 3e-3, 0),
    ("deft", None, 3e-3, 2),
    ("asft", None, 3e-3, 2),
    ("test_cells:drawn_to_chance", None, 3e-3, 1),
    ({"name": "neg_p", "floor": {"from": 0.5, "to": 0}, "special_tokens": "nll"}, 0.2, 3e-3, 2),
]


def drawn_to_chance(logp, entropy):
    """NLL less some entropy, which has a gradient."""
    return -logp - 0.2 * entropy


def random_rows(sets: int = 3) -> Rows:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SHAPE.vocabulary, (sets, COURSE.steps * COURSE.batch, SHAPE.length + 1), generator=generator)
    is_target = torch.rand(tokens[..., 1:].shape, generator=generator) < 0.5
    is_target[..., :2] = is_target[..., -1:] = False
    is_target[:, ::3, 3] = True  # no batch is empty
    return Rows(tokens, is_target)


def arms() -> list[Arm]:
    return [Arm(Objective.parse(spec), Threshold.parse(threshold), rate, rows) for spec, threshold, rate, rows in ARMS]


def starts(count: int) -> torch.Tensor:
    return torch.stack([initial(SHAPE, seed, torch.float64) for seed in range(count)])


def test_a_stack_trains_each_model_as_it_would_train_alone() -> None:
    rows, start = random_rows(), starts(len(ARMS))
    together = train(SHAPE, start, rows, arms(), COURSE)
    for i, arm in enumerate(arms()):
        alone = train(SHAPE, start[i : i + 1], rows, [arm], COURSE)
        assert (alone[0] - together[i]).abs().max() < 1e-9
        assert (together[i] - start[i]).abs().max() > 1e-6
    assert torch.equal(start, starts(len(ARMS)))


@pytest.mark.parametrize("i", range(len(ARMS)), ids=[str(spec) for spec, *_ in ARMS])
def test_a_model_trains_as_a_loop_with_torch_and_as_loss_does(i: int) -> None:
    rows, arm = random_rows(), arms()[i]
    start = starts(len(ARMS))[i]
    weights = {name: view[0].clone().requires_grad_() for name, view in unpack(SHAPE, start[None]).items()}
    base = {name: view.detach().clone() for name, view in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=arm.rate, weight_decay=0)
    for step in range(COURSE.steps):
        cut = slice(step * COURSE.batch, (step + 1) * COURSE.batch)
        tokens, is_target = rows.tokens[arm.rows, cut], rows.is_target[arm.rows, cut]
        labels = tokens.masked_fill(~torch.cat([torch.zeros(len(tokens), 1, dtype=torch.bool), is_target], 1), -100)
        found = logits(SHAPE, stack_of(weights), tokens[None, :, :-1])[0]
        extra = {}
        if "ref_logp" in arm.objective.statistics:
            known = logits(SHAPE, stack_of(base), tokens[None, :, :-1])[0].log_softmax(-1)
            own = known.gather(-1, tokens[:, 1:, None])[..., 0]
            extra["ref_logp"] = torch.cat([torch.zeros(len(own), 1, dtype=own.dtype), own], 1)
        if "is_special" in arm.objective.statistics:
            extra["is_special"] = tokens == END
        whole = torch.cat([found, torch.zeros_like(found[:, :1])], 1)
        loss = as_loss(arm.objective, arm.threshold, progress=step / COURSE.steps)({"logits": whole}, labels, **extra)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), COURSE.clip)
        optimizer.param_groups[0]["lr"] = arm.rate * COURSE.factor(step)
        optimizer.step()
    expected = torch.cat([weights[name].detach().flatten() for name in SHAPE.matrices])
    trained = train(SHAPE, start[None], rows, [arm], COURSE)[0]
    assert (trained - expected).abs().max() < 1e-6  # of the head's float32 sums


def test_label_smoothing_is_torchs() -> None:
    smoothed, plain = Entry.parse("s", {"name": "nll", "smoothing": 0.1}), Entry.parse("p", "nll")
    both = [Arm(each.objective, each.threshold, 1e-3, 0, each.smoothing) for each in (smoothed, plain)]
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(1, 3, 4, 9, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 9, (1, 3, 4), generator=generator)
    is_target = torch.rand(labels.shape, generator=generator) < 0.5
    losses = losses_of(both)
    assert [loss.models.tolist() for loss in losses] == [[0], [1]]
    for loss, share in zip(losses, (0.1, 0.0), strict=True):
        cost = cross_entropy(found[is_target], labels[is_target], label_smoothing=share)
        (expected,) = torch.autograd.grad(cost, found)
        assert (loss.slopes(found.detach(), labels, is_target, 0.0, None) - expected).abs().max() < 1e-12


def test_results_of_label_smoothing_are_kept_apart() -> None:
    entries = [
        Entry.parse("nll", spec) for spec in ("nll", {"name": "nll", "smoothing": 0.1}, {"name": "nll", "smoothing": 0.2})
    ]
    paths = [engine.Block(entry, "plain", (), (1e-3,), (0,), COURSE).path for entry in entries]
    assert len({*paths}) == 3
    assert (
        engine.Block(Entry.parse("nll", {"name": "nll", "smoothing": 0}), "plain", (), (1e-3,), (0,), COURSE).path == paths[0]
    )


def stack_of(weights: dict) -> dict:
    return {name: view[None] for name, view in weights.items()}


@pytest.mark.parametrize("function", [Norm, SquaredRelu])
def test_gradients_by_hand_are_the_derivatives(function: type) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(function.apply, (x,), eps=1e-7, atol=1e-5)


def test_later_tokens_and_other_models_change_no_logits() -> None:
    stack = starts(2)
    stack[:, -SHAPE.width * SHAPE.vocabulary :] = torch.randn(2, SHAPE.width * SHAPE.vocabulary, dtype=torch.float64)
    tokens = random_rows(2).tokens[:, :4, :-1]
    found = logits(SHAPE, unpack(SHAPE, stack), tokens)
    changed = tokens.clone()
    changed[:, :, 4:] = 0
    assert torch.allclose(logits(SHAPE, unpack(SHAPE, stack), changed)[:, :, :4], found[:, :, :4], atol=1e-12)
    for i in range(2):
        alone = logits(SHAPE, unpack(SHAPE, stack[i : i + 1]), tokens[i : i + 1], first=2)
        assert torch.allclose(alone[0], found[i, :, 2:], atol=1e-12)


ASKED = [
    Item((1, 2), (((3, 4), 0.7), ((5,), 0.3)), (0,)),
    Item((1, 6, 7), (((8, 8), 1.0),)),
]


def next_probabilities(stack: torch.Tensor, tokens: tuple[int, ...], temperature: float) -> torch.Tensor:
    found = logits(SHAPE, unpack(SHAPE, stack), torch.tensor(tokens).view(1, 1, -1))[0, 0, -1]
    return (found / temperature).softmax(-1)


def test_scores_are_the_probabilities_of_whole_answers() -> None:
    stack = starts(1)
    stack += 0.3 * torch.randn(stack.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = score(SHAPE, stack, questions([ASKED]))
    for j, item in enumerate(ASKED):
        for temperature in TEMPERATURES:
            chances = []
            for answer, _ in item.answers:
                whole = (*answer, END)
                steps = [
                    next_probabilities(stack, (*item.prompt, *whole[:k]), temperature)[whole[k]] for k in range(len(whole))
                ]
                chances.append(math.prod(map(float, steps)))
            assert float(found[f"sampled_{temperature:g}"][0, j]) == pytest.approx(sum(chances), rel=1e-9)
            apart = sum(abs(chance - share) for chance, (_, share) in zip(chances, item.answers, strict=True))
            expected = (apart + 1 - sum(chances)) / 2
            assert float(found[f"variation_{temperature:g}"][0, j]) == pytest.approx(expected, rel=1e-9)


def test_greedy_is_what_greedy_decoding_writes() -> None:
    for seed in itertools.count():  # a model that writes something, and ends
        stack = 5 * starts(1) + torch.randn(1, SHAPE.count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        written: list[int] = []
        while len(written) < 4 and END not in written:
            written.append(int(next_probabilities(stack, (1, 2, *written), 1).argmax()))
        if END in written[1:]:
            break
    answer = tuple(written[:-1])
    wrong = (answer[0] % 8 + 1, *answer[1:])
    items = [Item((1, 2), ((each, 1.0),), (0,)) for each in (answer, wrong, (*answer, 1), answer[:-1])]
    found = score(SHAPE, stack, questions([items]))
    assert found["greedy"][0].tolist() == [1, 0, 0, 0]
    assert found["format"][0, :2].tolist() == [1, 0]


ALL = {**CELLS, **JUDGING}
ENDLESS = ("plain", "two-even", "prefix", "rule-noise", "new-rule", "three-even")  # no question of a split is trained on


@pytest.mark.parametrize("name", ALL)
def test_a_cell_asks_in_a_split_what_is_not_in_the_other(name: str) -> None:
    cell, again = (ALL[name](World(5)) for _ in range(2))
    assert cell.validation == again.validation
    prompts = [{item.prompt for item in split} for split in (cell.validation, cell.test)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) == len(cell.validation) == len(cell.test) == len(prompts[1])
    assert all(sum(share for _, share in item.answers) == pytest.approx(1) for item in cell.validation)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("plain", 1), ("strong-noise", 0.7), ("half-noise", 0.7), ("weak-noise", 0.7), ("new-noise", 0.7), ("new-clean", 1)),
        *(("confusions", 0.7), ("two-even", 1), ("two-uneven", 1), ("prefix", 1), ("suffix", 1), ("mixture", 0.9)),
        *(("rule-noise", 0), ("new-rule", 1), ("three-even", 1), ("same-noise", 0.7), ("heavy-noise", 0.5)),
        *(("confusions-half", 0.7), ("two-noise", 0.7), ("wrapped", 1), ("mixture-valid", 0.9)),
    ],
)
def test_the_share_of_right_answers_among_training_rows(name: str, expected: float) -> None:
    cell, rng = ALL[name](World(5)), random.Random(0)
    answers = {item.prompt: dict(item.answers) for item in (*cell.validation, *cell.test)}
    rows = [cell.row(rng) for _ in range(4000)]
    if name in ENDLESS:
        assert not {prompt for prompt, _ in rows} & answers.keys()
        return
    share = sum(completion in answers[prompt] for prompt, completion in rows) / len(rows)
    assert share == pytest.approx(expected, abs=0.08 if name.startswith("confusions") else 0.03)


def test_valid_answers_are_drawn_by_their_shares() -> None:
    for name, first in (("two-even", 0.5), ("two-uneven", 0.7), ("three-even", 1 / 3)):
        cell, rng = ALL[name](World(5)), random.Random(0)
        rows = [cell.row(rng) for _ in range(4000)]
        if name in ENDLESS:
            share = sum(answer == prompt[1:-1] for prompt, answer in rows) / len(rows)
        else:
            firsts = {item.prompt: item.answers[0][0] for item in (*cell.validation, *cell.test)}
            share = sum(answer == firsts[prompt] for prompt, answer in rows) / len(rows)
        assert share == pytest.approx(first, abs=0.03)


def test_a_letter_in_ten_is_wrong_and_halves_change_places() -> None:
    rng, rule = random.Random(0), JUDGING["rule-noise"](World(5))
    pairs = [
        (a, b)
        for prompt, answer in (rule.row(rng) for _ in range(2000))
        for a, b in zip(answer, RULES[rule.rule](prompt[1:-1]), strict=True)
    ]
    assert sum(a != b for a, b in pairs) / len(pairs) == pytest.approx(0.1 * 23 / 24, abs=0.01)
    for prompt, answer in (JUDGING["new-rule"](World(5)).row(rng) for _ in range(20)):
        assert answer == (*prompt[3:5], *prompt[1:3])


def test_noise_of_one_value_and_two_values_under_noise() -> None:
    rng, same, two = random.Random(0), JUDGING["same-noise"](World(5)), JUDGING["two-noise"](World(5))
    answers = {item.prompt: item.answers[0][0] for item in (*same.validation, *same.test)}
    assert len({answer for prompt, answer in (same.row(rng) for _ in range(2000)) if answer != answers[prompt]}) == 1
    items = {item.prompt: item.answers for item in (*two.validation, *two.test)}
    rows = [two.row(rng) for _ in range(4000)]
    for place in (0, 1):
        share = sum(answer == items[prompt][place][0] for prompt, answer in rows) / len(rows)
        assert share == pytest.approx(0.35, abs=0.03)


def test_old_tasks_are_none_of_the_cell() -> None:
    world = World(5)
    tasks = old_items(world, next(iter(RULES)))
    asked = {item.prompt for items in tasks for item in items}
    assert len(tasks) == 3
    assert not {item.prompt[1:-1] for item in tasks[0]} & {
        entity for group in SHOWN if group != "old" for entity in world.facts[group]
    }
    assert len(asked) > 100


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "COURSE", Course(steps=2, batch=4, warmup=1))
    monkeypatch.setattr(pretraining, "SIZES", {size: Shape(16, 2, 1, 36, 14) for size in pretraining.SIZES})
    monkeypatch.setattr(engine, "SIZES", pretraining.SIZES)


def test_a_run_resumes_after_the_blocks_that_are_done(tmp_path, monkeypatch) -> None:
    small(monkeypatch)
    entries = [Entry.parse("nll", "nll"), Entry.parse("kept", {"name": "neg_p", "threshold": 0.2})]
    models, course = models_of((3, 4, 5, 6)), Course(steps=2, batch=4, warmup=1)
    calls, seen = [], []
    monkeypatch.setattr(engine, "train", lambda *given: calls.append(1) or train(*given))
    keys = {"cells": ["plain", "suffix"], "models": models, "rates": [1e-3, 1e-2], "course": course}
    first = run(entries, tmp_path, **keys, done=lambda number, count: seen.append((number, count)))
    assert len(calls) == len(seen) == seen[-1][1] == 8
    blocks = sorted((tmp_path / "results").iterdir())
    text = blocks[0].read_text()
    blocks[0].unlink()
    assert run(entries, tmp_path, **keys) == first
    assert len(calls) == 9
    assert blocks[0].read_text() == text
    assert len(first.rows) == 2 * 2 * 4 * 2
    assert first.objectives == ["nll", "kept"]
    assert first.models == ["small-3", "small-5", "large-4", "large-6"]
    assert Results.from_json(first.to_json()).mean("nll", "sampled").mean == pytest.approx(
        first.mean("nll", "sampled").mean, abs=1e-3
    )


def test_pretrained_models_are_kept_and_are_the_same_alone(tmp_path, monkeypatch) -> None:
    small(monkeypatch)
    models = [model for model in models_of((3, 4, 5, 6)) if model.size == "small"]
    both = pretrained(models, tmp_path / "a")
    assert torch.allclose(pretrained(models[1:], tmp_path / "b")[0], both[1], atol=1e-5)
    monkeypatch.setattr(pretraining, "train", None)
    assert torch.equal(pretrained(models, tmp_path / "a"), both)
    monkeypatch.setattr(pretraining, "RATE", 1.0)
    with pytest.raises(TypeError):  # another design is another model
        pretrained(models, tmp_path / "a")


def row(objective: str, model: int, rate: float, greedy: float, test: float, kept: float = 1.0, cell: str = "plain") -> dict:
    metrics = {"format": 1.0, **{f"{name}_{t:g}": greedy for name in ("sampled", "variation") for t in TEMPERATURES}}
    splits = {"validation": {**metrics, "greedy": greedy}, "test": {**metrics, "greedy": test}}
    return {"objective": objective, "cell": cell, "model": f"small-{model}", "rate": rate, "seed": 0, **splits, "kept": kept}


def test_a_rate_is_chosen_on_validation_and_judged_on_test() -> None:
    rows = [row("a", m, 1.0, 0.9, 0.2 + m / 10, kept=0.1) for m in range(2)]
    rows += [row("a", m, 2.0, 0.5, 0.8, kept=0.7) for m in range(2)]
    results = Results(tuple(rows))
    assert results.choice("a", "plain", "greedy").rate == 1.0
    assert results.mean("a", "greedy").by_model == pytest.approx({"small-0": 0.2, "small-1": 0.3})
    assert results.mean("a", "greedy").mean == pytest.approx(0.25)
    assert results.mean("a", "kept").mean == pytest.approx(0.1)
    assert results.mean("a", "greedy", least_kept=0.5).mean == pytest.approx(0.8)
    assert results.choice("a", "plain", "greedy", least_kept=0.99).rate == 2.0  # none keeps as much: the one that keeps most


def test_models_are_the_units_of_an_interval() -> None:
    values = [0.2, 0.4, 0.6]
    results = Results(tuple(row("a", m, 1.0, 0.5, value) for m, value in enumerate(values)))
    found = results.mean("a", "greedy")
    reach = 4.302653 * 0.2 / math.sqrt(3)
    assert found.interval == pytest.approx((max(0, 0.4 - reach), 0.4 + reach), abs=1e-5)
    assert Results(results.rows[:1]).mean("a", "greedy").interval is None


def test_differences_are_paired_by_model_and_ranks_know_what_is_better() -> None:
    rows = [row(name, m, 1.0, value, value + m / 10) for name, value in (("a", 0.1), ("b", 0.3)) for m in range(2)]
    results = Results(tuple(rows))
    assert results.difference("b", "a", "greedy").mean == pytest.approx(0.2)
    assert list(results.difference("b", "a", "greedy").by_model.values()) == pytest.approx([0.2, 0.2])
    assert [results.rank(name, "greedy") for name in "ab"] == [2, 1]
    assert [results.rank(name, "variation") for name in "ab"] == [1, 2]
    assert results.difference("a", "b", "variation").mean == pytest.approx(0.2)


def test_results_of_the_same_name_are_replaced() -> None:
    old, new = (Results((row("a", 0, 1.0, value, value),)) for value in (0.1, 0.2))
    assert (old + new).rows == new.rows


def test_temperatures_are_chosen_on_validation() -> None:
    rows = [row("a", m, 1.0, 0.5, 0.5) for m in range(2)]
    for each in rows:
        each["validation"]["sampled_0.25"], each["test"]["sampled_0.25"] = 0.9, 0.7
        each["validation"]["variation_0.5"], each["test"]["variation_0.5"] = 0.1, 0.3
    results = Results(tuple(rows))
    assert results.choice("a", "plain", "sampled") == (1.0, "sampled_0.25")
    assert results.mean("a", "sampled").mean == pytest.approx(0.7)
    assert results.mean("a", "variation").mean == pytest.approx(0.3)


def test_every_row_fits_the_longest_input() -> None:
    shape = pretraining.SIZES["large"]
    for name, world in itertools.product(ALL, (0, 1)):
        cell = ALL[name](World(world))
        rows = [(item.prompt, answer) for item in cell.test for answer, _ in item.answers]
        assert stacked([rows]).is_target.shape[-1] <= shape.length
    assert stacked([World(0).pretraining_rows(8, 4, random.Random(0))]).is_target.shape[-1] == shape.length
