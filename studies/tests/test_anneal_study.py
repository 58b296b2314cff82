"""The study of `anneal`: its regrets, recomputed from the arms' examples by plain loops."""

import argparse
import random
import re
import statistics
from functools import partial

import pytest

import anneal_study
import continuum
from anneal_study import ANNEAL, DESIGNS, FIXED, LEARNING_RATES
from bl_trainer.pages.figures import render
from miniature import prepare

BASE = {"greedy": 0.25, "sampled": 0.125}
SEEDS, EXAMPLES = 3, 1009  # of which no two arms have equally many right


def invented(plan, folder, cell, corruption, ran):
    """Stands in for `continuum.sweep`: arms of invented outcomes, which go to `ran` too."""
    found = {}
    for i, setting in enumerate(plan.listed()):
        rng = random.Random(f"{cell} {corruption} {setting}")
        chance = rng.random()
        items = {ruler: [int(rng.random() < chance) for _ in range(EXAMPLES)] for ruler in ("greedy", "sampled")}
        ran.append((cell, dict(setting), items))
        rulers = continuum.means({**items, "nll": [1.0], "prob": [1.0], "top1": [1], "targets": [9]})
        found[i] = continuum.Scored(i, setting, rulers, items=items)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What recipes and plans of the cells need, without a pretrained model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniature.POOL", 20)
        patch.setattr("miniature.HELD_OUT", 5)
        patch.setattr("miniature.PRETRAINING", {"steps": 1, "most_further_steps": 1, "batch": 2} | RATES)
        folder = tmp_path_factory.mktemp("anneal")
        prepare(folder, 1)
    return folder


RATES = {"learning_rate": 1e-3, "further_learning_rate": 1e-3}


@pytest.fixture(scope="module")
def study(home):
    """Two cells with all objectives, and what was run for them."""
    ran = []
    run = partial(invented, ran=ran)
    groups = {"fixed": FIXED, "anneal": [ANNEAL], "designs": DESIGNS}
    cells = [anneal_study.run_cell(home, cell, 0.3, 100, SEEDS, groups, run, BASE) for cell in ("strong", "weak")]
    return cells, ran


def outcome(ran, cell, objective, rate, ruler):
    """Return the ruler by seed, in the order of seeds, from the arms themselves."""
    mine = {**objective, "learning_rate": rate}
    found = {setting["seed"]: items[ruler] for name, setting, items in ran if name == cell and mine.items() <= setting.items()}
    return [statistics.mean(found[seed]) for seed in sorted(found)]


@pytest.mark.parametrize("ruler", ["greedy", "sampled"])
def test_regret_is_best_fixed_minus_own_best(study, ruler):
    cells, ran = study
    for arm in [ANNEAL, *DESIGNS, *FIXED]:
        found, expected = [], []
        for cell in cells:
            by_rate = partial(outcome, ran, cell.name, ruler=ruler)
            fixed = max((by_rate(each, rate) for each in FIXED for rate in LEARNING_RATES), key=statistics.mean)
            own = max((by_rate(arm, rate) for rate in LEARNING_RATES), key=statistics.mean)
            regret = anneal_study.regret(cell.boards[ruler], arm)
            assert regret.mean == pytest.approx(statistics.mean(fixed) - statistics.mean(own))
            assert by_rate(arm, regret.rate) == own
            low, high = regret.interval
            assert low <= regret.mean <= high
            for rate in LEARNING_RATES:
                at = anneal_study.regret(cell.boards[ruler], arm, rate)
                assert at.mean == pytest.approx(statistics.mean(fixed) - statistics.mean(by_rate(arm, rate)))
                assert at.mean >= regret.mean - 1e-12
            found.append(regret)
            expected.append([a - b for a, b in zip(fixed, own, strict=True)])
        mean, half = anneal_study.mean_regret(found)
        by_seed = [statistics.mean(seed) for seed in zip(*expected, strict=True)]
        assert mean == pytest.approx(statistics.mean(by_seed))
        assert half == pytest.approx(4.302653 * statistics.stdev(by_seed) / SEEDS**0.5, rel=1e-5)  # t of 2 degrees


