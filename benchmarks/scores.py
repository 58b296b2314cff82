"""Time and peak memory of `diagnose --scores` on a data set, against bare forward passes over the same batches.

`python benchmarks/scores.py --help`. Interleaved in one process on a randomly initialised model. Scoring is the verb's own,
with all that it does besides for each row: reading, hashing, and writing the files. The hash of the model's weights, which a
run takes once, is an arm of its own. Reported are medians, and medians of each round's ratios to the bare forward passes.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.diagnosis.row_scores import RowScorer
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.measurement.fingerprint import fingerprint
from bl_trainer.recipe.recipe import Recipe
from common import Figures, add_options, interleave, report, set_up
from step import SHAPES, make_model, make_tokenizer

ARMS = ("forward passes", "--scores", "--scores --tokens", "hash of the weights, once a run")


def measure(options: argparse.Namespace) -> Figures:
    """Return the figures of all arms."""
    rng = random.Random(0)
    rows = [[rng.randrange(10, 500) for _ in range(options.length)] for _ in range(options.rows)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = make_model(options.shape, options.device, options.dtype)
        plain.save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        (folder / "data.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
        diagnoses = {arm: _diagnosis(folder, arm.split()[1:], options) for arm in ARMS[1:3]}
        batches = [
            {"input_ids": torch.tensor(rows[start : start + options.batch], device=options.device)}
            for start in range(0, len(rows), options.batch)
        ]

        def forward() -> None:
            for batch in batches:
                with torch.no_grad():
                    plain(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False)

        scorers: dict[str, RowScorer] = {}

        def prepare(arm: str) -> None:
            if arm in diagnoses:
                scores = diagnoses[arm].folder
                assert scores is not None
                empty = replace(scores, path=Path(tempfile.mkdtemp(dir=folder)))
                scorers[arm] = RowScorer(diagnoses[arm].trainer, empty)

        runs: dict[str, Any] = {ARMS[0]: forward}
        runs |= {arm: lambda arm=arm: scorers[arm].run() for arm in diagnoses}
        runs[ARMS[3]] = lambda: fingerprint(diagnoses[ARMS[1]].trainer, [])
        clock = time.process_time if options.cpu_time else time.perf_counter
        return interleave(runs, options.rounds, options.device, prepare, clock=clock)


def _diagnosis(folder: Path, flags: list[str], options: argparse.Namespace) -> Diagnosis:
    keys = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data.jsonl"),
        "per_device_train_batch_size": options.batch,
        "use_cpu": options.device == "cpu",
        "dtype": options.dtype,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    argv = ["--config", str(recipe), "--scores", str(folder / "scores"), *flags]
    return Diagnosis(Recipe.read(argv, "diagnose", DiagnoseArguments))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu_time", action="store_true", help="time one thread's work, as a busy machine's clock says little")
    add_options(parser, "scores")
    options = parser.parse_args()
    set_up(options)
    if options.cpu_time:
        torch.set_num_threads(1)
    what = f"{options.rows} rows{', CPU time' if options.cpu_time else ''}"
    report("scores", {what: measure(options)}, ARMS[0], "forward", 2, options)


if __name__ == "__main__":
    main()
