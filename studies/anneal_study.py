"""How near `anneal` comes to the best fixed objective: `python studies/anneal_study.py [--folder anneal] [--jobs 2] [--full]`.

Trains on each cell of the miniature continuum with four fixed objectives and with `anneal`; `--full` adds the other designs
of `anneal_designs`, and runs of half and of twice the steps. An objective's regret in a cell is by how much the best fixed
one there exceeds it in exact match, each at its best learning rate. Leaves anneal.md and anneal.svg in `folder`; what is
done is kept there, and the same command goes on; after a change of an objective take another folder.

Pretraining seeds 0 to 3 (`--pretraining_seed`) are those by which the design and its numbers were chosen.
"""

import argparse
import itertools
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bl_trainer.pages.figures import render
from bl_trainer.sweep.design import describe
from bl_trainer.sweep.differences import difference
from bl_trainer.sweep.leaderboard import Leaderboard, compare
from continuum import NEG_P, NLL, RULERS, Scored, begin, boards_of, call, means, quiet, read_plan, row_of, sweep, values_of
from miniature import CELLS, CORRUPTIONS, STEPS, Miniature, cell_folder, prepare

FIXED: list[dict[str, Any]] = [
    NLL,
    {"objective": {"name": "power", "alpha": 0.5}},
    NEG_P,
    {"objective": {"name": "power", "alpha": 10}},
]
ANNEAL = {"objective": "anneal"}
# alpha = c e^-H without a schedule
TEMPERED: list[dict[str, Any]] = [{"objective": {"name": "anneal", "start": c, "end": c}} for c in (0.5, 1)]
DESIGNS = [{"objective": f"anneal_designs:{name}"} for name in ("linear", "late", "switch", "deft", "conflict", "gate")]
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
PRETRAINING_SEED, FIRST_SEED = 4, 100
MEAN_GOAL, WORST_GOAL = 0.03, 0.08


@dataclass
class Cell:
    """A cell of the study. `boards`: ruler -> leaderboard of all its arms. `base`: ruler -> the pretrained model's. `rates`:
    the learning rates tried."""

    name: str
    corruption: float
    boards: dict[str, Leaderboard]
    base: dict[str, float]
    rates: list[float]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.corruption:.0%} noise"


@dataclass
class Regret:
    """By how much the best fixed objective exceeds another one in a cell.

    `interval`: 95 %, over seeds and held-out examples, None with one seed. `by_seed`: the same for each seed, whose mean is
    `mean`. `rate`: the other one's learning rate.
    """

    mean: float
    interval: tuple[float, float] | None
    by_seed: dict[int, float]
    rate: float


def scores(board: Leaderboard, arms: list[int]) -> dict[int, float]:
    """Return the ruler by seed."""
    return {board.arms[i].setting["seed"]: board.arms[i].rulers[board.plan.rank_by] for i in arms}


def arms_at(board: Leaderboard, arm: dict[str, Any], rate: float) -> list[int]:
    """Return the arms of an objective at a learning rate, one for each seed."""
    settings = {i: result.setting for i, result in board.arms.items()}
    return [i for i, one in settings.items() if board.plan.group_of(one) == arm and one["learning_rate"] == rate]


def best_fixed(board: Leaderboard) -> dict[str, Any]:
    """Return the fixed objective of the highest mean, at its best learning rate."""
    tried = [arm for arm in FIXED if any(row.group == arm for row in board.rows)]
    return max(tried, key=lambda arm: row_of(board, arm).values[board.plan.rank_by][0])


def regret(board: Leaderboard, arm: dict[str, Any], rate: float | None = None) -> Regret:
    """Return an objective's regret in a cell, at its own best learning rate, or at `rate`; the best fixed one has its best."""
    ruler, row = board.plan.rank_by, row_of(board, arm)
    arms = row.arms
    if rate is not None:
        arms = arms_at(board, arm, rate)
    best = row_of(board, best_fixed(board)).arms
    found = compare(ruler, board.arms, lambda i: values_of(board.arms[i], ruler), best, arms)
    ours = scores(board, arms)
    by_seed = {seed: value - ours[seed] for seed, value in scores(board, best).items()}
    return Regret(found.mean, found.interval, by_seed, board.arms[arms[0]].setting["learning_rate"])


def regret_apart(board: Leaderboard, arm: dict[str, Any]) -> Regret:
    """Return an objective's regret in a cell, of each seed at the learning rates, and against the fixed objective, of the
    highest mean over the other seeds; of equals the least rate."""

    def runs(arms: list[dict[str, Any]]) -> list[dict[int, float]]:
        found = (scores(board, arms_at(board, *each)) for each in itertools.product(arms, LEARNING_RATES))
        return [run for run in found if run]

    def judged(runs: list[dict[int, float]], seed: int) -> float:
        return max(runs, key=lambda run: np.mean([value for other, value in run.items() if other != seed]))[seed]

    own, fixed = runs([arm]), runs(FIXED)
    by_seed = {seed: judged(fixed, seed) - judged(own, seed) for seed in own[0]}
    return Regret(float(np.mean(list(by_seed.values()))), None, by_seed, math.nan)


