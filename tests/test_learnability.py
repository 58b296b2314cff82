"""The learnability probe: against plain forward passes, on knowledge and noise made here, and what is made of its figures."""

import hashlib
import json
import math
import random
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset

from bl_trainer.cli import main
from bl_trainer.diagnosis.advice import CONTRADICTED, LEARNABLE, MOVED, NOISE, RISING, SOME, SWEPT, UNSEEN, judge, recommend
from bl_trainer.diagnosis.evidence import BELOW, Evidence, contexts, evidence, matched, shares
from bl_trainer.diagnosis.learnability import PROBE_EXAMPLES, halves
from bl_trainer.diagnosis.report import Foretold, Learnability, Trained
from bl_trainer.errors import MeasurementError
from bl_trainer.tokens.vocabulary import end_ids, special_ids
from conftest import sentence
from forking import ranks, run_script
from test_diagnosis import SCRIPT, diagnosed, diagnosis, rows_of, save, write_recipe

QUICK = {"per_device_train_batch_size": 16, "learning_rate": 1e-3}
LETTERS = "abcdefghijklmnop"
SKEWED = [1 / (i + 1) for i in range(len(LETTERS))]


def mapping_rows(noise, count=1500, weights=None):
    """Completions map the prompt's last letter by a fixed permutation, or with probability `noise` at random by `weights`."""
    table = dict(zip(LETTERS, random.Random(5).sample(LETTERS, len(LETTERS)), strict=True))
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        last = rng.choice(LETTERS)
        answer = rng.choices(LETTERS, weights)[0] if rng.random() < noise else table[last]
        rows.append({"prompt": sentence(rng, 3, 6) + last, "completion": answer})
    return rows


@pytest.mark.parametrize("weights", [None, SKEWED, [20, *[1] * (len(LETTERS) - 1)]], ids=["even", "zipf", "one"])
def test_noise_is_not_foretold(weights, checkpoint, tmp_path):
    """Answers at random, evenly or of some letters mostly, which training learns, and the end token, which it learns too."""
    data = save(mapping_rows(1.0, 2500, weights), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "60", **QUICK).run()["learnability"]
    low, high = found["learnable_interval"]
    assert found["low"] > 0.2
    assert found["gain"] > 0.2
    assert abs(found["learnable"]) < high - low  # twice half the 95 % interval
    assert found["contradicted"] == 0  # no context has rows enough
    assert found["verdict"] == "undecided"


