"""The continuum in miniature: `python studies/continuum.py [--folder continuum] [--jobs 2] [--seeds 5] [--full]`.

Sweeps each of `miniature`'s cells over objectives, learning rates and seeds, and judges by exact match on clean held-out
examples, greedy and sampled at temperature 1. Leaves continuum.md and continuum.svg in `folder`; what is done is kept
there, and the same command goes on.
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import transformers
import yaml
from matplotlib.figure import Figure

from bl_trainer.pages.figures import render
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.sweep.leaderboard import Leaderboard, Row, compare, rank
from bl_trainer.sweep.outcome import Result, arm_folder, finished
from bl_trainer.sweep.plan import Plan
from bl_trainer.sweep.study import Study
from miniature import CELLS, CORRUPTIONS, Miniature, cell_folder, prepare

NLL, NEG_P = {"objective": "nll"}, {"objective": "neg_p"}
ARMS: list[dict[str, Any]] = [
    NLL,
    {"objective": {"name": "power", "alpha": 0.5}},
    NEG_P,
    {"objective": {"name": "power", "alpha": 10}},
    {"objective": "nll", "threshold": {"above": 0.2}},
    {"objective": "nll", "threshold": {"below": 0.2}},
]
LEARNING_RATES = [3e-4, 1e-3, 3e-3, 1e-2]
RULERS = {"greedy": "greedy", "sampled": "sampled at temperature 1"}

PER_TOKEN = {"accuracy": "top1", "nll": "nll", "target_prob": "prob", "drift": "kl"}  # ruler -> sums by held-out example

_MINE: dict[str, Any] = {}  # a worker process's


def quiet() -> None:
    """Keep the libraries from printing what would be printed for each arm."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def begin(make: Callable[..., Any], *args: Any) -> None:
    """Load what has arms in a worker process: `make(*args)`."""
    quiet()
    _MINE["model"] = make(*args)
    gc.collect()
    gc.freeze()  # accelerate collects garbage after each arm, and would go through all that is loaded


