"""The study of `anneal`: its regrets, recomputed from the arms' examples by plain loops."""

import argparse
import random
import re
import statistics
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import anneal_study
import continuum
from anneal_study import ANNEAL, DESIGNS, FIXED, LEARNING_RATES
from bl_trainer.pages import render
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
        found[i] = {"setting": setting, "rulers": rulers, "base": {}, "loss": None, "items": items}
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
    command = "python scripts/anneal_study.py --seeds 3 --full --pretraining_seed 1 --cells strong weak"
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


DOCS = Path(__file__).parent.parent / "docs"
LENGTHS = [f"{steps} steps, {name}" for steps in (100, 50, 200) for name in continuum.RULERS.values()]


def tables_in(text):
    """Return what stands above the first heading of a table, and heading -> what stands below it."""
    above, *parts = re.split(r"\*\*(\d+ steps, .*)\*\*\n", text)
    return above, dict(zip(parts[::2], parts[1::2], strict=True))


def rows_in(table):
    """Return the cells of a Markdown table's rows, its head first."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return [lines[0], *lines[2:]]


def test_the_tables_of_the_study_agree_with_each_other():
    """Means and worst cells of the summaries are those over the rows of cells."""
    _, tables = tables_in((DOCS / "anneal-study.md").read_text(encoding="utf-8"))
    assert list(tables) == LENGTHS
    for heading, part in tables.items():
        summary, cells = map(rows_in, part.strip().split("\n\n"))
        is_main = heading in LENGTHS[:2]
        names = [anneal_study.name_of(arm) for arm in [ANNEAL, *(DESIGNS if is_main else []), *FIXED]]
        assert cells[0][3:] == names == [row[0] for row in summary[1:]]
        assert len(cells[1:]) == (8 if is_main else 4)
        for name, mean, worst, *_ in summary[1:]:
            regrets = {cell[0]: float(cell[cells[0].index(name)].split()[0]) for cell in cells[1:]}
            assert float(mean.split()[0]) == pytest.approx(statistics.mean(regrets.values()), abs=0.001)
            value, label = worst.rsplit(": ", 1)
            assert float(value.split()[0]) == max(regrets.values()) == regrets[label]


def test_the_page_agrees_with_the_study():
    """Its tables are those of the study, and whether it calls the goal met is what they say."""
    _, whole = tables_in((DOCS / "anneal-study.md").read_text(encoding="utf-8"))
    page = (DOCS / "anneal.md").read_text(encoding="utf-8")
    text, shown = tables_in(page.partition("\n## The study\n")[2].partition("\n## ")[0])
    assert list(shown) == LENGTHS
    for heading, table in shown.items():
        assert table.strip() == whole[heading].strip().split("\n\n")[0]
    flat = " ".join(text.split())
    goal = [tuple(cell.split()[0].strip("+") for cell in rows_in(shown[heading])[1][1:3]) for heading in LENGTHS[:2]]
    assert f"greedy {goal[0][0]} and {goal[0][1]}, sampled {goal[1][0]} and {goal[1][1]}" in flat
    met = all(float(mean) <= anneal_study.MEAN_GOAL and float(worst) <= anneal_study.WORST_GOAL for mean, worst in goal)
    assert ("in the worst cell, is met" in flat) == met != ("in the worst cell, is missed" in flat)


def test_every_figure_of_the_page_is_the_one_that_it_speaks_of():
    _, whole = tables_in((DOCS / "anneal-study.md").read_text(encoding="utf-8"))
    page = (DOCS / "anneal.md").read_text(encoding="utf-8")
    text, _ = tables_in(page.partition("\n## The study\n")[2].partition("\n## ")[0])
    summaries, cells = {}, {}
    for heading, part in whole.items():
        steps, ruler = re.match(r"(\d+) steps, (\w+)", heading).groups()
        summary, by_cell = map(rows_in, part.strip().split("\n\n"))
        for arm, *row in summary[1:]:
            summaries[int(steps), ruler, arm] = [float(cell.split()[0].rstrip(":")) for cell in row]
        for label, best, untrained, *regrets in by_cell[1:]:
            best = float(best.split(": ")[1].split()[0])
            found = {name: [float(each) for each in re.findall(r"[+-]?\d\.\d{3}\b", cell)[:3]]
                     for name, cell in zip(by_cell[0][3:], regrets, strict=True)}  # fmt: skip
            cells[int(steps), ruler, label] = best, float(untrained), found

    def mean_worst(steps, ruler, arm="anneal"):
        return summaries[steps, ruler, arm][:2]

    def at_one_rate(ruler, arm="anneal"):
        return summaries[100, ruler, arm][2:4]

    def apart(steps, ruler, arm="anneal"):
        return summaries[steps, ruler, arm][5]

    def behind(steps, ruler, cell, arm):
        return cells[steps, ruler, f"{cell}, 30% noise"][2][arm]

    def has(ruler, cell, arm, steps=100):
        best, untrained, found = cells[steps, ruler, f"{cell}, 30% noise"]
        return best - (untrained if arm is None else found[arm][0])

    def without_mid_rule(arm):
        parts = [key for key in cells if key[:2] == (100, "sampled") and key[2] != "mid-rule, 30% noise"]
        return statistics.mean(cells[key][2][arm][0] for key in parts)

    ahead = [-behind(200, "sampled", cell, "anneal")[0] for cell in ("mid-rule", "mid-fact", "weak")]
    expected = [
        *(*mean_worst(100, "greedy"), *mean_worst(100, "sampled")),
        *(cells[100, "sampled", "mid-rule, 30% noise"][0], has("sampled", "mid-rule", "anneal")),
        *(*behind(100, "sampled", "mid-rule", "anneal")[1:], without_mid_rule("anneal")),
        *(*mean_worst(50, "greedy"), *mean_worst(50, "sampled")),
        *(has("greedy", "mid-rule", "anneal", 50), -behind(50, "greedy", "mid-rule", "anneal")[0]),
        *(*behind(50, "greedy", "mid-rule", "anneal")[1:], -behind(50, "sampled", "mid-rule", "anneal")[0]),
        *(*mean_worst(200, "greedy"), *mean_worst(200, "sampled"), min(ahead), max(ahead)),
        *(apart(100, "sampled"), mean_worst(100, "sampled")[1]),
        *(apart(100, "greedy", "power 0.5"), mean_worst(100, "greedy", "power 0.5")[1]),
        *(apart(200, "sampled"), mean_worst(200, "sampled")[1]),
        *(behind(100, "greedy", "mid-rule", "power 0.5")[0], behind(50, "greedy", "mid-rule", "power 0.5")[0]),
        *(behind(100, "greedy", "strong", "nll")[0], *mean_worst(100, "sampled", "power 0.5"), without_mid_rule("power 0.5")),
        *(mean_worst(200, "greedy", "power 0.5")[1], mean_worst(200, "sampled", "power 0.5")[1]),
        *(has(ruler, "strong", arm) for arm in ("anneal", None, "power 10") for ruler in ("greedy", "sampled")),
        mean_worst(100, "greedy", "power 10")[1],
        *(at_one_rate("greedy")[0], at_one_rate("sampled")[0], at_one_rate("greedy")[1], at_one_rate("sampled")[1]),
        *(at_one_rate("greedy", "nll")[0], at_one_rate("sampled", "power 0.5")[1]),
        *(*mean_worst(100, "greedy", "conflict"), *mean_worst(100, "sampled", "conflict")),
        *(*mean_worst(100, "greedy", "linear"), *mean_worst(100, "sampled", "linear")),
        behind(100, "greedy", "mid-rule", "deft")[0],
        *(behind(100, "sampled", "strong", arm)[0] for arm in ("late", "switch")),
        behind(100, "greedy", "mid-rule", "gate")[0],
    ]
    figures = [float(figure) for figure in re.findall(r"(?<![\w.])[+-]?\d\.\d{3}\b", text)]
    assert figures == pytest.approx(expected, abs=0.0011)
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(
        r"within (\d\.\d{3}) \(greedy\) and (\d\.\d{3}) \(sampled\) of the best of four others in every", readme
    )
    worst = [max(mean_worst(steps, ruler)[1] for steps in (50, 100, 200)) for ruler in ("greedy", "sampled")]
    assert [float(figure) for figure in said] == worst
    assert without_mid_rule("anneal") == pytest.approx(without_mid_rule("power 0.5"), abs=0.001)
    assert max(ahead) - min(ahead) < 0.01
    for cell in ("mid-rule", "mid-fact", "weak"):
        assert behind(200, "sampled", cell, "anneal")[2] < 0  # beyond chance
    assert behind(50, "sampled", "mid-rule", "anneal")[2] < 0
    assert apart(50, "greedy") == mean_worst(50, "greedy")[1]
    assert apart(50, "sampled") == mean_worst(50, "sampled")[1]
    met = {
        (steps, arm)
        for steps, _, arm in summaries
        if all(
            mean_worst(steps, ruler, arm)[0] <= anneal_study.MEAN_GOAL
            and mean_worst(steps, ruler, arm)[1] <= anneal_study.WORST_GOAL
            for ruler in ("greedy", "sampled")
        )
    }
    assert met == {(100, "linear"), (100, "conflict"), (50, "anneal")}
