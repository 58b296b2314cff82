"""The score verb: its mistakes, its output, and its page of the documentation."""

import gzip
import json
import math
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import bl_trainer
from bl_trainer.cells import engine, pretraining, verb
from bl_trainer.cells.cells import CELLS
from bl_trainer.cells.field import FIELD, entries, store, stored
from bl_trainer.cells.page import comparison, report, temperatures
from bl_trainer.cells.results import METRICS, Results
from bl_trainer.cells.scores import TEMPERATURES
from bl_trainer.cells.training import Course
from bl_trainer.cells.transformer import Shape
from bl_trainer.cells.verb import ScoreArguments
from bl_trainer.cli import main
from bl_trainer.errors import LossError
from bl_trainer.objectives import Threshold

ROOT = Path(__file__).parents[1]
DESIGN = engine.study_design()


def mine(logp):
    """The square of the surprise."""
    return logp**2 / 2 - logp


def narrow(logp):
    """1 - p, and no number where p is near 1/36, that of each token under an untrained model."""
    return 1 - logp.exp() + 1e-3 * torch.sqrt((logp - math.log(1 / 36)) ** 2 - 0.0025)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Cannot score: no objective is named. Write `score my_losses:my_objective --output DIR`."),
        (["nll"], "Cannot score: `--output` is missing. Write e.g. `--output out/score`."),
        (["nll", "--output", "o", "--models", "1"], "Cannot score with `--models 1`: intervals need several. Give at least 2."),
        (
            ["nll", "--output", "o", "--models", "10"],
            "Cannot score with `--models 10`: the stored results have 8. Give at most 8, or a `--secret_seed`.",
        ),
        (["nll", "--output", "o", "--secret_seed", "3"], "Cannot use `--secret_seed 3`: seeds below 1000 are public."),
        (["nll", "--output", "o", "--against", "nl"], "Cannot compare with 'nl': no such name. Did you mean 'nll'?"),
        (["nll", "--outptu", "o"], "Unknown option 'outptu'. Did you mean"),
        (["neg_q", "--output", "o"], "Unknown objective 'neg_q'. Did you mean 'neg_p'?"),
        (["nll", "--output", "o", "--threshold", "2"], "`threshold` `above` must be a probability"),
    ],
)
def test_a_mistake_ends_in_a_sentence(argv, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["score", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small(monkeypatch):
    """Models that are quick to train, on two cells."""
    shapes = {size: Shape(16, 2, 1, 36, 14) for size in pretraining.SIZES}
    for module in (pretraining, engine):
        monkeypatch.setattr(module, "SIZES", shapes)
    monkeypatch.setattr(pretraining, "COURSE", Course(steps=2, batch=4, warmup=1))
    quick = {"cells": ["plain", "suffix"], "rates": [1e-3], "course": Course(steps=1, batch=4, warmup=1)}
    monkeypatch.setattr(verb, "run", lambda *given, **keys: engine.run(*given, **keys, **quick))


def test_an_objective_that_is_no_number_somewhere_is_not_ranked(small, tmp_path) -> None:
    own = {"cells": ["plain"], "rates": [1e-3], "course": Course(steps=30, batch=16, warmup=1)}
    with pytest.raises(LossError, match=r"Cannot score `test_score:narrow`: .* weights that are not finite"):
        engine.run([engine.Entry.parse("mine", "test_score:narrow")], tmp_path, models=engine.models_of([0]), **own)


def test_it_ranks_a_function_among_stored_results(small, tmp_path, monkeypatch, capsys) -> None:
    others = engine.run(entries(["nll", "neg_p"]), tmp_path, ["plain", "suffix"], engine.models_of(range(8)), [1e-3])
    store(others, tmp_path / "stored.json.gz")
    monkeypatch.setattr(verb, "stored", lambda: stored(tmp_path / "stored.json.gz"))
    main(["score", "test_score:mine", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--models", "4"])
    said = capsys.readouterr().out
    assert said.startswith("Pretraining 4 models, once")
    assert "test_score:mine answers " in said
    assert re.search(r" of the questions right and nll 0\.\d+, both greedy: [+-].* to .*\)\. It ranks \d of 3\.", said)
    results = Results.from_json(json.loads((tmp_path / "out/results.json").read_text()))
    assert results.objectives == ["nll", "neg_p", "test_score:mine"]
    assert len(results.models) == 4
    assert {row["objective"] for row in results.rows if row["model"] == "small-0"} == {*results.objectives}
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "test_score:mine" in page
    assert "http" not in re.sub(r"http://www.w3.org\S+", "", page)
    assert not list((tmp_path / "cache/results").iterdir())  # the function may change
    main(["score", "test_score:mine", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--models", "4"])
    assert "Pretraining" not in capsys.readouterr().out


def test_a_secret_seed_runs_the_others_too(small, tmp_path, capsys) -> None:
    where = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    main(["score", "neg_p", *where, "--models", "2", "--secret_seed", "4711", "--against", "nll,deft"])
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["scored"] == {"name": "neg_p", "objective": {"name": "neg_p"}, "threshold": Threshold.parse(None).to_dict()}
    assert (found["secret_seed"], found["package"]) == (4711, bl_trainer.__version__)
    assert found["design"] != DESIGN  # models of this test are others
    results = Results.from_json(found)
    assert results.objectives == ["neg_p", "nll", "deft"]
    assert results.models == ["small-4711", "large-4712"]
    assert "right and nll 0." in capsys.readouterr().out


def test_stored_results_are_of_the_cells_and_models_of_today() -> None:
    results = stored()
    assert results.cells == list(CELLS)
    assert results.models == [
        model.name for model in sorted(engine.models_of(range(8)), key=lambda model: model.size == "large")
    ]
    assert {*results.objectives} <= FIELD.keys()
    assert "nll" in results.objectives
    each = len(results.rows) / len(results.objectives)
    assert each == len(CELLS) * 8 * len(engine.RATES)
    header, rows = comparison(results, temperatures(entries()))
    assert len(rows) == len(results.objectives)
    assert all(len(row) == len(header) for row in rows)
    assert "**greedy**" in report(results, temperatures(entries()))


@pytest.mark.parametrize("name", ["bl_trainer/cells/stored", "docs/results/judged", "docs/results/references"])
def test_stored_results_are_of_the_design_of_today(name) -> None:
    with gzip.open(ROOT / f"{name}.json.gz") as file:
        assert json.load(file)["design"] == DESIGN, "cells, models or training have changed: run studies/cells_study.py"


def test_the_page_of_results_is_the_tools(tmp_path) -> None:
    runpy.run_path(str(ROOT / "tools" / "cells_page.py"))["main"](str(tmp_path))
    assert (tmp_path / "cells.md").read_bytes() == (ROOT / "docs/results/cells.md").read_bytes(), "run `make figures`"


def test_stored_results_are_written_as_they_are_read(tmp_path) -> None:
    results = stored()
    store(results, tmp_path / "again")
    assert stored(tmp_path / "again") == results


def test_the_page_names_options_cells_and_metrics() -> None:
    text = (ROOT / "docs/guide/score.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `--(\w+)` ", text, re.M) == [each.name for each in fields(ScoreArguments)[1:]]
    assert re.findall(r"^\| `(\w[\w-]*)` \|", text, re.M) == list(CELLS)
    named = set(re.findall(r"^- \*\*(\w+)\*\*", text, re.M))
    assert named == {name.split("_")[0] for name in METRICS}
    assert "1, 0.5 and 0.25" in text
    assert TEMPERATURES == (1, 0.5, 0.25)


def test_the_snippet_of_the_page_runs(small, tmp_path, monkeypatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide/score.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    quick = Course(steps=1, batch=4, warmup=1)
    monkeypatch.setattr(engine.run, "__defaults__", (*engine.run.__defaults__[:-2], quick, engine.run.__defaults__[-1]))
    seen: dict = {}
    exec(snippet, seen)
    assert seen["results"].objectives == ["nll", "mine"]