def test_rows_of_one_prompt_show_noise(checkpoint, tmp_path):
    """The same answers at random, to prompts that many rows share."""
    rng = random.Random(0)
    prompts = [sentence(rng, 3, 6) for _ in range(30)]
    rows = [{"prompt": rng.choice(prompts), "completion": rng.choice(LETTERS)} for _ in range(2500)]
    found = diagnosis(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--probe_steps", "60", **QUICK).run()["learnability"]
    assert found["contradicted"] > 0.8 * found["low"] > 0.2
    assert found["verdict"] == "noise", json.dumps(found)


def test_knowledge_is_foretold(checkpoint, tmp_path):
    data = save(mapping_rows(0.0), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "100", **QUICK).run()["learnability"]
    assert found["learnable"] > 0.8 * found["low"] > 0.4
    assert found["learnable_interval"][0] >= LEARNABLE
    assert found["contradicted"] == 0
    is_clean = found["noise_interval"][1] < NOISE
    assert (found["verdict"], found["why"][:18]) == (("knowledge", "") if is_clean else ("undecided", "there is knowledge"))
    half_way = found["half_way"]
    assert half_way["tokens"] == found["tokens"]
    assert half_way["learnable"] <= found["learnable"] + 0.05


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "max_length": 64}, {"padding_free": True, "unlimited": True}, {"use_peft": True}]
)
def test_figures_are_those_of_plain_forward_passes(changes, checkpoint, tmp_path):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    changes = {**QUICK, "learning_rate": 1e-2, **changes}
    diagnosing = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "4", **changes)
    probe, kept = diagnosing.learnability, {}
    choose = probe._controls

    def controls(low):
        kept["low"], (kept["places"], kept["before"]) = low, choose(low)
        return kept["places"], kept["before"]

    probe._controls = controls
    found = diagnosing.run()["learnability"]
    model, both = diagnosing.trainer.model.eval(), []
    for context in (model.disable_adapter(), nullcontext()):
        rows = []
        with torch.no_grad(), context:
            for batch in probe.batches:
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
                rows.append(model(**inputs).logits.double().log_softmax(-1)[:, :-1][batch["labels"][:, 1:] != -100])
        both.append(torch.cat(rows))
    base, tuned = both
    target = torch.cat([batch["labels"][:, 1:][batch["labels"][:, 1:] != -100] for batch in probe.batches])
    assert torch.equal(target, probe.token)
    special = end_ids(diagnosing.trainer) | special_ids(diagnosing.trainer.processing_class)
    content = torch.tensor([token not in special for token in target.tolist()])
    assert torch.equal(content.nonzero().flatten(), probe.content)
    own = base.gather(1, target[:, None])[:, 0]
    assert torch.equal((content & (own < math.log(BELOW))).nonzero().flatten(), kept["low"])
    gain = signs = lost = 0
    for i in probe.content.tolist():
        gain += (tuned[i, target[i]] - base[i, target[i]]).item()
    distances = []
    for i, j, before in zip(kept["low"].tolist(), kept["places"].tolist(), kept["before"].tolist(), strict=True):
        if math.isnan(before):
            lost += 1
            continue
        token = target[i]
        assert target[j] != token
        assert content[j]
        assert before == pytest.approx(base[j, token].item(), abs=1e-4)
        assert before < math.log(BELOW)
        signs += torch.sign((tuned[i, token] - base[i, token]) - (tuned[j, token] - base[j, token])).item()
        distances.append([abs(before - own[i].item()), abs(base[random.Random(i).randrange(len(base)), token] - own[i]).item()])
    close, random_ones = torch.tensor(distances).mean(0).tolist()
    assert close < random_ones / 4
    size = len(probe.content)
    assert (found["tokens"], found["low"]) == (size, pytest.approx(len(kept["low"]) / size))
    assert found["learnable"] == pytest.approx(signs / size, abs=2.5 / size)  # a sign may differ by rounding
    assert found["without_control"] == lost
    assert found["noise"] == pytest.approx(len(kept["low"]) / size - found["learnable"])
    assert found["gain"] == pytest.approx(gain / size, rel=1e-3, abs=1e-4)
    assert found["learning_rate"] == pytest.approx(1e-2 if "use_peft" in changes else 1e-1)


def test_a_packed_recipe_trains_on_packed_rows(checkpoint, tmp_path):
    """As many tokens a step as the recipe's own."""
    data = save(rows_of("pairs", 200), tmp_path / "data")
    keys = {**QUICK, "packing": True, "max_length": 64, "per_device_train_batch_size": 2}
    probe = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "4", **keys).learnability
    lengths = [len(row) for row in probe.first["input_ids"]]
    assert len(lengths) >= 8
    assert sum(lengths) / len(lengths) > 48
    assert probe.train_tokens == pytest.approx(8 * sum(lengths) / len(lengths), abs=1)


def test_rest_of_the_report_and_the_model_stay(checkpoint, tmp_path, capsys):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    digest = lambda: {path.name: hashlib.sha256(path.read_bytes()).digest() for path in checkpoint.iterdir()}  # noqa: E731
    before = digest()
    plain = diagnosis(tmp_path, checkpoint, data, "--by", "source").run()
    probed = diagnosis(tmp_path, checkpoint, data, "--by", "source", "--probe_steps", "2").run()
    assert digest() == before
    for key in plain.keys() - {"recommendation"}:
        assert probed[key] == plain[key], key
    said = capsys.readouterr().out
    assert "Learnability probe: 2 steps of an adapter by nll at learning rate 0.0002 on 16" in said
    assert re.search(r" on (?:16 of the )?(\d+) rows drawn from half", said)[1] == re.search(r"; (\d+) rows of ", said)[1]


def test_repeats(checkpoint, tmp_path):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    first, again = (diagnosis(tmp_path, checkpoint, data, "--probe_steps", "3", **QUICK).run() for _ in range(2))
    assert first["learnability"] == again["learnability"]