def mean_regret(regrets: list[Regret]) -> tuple[float, float | None]:
    """Return the mean regret over cells, and half its 95 % interval over seeds, None with one seed."""
    by_seed = np.array([[each.by_seed[seed] for each in regrets] for seed in regrets[0].by_seed]).mean(axis=1)
    interval = difference(float(by_seed.mean()), {"seeds": by_seed} if len(by_seed) > 1 else {}).interval
    return float(by_seed.mean()), None if interval is None else (interval[1] - interval[0]) / 2


def common_rate(cells: list[Cell], arm: dict[str, Any], ruler: str) -> float:
    """Return the learning rate at which an objective's mean regret over cells is least."""
    return min(LEARNING_RATES, key=lambda rate: mean_regret([regret(cell.boards[ruler], arm, rate) for cell in cells])[0])


def arms_of(cells: list[Cell]) -> list[dict[str, Any]]:
    """Return the objectives that every cell has, `anneal` first and the fixed ones last."""
    known = [[row.group for row in next(iter(cell.boards.values())).rows] for cell in cells]
    return [arm for arm in [ANNEAL, *TEMPERED, *DESIGNS, *FIXED] if all(arm in groups for groups in known)]


def summary(cells: list[Cell], ruler: str) -> str:
    """Return a Markdown table of mean and worst regret, at the best learning rate of each cell, at one for all, and, of several
    seeds, at the best of the other seeds."""
    apart = len(regret(cells[0].boards[ruler], ANNEAL).by_seed) > 1
    lines = ["| objective | mean regret | worst cell | at one rate: mean | worst cell |", "|---|---|---|---|---|"]
    if apart:
        lines = [lines[0] + " at the other seeds' rate: mean | worst cell |", lines[1] + "---|---|"]
    for arm in arms_of(cells):
        one = common_rate(cells, arm, ruler)
        parts = [name_of(arm)]
        for rate in (None, one):
            regrets = {cell.label: regret(cell.boards[ruler], arm, rate) for cell in cells}
            mean, half = mean_regret(list(regrets.values()))
            worst = max(regrets, key=lambda label: regrets[label].mean)
            parts.append(f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}") + ("" if rate is None else f" @ {one:g}"))
            parts.append(f"{shown(regrets[worst])}: {worst}")
        if apart:
            regrets = {cell.label: regret_apart(cell.boards[ruler], arm) for cell in cells}
            mean, half = mean_regret(list(regrets.values()))
            worst = max(regrets, key=lambda label: regrets[label].mean)
            parts += [f"{mean:+.3f} ± {half:.3f}", f"{regrets[worst].mean:+.3f}: {worst}"]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def by_cell(cells: list[Cell], ruler: str) -> str:
    """Return a Markdown table of each cell's best fixed objective and of all regrets, that of no training among them."""
    arms = arms_of(cells)
    lines = ["| cell | best fixed | untrained | " + " | ".join(map(name_of, arms)) + " |", "|---" * (len(arms) + 3) + "|"]
    for cell in cells:
        board = cell.boards[ruler]
        best = row_of(board, best_fixed(board))
        value = best.values[ruler][0]
        head = f"| {cell.label} | {name_of(best.group)}: {value:.3f} @ {at_rate(cell, best.best['learning_rate'])} | "
        head += f"{value - cell.base[ruler]:+.3f} | "
        found = (regret(board, arm) for arm in arms)
        lines.append(head + " | ".join(f"{shown(each)} @ {at_rate(cell, each.rate)}" for each in found) + " |")
    return "\n".join(lines)


def at_rate(cell: Cell, rate: float) -> str:
    """Return a learning rate for people, and whether it is the least or the greatest tried."""
    return f"{rate:g}" + (" (edge)" if rate in (min(cell.rates), max(cell.rates)) else "")


def name_of(arm: dict[str, Any]) -> str:
    """Return an objective for people."""
    return describe(arm).replace("anneal_designs:", "")


def shown(regret: Regret) -> str:
    """Return a regret with its interval."""
    low, high = regret.interval or (regret.mean, regret.mean)
    return f"{regret.mean:+.3f} ({low:+.3f} to {high:+.3f})" if regret.interval else f"{regret.mean:+.3f}"


def draw(cells: list[Cell], figure: Figure, theme: Any) -> None:
    """Draw each objective's regret in each cell, and its mean."""
    arms, least = arms_of(cells), -0.05
    for axes, (ruler, name) in zip(figure.subplots(1, len(RULERS), sharey=True), RULERS.items(), strict=True):
        for k, cell in enumerate(cells):
            place = [x + (k - (len(cells) - 1) / 2) * 0.09 for x in range(len(arms))]
            colour = theme[3][list(CELLS).index(cell.name)]
            fill = colour if cell.corruption else "none"
            values = [regret(cell.boards[ruler], arm).mean for arm in arms]
            least = min(least, min(values) - 0.05)
            axes.plot(place, values, "o", ms=4, color=colour, markerfacecolor=fill, label=cell.label)
        means = [mean_regret([regret(cell.boards[ruler], arm) for cell in cells])[0] for arm in arms]
        axes.hlines(means, [x - 0.4 for x in range(len(arms))], [x + 0.4 for x in range(len(arms))], color=theme[0], lw=1)
        axes.axhline(WORST_GOAL, color=theme[1], lw=0.8, ls=":")
        axes.set(xticks=range(len(arms)), title=f"Regret, {name}")
        axes.set_xticklabels(map(name_of, arms), rotation=45, ha="right", size=7)
        axes.title.set_size(8.5)
    figure.axes[0].set_ylim(least, 1.03)  # of both: they share it
    figure.axes[0].legend(fontsize=6.5, loc="upper left")


