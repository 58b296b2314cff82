"""Pages of claims: they are what the tools write, and the README repeats their figures."""

import re
import runpy
from pathlib import Path

import pytest

from bl_trainer.cells.choosing import STEPS
from bl_trainer.cells.field import CANDIDATES, stored
from bl_trainer.cells.judging import JUDGING

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", ["claims", "default", "ready-for-rl"])
def test_a_page_is_the_tools(name: str, tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "tools" / f"{name.partition('-')[0]}_page.py"))["main"](str(tmp_path))
    assert (tmp_path / f"{name}.md").read_bytes() == (RESULTS / f"{name}.md").read_bytes(), "run `make figures`"


def test_the_readme_has_the_figures_of_the_claims() -> None:
    claims = (RESULTS / "claims.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-]\d\.\d{3} \([^)]*\)", readme)
    assert len(figures) == 4
    assert all(figure in claims for figure in figures)
    assert f"On {len(stored().models)} small models" in readme


def test_the_rule_names_its_candidates_and_the_cells_that_judge() -> None:
    rule = (RESULTS / "default.md").read_text(encoding="utf-8").partition("## What the twelve")[0]
    assert set(re.findall(r"`([^`]+)`", rule.partition("## Candidates")[2].partition("Label")[0])) == {*CANDIDATES}
    assert re.findall(r"^\| `([\w-]+)` \|", rule.partition("| cell that judges")[2], re.M) == list(JUDGING)
    assert STEPS == ("greedy", "variation", "sampled")
