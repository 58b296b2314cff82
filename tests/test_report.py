"""The report on made-up figures: its schema, the warnings, the advice, the page's escapes."""

import errno
import math
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from bl_trainer.diagnosis import warnings
from bl_trainer.diagnosis.advice import recommend, sweep_yaml
from bl_trainer.diagnosis.continuum import place
from bl_trainer.diagnosis.decision import BY_PLACEMENT, BY_PROBE, UNDECIDED
from bl_trainer.diagnosis.decision import OPEN as NO_CHOICE
from bl_trainer.diagnosis.page import page, write_report
from bl_trainer.diagnosis.report import (
    SCHEMA,
    Bin,
    Compare,
    Compared,
    ComparedElsewhere,
    Conflicts,
    Examples,
    Foretold,
    Gradient,
    Kind,
    Learnability,
    Positions,
    RecipeFacts,
    Reliability,
    Report,
    Total,
    Trained,
)
from bl_trainer.diagnosis.terminal import terminal_summary
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.threshold import Threshold

SPECS = ["nll", {"name": "power", "alpha": 0.5}, "neg_p", {"name": "power", "alpha": 10}]
NAMES = ("all", "eos", "special", "template", "content")


def kind(prob=0.5, tokens=100):
    return Kind(tokens, prob, 1.0, 2.0, 0.6, 0.4, 0.0)


def total(prob=0.5, interval=(0.45, 0.55), conflicts=0.0):
    return Total(20, 1000, prob, 1.0, 2.0, 0.6, 0.4, conflicts, interval)


def gradient(spec, above=0.0):
    shares = dict(zip(NAMES, (1.0, 0.25, 0.25, 0.125, 0.625), strict=True))
    objective, threshold = Objective.parse(spec).to_dict(), Threshold(above=above).to_dict()
    return Gradient(objective, threshold, [0.1] * 10, shares, 10.0, 0.5, 0.5, 1.0, [0.5, 0.5, 0.5])


def made(**changes):
    """A report that gives no cause for a warning but for the one that all give."""
    plain = {
        "schema": SCHEMA,
        "versions": {"bl_trainer": "0"},
        "model": "a model",
        "date": "2026-01-31",
        "data": "some data",
        "recipe": RecipeFacts("nll", None, 1e-5, False),
        "total": total(),
        "placement": place(0.5, (0.45, 0.55)),
        "percentiles": {str(rank): rank / 100 for rank in range(1, 100)},
        "percentile_error": 2.0**-11,
        "examples": Examples(0.5, 0.1, {"10": 0.3, "50": 0.5, "90": 0.7}, [1] * 20),
        "histogram": [20] * 50,
        "kinds": {"all": kind(), "eos": kind(0.6), "content": kind()},
        "positions": Positions([(20, 0.5), (0, None)], [(20, 0.5)], [(20, 0.5)]),
        "calibration": Reliability(0.05, [Bin(1000, 0.65, 0.6)]),
        "conflicts": Conflicts(0.5, 0.05, 0.0),
        "groups": {},
        "groups_cut": False,
        "has_prompts": True,
        "objectives": [*map(gradient, SPECS), gradient("nll", 0.1)],
        "sampled": False,
        "streamed": False,
        "reader": {"surprising": [], "conflicting": [], "typical": []},
        "rows": {},
        "is_weighed": False,
        "unmarked": 0.0,
    }
    return Report(**{**plain, **changes})


def compared():
    reliability = {"base": Reliability(0.1, [Bin(10, 0.5, 0.4)]), "tuned": Reliability(0.1, [Bin(10, 0.5, 0.4)])}
    means = dict.fromkeys(("kl", "reverse_kl", "js", "base_prob", "prob", "base_nll", "nll", "base_top1", "top1"), 0.5)
    intervals = dict.fromkeys(means, None)
    return Compared(3, 10, **means, kl_interval=None, intervals=intervals, calibration=reliability, moved=[[1] * 10] * 10)