def report(studies: dict[int, list[Cell]], options: argparse.Namespace) -> str:
    """Return anneal.md."""
    first: Any = studies[STEPS][0].boards["greedy"].arms[0]
    examples = len(first.items["greedy"])
    count = sum(len(cell.boards["greedy"].arms) for cells in studies.values() for cell in cells)
    seed = options.pretraining_seed
    command = f"python studies/anneal_study.py --seeds {options.seeds}" + (" --full" if options.full else "")
    command += "" if seed == PRETRAINING_SEED else f" --pretraining_seed {seed}"
    names = list(dict.fromkeys(cell.name for cell in studies[STEPS]))
    command += "" if names == list(CELLS) else f" --cells {' '.join(names)}"
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    parts = [
        f"`{command}`, {count} arms: pretraining seed {seed}, seeds {FIRST_SEED} to "
        f"{FIRST_SEED + options.seeds - 1}, learning rates {rates}. Regret is in exact match on {examples} clean held-out "
        "examples, each objective at its best rate in a cell (@; edge: the least or the greatest tried), or at the one that is "
        "best for it on average, or each seed at the rate, and against the fixed objective, that are best by the other seeds. "
        "0 is the best fixed objective of the cell; below 0 is better than any. In brackets 95 % intervals over seeds and "
        "examples, of means (±) over seeds."
    ]
    for steps, cells in studies.items():
        for ruler, name in RULERS.items():
            parts.append(f"**{steps} steps, {name}**")
            parts += [summary(cells, ruler), by_cell(cells, ruler)]
    return "\n\n".join(parts) + "\n"


def run_cell(
    folder: Path,
    cell: str,
    corruption: float,
    steps: int,
    seeds: int,
    groups: dict[str, list[dict[str, Any]]],
    run: Callable[..., dict[int, Scored]],
    base: dict[str, float],
) -> Cell:
    """Run what is left of a cell's arms, each group of objectives as a sweep of its own, and return them all."""
    home = cell_folder(folder, cell, corruption)
    results: list[Scored] = []
    for name, arms in groups.items():
        name = f"{name}-{steps}"
        rest = {"learning_rate": LEARNING_RATES, "seed": list(range(FIRST_SEED, FIRST_SEED + seeds))}
        rest |= {} if steps == STEPS else {"max_steps": [steps]}
        plan = read_plan(home, name, {"arms": arms, **rest})
        results += run(plan, folder / "sweeps" / home.name / name, cell, corruption).values()  # outside of the data
    for result in results:
        result.setting.pop("max_steps", None)  # the same for all, and no part of an objective's name
    return Cell(cell, corruption, boards_of(plan, dict(enumerate(results))), base, LEARNING_RATES)


def main() -> None:
    """Prepare, run the cells, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("anneal"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretraining_seed", type=int, default=PRETRAINING_SEED)
    parser.add_argument("--full", action="store_true", help="the other designs too, and half and twice the steps")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    options = parser.parse_args()
    quiet()
    prepare(options.folder, options.pretraining_seed)
    groups = {"fixed": FIXED, "anneal": [ANNEAL]}
    studies: dict[int, list[Cell]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, begin, (Miniature, options.folder)) as pool:
        run = partial(sweep, pool=pool, jobs=options.jobs)
        bases = {}
        for cell in options.cells:  # the mean over seeds, by which samples are drawn
            drawn = [pool.submit(call, "evaluate", None, cell, FIRST_SEED + seed) for seed in range(options.seeds)]
            each = [means(future.result()) for future in drawn]
            bases[cell] = {ruler: float(np.mean([one[ruler] for one in each])) for ruler in RULERS}
        for steps in (STEPS, STEPS // 2, 2 * STEPS) if options.full else (STEPS,):
            mine = {**groups, "designs": DESIGNS} if options.full and steps == STEPS else groups
            noises = sorted(CORRUPTIONS if steps == STEPS else CORRUPTIONS[1:], reverse=True)
            studies[steps] = [
                run_cell(options.folder, cell, noise, steps, options.seeds, mine, run, bases[cell])
                for noise, cell in itertools.product(noises, options.cells)
            ]
    text = report(studies, options)
    (options.folder / "anneal.md").write_text(text, encoding="utf-8")
    (options.folder / "anneal.svg").write_bytes(render(partial(draw, studies[STEPS]), (7.2, 4.2), "light", "svg"))
    print(text)


if __name__ == "__main__":
    main()
