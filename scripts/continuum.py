"""The continuum in miniature: `python scripts/continuum.py [--folder continuum] [--jobs 2] [--seeds 5]`.

Fine-tunes `miniature`'s four cells with each objective, learning rate and seed, and prints exact match on clean held-out
examples, greedy / sampled at temperature 1. Arms done are kept in `folder`/arms.jsonl, and not run again.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import transformers
from miniature import CELLS, CORRUPTIONS, Miniature, prepare

OBJECTIVES: dict[str, dict[str, Any]] = {
    "nll": {"objective": "nll"},
    "power 0.5": {"objective": {"name": "power", "alpha": 0.5}},
    "neg_p": {"objective": "neg_p"},
    "power 10": {"objective": {"name": "power", "alpha": 10}},
    "nll, p >= 0.2": {"objective": "nll", "threshold": {"above": 0.2}},
    "nll, p <= 0.2": {"objective": "nll", "threshold": {"below": 0.2}},
}
ENDS = ("nll", "neg_p")  # the objectives that clean cells are trained with, unless --full asks for all
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # the best of nll and of neg_p lies within
RULERS = ("greedy", "sampled")

_MINE: dict[str, Any] = {}  # a worker process's Miniature


def grid(
    seeds: int, cells: Iterable[str], corruptions: Iterable[float], names: Iterable[str], rates: Iterable[float]
) -> list[dict[str, Any]]:
    """Return the arms, as keyword arguments of `Miniature.arm`; seed by seed, so that a part of them is a whole table."""
    return [
        {"cell": cell, "corruption": corruption, **OBJECTIVES[name], "learning_rate": rate, "seed": seed}
        for seed, cell, corruption, name, rate in itertools.product(range(seeds), cells, corruptions, names, rates)
    ]


def key(arm: dict[str, Any]) -> str:
    """Return what tells an arm from others."""
    return json.dumps([arm.get(name) for name in ("cell", "corruption", "objective", "threshold", "learning_rate", "seed")])


def name_of(arm: dict[str, Any]) -> str:
    """Return the name of an arm's objective in OBJECTIVES."""
    own = (arm["objective"], arm.get("threshold"))
    return next(name for name, keys in OBJECTIVES.items() if (keys["objective"], keys.get("threshold")) == own)


def quiet() -> None:
    """Keep the libraries from printing what would be printed for each arm."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def begin(folder: Path) -> None:
    """Load the miniature in a worker process."""
    quiet()
    _MINE["miniature"] = Miniature(folder)


def run(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a method of the worker's Miniature."""
    return getattr(_MINE["miniature"], method)(**arguments)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the arms that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(arms: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Return a Markdown table: mean exact match over items and seeds, greedy / sampled, by cell, objective and rate."""
    rates = sorted({arm["learning_rate"] for arm in arms})
    lines = ["| cell | base mean p | objective | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (3 + len(rates)) + "|")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for arm in arms:
        groups.setdefault((arm["cell"], arm["corruption"], name_of(arm), arm["learning_rate"]), []).append(arm)
    for found, name in itertools.product(base, ["base", *OBJECTIVES]):
        here = [groups.get((found["cell"], found["corruption"], name, rate), []) for rate in rates]
        here = [[found]] * len(rates) if name == "base" else here
        if any(here):
            means = [[fmean(fmean(arm[ruler]) for arm in some) if some else nan for ruler in RULERS] for some in here]
            cells = [f"{greedy:.2f} / {sampled:.2f}" for greedy, sampled in means]
            lines.append(f"| {found['cell']}, {found['corruption']:.0%} | {found['prob']:.3f} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare, measure the base model, run the arms that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("continuum"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretraining_seed", type=int, default=0, help="of the model and the data that all arms share")
    parser.add_argument("--full", action="store_true", help="all objectives on clean targets too, not only nll and neg_p")
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--corruptions", nargs="+", type=float, choices=CORRUPTIONS, default=list(CORRUPTIONS))
    parser.add_argument("--learning_rates", nargs="+", type=float, default=list(LEARNING_RATES))
    options = parser.parse_args()
    folder = options.folder
    quiet()
    prepare(folder, options.pretraining_seed)
    arms = grid(options.seeds, options.cells, options.corruptions, options.objectives, options.learning_rates)
    arms = [arm for arm in arms if options.full or arm["corruption"] or name_of(arm) in ENDS]
    done = {key(arm): arm for arm in read(folder / "arms.jsonl")}
    settings = [{"cell": cell, "corruption": c} for cell, c in itertools.product(options.cells, options.corruptions)]
    workers = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), begin, (folder,))
    with workers as pool, (folder / "arms.jsonl").open("a") as file:
        reports = [pool.submit(run, "diagnose", setting) for setting in settings]
        running = [pool.submit(run, "arm", arm) for arm in arms if key(arm) not in done]
        for count, future in enumerate(as_completed(running), 1):
            arm = future.result()
            done[key(arm)] = arm
            file.write(json.dumps(arm) + "\n")
            file.flush()
            print(f"\r{count} of {len(running)} arms", end="", flush=True)
        untrained = [pool.submit(run, "evaluate", {"model": None, "cell": setting["cell"]}) for setting in settings]
        base = [
            {**scores.result(), **setting, "prob": report.result()["total"]["prob"]}
            for setting, report, scores in zip(settings, reports, untrained, strict=True)
        ]
    print("\n\n" + table([done[key(arm)] for arm in arms], base))


if __name__ == "__main__":
    main()
