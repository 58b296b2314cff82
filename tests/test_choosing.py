"""The rule that picks a default, on results made for it."""

import pytest

from bl_trainer.cells.choosing import SCHEDULED, TIED, Ruling, regrets
from bl_trainer.cells.field import CANDIDATES, FIELD
from bl_trainer.cells.results import Results
from bl_trainer.cells.scores import TEMPERATURES

CELLS = ("a", "b")


def results(table: dict[str, dict[str, list[float]]], models: int = 3) -> Results:
    """Return results by objective and metric, a figure for each cell; models differ by 0.01 about it."""
    rows = []
    for name, metrics in table.items():
        for i, cell in enumerate(CELLS):
            for model in range(models):
                shift = 0.01 * (model - (models - 1) / 2)
                split = {"greedy": metrics["greedy"][i] + shift, "format": 1.0}
                for metric in ("variation", "sampled"):
                    split |= {f"{metric}_{t:g}": metrics.get(metric, [0.5, 0.5])[i] + shift for t in TEMPERATURES}
                row = {"objective": name, "cell": cell, "model": f"small-{model}", "rate": 1.0, "seed": 0}
                rows.append({**row, "validation": split, "test": split, "kept": 1.0})
    return Results(tuple(rows))


def test_regret_is_the_distance_to_the_best_candidate_of_each_cell() -> None:
    found = regrets(results({"x": {"greedy": [0.9, 0.5]}, "y": {"greedy": [0.7, 0.8]}}), ["x", "y"], "greedy")
    assert found["x"].by_cell == pytest.approx({"a": 0, "b": 0.3})
    assert found["y"].by_cell == pytest.approx({"a": 0.2, "b": 0})
    assert (found["x"].worst, found["y"].worst) == ("b", "a")
    assert found["x"].most == pytest.approx(0.3)
    assert found["x"].mean.mean == pytest.approx(0.15)
    assert list(found["x"].mean.by_model.values()) == pytest.approx([0.15] * 3)  # paired by model: they differ alike


def test_regret_of_a_distance_is_positive_where_it_is_greater() -> None:
    table = {"x": {"greedy": [1, 1], "variation": [0.1, 0.4]}, "y": {"greedy": [1, 1], "variation": [0.3, 0.3]}}
    found = regrets(results(table), ["x", "y"], "variation")
    assert found["x"].by_cell == pytest.approx({"a": 0, "b": 0.1})
    assert found["y"].by_cell == pytest.approx({"a": 0.2, "b": 0})


def test_the_worst_cell_counts_and_a_later_step_sees_only_what_is_left() -> None:
    table = {
        "best on average": {"greedy": [1.0, 0.75], "variation": [0.0, 0.0]},
        "even": {"greedy": [0.9, 0.9], "variation": [0.2, 0.2]},
        "even and varied": {"greedy": [0.9 - TIED / 2, 0.9], "variation": [0.1, 0.1]},
    }
    ruling = Ruling(results(table), tuple(table))
    assert ruling.rounds[0] == ["even", "even and varied"]
    assert ruling.rounds[1:] == [["even and varied"]] * 2
    assert ruling.winner == "even and varied"


def test_sampled_answers_decide_after_variation() -> None:
    table = {
        "x": {"greedy": [0.9, 0.9], "sampled": [0.9, 0.8]},
        "y": {"greedy": [0.9, 0.9], "sampled": [0.9, 0.9]},
    }
    assert Ruling(results(table), ("x", "y")).winner == "y"


def test_a_stateless_candidate_is_preferred_among_equals_and_then_the_smaller_mean() -> None:
    (scheduled,) = SCHEDULED
    table = {scheduled: {"greedy": [0.9, 0.9]}, "x": {"greedy": [0.9 - TIED / 2, 0.9]}, "y": {"greedy": [0.9 - TIED / 3, 0.9]}}
    ruling = Ruling(results(table), tuple(table))
    assert ruling.rounds[-1] == list(table)
    assert ruling.winner == "y"
    worse = table | {"x": {"greedy": [0.8, 0.9]}, "y": {"greedy": [0.8, 0.9]}}
    assert Ruling(results(worse), tuple(table)).winner == scheduled


def test_each_model_is_left_out_in_turn() -> None:
    """y is the better one by two models of three, and by the mean; by the first and the last alone x is."""
    made = results({"x": {"greedy": [0.5, 0.5]}, "y": {"greedy": [0.5, 0.5]}})
    better = {("y", "small-0"): 0.01, ("y", "small-1"): 0.2, ("x", "small-2"): 0.1}
    rows = []
    for row in made.rows:
        split = {**row["test"], "greedy": 0.5 + better.get((row["objective"], row["model"]), 0.0)}
        rows.append({**row, "validation": split, "test": split})
    ruling = Ruling(Results(tuple(rows)), ("x", "y"))
    assert ruling.winner == "y"
    assert ruling.winners_without_one == ["y", "x", "y"]
    assert ruling.regrets["greedy"]["x"].cells["a"].by_model == pytest.approx(
        {"small-0": 0.01, "small-1": 0.2, "small-2": -0.1}
    )


def test_candidates_are_of_the_field() -> None:
    assert {*CANDIDATES} < FIELD.keys()
