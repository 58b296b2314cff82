"""pass@k, distinct answers and their entropy: by hand, in results, in the table, and as what a sweep ranks by."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest

from bl_trainer.errors import RecipeError
from bl_trainer.evaluation.exploration import bounds_of, diversity, is_of_all, names_of, pass_at
from bl_trainer.evaluation.items import item_rows, read_items
from bl_trainer.evaluation.options import Checkpoint, EvaluateArguments
from bl_trainer.evaluation.results import Answered, Results
from bl_trainer.evaluation.scores import paired_difference
from bl_trainer.evaluation.table import table
from bl_trainer.sweep.checks import rank_is_measured
from bl_trainer.sweep.outcome import task_scores


@pytest.mark.parametrize("answers", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(answers):
    for right, k in itertools.product(range(answers + 1), range(1, answers + 1)):
        subsets = [*itertools.combinations([True] * right + [False] * (answers - right), k)]
        assert pass_at(right, answers, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_has_no_bias():
    """Its mean over the answers of a model that is right with probability p is 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 4
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(c, n, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-15)
    assert sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - (1 - c / n) ** k) for c in range(n + 1)) < mean - 0.01


def test_answers_are_the_same_by_their_final_answers():
    said = ["so \\boxed{12}", "thus it is \\boxed{ 12 }", "a\n#### 7", " a  b ", "a b", "a B"]
    found = diversity(said)
    assert found["distinct_answers"] == 4 / 6
    shares = [2 / 6, 1 / 6, 2 / 6, 1 / 6]
    assert found["answer_entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert diversity(["a"] * 5) == {"distinct_answers": 1 / 5, "answer_entropy": 0.0}
    assert diversity([*"abcd"])["answer_entropy"] == pytest.approx(math.log(4))


GRADED = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]] * 3
SOURCES = ["x", "y", "x", ""] * 3


def samples_of(graded, close=0.5):
    """As the harness has them. Right answers are alike, wrong ones are not."""
    return [
        {
            "doc_id": i, "doc_hash": str(i), "filtered_resps": [["a"]], "arguments": [("q", {})], "target": "a",
            "filter": "none",
            "resps": [["right" if right else f"wrong {k}" for k, right in enumerate(own)]], "metrics": ["acc", "near"],
            "acc": [float(right) for right in own], "near": [close] * len(own), "doc": {"source": source},
        }
        for i, (own, source) in enumerate(zip(graded, SOURCES, strict=True))
    ]  # fmt: skip


def results_of(tmp_path, models=("a",), **options):
    for name in models:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    arguments = EvaluateArguments(model=[*models], tasks=["t"], output=str(tmp_path / "out"), **options)
    arguments.check()
    return Results(arguments, [Checkpoint(name, str(tmp_path / name), None) for name in models])


def add(results, name, graded, **rest):
    scores = {"acc,none": sum(map(sum, graded)) / 4 / len(graded), "near,none": 0.5}
    found = {
        "samples": {"t": samples_of(graded, **rest)}, "results": {"t": scores},
        "configs": {"t": {"metadata": {"by": "source"}}}, "higher_is_better": {}, "n-shot": {"t": 0}, "versions": {"t": 1},
    }  # fmt: skip
    ways = [Answered(at, own, found) for at, own in results.options.decodings()]
    results.add(Checkpoint(name, name, None), "t", ways, chat=False)