def test_whatever_else_the_recipe_trains_with(checkpoint, tmp_path):
    """The probe neither evaluates nor saves nor logs, and has its own schedule."""
    data = save(rows_of("pairs", 80), tmp_path / "data")
    save(rows_of("pairs", 10, seed=4), tmp_path / "data", "test")
    keys = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_nll", "lr_scheduler_type": "cosine_with_min_lr", "logging_steps": 1,
            "lr_scheduler_kwargs": {"min_lr": 0.0001}, "warmup_steps": 0.2, "stop_on_nan": True, "gradient_checkpointing": True,
            "neftune_noise_alpha": 5, "gradient_accumulation_steps": 2, "enable_jit_checkpoint": True,
            "threshold": 0.2,
            "objective": {"name": "power", "alpha": {"from": 0, "to": 2}, "special_tokens": "nll"}}  # fmt: skip
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "3", **QUICK, **keys)
    before = [args.to_dict() for args in (found.recipe.training, found.trainer.args)]
    report = found.run()
    assert [args.to_dict() for args in (found.recipe.training, found.trainer.args)] == before
    assert report["learnability"]["trained"]["rows"] > 30
    assert report["recipe"]["learning_rate"] == 1e-3
    assert not (tmp_path / "out").exists()
    assert found.learnability.trainer.state.global_step == 3
    assert [entry for entry in found.learnability.trainer.state.log_history if "eval_nll" in entry] == []


def test_stream(checkpoint, tmp_path):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "3", dataset_streaming=True, max_steps=1, **QUICK).run()[
        "learnability"
    ]
    assert found["examples"] + found["trained"]["rows"] > 60


def test_halves():
    rows = [{"prompt": f"p{i % 300}", "completion": str(i)} for i in range(900)]
    dataset = Dataset.from_list(rows)
    for source in (dataset, dataset.to_iterable_dataset()):
        first, second = halves(source, 0, 10_000)
        prompts = {row["prompt"] for row in first}, {row["prompt"] for row in second}
        assert not prompts[0] & prompts[1]
        assert len(first) + len(second) == 900
        assert min(map(len, prompts)) > 100
    first, second = halves(dataset, 0, 20)
    assert (len(first), len(second) > 100) == (20, True)
    assert {row["completion"] for row in first} <= {row["completion"] for row in halves(dataset, 0, 10_000)[0]}
    twice = Dataset.from_list([{"text": f"t{i % 50}"} for i in range(100)])
    first, second = halves(twice, 0, 10_000)
    assert not set(first["text"]) & set(second["text"])
    many = Dataset.from_list([{"text": str(i)} for i in range(3 * PROBE_EXAMPLES)])
    assert len(halves(many, 0, 10)[1]) == PROBE_EXAMPLES


def test_halves_by_their_beginning():
    """Other columns, and other answers to the same question, don't part examples."""
    turns = lambda i, answer: [{"role": "user", "content": f"q{i % 100}"}, {"role": "assistant", "content": answer}]  # noqa: E731
    sets = {
        "messages": [{"messages": turns(i, str(i)), "id": i} for i in range(300)],
        "text": [{"text": f"t{i % 100}", "id": i} for i in range(300)],
        "mine": [{"mine": f"t{i % 100}", "id": i} for i in range(300)],
    }
    for name, rows in sets.items():
        first, second = halves(Dataset.from_list(rows), 0, 10_000, name)
        asked = [{str(row[name][0] if name == "messages" else row[name]) for row in part} for part in (first, second)]
        assert not asked[0] & asked[1]
        assert len(asked[0] | asked[1]) == 100


TARGETS = {"labels": [-100, -100, 7, 7], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 0, 1, 1],
           "token_weight": [0, 0, 0.5, 1]}  # fmt: skip


@pytest.mark.parametrize("column", TARGETS)
def test_halves_of_tokens_by_their_prompt(column):
    """Those before the first target; all of a row that trains on all, or on all but a start token."""
    rows = [{"input_ids": [1, i % 100, i, 7], column: TARGETS[column]} for i in range(300)]
    asked = [{row["input_ids"][1] for row in part} for part in halves(Dataset.from_list(rows), 0, 10_000)]
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 100
    for trains in ([TARGETS[column][0]] + [TARGETS[column][-1]] * 3, [TARGETS[column][-1]] * 4):
        parts = halves(Dataset.from_list([{**row, column: trains} for row in rows]), 0, 10_000)
        assert min(map(len, parts)) > 100


def figures(learnable, half_way=None, noise=0.0, contradicted=0.0, reach=0.01, gain=1.0, low=0.5):
    interval = lambda mean: None if reach is None else (mean - reach, mean + reach)  # noqa: E731
    intervals = map(interval, (learnable, noise, contradicted))
    found = Foretold(100, 1000, learnable, noise, contradicted, low, gain, *intervals)
    earlier = None if half_way is None else replace(found, learnable=half_way)
    return Learnability(40, 1e-3, BELOW, 0, Trained(100, 1000), found, earlier)


