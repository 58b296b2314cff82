"""Write docs/results/cells.md, the stored results of the cells: `python tools/cells_page.py [docs/results]`."""

import sys
from pathlib import Path

from bl_trainer.cells.field import entries, stored
from bl_trainer.cells.page import report, temperatures

HEAD = """# Results of the cells

<!-- Written by tools/cells_page.py (`make figures`) from the results that the package comes with. -->

`python studies/cells_study.py --store` makes them. It takes about two minutes of one core per objective, and resumes.
[Scoring an objective](../guide/score.md) describes cells and metrics.
"""


def main(folder: str) -> None:
    """Write the page into `folder`."""
    results = stored()
    text = f"{HEAD}\n{report(results, temperatures(entries(results.objectives)))}"
    (Path(folder) / "cells.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
