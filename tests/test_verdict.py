"""The probe's verdict on cells of known noise and knowledge, by its own functions, and the page of the study."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from bl_trainer.cells.pretraining import SIZES, Model
from bl_trainer.cells.transformer import initial
from bl_trainer.cells.vocabulary import BANG, CLOSE
from bl_trainer.cells.world import World

ROOT = Path(__file__).parents[1]
STUDY = runpy.run_path(str(ROOT / "studies" / "verdict_study.py"))
PAGE = runpy.run_path(str(ROOT / "tools" / "verdict_page.py"))
CELLS = {"new-clean": ("knowledge",), "suffix": ("knowledge",), "new-noise": ("both", "undecided")}


@pytest.fixture(scope="module")
def rows():
    """Verdicts of a model that knows nothing, so that all is improbable."""
    study = STUDY["judged"]
    shape = SIZES["small"]
    return study([Model("small", 0)], shape, initial(shape, 0)[None], 1.5e-3, tuple(CELLS), half=20)


def test_verdicts_of_a_model_that_knows_nothing(rows):
    assert {row["cell"]: row["verdict"] in CELLS[row["cell"]] for row in rows} == dict.fromkeys(CELLS, True)
    assert not any(map(PAGE["is_wrong"], rows))


def test_figures_keep_to_the_truth(rows):
    """Clean cells have no noise; the bound holds; what rows contradict is noise, and most of its first letters."""
    for row in rows:
        true = row["true"]
        assert row["low"] == pytest.approx(true["noise"] + true["knowledge"], abs=1e-9)
        assert row["contradicted"] <= true["noise"] + 0.01
        assert row["noise"] <= (0.02 if row["cell"].endswith(("clean", "suffix")) else true["noise"] + 0.02)
    noisy = next(row for row in rows if row["cell"] == "new-noise")
    assert noisy["contradicted"] > 0.3 * noisy["true"]["noise"]


def test_halves_share_no_question_and_random_letters_keep_the_format():
    parts = STUDY["split"]("suffix-noise", World(3), 10)
    assert not {row.prompt for row in parts.first} & {row.prompt for row in parts.second}
    assert 0.2 < sum(any(row.is_noise) for row in parts.first) / len(parts.first) < 0.4
    assert {row.answer[2:] for row in parts.first} == {(CLOSE, BANG)}
    answers = {row.prompt: row.answer for row in parts.first if not any(row.is_noise)}
    assert all(answers[row.prompt] == row.answer for row in parts.first if not any(row.is_noise))


@pytest.mark.parametrize(
    ("verdict", "noise", "knowledge", "wrong"),
    [
        ("noise", 0.3, 0.0, False), ("noise", 0.0, 0.0, True), ("noise", 0.3, 0.3, True),
        ("both", 0.3, 0.3, False), ("both", 0.0, 0.3, True), ("both", 0.3, 0.0, True),
        ("knowledge", 0.0, 0.3, False), ("knowledge", 0.3, 0.3, True), ("knowledge", 0.0, 0.0, True),
        ("little", 0.0, 0.0, False), ("little", 0.0, 0.15, True), ("little", 0.15, 0.0, True),
        ("undecided", 0.3, 0.3, False),
    ],
)  # fmt: skip
def test_what_is_wrong(verdict, noise, knowledge, wrong):
    assert PAGE["is_wrong"]({"verdict": verdict, "true": {"noise": noise, "knowledge": knowledge}}) == wrong


def test_the_page_is_current_and_the_goal_is_met(tmp_path):
    PAGE["main"](str(tmp_path))
    assert (tmp_path / "verdict.md").read_text() == (ROOT / "docs" / "results" / "verdict.md").read_text()
    rows = json.loads(PAGE["MEASURED"].read_text())
    assert len({row["model"] for row in rows}) == 8
    assert {row["cell"] for row in rows} == set(STUDY["JUDGED"])
    assert not any(map(PAGE["is_wrong"], rows))
    assert torch.tensor([row["contradicted"] for row in rows if not row["cell"].endswith("noise")]).max() <= 0.05