def full():
    """A report with all its parts."""
    found = Foretold(10, 100, 0.3, 0.05, 0.0, 0.4, 0.2, (0.25, 0.35), (0.0, 0.1), (0.0, 0.0))
    compare = Compare("a checkpoint", compared(), ComparedElsewhere("other data", "test", compared()))
    probe = Learnability(40, 1e-4, 0.1, 0, Trained(10, 100), found, found, "knowledge")
    report = made(compare=compare, learnability=probe, groups={"g": total()}, rows={"compare": [(0, 1)]})
    return replace(report, recommendation=recommend(report))


def keys(value, path=""):
    """The names in a mapping with those that it stands below, `*` for any of several."""
    parts = value if isinstance(value, list) else [value]
    if path in RECIPES or not any(isinstance(item, dict) for item in parts):
        return {path}
    if isinstance(value, list):
        return set().union(*(keys(item, f"{path}[]") for item in value))
    return set().union(*(keys(item, f"{path}.{'*' if path in OPEN else key}".lstrip(".")) for key, item in value.items()))


VALUES = "prob nll entropy top1 above_paper conflicts"
COMPARED = (
    "examples tokens kl reverse_kl js base_prob prob base_nll nll base_top1 top1 kl_interval intervals.* calibration.*.error "
    "calibration.*.curve[].tokens calibration.*.curve[].confidence calibration.*.curve[].accuracy moved"
)
FORETOLD = "examples tokens learnable noise contradicted low gain learnable_interval noise_interval contradicted_interval"
RECIPES = {"objectives[].objective", "objectives[].threshold", "recommendation.arms"}  # as recipes write them
OPEN = {
    "versions", "percentiles", "examples.percentiles", "kinds", "groups", "objectives[].kinds",
    "placement.distance_to_anchors", "placement.anchors",
    *(f"compare.{part}.{name}" for part in ("train", "probe") for name in ("intervals", "calibration")),
}  # fmt: skip
CONTRACT = {
    "": "schema date versions.* model data percentiles.* percentile_error histogram groups_cut has_prompts sampled streamed",
    "recipe": "objective threshold learning_rate chooses_by_loss",
    "total": f"examples tokens {VALUES} prob_interval",
    "placement": "region decided possible cuts distance_to_cuts distance_to_anchors.* anchors.*",
    "examples": "mean deviation percentiles.* histogram",
    "kinds": " ".join(f"*.{name}" for name in f"tokens {VALUES}".split()),
    "positions": "first last relative",
    "calibration": "error curve[].tokens curve[].confidence curve[].accuracy",
    "conflicts": "entropy prob share",
    "groups": " ".join(f"*.{name}" for name in f"examples tokens {VALUES} prob_interval".split()),
    "learnability": f"steps learning_rate below without_control trained.rows trained.tokens {FORETOLD} verdict why "
    + " ".join(f"half_way.{name}" for name in FORETOLD.split()),
    "objectives[]": "objective threshold buckets kinds.* effective_tokens scale gradient_weight kept temperatures",
    "recommendation": "headline confidence arms learning_rate seed reasons warnings",
    "compare": "checkpoint probe.data probe.split",
    "compare.train": COMPARED,
    "compare.probe": COMPARED,
}


def test_schema_is_frozen():
    """report.json's keys under SCHEMA 1; a key may come, and then here too, but none may go or move."""
    expected = {f"{path}.{name}".lstrip(".") for path, names in CONTRACT.items() for name in names.split()}
    assert SCHEMA == 1
    assert keys(full().to_json()) == expected


def test_parts_that_were_not_asked_for_are_left_out():
    assert made().to_json().keys() == full().to_json().keys() - {"learnability", "compare"}
    alone = replace(full(), compare=Compare("a checkpoint", compared()))
    assert alone.to_json()["compare"].keys() == {"checkpoint", "train"}
    once = replace(full(), learnability=replace(full().learnability, half_way=None))
    assert once.to_json()["learnability"]["half_way"] is None


