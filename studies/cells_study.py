"""Fine-tune pretrained models on cells with each objective of the field, store the results, and apply the rule that picks one.

    python studies/cells_study.py --store               # twelve cells and models 0 to 7: they choose
    python studies/cells_study.py --store --judge       # nine other cells and models 100 to 107: they judge what was chosen
    python studies/cells_study.py --store --references  # what is no candidate: `neg_p` and label smoothing on all these cells
                                                        # and models, others on five cells of formats and of valid answers

takes about two minutes of a core for each objective. The same command resumes; objectives that it has run before are kept, and
those that `--objectives` does not name stay stored.
The rule is `bl_trainer.cells.choosing.Ruling`; docs/results/default.md has it in words, with what was known beforehand.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch

from bl_trainer.cells.cells import CELLS
from bl_trainer.cells.choosing import Ruling
from bl_trainer.cells.engine import MODELS, run
from bl_trainer.cells.field import CANDIDATES, FIELD, STORED, entries, store, stored
from bl_trainer.cells.judging import JUDGING
from bl_trainer.cells.page import report, temperatures
from bl_trainer.cells.pretraining import models_of
from bl_trainer.cells.results import Results

DOCS = Path(__file__).parents[1] / "docs" / "results"
JUDGED, REFERENCES = DOCS / "judged.json.gz", DOCS / "references.json.gz"
JUDGE_SEED = 100  # models from it on have chosen nothing
WHOLE = ("neg_p", "label smoothing 0.1")  # references that run on all cells
TELLING = ("prefix", "suffix", "two-even", "wrapped", "three-even")  # cells that tell of formats and of several valid answers


def main() -> None:
    """Run what is left, store the results, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cells"))
    parser.add_argument("--objectives", nargs="+", choices=list(FIELD), help="by default all; with --references no candidates")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--judge", action="store_true", help="run the cells and models that have chosen nothing")
    which.add_argument("--references", action="store_true", help="run what is no candidate, on cells of both kinds")
    parser.add_argument("--store", action="store_true", help="put the results among those that the docs are made of")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would gain nothing
    torch.set_flush_denormal(True)
    names = options.objectives or [name for name in FIELD if not (options.references and name in CANDIDATES)]
    path = REFERENCES if options.references else JUDGED if options.judge else STORED
    results = Results(())
    for name in names:
        if options.references:
            cells = None if name in WHOLE else TELLING
            results += Results((*one(name, options.folder, False, cells).rows, *one(name, options.folder, True, cells).rows))
        else:
            results += one(name, options.folder, options.judge)
        print(name, flush=True)
        if options.store:
            store(among(results, path), path)
    if options.references:
        return
    text = report(results, temperatures(entries(names)))
    (options.folder / ("judged.md" if options.judge else "cells.md")).write_text(text, encoding="utf-8")
    print(text)
    if {*CANDIDATES} <= {*results.objectives}:
        print("The rule:", Ruling(results, CANDIDATES).rounds, Ruling(results, CANDIDATES).winner)


def one(name: str, folder: Path, judge: bool, cells: Collection[str] | None = None) -> Results:
    """Return the results of one objective on the cells and models that choose, or that judge; `cells`: on these alone."""
    seeds = range(JUDGE_SEED, JUDGE_SEED + MODELS) if judge else range(MODELS)
    known = [cell for cell in (JUDGING if judge else CELLS) if cells is None or cell in cells]
    return run(entries([name]), folder, known, models_of(seeds))


def among(results: Results, path: Path) -> Results:
    """Return results with those of other objectives that a file has, in the order of the field."""
    both = stored(path) + results if path.exists() else results
    return Results(tuple(sorted(both.rows, key=lambda row: list(FIELD).index(row["objective"]))))


if __name__ == "__main__":
    main()