def test_evidence_of_rows():
    """By hand: a format, an answer that all rows of a prompt repeat, one that half do, and one against 19 others."""
    answers = [(1, 7, 9)] * 19 + [(1, 8, 9)] + [(1, 3 + i % 2, 9) for i in range(20)]
    rows = [(50 + i // 20, *answer) for i, answer in enumerate(answers)]
    token = torch.tensor(answers).flatten()
    example = torch.arange(40).repeat_interleave(3)
    place = torch.tensor([1, 2, 3]).repeat(40)
    found = evidence(token, example, contexts(rows, example, place))
    assert found.is_format.view(40, 3).tolist() == [[True, False, True]] * 40
    assert found.is_repeated.view(40, 3)[:, 1].tolist() == [True] * 19 + [False] + [True] * 20
    assert found.is_contradicted.view(40, 3)[:, 1].tolist() == [False] * 19 + [True] + [False] * 20
    renamed = evidence(token, 39 - example, contexts(rows, example, place) ^ 5)  # numbers are names alone
    assert all(map(torch.equal, found, renamed))


def test_evidence_needs_several_rows():
    """One row of each prompt says nothing, whatever the answer; a common token is not repeated by chance."""
    rng = random.Random(0)
    for tokens, contexts_ in (
        (list(range(60)), list(range(60))),
        ([rng.randrange(2) for _ in range(60)], [i // 2 for i in range(60)]),
    ):
        found = evidence(torch.tensor(tokens), torch.arange(60), torch.tensor(contexts_))
        assert not found.is_decided.any()
    none = torch.empty(0, dtype=torch.long)
    assert [len(each) for each in evidence(none, none, none)] == [0, 0, 0]


def test_noise_is_rarely_taken_for_repeated():
    """At random by skewed shares, in contexts of 2 to 40 rows: at most a twentieth of them is."""
    rng, taken = random.Random(1), []
    for size in (2, 3, 8, 40):
        tokens = torch.tensor(rng.choices(range(16), SKEWED, k=4000))
        found = evidence(tokens, torch.arange(4000), torch.arange(4000) // size)
        taken.append(found.is_repeated.double().mean().item())
    assert max(taken) <= 0.05


def test_shares_by_hand():
    """A target that is probable, one that gained, one that lost, one without control, a format's, one contradicted."""
    low = math.log(BELOW) - 1
    base = torch.tensor([0.0, low, low, low, low, low])
    gain, control = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 3.0, math.nan, math.nan, 1.0])
    flags = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    learnable, noise, contradicted, is_low, rise = shares(base, gain, control, Evidence(*flags)).tolist()
    assert learnable == [0, 1, -1, 0, 1, 0]
    assert noise == [0, 0, 2, 1, 0, 1]
    assert contradicted == [0, 0, 0, 0, 0, 1]
    assert (is_low, rise) == ([0, 1, 1, 1, 1, 1], gain.tolist())


def test_control_by_hand():
    """The nearest of those that are another token's and improbable."""
    logp = torch.tensor([[-5.0, -5.0, -4.0, -1.0, -5.5], [-5.0, -1.0, -1.0, -1.0, -5.0]])
    is_same = torch.tensor([[True, False, False, False], [False, False, False, True]])
    place, before = matched(torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]), logp, is_same)
    assert (place[0].item(), before[0].item(), before[1].isnan().item()) == (13, -5.5, True)


def test_targets_without_a_control_are_neither(checkpoint, tmp_path):
    """Where all targets are one token, it is a format's; where every other one has lost its control, half are left."""
    data = save([{**row, "completion": "a"} for row in mapping_rows(0.0, 200)], tmp_path / "same")
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "4", **QUICK).run()["learnability"]
    assert found["without_control"] == found["noise"] == 0
    assert found["learnable"] == found["low"] > 0
    half = diagnosis(tmp_path, checkpoint, save(mapping_rows(1.0, 200), tmp_path / "half"), "--probe_steps", "4", **QUICK)
    choose, half.learnability._controls = half.learnability._controls, lambda low: lose(choose(low))

    def lose(controls):
        places, before = controls
        before[::2] = math.nan
        return places, before

    report = half.run()
    found = report["learnability"]
    reason = report["recommendation"]["reasons"][0]
    assert f"{found['without_control']} improbable targets are left out: no place serves them as a control." in reason
    targets = round(found["low"] * found["tokens"])
    assert found["without_control"] >= targets // 2 > 0
    assert found["noise"] + found["learnable"] == pytest.approx(found["low"])