def call(method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of what the worker has loaded."""
    return getattr(_MINE["model"], method)(*args, **kwargs)


def means(items: dict[str, Any]) -> dict[str, float]:
    """Return the rulers that numbers by held-out example make: of each target token, or of each example."""
    tokens = sum(items["targets"])
    found = {name: sum(items[key]) / tokens for name, key in PER_TOKEN.items() if key in items}
    own = items.keys() - {"targets", "cluster", *PER_TOKEN.values()}
    return found | {name: sum(items[name]) / len(items[name]) for name in items if name in own}


def plan_of(folder: Path, cell: str, corruption: float, seeds: int, full: bool) -> Plan:
    """Return what is to be run of a cell; of clean targets NLL and neg_p alone unless `full`."""
    arms = ARMS if full or corruption else [NLL, NEG_P]
    sweep = {"arms": arms, "learning_rate": LEARNING_RATES, "seed": list(range(seeds))}
    return read_plan(cell_folder(folder, cell, corruption), "sweep", sweep)


def read_plan(home: Path, name: str, sweep: dict[str, Any]) -> Plan:
    """Write the sweep file `home`/`name`.yaml, and return what it makes of the cell's recipe, to be run in `home`/`name`."""
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    return replace(Plan.read(Recipe.read(["--config", str(home / "recipe.yaml")]), str(path), home / name), rank_by="greedy")


@dataclass(frozen=True)
class Scored(Result):
    """A run's result, with `items`: name -> value of each held-out example."""

    items: dict[str, Any] = field(default_factory=dict)


def sweep(plan: Plan, folder: Path, cell: str, corruption: float, pool: Executor, jobs: int) -> dict[int, Scored]:
    """Run what is left in `folder` of a cell's arms, and return all their results."""
    begun = time.monotonic()

    def run_arm(index: int, setting: dict[str, Any], trial: Any, job: int) -> float:
        place = arm_folder(folder, index)
        result = Scored.read(place)
        if result is None:
            items = pool.submit(call, "arm", cell, corruption, **setting, **length_of(plan, setting)).result()
            counts = {"examples": len(items["targets"]), "tokens": sum(items["targets"])}
            result = Scored(index, setting, means(items), **counts, items=items)
            place.mkdir(parents=True, exist_ok=True)
            result.write(place)
        return result.rulers[plan.rank_by]

    Study(plan, folder).run(run_arm, jobs, False)
    print(f"{folder.parent.name}/{folder.name}: {plan.count} arms, {time.monotonic() - begun:.0f} s", flush=True)
    return finished(plan.count, folder, Scored)


def length_of(plan: Plan, setting: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that cut a run to a short sweep's budget."""
    cut = plan.recipe_of(setting) if plan.is_staged else {}
    return {key: cut[key] for key in ("max_steps", "warmup_steps") if key in cut and key not in setting}


def boards_of(plan: Plan, arms: dict[int, Scored]) -> dict[str, Leaderboard]:
    """Return the leaderboard of results by arm, by each ruler."""
    return {name: board_by(name, plan, arms) for name in RULERS}


def board_by(ruler: str, plan: Plan, arms: Mapping[int, Scored]) -> Leaderboard:
    """Return the leaderboard of results by arm, for another ruler."""
    return rank(replace(plan, rank_by=ruler), arms, lambda i: values_of(arms[i], ruler), {})


def values_of(result: Any, ruler: str) -> dict[str, tuple[float, float]]:
    """Return weight and weighted value by held-out example, or by `cluster` of such."""
    items, key = result.items, PER_TOKEN.get(ruler)
    values = items[key or ruler]
    weights = [1.0] * len(values) if key is None else items["targets"]
    sums: dict[str, tuple[float, float]] = {}
    for name, weight, value in zip(items.get("cluster", range(len(values))), weights, values, strict=True):
        before = sums.get(str(name), (0.0, 0.0))
        sums[str(name)] = (before[0] + weight, before[1] + value)
    return sums


def row_of(board: Leaderboard, group: dict[str, Any]) -> Row:
    """Return the row of an objective."""
    return next(row for row in board.rows if row.group == group)


def nll_against_neg_p(board: Leaderboard) -> tuple[float, str]:
    """Return how far neg_p exceeds NLL, both at their best rates, with the interval; and what that says."""
    ruler, arms = board.plan.rank_by, board.arms
    found = compare(ruler, arms, lambda i: values_of(arms[i], ruler), row_of(board, NEG_P).arms, row_of(board, NLL).arms)
    low, high = found.interval or (found.mean, found.mean)
    verdict = "neg_p" if low > 0 else "nll" if high < 0 else "neither"
    return found.mean, f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f}): {verdict}"


def table(cells: list[dict[str, Any]], ruler: str) -> str:
    """Return a Markdown table of a ruler: each objective at its best learning rate, mean over seeds with its interval."""
    names = list(dict.fromkeys(row.name for cell in cells for row in sorted(cell["boards"][ruler].rows, key=_order)))
    lines = ["| cell | noise | base mean p | foretold | base | " + " | ".join(names)]
    lines = [lines[0] + " | neg_p - nll |", "|---" * (len(names) + 6) + "|"]
    for cell in cells:
        board = cell["boards"][ruler]
        rows = {row.name: row for row in board.rows}
        shown = [_shown(rows[name], ruler) if name in rows else "" for name in names]
        base = f"{cell['base'][ruler]:.3f}"
        head = f"| {cell['cell']} | {cell['corruption']:.0%} | {cell['prob']:.3f} | {cell['learnable']:.3f} | {base} |"
        lines.append(f"{head} {' | '.join(shown)} | {nll_against_neg_p(board)[1]} |")
    return "\n".join(lines)


def _order(row: Row) -> int:
    return ARMS.index(row.group)


