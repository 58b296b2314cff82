"""Fine-tune pretrained models on cells with each objective of the field, store the results, and apply the rule that picks one.

    python studies/cells_study.py --store             # twelve cells and models 0 to 7: they choose
    python studies/cells_study.py --store --judge     # nine other cells and models 100 to 107: they judge what was chosen

takes about two minutes a core for each objective. The same command resumes; objectives that it has run before are kept.
The rule is `bl_trainer.cells.choosing.Ruling`; docs/results/default.md has it in words, with what was known beforehand.
"""

import argparse
from pathlib import Path

import torch

from bl_trainer.cells.cells import CELLS
from bl_trainer.cells.choosing import Ruling
from bl_trainer.cells.engine import MODELS, run
from bl_trainer.cells.field import CANDIDATES, FIELD, STORED, entries, store
from bl_trainer.cells.judging import JUDGING
from bl_trainer.cells.page import report, temperatures
from bl_trainer.cells.pretraining import models_of
from bl_trainer.cells.results import Results

JUDGED = Path(__file__).parents[1] / "docs" / "results" / "judged.json.gz"
JUDGE_SEED = 100  # models from it on have chosen nothing


def main() -> None:
    """Run what is left, store the results, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cells"))
    parser.add_argument("--objectives", nargs="+", choices=list(FIELD), default=list(FIELD))
    parser.add_argument("--judge", action="store_true", help="run the cells and models that have chosen nothing")
    parser.add_argument("--store", action="store_true", help="replace the results that the docs are made of")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would gain nothing
    torch.set_flush_denormal(True)
    results = Results(())
    for name in options.objectives:
        results += one(name, options.folder, options.judge)
        print(name, flush=True)
        if options.store:
            store(results, JUDGED if options.judge else STORED)
    text = report(results, temperatures(entries(options.objectives)))
    (options.folder / ("judged.md" if options.judge else "cells.md")).write_text(text, encoding="utf-8")
    print(text)
    if {*CANDIDATES} <= {*results.objectives} and not options.judge:
        print("The rule:", Ruling(results, CANDIDATES).rounds, Ruling(results, CANDIDATES).winner)


def one(name: str, folder: Path, judge: bool) -> Results:
    """Return the results of one objective on the cells and models that choose, or that judge."""
    seeds = range(JUDGE_SEED, JUDGE_SEED + MODELS) if judge else range(MODELS)
    return run(entries([name]), folder, tuple(JUDGING if judge else CELLS), models_of(seeds))


if __name__ == "__main__":
    main()
