"""The presets of a sweep side by side: `python studies/sweep_presets.py [--folder presets] [--jobs 2] [--cells mid-fact]`.

Runs `preset: short` and `preset: full` of the same objectives and learning rates on `miniature`'s cells, several times each
with other seeds, and says what each cost and which objective it found best. Leaves sweep-presets.json and sweep-presets.md in
`folder`; what is done is kept there, and the same command resumes it.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bl_trainer.sweep.leaderboard import Leaderboard
from bl_trainer.sweep.plan import Plan
from continuum import NEG_P, NLL, Scored, begin, board_by, quiet, read_plan, sweep
from miniature import BATCH, CELLS, LENGTH, Miniature, cell_folder, prepare

ARMS: list[dict[str, Any]] = [NLL, {"objective": {"name": "power", "alpha": 0.5}}, NEG_P]
LEARNING_RATES = [3e-4, 1e-3, 3e-3]
CORRUPTION, RULER = 0.3, "sampled"
SEEDS = {"short": 4, "full": 3}
TARGETS = LENGTH + 1  # tokens of a completion


class Timed(Miniature):
    """The same, with the CPU seconds of each run among what it measures."""

    def arm(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        begun = time.process_time()
        found = super().arm(*args, **kwargs)
        return {**found, "cpu_seconds": [time.process_time() - begun]}


def plan_of(home: Path, preset: str, repetition: int) -> Plan:
    """Return the plan of a preset; repetitions have no seed in common."""
    first = 10 * repetition
    given = {"preset": preset, "arms": ARMS, "learning_rate": LEARNING_RATES}
    seeds = list(range(first, first + SEEDS[preset]))
    return replace(read_plan(home, f"{preset}-{repetition}", {**given, "seed": seeds}), rank_by=RULER)


def found_by(plan: Plan, arms: dict[int, Scored], cell: str, repetition: int) -> dict[str, Any]:
    """Return what a sweep cost and found."""
    board = board_by(RULER, plan, arms)
    steps = [int(plan.recipe_of(result.setting)["max_steps"]) for result in arms.values()]
    return {
        "cell": cell,
        "repetition": repetition,
        "preset": plan.preset,
        "runs": len(arms),
        "target_tokens": sum(steps) * BATCH * TARGETS,
        "cpu_seconds": round(sum(result.rulers["cpu_seconds"] for result in arms.values()), 1),
        "winner": board.rows[0].name,
        "learning_rate": board.rows[0].best["learning_rate"],
        "values": values_of(board),
        "verdict": board.verdict(),
    }


def values_of(board: Leaderboard) -> dict[str, float]:
    """Return the ruler of each objective that was judged, the best first."""
    return {row.name: round(row.values[RULER][0], 4) for row in board.rows}


def report(found: list[dict[str, Any]]) -> str:
    """Return sweep-presets.md."""
    lines = ["| cell | repetition | preset | runs | target tokens | CPU seconds | best | at | by how much |", "|---" * 9 + "|"]
    for each in found:
        values = ", ".join(f"{name} {value:.3f}" for name, value in each["values"].items())
        lines.append(
            f"| {each['cell']} | {each['repetition']} | {each['preset']} | {each['runs']} | {each['target_tokens']:,} | "
            f"{each['cpu_seconds']:.0f} | {each['winner']} | {each['learning_rate']:g} | {values} |"
        )
    return "\n".join(lines) + "\n"


def run(folder: Path, cells: list[str], repetitions: int, pool: Executor, jobs: int) -> list[dict[str, Any]]:
    """Run what is left, the short sweeps first, and return what each found; write it as it comes."""
    found = []
    for repetition in range(repetitions):
        for cell in cells:
            home = cell_folder(folder, cell, CORRUPTION)
            for preset in SEEDS:
                plan = plan_of(home, preset, repetition)
                place = folder / "sweeps" / home.name / f"{preset}-{repetition}"
                found.append(found_by(plan, sweep(plan, place, cell, CORRUPTION, pool, jobs), cell, repetition))
                (folder / "sweep-presets.json").write_text(json.dumps(found, indent=1) + "\n")
                (folder / "sweep-presets.md").write_text(report(found))
    return found


def main() -> None:
    """Prepare, sweep, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("presets"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=["mid-fact"])
    options = parser.parse_args()
    quiet()
    prepare(options.folder)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, begin, (Timed, options.folder)) as pool:
        print(report(run(options.folder, options.cells, options.repetitions, pool, options.jobs)))


if __name__ == "__main__":
    main()