RATHER, SLIGHTLY, HARDLY = LEARNABLE + 0.02, SOME + 0.05, SOME / 2
SURELY, BARELY = CONTRADICTED + 0.02, CONTRADICTED + 0.005
JUDGED = [
    (figures(RATHER, RATHER), "knowledge", ""),
    (figures(RATHER, RATHER, 0.2, SURELY), "both", ""),
    (figures(RATHER, RATHER - 2 * RISING, NOISE - 0.02), "knowledge", ""),
    (figures(RATHER, RATHER, NOISE + 0.02), "undecided", "there is knowledge, and about 0.120 is not predictable"),
    (figures(HARDLY, HARDLY, 0.2, SURELY), "noise", ""),
    (figures(HARDLY, HARDLY - RISING / 2, 0.2, SURELY), "noise", ""),
    (figures(HARDLY, HARDLY, 0.4), "undecided", "about 0.400 is not predictable: it may be noise, or need"),
    (figures(HARDLY, HARDLY, 0.2, BARELY), "undecided", "about 0.200 is not predictable"),
    (figures(HARDLY, HARDLY, NOISE - 0.02), "little", ""),
    (figures(HARDLY, 0.0, 0.01, low=0.12), "little", ""),
    (figures(SLIGHTLY, SLIGHTLY, NOISE - 0.02), "undecided", "may be enough for objectives to differ"),
    (figures(SLIGHTLY, SLIGHTLY, 0.2, SURELY), "undecided", "may be enough for objectives to differ"),
    (figures(LEARNABLE + 0.005, LEARNABLE, 0.2, SURELY), "undecided", "may be enough for objectives to differ"),
    (figures(HARDLY, HARDLY - 2 * RISING, 0.2, SURELY), "undecided", "still rising"),
    (figures(HARDLY, None, 0.2, SURELY), "undecided", "still rising"),
    (figures(0.0, 0.0, 0.2, SURELY, gain=MOVED / 2), "undecided", "hardly moved"),
    (figures(HARDLY, HARDLY, NOISE - 0.005), "undecided", "not predictable"),
    (figures(RATHER, RATHER, reach=None), "undecided", "too few examples"),
]


def test_targets_without_a_control_leave_it_undecided():
    """As many as could bring the predictable share to what objectives differ by."""
    for found, verdict in ((figures(HARDLY, HARDLY, 0.2, SURELY), "noise"), (figures(HARDLY, HARDLY, 0.05), "little")):
        few = replace(found, without_control=10)
        assert judge(few)[0] == judge(found)[0] == verdict
        said, why = judge(replace(few, without_control=1000 * HARDLY))
        assert (said, "targets without a control may be either" in why) == ("undecided", True)


@pytest.mark.parametrize(("found", "verdict", "why"), JUDGED)
def test_verdict(found, verdict, why):
    said, reason = judge(found)
    assert said == verdict
    assert why in reason
    assert bool(reason) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("possible", "verdict", "regions"),
    [
        (["intermediate"], "knowledge", ["weak"]),
        (["strong"], "both", ["weak"]),
        (["weak"], "noise", ["intermediate"]),
        (["weak", "intermediate"], "noise", ["intermediate"]),
        (["strong"], "noise", ["strong"]),
        (["intermediate"], "little", ["intermediate"]),
        (["intermediate"], "undecided", ["intermediate"]),
        (["strong"], "undecided", ["weak"]),
    ],
)
def test_recommendation_follows_the_probe(possible, verdict, regions, checkpoint, tmp_path):
    report = diagnosed(tmp_path, checkpoint, save(rows_of("pairs", 12), tmp_path / "data"))
    placement = replace(report.placement, possible=possible, region=possible[0], decided=len(possible) == 1)
    learnable = RATHER if regions == ["weak"] else HARDLY
    probe = replace(figures(learnable, learnable, 0.4), verdict=verdict, why="it rains")
    advice = recommend(replace(report, placement=placement, learnability=probe))
    arms = [arm for region in regions for arm in SWEPT[region]]
    assert advice.arms[: len(arms)] == arms
    assert any("threshold" in arm for arm in advice.arms) == (regions != ["weak"])
    assert ({"objective": "anneal"} in advice.arms) == (regions != ["strong"])
    assert any(reason.startswith("The sweep tries `anneal` too") for reason in advice.reasons) == (verdict == "undecided")
    assert {"objective": "nll"} in advice.arms
    first, second, *_ = advice.reasons
    assert first.startswith(f"Of the content 0.500 is improbable (p < 0.1). After 40 steps on other examples {learnable:.3f} (")
    assert "0.400 are not. Rows of the same context contradict 0.000." in first
    assert first.endswith(UNSEEN)
    assert ("undecided, since it rains" in first) == (verdict == "undecided")
    overruled = second.endswith(f"model-{' or model-'.join(possible)}.")
    assert overruled == (regions != possible)