def test_a_report_is_frozen_and_its_json_is_strict():
    report = made(total=total(float("nan"), None))
    with pytest.raises(FrozenInstanceError):
        report.model = "another"
    found = report.to_json()["total"]
    assert found["prob"] is None
    assert found["prob_interval"] is None


SPARING = RecipeFacts({"name": "neg_p", "special_tokens": "nll"}, None, 1e-5, False)
CAUSES = {
    "beginning_of_stream": ({"sampled": True, "streamed": True}, "Only the beginning of the stream was measured"),
    "weights_left_out": (
        {"is_weighed": True},
        "Weights (`objective_weight`, and those of messages",
    ),
    "no_end_token": ({"kinds": {"all": kind(), "content": kind()}}, "No target is an end token"),
    "content_differs": (
        {"kinds": {"all": kind(), "eos": kind(0.6), "content": kind(0.2)}},
        "mean p is 0.200 (model-weak), with them 0.500",
    ),
    "improbable_end_tokens": (
        {"kinds": {"eos": kind(0.01)}},
        "End tokens are improbable (mean p 0.01): they get 25.0% of the gradient under nll",
    ),
    "improbable_special_tokens": ({"kinds": {"eos": kind(), "special": kind(0.01)}}, "Special tokens are improbable"),
    "improbable_template": (
        {"kinds": {"template": kind(0.01)}, "recipe": SPARING},
        "never teach them, if not by the `special_tokens` that the recipe has.",
    ),
    "confident_conflicts": ({"total": total(conflicts=0.5)}, "50.0% of the tokens are confident conflicts"),
    "miscalibrated": (
        {"calibration": Reliability(0.2, [Bin(1000, 0.8, 0.6)])},
        "more confident than right (calibration error 0.20)",
    ),
    "groups_differ": ({"groups": {"a": total(0.1), "b": total(0.9)}}, "in different regions (strong, weak)"),
    "improbable_opening": ({"positions": Positions([(20, 0.05)], [], [])}, "The first token of a response has mean p 0.05"),
    "gradient_not_shown": (
        {"recipe": RecipeFacts("anneal", None, 1e-5, False)},
        "gradient of anneal comes from is not shown: it depends on more than p (entropy, training progress). Its effective "
        "temperature: 0.00.",
    ),
    "template_not_told": ({"unmarked": 0.25}, "In 25.0% of the tokens the chat template's own could not be told"),
}
NO_CAUSES = {
    "beginning_of_stream": ({"sampled": True}, {"streamed": True}),
    "weights_left_out": (),
    "no_end_token": (),
    "content_differs": ({"kinds": {"eos": kind()}}, {"kinds": {"content": kind(0.46)}}),
    "improbable_end_tokens": ({"kinds": {"content": kind(0.01)}}, {"kinds": {"eos": kind(0.1)}}),
    "improbable_special_tokens": ({"kinds": {"eos": kind(0.01), "special": kind(0.01)}},),  # the same tokens
    "improbable_template": ({"kinds": {"template": kind(0.1)}},),
    "confident_conflicts": ({"total": total(conflicts=0.009)},),
    "miscalibrated": ({"calibration": Reliability(0.1, [Bin(1000, 0.7, 0.6)])},),
    "groups_differ": ({"groups": {"a": total(0.1), "b": total(0.2)}},),
    "improbable_opening": (
        {"positions": Positions([(20, 0.05)], [], []), "has_prompts": False},
        {"positions": Positions([(0, None)], [], [])},
        {"positions": Positions([(20, 0.2)], [], []), "total": total(0.3)},
    ),
    "gradient_not_shown": ({"recipe": RecipeFacts({"name": "power", "alpha": {"from": 0, "to": 2}}, None, 1e-5, False)},),
    "template_not_told": (),
}