@pytest.mark.parametrize("ruler", ["greedy", "sampled"])
def test_a_seed_is_judged_by_what_the_others_chose(study, ruler):
    cells, ran = study
    for cell in cells:
        by_rate = partial(outcome, ran, cell.name, ruler=ruler)
        for arm in [ANNEAL, *DESIGNS, *FIXED]:
            expected = {}
            for k in range(SEEDS):
                fixed = [by_rate(each, rate) for each in FIXED for rate in LEARNING_RATES]
                own = [by_rate(arm, rate) for rate in LEARNING_RATES]
                chosen = [max(runs, key=lambda run: sum(run[:k] + run[k + 1 :])) for runs in (fixed, own)]
                expected[anneal_study.FIRST_SEED + k] = chosen[0][k] - chosen[1][k]
            found = anneal_study.regret_apart(cell.boards[ruler], arm)
            assert found.by_seed == pytest.approx(expected)
            assert found.mean == pytest.approx(statistics.mean(expected.values()))


def test_best_fixed_has_no_regret(study):
    for cell in study[0]:
        for board in cell.boards.values():
            regrets = [anneal_study.regret(board, arm).mean for arm in FIXED]
            assert min(regrets) == pytest.approx(0, abs=1e-12)


def test_common_rate_is_the_one_of_least_mean_regret(study):
    cells, _ = study
    for arm in FIXED:
        rate = anneal_study.common_rate(cells, arm, "greedy")
        regrets = {
            each: statistics.mean(anneal_study.regret(cell.boards["greedy"], arm, each).mean for cell in cells)
            for each in LEARNING_RATES
        }
        assert regrets[rate] == min(regrets.values())


def test_the_report_holds_the_regrets(study):
    cells, _ = study
    options = argparse.Namespace(seeds=SEEDS, full=True, pretraining_seed=1)
    text = anneal_study.report({100: cells}, options)
    count = 2 * SEEDS * len(LEARNING_RATES) * len([ANNEAL, *DESIGNS, *FIXED])
    command = "python studies/anneal_study.py --seeds 3 --full --pretraining_seed 1 --cells strong weak"
    assert text.startswith(f"`{command}`, {count} arms: pretraining seed 1,")
    line = next(line for line in text.splitlines() if line.startswith("| anneal |"))
    regrets = {cell.label: anneal_study.regret(cell.boards["greedy"], ANNEAL).mean for cell in cells}
    worst = max(regrets, key=regrets.get)
    assert line.startswith(f"| anneal | {statistics.mean(regrets.values()):+.3f} ± ")
    assert re.search(rf"\| {re.escape(f'{regrets[worst]:+.3f}')} \(.*\): {worst} \|", line)
    line = next(line for line in text.splitlines() if line.startswith("| weak, 30% noise | "))
    best = max(row.values["greedy"][0] for row in cells[1].boards["greedy"].rows if row.group in FIXED)
    assert line.split(" | ")[2] == f"{best - 0.25:+.3f}"
    assert {part.endswith("(edge)") for part in line.split(" | ") if " @ 0.01" in part} <= {True}
    assert not any(part.endswith("(edge)") for part in line.split(" | ") if " @ 0.001" in part or " @ 0.003" in part)
    assert b"Regret, greedy" in render(partial(anneal_study.draw, cells), (7.2, 4.2), "light", "svg")


def test_other_steps_are_swept_apart(home):
    ran = []
    groups = {"fixed": FIXED, "anneal": [ANNEAL]}
    cell = anneal_study.run_cell(home, "weak", 0.3, 50, 1, groups, partial(invented, ran=ran), BASE)
    assert {setting["max_steps"] for _, setting, _ in ran} == {50}
    assert {setting["seed"] for _, setting, _ in ran} == {anneal_study.FIRST_SEED}
    assert anneal_study.regret(cell.boards["greedy"], ANNEAL).interval  # over examples alone
    mean, half = anneal_study.mean_regret([anneal_study.regret(cell.boards["greedy"], ANNEAL)])
    assert half is None
    assert mean == anneal_study.regret(cell.boards["greedy"], ANNEAL).mean