def test_results_have_them_with_their_errors_and_differences(tmp_path):
    results = results_of(tmp_path, ("a", "b"), samples=4)
    add(results, "a", GRADED)
    add(results, "b", [[1, 0, 0, 0]] * 12)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = {score["metric"]: score for score in content["evaluations"][0]["scores"] if ":" not in score["metric"]}
    assert [*scores] == ["acc", "near", "acc,pass@2", "acc,pass@4", "distinct_answers", "answer_entropy"]  # `near` is no 0 or 1
    by_item = [pass_at(sum(own), 4, 2) for own in GRADED]
    assert by_item[:4] == [pytest.approx(5 / 6), 0, 1, 0.5]
    two = scores["acc,pass@2"]
    assert two["value"] == pytest.approx(sum(by_item) / 12)
    mean = sum(by_item) / 12
    assert two["stderr"] == pytest.approx((sum((each - mean) ** 2 for each in by_item) / 11 / 12) ** 0.5)
    half = 2.200985 * two["stderr"]  # of Student's t with 11 degrees of freedom
    assert two["interval"] == pytest.approx([mean - half, mean + half], abs=1e-6)
    assert scores["near"]["interval"] == pytest.approx([0.5 - 0.5 * (1 - 0.05 ** (1 / 12)), 0.5 + 0.5 * (1 - 0.05 ** (1 / 12))])
    assert scores["answer_entropy"]["interval"][1] > 1
    assert (two["items"], two["answers"], two["is_mean"], two["higher_is_better"]) == (12, 4, True, True)
    assert scores["acc,pass@4"]["value"] == pytest.approx(3 / 4)
    assert scores["distinct_answers"]["value"] == pytest.approx((3 / 4 + 1 + 1 / 4 + 1) / 4)
    mixed = -0.5 * math.log(0.5) - 0.5 * math.log(0.25)
    assert scores["answer_entropy"]["value"] == pytest.approx((mixed + 2 * math.log(4)) / 4)
    named = {score["metric"]: score["value"] for score in content["evaluations"][0]["scores"]}
    assert named["acc,pass@2:x"] == pytest.approx((5 / 6 + 1) / 2)
    assert named["acc,pass@2:macro"] == pytest.approx((5 / 6 + 1) / 4)
    items = read_items(tmp_path / "out" / two["samples"], "acc,pass@2")
    assert [*items.values()] == pytest.approx(by_item)
    differences = {each["metric"]: each for each in content["differences"]}
    assert differences["acc,pass@2"]["difference"] == pytest.approx(0.5 - mean)
    assert differences["acc,pass@2"]["interval"][0] < 0.5 - mean < differences["acc,pass@2"]["interval"][1]
    shown = table(results)
    assert "acc, Avg@4 " in shown
    assert "acc,pass@2 " in shown
    assert "distinct_answers  " in shown
    assert "acc,pass@2, Avg" not in shown
    assert task_scores(tmp_path / "out")["t/acc,pass@4"]["value"] is not None


def test_one_answer_has_none_but_what_is_asked_for(tmp_path):
    (one,) = item_rows([{**samples_of(GRADED)[0], "acc": 1.0, "near": 0.5, "resps": [["a"]]}])
    assert one["metrics"] == {"acc": 1.0, "near": 0.5}
    (one,) = item_rows([{**samples_of(GRADED)[0], "acc": 1.0, "near": 0.5, "resps": [["a"]]}], ks=[1])
    assert one["metrics"] == {"acc": 1.0, "acc,pass@1": 1.0, "near": 0.5}


def test_a_metric_that_is_better_lower_has_no_pass_at_k():
    """Of its 1 and 0 the one is no success."""
    sample = samples_of(GRADED)[0]
    (row,) = item_rows([{**sample, "near": [1.0, 0.0, 0.0, 0.0]}], ks=[2], higher={"acc": True, "near": False})
    assert [name for name in row["metrics"] if "pass@" in name] == ["acc,pass@2"]


def test_an_entropy_is_no_share():
    assert bounds_of("acc", [0.0, 1.0]) == (0, 1)
    assert bounds_of("acc", [0.0, 7.0]) is None
    names = ["answer_entropy", "answer_entropy@T0.5:macro", "a/t.yaml/answer_entropy:x", "t/answer_entropy@T1"]
    assert [bounds_of(name, [0.5]) for name in names] == [(0, math.inf)] * 4
    alike = {str(i): 0.5 for i in range(12)}
    assert paired_difference(alike, alike, metric="answer_entropy")["interval"] is None
    assert paired_difference(alike, alike, metric="acc")["interval"] is not None