def test_each_warning_has_its_test():
    names = {warn.__name__ for warn in warnings.WARNINGS}
    assert CAUSES.keys() == NO_CAUSES.keys() == names - {"scales_differ"}


@pytest.mark.parametrize("name", CAUSES)
def test_a_warning_has_its_cause(name):
    changes, said = CAUSES[name]
    report = made(**changes)
    found = getattr(warnings, name)(report)
    assert said in found
    assert found in recommend(report).warnings


@pytest.mark.parametrize("name", NO_CAUSES)
def test_no_warning_without_a_cause(name):
    for changes in ({}, *NO_CAUSES[name]):
        assert getattr(warnings, name)(made(**changes)) is None


def test_all_reports_say_how_pulls_differ():
    (only,) = recommend(made()).warnings
    assert only.startswith("The sum of the pulls, relative to nll's, is power 0.5: 0.5, neg_p: 0.5, power 10: 0.5.")


def test_warnings_come_in_their_order():
    changes = [CAUSES[name][0] for name in ("weights_left_out", "confident_conflicts", "beginning_of_stream")]
    found = recommend(made(**{key: value for each in changes for key, value in each.items()})).warnings
    assert [said.split()[0] for said in found] == ["Only", "Weights", "50.0%", "The"]


@pytest.mark.parametrize(
    ("changes", "arms", "reason"),
    [
        ({}, ["nll", "anneal", "neg_p", "nll"], "Mean p is 0.500: the paper found no winner here"),
        (
            {"placement": place(0.8, (0.79, 0.81))},
            ["nll", "neg_p", "power", "nll"],
            "Mean p is 0.500: the model knows this well",
        ),
        ({"placement": place(0.1, (0.05, 0.15))}, ["nll", "anneal"], "Mean p is 0.500: the model knows little of this"),
        (
            {"placement": place(0.3, (0.2, 0.4))},
            ["nll", "anneal", "neg_p", "nll"],
            "Undecided, weak or intermediate: the interval crosses a cut.",
        ),
        ({"total": total(interval=None), "placement": place(0.5, None)}, None, "there are too few examples for an interval"),
        ({"recipe": RecipeFacts("psft", None, 1e-5, False)}, ["nll", "anneal", "neg_p", "nll", "psft"], ""),
    ],
)
def test_advice(changes, arms, reason):
    advice = recommend(made(**changes))
    name = lambda arm: Objective.parse(arm["objective"]).to_dict()["name"]  # noqa: E731
    assert arms is None or [name(arm) for arm in advice.arms] == arms
    assert reason in advice.reasons[0]
    assert [arm["threshold"] for arm in advice.arms if "threshold" in arm] == [0.1] * (arms != ["nll", "anneal"])
    assert (advice.learning_rate, advice.seed) == ([3.3e-6, 1e-5, 3e-5], [0, 1, 2])


@pytest.mark.parametrize(
    ("mean", "interval", "verdict", "learnable", "headline", "confidence"),
    [
        (0.8, (0.79, 0.81), None, 0, "Try `neg_p` first, with `nll` as the control.", BY_PLACEMENT),
        (0.1, (0.05, 0.15), None, 0, "Keep `nll`, and try `anneal` against it.", BY_PLACEMENT),
        (0.5, (0.45, 0.55), None, 0, NO_CHOICE, BY_PLACEMENT),
        (0.3, (0.2, 0.4), None, 0, NO_CHOICE, UNDECIDED),
        (0.8, (0.79, 0.81), "knowledge", 0.3, "Keep `nll`, and try `anneal` against it.", BY_PROBE),
        (0.8, (0.79, 0.81), "both", 0.3, "Try `anneal`, with `nll` as the control.", BY_PROBE),
        (0.1, (0.05, 0.15), "noise", 0.05, "Try `neg_p` first, with `nll` as the control.", BY_PROBE),
        (0.8, (0.79, 0.81), "little", 0.05, "Try `neg_p` first, with `nll` as the control.", BY_PROBE),
        (0.3, (0.2, 0.4), "undecided", 0.15, NO_CHOICE, UNDECIDED),
    ],
)
def test_decision(mean, interval, verdict, learnable, headline, confidence):
    probe = full().learnability
    judged = verdict and replace(probe, verdict=verdict, found=replace(probe.found, learnable=learnable))
    advice = recommend(made(placement=place(mean, interval), learnability=judged))
    assert (advice.headline, advice.confidence) == (headline, confidence)