def test_report_shows_it(checkpoint, tmp_path):
    data = save(mapping_rows(0.0, 400), tmp_path / "data")
    recipe = write_recipe(tmp_path, checkpoint, data, **QUICK)
    main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report"), "--probe_steps", "60"])
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Knowledge or noise" in html
    assert "After 60 steps on other examples" in html
    arms = yaml.safe_load((tmp_path / "report" / "sweep.yaml").read_text())["arms"]
    assert arms[:2] == SWEPT["weak"]
    assert "improbable tokens: " in (tmp_path / "report" / "sweep.yaml").read_text().splitlines()[0]


ERRORS = {
    "negative": (["--probe_steps", "-1"], "`--probe_steps -1` must not be negative"),
    "compare": (["--probe_steps", "5", "--compare", "."], "`--probe_steps` asks about the recipe's own model"),
    "few": (["--probe_steps", "5"], "`--probe_steps` needs at least 10 examples in each half of the data"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_sentence(name, checkpoint, tmp_path, capsys):
    flags, message = ERRORS[name]
    recipe = write_recipe(tmp_path, checkpoint, save(rows_of("pairs", 12), tmp_path / "data"))
    with pytest.raises(SystemExit) as exit_code:
        main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report"), *flags])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"learning_rate": 1e30},
            MeasurementError,
            "training diverged: probabilities are NaN or infinite. Lower `--learning_rate`",
        ),
        ({"max_length": 3}, MeasurementError, "No example of the probe's first half has a target token. Raise `max_length`"),
    ],
)
def test_a_probe_that_can_find_nothing_says_so(changes, error, message, checkpoint, tmp_path):
    data = save([{"prompt": "abcdef"[i % 3 :] + str(i), "completion": "ab"} for i in range(60)], tmp_path / "data")
    with pytest.raises(error, match=message):
        diagnosis(tmp_path, checkpoint, data, "--probe_steps", "4", **{**QUICK, **changes}).run()


def test_without_content(checkpoint, tmp_path):
    data = save([{"prompt": f"a{i}", "completion": ""} for i in range(60)], tmp_path / "data")
    with pytest.raises(MeasurementError, match="No target token of the probe's second half is content"):
        diagnosis(tmp_path, checkpoint, data, "--probe_steps", "4", **QUICK)


def test_weights_of_examples_do_not_train_the_probe(checkpoint, tmp_path):
    rows = rows_of("pairs", 80)
    keys = {**QUICK, "learning_rate": 1e-2}
    plain = diagnosis(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--probe_steps", "3", **keys).run()
    weighted = save([{**row, "objective_weight": 0.0} for row in rows], tmp_path / "weighted")
    assert (
        diagnosis(tmp_path, checkpoint, weighted, "--probe_steps", "3", **keys).run()["learnability"] == plain["learnability"]
    )


def test_two_processes(checkpoint, tmp_path):
    """Each asks about its own part; all agree on the sums, and the pool of controls is everybody's."""
    data = save(mapping_rows(0.0, 300), tmp_path / "data")
    recipe = write_recipe(tmp_path, checkpoint, data, per_device_train_batch_size=8, learning_rate=1e-3)
    codes, said = ranks(tmp_path, run_script, SCRIPT, "--config", recipe, "--report", tmp_path / "two", "--probe_steps", "20")
    assert codes == [0, 0], said[0]
    found = json.loads((tmp_path / "two" / "report.json").read_text())["learnability"]
    recipe = write_recipe(tmp_path, checkpoint, data, **QUICK)
    alone = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "20", **QUICK).run()["learnability"]
    for key in ("tokens", "examples", "trained"):
        assert found[key] == alone[key]
    assert found["low"] == pytest.approx(alone["low"], abs=1e-3)
    assert found["gain"] == pytest.approx(alone["gain"], rel=0.3)  # other batches at the ends of epochs
    assert found["learnable"] == pytest.approx(alone["learnable"], abs=0.2)  # each process draws its controls from its own part
