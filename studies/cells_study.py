"""Fine-tune eight pretrained models on twelve cells with each objective of the field, and store and tabulate the results.

    python studies/cells_study.py --objectives nll anneal

takes about two minutes a core for each objective. The same command resumes; objectives that it has run before are kept.
"""

import argparse
from pathlib import Path

import torch

from bl_trainer.cells.engine import run
from bl_trainer.cells.field import FIELD, entries, store
from bl_trainer.cells.page import report, temperatures


def main() -> None:
    """Run what is left, store the results beside the engine, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cells"))
    parser.add_argument("--objectives", nargs="+", choices=list(FIELD), default=list(FIELD))
    parser.add_argument("--store", action="store_true", help="replace the results that the package comes with")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would gain nothing
    torch.set_flush_denormal(True)
    results = run(
        entries(options.objectives), options.folder, done=lambda number, count: print(f"{number}/{count}", flush=True)
    )
    if options.store:
        store(results)
    text = report(results, temperatures(entries(options.objectives)))
    (options.folder / "cells.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