def test_effective_temperatures_are_shown():
    """One figure where it is fixed, three where it depends on the distribution; infinity is null in the file."""
    uneven = replace(made().objectives[0], temperatures=[0.5, math.inf, 0.0])
    report = made(objectives=[made().objectives[0], uneven])
    text = page(report, Path("out"))
    assert "<td>0.50</td>" in text
    assert "<td>0.50, infinity, 0.00</td>" in text
    assert report.to_json()["objectives"][1]["temperatures"] == [0.5, None, 0.0]
    assert "equals nll sampled at its effective temperature" in text


def test_the_page_explains_a_swept_threshold_where_one_is_swept():
    said = "The threshold of <code>nll, p &gt;= 0.1</code> is the 10th percentile of p"
    assert said in page(made(recommendation=recommend(made())), Path("out"))
    weak = made(placement=place(0.1, (0.05, 0.15)), recipe=RecipeFacts("neg_p", 0.2, 1e-5, False))
    text = page(replace(weak, recommendation=recommend(weak)), Path("out"))
    assert "<code>neg_p, p &gt;= 0.2</code>" in text
    assert "The threshold of" not in text


def test_readers_take_every_report():
    hostile = "<script>alert(1)</script>"
    report = replace(full(), model=hostile, groups={hostile: total()})
    text = page(report, Path("out"))
    assert hostile not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # title, heading and group
    headings = [part.split("</h2>")[0] for part in text.split("<h2>")[1:]]
    assert [heading for heading in headings if "<" not in heading and ":" not in heading] == [
        "Look at these first", "Next", "Knowledge or noise", "Against the base model", "Read the examples", "Probabilities",
        "Where the gradient comes from", "Position and kind", "Calibration", "From example to example",
    ]  # fmt: skip
    assert "against a checkpoint on probe: mean p 0.500 -> 0.500" in terminal_summary(report, "out")
    assert "improbable tokens: knowledge" in sweep_yaml(report)
    assert "<h2>Knowledge or noise" not in page(made(), Path("out"))


def test_a_report_without_drawings_has_no_page_left_of_an_earlier_one(tmp_path):
    write_report(full(), str(tmp_path / "drawn"))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir() if path.suffix not in ("", ".html")}
    write_report(full(), str(tmp_path / "drawn"), draw=False)
    write_report(full(), str(tmp_path / "new"), draw=False)
    assert {path.name for path in (tmp_path / "drawn").rglob("*")} == {*kept, "figures"}
    assert {path.name for path in (tmp_path / "new").rglob("*")} == {*kept}
    assert {name: (tmp_path / "drawn" / name).read_bytes() for name in kept} == kept
    assert f"Report: {tmp_path / 'report.json'} " in terminal_summary(full(), str(tmp_path), drawn=False)


def test_a_report_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    write_report(full(), str(tmp_path))
    names = ("report.json", "report.html", "examples.json", "sweep.yaml")
    before = {name: (tmp_path / name).read_text() for name in names}
    assert (tmp_path / "compare.csv").read_bytes().splitlines(keepends=True)[1] == b"0,1\r\n"
    synced = []

    def full_disk(descriptor):
        synced.append(descriptor)
        if len(synced) > 7:  # the figures
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(replace(full(), model="another"), str(tmp_path))
    assert len(synced) == 8
    assert {name: (tmp_path / name).read_text() for name in names} == before
    assert not list(tmp_path.rglob("*.part"))
