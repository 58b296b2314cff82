"""The probe's verdict on cells of known noise and knowledge, by its own functions, and the page of the study."""

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch

from bl_trainer.cells.pretraining import SIZES, Model
from bl_trainer.cells.transformer import initial
from bl_trainer.cells.vocabulary import BANG, CLOSE, ROTATE
from bl_trainer.cells.world import RULES, World

ROOT = Path(__file__).parents[1]
STUDY = runpy.run_path(str(ROOT / "studies" / "verdict_study.py"))
PAGE = runpy.run_path(str(ROOT / "tools" / "verdict_page.py"))
STORED = json.loads(PAGE["MEASURED"].read_text())
VERDICT = (ROOT / "docs" / "results" / "verdict.md").read_text()
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
    """Clean cells have no noise; the estimate holds here; what rows contradict is noise, and most of its first letters."""
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


def test_noise_is_known_per_token():
    """What a noisy cell writes differs from the clean cell's answer only where a row says so."""
    world = World(3)
    for name, share in (("letters-noise", 0.1), ("same-noise", 0.3), ("wrapped-noise", 0.15), ("halves-noise", 0.15)):
        flags = [flag for row in STUDY["split"](name, world, 10).first for flag in row.is_noise]
        assert sum(flags) / len(flags) == pytest.approx(share, abs=0.05)
    rows = STUDY["split"]("same-noise", world, 10).first
    assert len({row.answer for row in rows if all(row.is_noise)}) == 1
    for name, facts in (("same-noise", world.facts["half"]), ("heavy-noise", world.facts["weak"])):
        rows = STUDY["split"](name, world, 10).first
        assert all(any(row.is_noise) or row.answer == facts[row.prompt[1:3]] for row in rows)
    for row in STUDY["split"]("letters-noise", world, 10).first:
        right = RULES[ROTATE](row.prompt[1:-1])
        assert all(flag or token == other for token, other, flag in zip(row.answer, right, row.is_noise, strict=True))
    assert not any(
        any(row.is_noise) for name in STUDY["NEW"] if "noise" not in name for row in STUDY["split"](name, world, 2).second
    )


def test_the_page_is_current(tmp_path):
    PAGE["main"](str(tmp_path))
    assert (tmp_path / "verdict.md").read_text() == VERDICT
    for part, cells, seeds in (("chosen", "JUDGED", range(8)), ("new", "NEW", range(100, 108))):
        found = sorted((row["model"].split("-")[1], row["cell"]) for row in STORED[part])
        assert found == sorted((str(seed), cell) for seed in seeds for cell in STUDY[cells])


# Verdict -> the noise and the knowledge that it allows, each from a bound up to below another
ALLOWED = {
    "knowledge": ((0, 0.1), (0.1, 2)),
    "both": ((0.05, 2), (0.1, 2)),
    "noise": ((0.05, 2), (0, 0.2)),
    "little": ((0, 0.1), (0, 0.1)),
    "undecided": ((0, 2), (0, 2)),
}


def outcome(row):
    """Whether a verdict is right, undecided or wrong."""
    holds = [low <= value < high for value, (low, high) in zip(row["true"].values(), ALLOWED[row["verdict"]], strict=True)]
    return "wrong" if not all(holds) else "undecided" if row["verdict"] == "undecided" else "right"


@pytest.mark.parametrize(("part", "name"), [("chosen", "first cells"), ("new", "new cells")])
def test_counts_of_the_page(part, name):
    """By other code than the page's."""
    rows = STORED[part]
    assert all([*row["true"]] == ["noise", "knowledge"] for row in rows)
    outcomes = Counter(map(outcome, rows))
    numbers = [outcomes[key] for key in ("right", "undecided", "wrong")]
    assert (
        f"| {name} | {12 if part == 'chosen' else 10} and {8 if part == 'chosen' else 10} | 8 | "
        + " | ".join(map(str, numbers))
        in VERDICT
    )
    assert "- **{} right, {} undecided, {} wrong** of 160 verdicts.".format(*numbers) in VERDICT
    for key, count in Counter((row["verdict"], row["cell"]) for row in rows if outcome(row) == "wrong").items():
        assert "Wrong: `{}` on {}, {} of 8 models.".format(*key, count) in VERDICT
    clean = [row for row in rows if row["cell"][-5:] != "noise"]
    flagged = [len([row for row in clean if row[key] > 0.05]) for key in ("contradicted", "noise")]
    assert "{0} of {2} by what rows contradict, {1} by what is not predictable".format(*flagged, len(clean)) in VERDICT
    noisy = torch.tensor(
        [
            [row["true"]["noise"], row["low"] - row["true"]["knowledge"], row["noise"], row["noise_high"]]
            for row in rows
            if row not in clean
        ]
    ).double()
    found = len([row for row in rows if row not in clean and row["verdict"] in {"noise", "both"}])
    assert f"- **Noisy cells found noisy**: {found} of {len(noisy)}." in VERDICT
    for i, kind in enumerate(("all noise", "improbable noise")):
        more = noisy[:, i] - noisy[:, 2]
        line = next(line for line in VERDICT.splitlines() if line.startswith(f"| {name}, {kind} |"))
        _, _, count, some, much, above, most, mean, _ = (cell.strip() for cell in line.split("|"))
        assert (int(count), int(much)) == (len(noisy), (more > 0.05).sum())
        assert int(above) == pytest.approx((noisy[:, i] > noisy[:, 3]).sum().item(), abs=1)
        assert int(some) == pytest.approx((more > 1e-6).sum().item(), abs=1)  # by rounding
        assert float(most.split(",")[0]) == pytest.approx(more.max().item(), abs=6e-4)
        assert float(mean) == pytest.approx(more.mean().item(), abs=6e-4)


def test_the_guide_has_the_figures_of_the_page():
    guide = " ".join((ROOT / "docs" / "guide" / "diagnose.md").read_text().split())
    outcomes = Counter(map(outcome, STORED["new"]))
    noisy = [row["verdict"] for row in STORED["new"] if row["cell"].endswith("noise")]
    assert "Of 160 verdicts {right} are right, {undecided} undecided, and {wrong} wrong.".format(**outcomes) in guide
    found = sum(verdict in ("noise", "both") for verdict in noisy)
    assert f"It found noise in {found} of {len(noisy)} noisy cases" in guide
    wrong = {(row["verdict"], row["cell"]) for row in STORED["new"] if outcome(row) == "wrong"}
    assert wrong == {("knowledge", "same-noise")}