def _shown(row: Row, ruler: str) -> str:
    mean, interval = row.values[ruler]
    half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.3f}"
    return f"{mean:.3f}{half} @ {row.best['learning_rate']:g}" + (" (edge)" if row.at_edge else "")


def draw(cells: list[dict[str, Any]], figure: Figure, theme: Any) -> None:
    """Draw each objective's exact match by cell, under noise and without."""
    kinds = sorted({cell["corruption"] for cell in cells}, reverse=True)
    for axes, (ruler, corruption) in zip(
        figure.subplots(len(RULERS), len(kinds), sharey=True, squeeze=False).flat, itertools.product(RULERS, kinds), strict=True
    ):
        here = sorted((cell for cell in cells if cell["corruption"] == corruption), key=lambda cell: -cell["prob"])
        for k, arm in enumerate(ARMS):
            found = [(x, row) for x, cell in enumerate(here) for row in cell["boards"][ruler].rows if row.group == arm]
            for x, row in found:
                mean, interval = row.values[ruler]
                place = x + (k - 2.5) * 0.11
                label = row.name if x == 0 else None
                axes.plot([place], [mean], "o", ms=3.5, color=theme[3][k], label=label)
                axes.plot([place, place], interval or (mean, mean), "-", lw=1.2, color=theme[3][k])
        axes.set(xticks=range(len(here)), ylim=(-0.03, 1.03), title=f"{RULERS[ruler]}, {corruption:.0%} noise")
        axes.set_xticklabels([f"{cell['cell']}\n{cell['prob']:.2f}" for cell in here], size=7.5)
        axes.title.set_size(8.5)
    figure.axes[0].legend(fontsize=6.5)


def report(cells: list[dict[str, Any]], options: argparse.Namespace, arms: int) -> str:
    """Return continuum.md."""
    command = f"python studies/continuum.py --seeds {options.seeds}" + (" --full" if options.full else "")
    if options.pretraining_seed:
        command += f" --pretraining_seed {options.pretraining_seed}"
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    parts = [
        f"`{command}`, {arms} arms. Exact match on {cells[0]['examples']} clean held-out examples, each objective at the best "
        f"of the learning rates {rates}: mean over {options.seeds} seeds ± half the 95 % interval over seeds, @ that rate. The "
        "last column is paired by seed and example, with an interval that counts both.",
    ]
    for ruler, name in RULERS.items():
        parts += [f"**{name[0].upper() + name[1:]}**", table(cells, ruler)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Prepare, diagnose each cell, sweep it, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("continuum"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretraining_seed", type=int, default=0, help="of the model and the data that all arms share")
    parser.add_argument("--full", action="store_true", help="all objectives on clean targets too, not only nll and neg_p")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    options = parser.parse_args()
    quiet()
    prepare(options.folder, options.pretraining_seed)
    cells, arms = [], 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, begin, (Miniature, options.folder)) as pool:
        for cell, corruption in itertools.product(options.cells, sorted(CORRUPTIONS, reverse=True)):
            home = cell_folder(options.folder, cell, corruption)
            diagnosis = pool.submit(call, "diagnose", cell, corruption)
            base = pool.submit(call, "evaluate", None, cell)
            plan = plan_of(options.folder, cell, corruption, options.seeds, options.full)
            boards = boards_of(plan, sweep(plan, home / "sweep", cell, corruption, pool, options.jobs))
            items = base.result()
            measured = diagnosis.result()
            base_figures = {"prob": measured["total"]["prob"], "learnable": measured["learnability"]["learnable"]}
            found = {"cell": cell, "corruption": corruption, **base_figures, "boards": boards}
            cells.append({**found, "base": means(items), "examples": len(items["greedy"])})
            arms += plan.count
    text = report(cells, options, arms)
    (options.folder / "continuum.md").write_text(text, encoding="utf-8")
    (options.folder / "continuum.svg").write_bytes(render(partial(draw, cells), (7.2, 5.4), "light", "svg"))
    print(text)


if __name__ == "__main__":
    main()
