"""Pages of claims: they are what the tools write, and the README repeats their figures."""

import re
import runpy
from pathlib import Path

import pytest

from bl_trainer.cells.cells import CELLS
from bl_trainer.cells.choosing import STEPS, Ruling
from bl_trainer.cells.field import CANDIDATES, FIELD, store, stored
from bl_trainer.cells.judging import JUDGING
from bl_trainer.cells.results import SAMPLED, VARIATION, Mean, Results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", ["claims", "default", "facts", "pretrained", "ready-for-rl"])
def test_a_page_is_the_tools(name: str, tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "tools" / f"{name.partition('-')[0]}_page.py"))["main"](str(tmp_path))
    assert (tmp_path / f"{name}.md").read_bytes() == (RESULTS / f"{name}.md").read_bytes(), "run `make figures`"


def test_the_readme_has_the_figures_of_the_claims() -> None:
    claims = (RESULTS / "claims.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-]\d\.\d{3} \([^)]*\)", readme)
    assert len(figures) == 5
    assert all(figure in claims for figure in figures)
    assert f"on 12 tasks and {len(stored().models)} models" in readme


def test_the_rule_names_its_candidates_and_the_cells_that_judge() -> None:
    rule = (RESULTS / "default.md").read_text(encoding="utf-8").partition("## What the twelve")[0]
    assert set(re.findall(r"`([^`]+)`", rule.partition("## Candidates")[2].partition("Label")[0])) == {*CANDIDATES}
    assert re.findall(r"^\| `([\w-]+)` \|", rule.partition("| cell that judges")[2], re.M) == list(JUDGING)
    assert STEPS == ("greedy", "variation", "sampled")


def test_what_is_no_candidate_ran_on_cells_of_formats_and_of_several_answers_or_on_all() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "default_page.py"))
    study = runpy.run_path(str(ROOT / "studies" / "cells_study.py"))
    references = stored(tool["REFERENCES"])
    assert set(references.objectives) == FIELD.keys() - {*CANDIDATES}
    for name in references.objectives:
        cells = {*CELLS, *JUDGING} if name in study["WHOLE"] else {*tool["FORMATS"], *tool["SEVERAL"]}
        assert {*references.cells_with(name)} == cells
    assert len(references.models) == 16


@pytest.mark.parametrize(("limit", "winner"), [(0.01, "b"), (0.3, "a")])
def test_another_limit_may_pick_another_candidate(limit: float, winner: str) -> None:
    """`a` is the better one on average, and behind by 0.2 in its worst cell; `b` by 0.1 in all others."""
    right = {"a": [0.8, 1.0, 1.0, 1.0], "b": [1.0, 0.9, 0.9, 0.9]}
    rows = []
    for name, values in right.items():
        for cell, value in zip(list(CELLS)[:4], values, strict=True):
            metrics = dict.fromkeys([*SAMPLED, "greedy", "format"], value) | dict.fromkeys(VARIATION, 1 - value)
            where = {"objective": name, "cell": cell, "rate": 1.0, "seed": 0, "kept": 1.0}
            rows += [{**where, "model": f"m{i}", "validation": metrics, "test": metrics} for i in (0, 1)]
    assert Ruling(Results(tuple(rows)), ("a", "b"), limit).winner == winner


def test_what_is_beyond_its_share_is_variation_less_what_is_wrong() -> None:
    """Answers with 0.6 and 0.1 in place of 0.5 each: 0.3 is wrong, 0.1 beyond its share, and 0.4 the total variation."""
    metrics = {"sampled_1": 0.7, "variation_1": 0.4, "format": 0.0}
    splits = {"validation": metrics, "test": metrics}
    rows = [
        {"objective": "a", "cell": "two-even", "model": f"m{i}", "rate": 1.0, "seed": 0, "kept": 1.0, **splits} for i in (0, 1)
    ]
    less = {**metrics, "sampled_1": 0.2, "format": 1.0}
    rows += [{**row, "rate": 2.0, "validation": less, "test": less} for row in rows]
    tool = runpy.run_path(str(ROOT / "tools" / "default_page.py"))
    assert tool["beyond"](Results(tuple(rows)), "a", "two-even").mean == pytest.approx(0.1)
    assert tool["in_format"](Results(tuple(rows)), "a", "two-even").mean == 1  # at a rate of its own
    assert tool["paired"](
        tool["beyond"](Results(tuple(rows)), "a", "two-even"), Mean(0.0, None, {"m0": 0.0, "m1": 0.1})
    ).mean == (pytest.approx(0.05))


def test_storing_some_objectives_keeps_the_others(tmp_path: Path) -> None:
    study = runpy.run_path(str(ROOT / "studies" / "cells_study.py"))
    old, new = (Results(tuple({"objective": name, "kept": kept} for name in names)) for names, kept in (
        (("anneal", "nll"), 0.1), (("deft", "nll"), 0.2),
    ))  # fmt: skip
    store(old, tmp_path / "stored")
    found = study["among"](new, tmp_path / "stored")
    assert [(row["objective"], row["kept"]) for row in found.rows] == [("nll", 0.2), ("anneal", 0.1), ("deft", 0.2)]
    assert study["among"](new, tmp_path / "none").objectives == ["nll", "deft"]
