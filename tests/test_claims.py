"""Pages of claims: they are what the tools write, and the README repeats their figures."""

import gzip
import json
import math
import re
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

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
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    figures = re.findall(r"[+-]\d\.\d{3} \([^)]*\)", readme)
    assert len(figures) == 9
    assert all(figure in claims for figure in figures)
    assert f"12 tasks, {len(stored().models)} models" in readme


def with_interval(values: list[float]) -> str:
    """Return a mean as pages write it, with Student's interval."""
    mean, reach = statistics.fmean(values), student.ppf(0.975, len(values) - 1) * statistics.stdev(values)
    low, high = (mean + sign * reach / math.sqrt(len(values)) for sign in (-1, 1))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def at_rates_that_keep_half(rows: list[dict[str, Any]], objective: str, metrics: list[str]) -> dict[str, list[float]]:
    """Return the test figures of each model, one for each cell, at the rate and metric that are best on validation."""
    found: dict[str, list[float]] = {}
    for cell in {row["cell"] for row in rows}:
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if (row["objective"], row["cell"]) == (objective, cell):
                by_rate.setdefault(row["rate"], []).append(row)
        kept = {rate: statistics.fmean(row["kept"] for row in own) for rate, own in by_rate.items()}
        if max(kept.values()) < 0.5:
            by_rate = {rate: own for rate, own in by_rate.items() if kept[rate] == max(kept.values())}
        else:
            by_rate = {rate: own for rate, own in by_rate.items() if kept[rate] >= 0.5}
        tried = [
            (statistics.fmean(row["validation"][name] for row in by_rate[rate]), -rate, name)
            for rate in by_rate
            for name in metrics
        ]
        _, rate, metric = max(tried, key=lambda each: (round(each[0], 12), each[1]))
        for row in by_rate[-rate]:
            found.setdefault(row["model"], []).append(row["test"][metric])
    return found


@pytest.mark.parametrize(
    ("path", "signs"),
    [(ROOT / "bl_trainer" / "cells" / "stored.json.gz", "--+"), (RESULTS / "judged.json.gz", " ++")],
    ids=["twelve", "judge"],
)
def test_at_rates_that_keep_half_the_claims_have_what_the_runs_give(path: Path, signs: str) -> None:
    """Recomputed from the stored runs. `signs`: of the three differences, blank where the interval has 0."""
    claims = (RESULTS / "claims.md").read_text(encoding="utf-8")
    row = next(line for line in claims.splitlines() if "The three rows above take the best rates" in line)
    rows = json.loads(gzip.decompress(path.read_bytes()))["rows"]
    metrics = {"greedy": ["greedy"], "best T": [*SAMPLED], "T = 1": ["sampled_1"]}
    for (word, names), sign in zip(metrics.items(), signs, strict=True):
        ours, theirs = (at_rates_that_keep_half(rows, objective, names) for objective in ("anneal", "nll"))
        found = with_interval([statistics.fmean(ours[model]) - statistics.fmean(theirs[model]) for model in ours])
        assert f"{word} {found}" in row
        ends = re.findall(r"[+-]\d\.\d+", found)[1:]
        assert {end[0] for end in ends} == ({*sign} if sign.strip() else {"-", "+"})


def test_what_is_said_of_formats_is_what_the_cells_give() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "default_page.py"))
    cells = tool["telling"]()
    share = {
        name: [tool["in_format"](cells[cell], name, cell).mean for cell in tool["FORMATS"]]
        for name in ("nll", "anneal", "neg_p", "power 10", "nll p >= 0.2")
    }
    assert share["anneal"] == share["nll"] == [1, 1, 1]
    assert share["power 10"] == share["nll p >= 0.2"] == [0, 0, 0]
    assert all(0 < each < 1 for each in share["neg_p"])


def test_the_claims_part_total_variation_on_facts_as_their_page_does() -> None:
    claims, facts = ((RESULTS / f"{name}.md").read_text(encoding="utf-8") for name in ("claims", "facts"))
    parts = re.findall(r"^\| `([^`]+)` \| \S+ \([^)]+\) \| ([^|]+) \| ([^|]+) \|$", facts.partition("lost diversity.")[2], re.M)
    assert {name: above.split("(")[1][0] for name, _, above in parts} == {
        "alpha 0.5 e^-H": "+", "alpha e^-H": "-", "anneal": "-", "neg_p": "-",
    }  # fmt: skip
    assert all(f"`{name}`: wrong answers {wrong}, above shares {above}" in claims for name, wrong, above in parts)


def test_validation_names_the_best_candidate_where_test_questions_would_name_another() -> None:
    """`a` is better by 0.1 on validation, `b` by 0.2 on test, so `a` is the best and `b` ahead of it."""
    rows = []
    for name, seen, value in (("a", 0.9, 0.5), ("b", 0.8, 0.7)):
        splits = {"validation": {"greedy": seen}, "test": {"greedy": value}}
        where = {"objective": name, "cell": "plain", "rate": 1.0, "seed": 0, "kept": 1.0}
        rows += [{**where, "model": f"m{i}", **splits} for i in (0, 1)]
    tool = runpy.run_path(str(ROOT / "tools" / "default_page.py"))
    found = tool["regret_by_validation"](Results(tuple(rows)), ["a", "b"])
    assert [found[name].mean for name in "ab"] == pytest.approx([0, -0.2])


def test_what_the_rule_picks_with_other_candidates_is_said() -> None:
    tool, page = runpy.run_path(str(ROOT / "tools" / "default_page.py")), (RESULTS / "default.md").read_text(encoding="utf-8")
    both = stored() + stored(tool["REFERENCES"]).of(stored().models).on(stored().cells)
    for name, picked in (("label smoothing 0.1", "nll"), ("neg_p", "alpha 0.5 e^-H")):
        assert Ruling(both, (*CANDIDATES, name)).winner == picked
        assert f"`{picked}` with `{name}`" in page.partition("**Twelve cells**")[2].partition("**Nine cells")[0]


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