def test_a_task_without_right_or_wrong_has_no_pass_at_k(tmp_path, caplog):
    results = results_of(tmp_path, samples=4, pass_at=[2])
    add(results, "a", [[0.5] * 4] * 12, close=0.25)
    assert "`--pass_at` has no effect on t: it has no metric that is 1 for right answers, else 0." in caplog.text
    assert not any("pass@" in score["metric"] for score in results.own[0]["scores"])


@pytest.mark.parametrize(
    ("samples", "pass_at", "ks"),
    [(1, None, []), (2, None, [2]), (3, None, [2, 3]), (16, None, [2, 4, 8, 16]), (4, [4, 1, 4], [1, 4]), (1, [1], [1])],
)
def test_which_k(samples, pass_at, ks):
    options = EvaluateArguments(model=["a"], tasks=["gsm8k"], output="b", samples=samples, pass_at=pass_at)
    options.check()
    assert options.ks == ks
    told = ["--pass_at", *map(str, pass_at)] if pass_at else []
    read = EvaluateArguments.read(["--model", "a", "--tasks", "t", "--output", "b", "--samples", str(samples), *told])
    assert read.pass_at == pass_at


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"samples": 4, "pass_at": [8]},
            "Cannot compute pass@8 from 4 answers to each item. Write `--samples 8` or more, or a",
        ),
        ({"pass_at": [2]}, "Cannot compute pass@2 from 1 answer to each item. Write `--samples 2` or more"),  # greedy
        ({"samples": 4, "pass_at": [2], "temperature": 0.0}, "`--temperature 0` gives 4 equal answers"),
        ({"samples": 4, "pass_at": [0]}, "`--pass_at 0` must be numbers of answers, each at least 1"),
        ({"samples": 4, "pass_at": []}, "must be numbers of answers"),
    ],
    ids=str,
)
def test_k_that_can_not_be_are_named(options, message):
    with pytest.raises(RecipeError, match=message):
        EvaluateArguments(model=["a"], tasks=["gsm8k"], output="b", **options).check()


def test_other_k_are_other_results(tmp_path):
    add(results_of(tmp_path, samples=4), "a", GRADED)
    with pytest.raises(RecipeError, match=r"results of t with other options \(`pass_at`: None, now \[2\]\)"):
        results_of(tmp_path, samples=4, pass_at=[2])


def test_a_sweep_ranks_by_them():
    class Design:
        base = {"model_name_or_path": "m"}

        def __init__(self, rank_by, **options):
            self.rank_by, self.evaluate = rank_by, {"tasks": ["gsm8k", "medical"], **options}

    for name in ("gsm8k/accuracy,pass@4", "gsm8k/distinct_answers", "medical/answer_entropy", "medical/accuracy,pass@2:macro"):
        rank_is_measured(Design(name, samples=4))
    rank_is_measured(Design("gsm8k/accuracy,pass@3", samples=4, pass_at=[3]))
    rank_is_measured(Design("gsm8k/format", format=r".*\\boxed\{.+\}.*"))
    with pytest.raises(RecipeError, match=r"`rank_by: gsm8k/format` is not a metric"):
        rank_is_measured(Design("gsm8k/format"))
    for options in ({"samples": 4}, {}):
        with pytest.raises(RecipeError, match=r"`rank_by: gsm8k/accuracy,pass@8` is not a metric"):
            rank_is_measured(Design("gsm8k/accuracy,pass@8", **options))
    assert [*filter(is_of_all, ["accuracy", "accuracy,strict", "accuracy:pass", *names_of(["a"], [2], 2)])] == names_of(
        ["a"], [2], 2
    )


def test_a_sweep_that_can_not_evaluate_says_so_at_once(monkeypatch):
    monkeypatch.setattr("bl_trainer.evaluation.options.find_spec", lambda name: None)
    design = SimpleNamespace(base={"model_name_or_path": "m"}, rank_by="gsm8k/accuracy", evaluate={"tasks": ["gsm8k"]})
    with pytest.raises(RecipeError, match=r"Evaluation needs lm-evaluation-harness. Run `pip install '\.\[evaluation\]'`"):
        rank_is_measured(design)
