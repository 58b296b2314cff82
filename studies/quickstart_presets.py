"""The presets of a sweep on SmolLM2-135M: `python studies/quickstart_presets.py`, after `scripts/quickstart.py prepare`.

Sweeps the quickstart's task by `preset: short` and `preset: full`, several times each with other seeds, and says what each cost
and which objective it found best. Leaves quickstart-presets.json and quickstart-presets.md in `folder`; what is done is kept
there, and the same command resumes it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from bl_trainer.recipe.recipe import Recipe
from bl_trainer.sweep.cost import Spent
from bl_trainer.sweep.leaderboard import judge
from bl_trainer.sweep.outcome import Result, finished
from bl_trainer.sweep.plan import Plan
from bl_trainer.sweep.verb import SweepArguments

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
LENGTH = {"max_steps": 12, "per_device_train_batch_size": 4}  # the runs of the full grid; the quickstart's is 32 steps of 8
LEFT_OUT = (
    *("objective", "num_train_epochs", "eval_strategy", "eval_steps", "eval_on_start"),
    *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
)
ARMS = [{"objective": "nll"}, {"objective": "neg_p"}, {"objective": {"name": "power", "alpha": 0.5}}]
LEARNING_RATES = [1e-4, 1e-3]
SEEDS = {"short": 4, "full": 3}
TEST, HELD_OUT = Path("quickstart/data/test.jsonl"), 16  # rows, since measuring all 64 takes longer than a short run


def write_files(folder: Path, preset: str, repetition: int) -> list[str]:
    """Write recipe and sweep file of a preset, and return the options that name them; repetitions have no seed in common."""
    recipe = {key: value for key, value in yaml.safe_load(RECIPE.read_text()).items() if key not in LEFT_OUT}
    first = 10 * repetition
    seeds = list(range(first, first + SEEDS[preset]))
    place = folder / f"{preset}-{repetition}"
    place.mkdir(parents=True, exist_ok=True)
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(TEST.open(encoding="utf-8").readlines()[:HELD_OUT]), encoding="utf-8")
    sweep = {"preset": preset, "arms": ARMS, "learning_rate": LEARNING_RATES, "seed": seeds, "held_out": str(held_out)}
    files = {"config": {**recipe, **LENGTH, "output_dir": str(place / "run")}, "sweep": sweep}
    options = [f"--sweep_dir={place / 'sweep'}"]
    for name, keys in files.items():
        path = place / f"{name}.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        options.append(f"--{name}={path}")
    return options


def found_by(options: list[str], preset: str, repetition: int) -> dict[str, Any]:
    """Return what a finished sweep cost and found."""
    recipe = Recipe.read(options, "sweep", SweepArguments)
    folder = Path(recipe.options.sweep_dir)
    plan = Plan.read(recipe, recipe.options.sweep, folder)
    board, results = judge(plan, folder, {}), finished(plan.count, folder, Result)
    spent = Spent.of(results.values())
    return {
        "repetition": repetition,
        "preset": preset,
        "runs": len(results),
        "tokens": spent.tokens,
        "seconds": round(spent.seconds),
        "metric": plan.rank_by,
        "winner": board.rows[0].name,
        "learning_rate": board.rows[0].best["learning_rate"],
        "values": {row.name: round(row.values[plan.rank_by][0], 4) for row in board.rows},
        "verdict": board.verdict(),
    }


def report(found: list[dict[str, Any]]) -> str:
    """Return quickstart-presets.md."""
    lines = ["| repetition | preset | runs | tokens | minutes | best | at | by how much |", "|---" * 8 + "|"]
    for each in found:
        values = ", ".join(f"{name} {value:.3f}" for name, value in each["values"].items())
        lines.append(
            f"| {each['repetition']} | {each['preset']} | {each['runs']} | {each['tokens']:,} | {each['seconds'] / 60:.0f} | "
            f"{each['winner']} | {each['learning_rate']:g} | {values} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the sweeps that are left, and write the report as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart-presets"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    found = []
    for repetition in range(options.repetitions):
        for preset in SEEDS:
            files = write_files(options.folder, preset, repetition)
            subprocess.run([sys.executable, "-m", "bl_trainer", "sweep", *files, f"--jobs={options.jobs}"], check=True)
            found.append(found_by(files, preset, repetition))
            (options.folder / "quickstart-presets.json").write_text(json.dumps(found, indent=1) + "\n")
            (options.folder / "quickstart-presets.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
