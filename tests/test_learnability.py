"""The learnability probe: against plain forward passes, on knowledge and noise made here, and what is made of its figures."""

import hashlib
import json
import math
import random

import pytest
import torch
import yaml
from conftest import sentence
from datasets import Dataset
from test_diagnosis import SCRIPT, diagnosis, rows_of, save, write_recipe
from test_processes import launch

from bl_trainer import learnability
from bl_trainer.__main__ import main
from bl_trainer.continuum import LEARNABLE, SWEPT, judge, recommend
from bl_trainer.learnability import BELOW, PROBE_EXAMPLES, halves
from bl_trainer.objectives import Threshold

QUICK = {"per_device_train_batch_size": 16, "learning_rate": 1e-3}
LETTERS = "abcdefghijklmnop"


def mapping_rows(noise, count=1500):
    """Completions map the prompt's last letter by a fixed permutation, or with probability `noise` at random."""
    table = dict(zip(LETTERS, random.Random(5).sample(LETTERS, len(LETTERS)), strict=True))
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        first = rng.choice(LETTERS)
        answer = rng.choice(LETTERS) if rng.random() < noise else table[first]
        rows.append({"prompt": sentence(rng, 2, 4) + first, "completion": answer})
    return rows


@pytest.fixture
def seen(monkeypatch):
    """What the probe's figures are made of: (asked, log p after), half-way and at the end."""
    found = []

    class Spy(learnability.Learnability):
        def __init__(self, asked, accelerator):
            found.append(list(asked))
            super().__init__(found[-1], accelerator)

    monkeypatch.setattr(learnability, "Learnability", Spy)
    return found


def signs(part):
    """Return the targets of improbable places with controls, and whether they gained more than those."""
    pairs, rises = zip(*((a.pairs[a.is_fair], (after - a.before)[a.is_fair]) for a, after in part), strict=True)
    rise = torch.cat(rises)
    return torch.cat(pairs)[:, 0], (rise[:, 0] - rise[:, 1]).sign().double()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_tells_knowledge_from_noise(noise, seen, tokenizer, checkpoint, tmp_path):
    """Of the letters, what the mapping gives is foretold and what is random is not; the end of a completion always is."""
    data = save(mapping_rows(noise), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "80", **QUICK).run()["learnability"]
    targets, sign = signs(seen[-1])
    letters = sign[targets != tokenizer.eos_token_id]
    assert len(letters) > 400
    if noise:
        assert abs(letters.mean()) < 4 / math.sqrt(len(letters))
    else:
        assert letters.mean() > 0.8
    assert sign[targets == tokenizer.eos_token_id].mean() > 0.9
    assert found["learnable"] == pytest.approx(sign.sum().item() / found["tokens"])


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "max_length": 64}, {"padding_free": True, "unlimited": True}, {"use_peft": True}]
)
def test_figures_are_those_of_plain_forward_passes(changes, seen, checkpoint, tmp_path):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    changes = {**QUICK, "learning_rate": 1e-2, **changes}
    probe = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "4", **changes)
    found = probe.run()["learnability"]
    assert [len(part) for part in seen] == [len(probe.learnability.batches)] * 2
    model = probe.trainer.model.eval()
    gain = tokens = low = 0
    for asked, after in seen[-1]:
        inputs = {key: value for key, value in asked.inputs.items() if key in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            tuned = model(**inputs).logits.log_softmax(-1)[:, :-1]
            with model.disable_adapter():
                base = model(**inputs).logits.log_softmax(-1)[:, :-1]
        target = asked.inputs["labels"][:, 1:]
        here = target != -100
        base, tuned, target = base[here], tuned[here], target[here]
        is_low = base.gather(1, target[:, None])[:, 0] < math.log(BELOW)
        assert torch.equal(is_low, asked.is_low)
        assert torch.equal(target[is_low], asked.pairs[:, 0])
        torch.testing.assert_close(base[is_low].gather(1, asked.pairs), asked.before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tuned[is_low].gather(1, asked.pairs), after, rtol=1e-4, atol=1e-4)
        fair = asked.pairs[asked.is_fair]
        assert (fair[:, 0] != fair[:, 1]).all()
        assert (asked.before[asked.is_fair] < math.log(BELOW)).all()
        rise = (after - asked.before)[asked.is_fair]
        gain += (rise[:, 0] > rise[:, 1]).sum().item() - (rise[:, 0] < rise[:, 1]).sum().item()
        tokens, low = tokens + len(target), low + is_low.sum().item()
    assert (found["tokens"], found["low"]) == (tokens, pytest.approx(low / tokens))
    assert found["learnable"] == pytest.approx(gain / tokens)
    assert found["trained"]["examples"] == min(64, len(probe.learnability.first))
    assert found["learning_rate"] == pytest.approx(1e-2 if "use_peft" in changes else 1e-1)


def test_controls_are_as_improbable(seen, checkpoint, tmp_path):
    """The control's log p is nearer to the target's than another improbable target's would be."""
    data = save(rows_of("pairs", 80), tmp_path / "data")
    diagnosis(tmp_path, checkpoint, data, "--probe_steps", "1", **QUICK).run()
    before = torch.cat([asked.before[asked.is_fair] for asked, _ in seen[-1]])
    gap = (before[:, 0] - before[:, 1]).abs().mean()
    assert gap < (before[:, 0] - before[torch.randperm(len(before)), 0]).abs().mean() / 3


def test_rest_of_the_report_and_the_model_stay(checkpoint, tmp_path, capsys):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    digest = lambda: {path.name: hashlib.sha256(path.read_bytes()).digest() for path in checkpoint.iterdir()}  # noqa: E731
    before = digest()
    plain = diagnosis(tmp_path, checkpoint, data, "--by", "source").run()
    probed = diagnosis(tmp_path, checkpoint, data, "--by", "source", "--probe_steps", "2").run()
    assert digest() == before
    for key in plain.keys() - {"recommendation"}:
        assert probed[key] == plain[key], key
    assert "Learnability probe: 2 steps of an adapter by nll at learning rate 0.0002 on 16 examples" in capsys.readouterr().out


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
    probe = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "3", **QUICK, **keys)
    report = probe.run()
    assert report["learnability"]["trained"]["examples"] > 30
    assert report["recipe"]["learning_rate"] == 1e-3
    assert not (tmp_path / "out").exists()
    assert [entry for entry in probe.trainer.state.log_history if "eval_nll" in entry] == []


def test_stream(checkpoint, tmp_path):
    data = save(rows_of("pairs", 80), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "3", dataset_streaming=True, max_steps=1, **QUICK).run()[
        "learnability"
    ]
    assert found["examples"] + found["trained"]["examples"] > 60


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


def figures(learnable, half_way, reach=0.01, low=0.5):
    return {
        "learnable": learnable,
        "learnable_interval": None if reach is None else [learnable - reach, learnable + reach],
        "half_way": None if half_way is None else {"learnable": half_way},
        "low": low,
        "below": BELOW,
        "steps": 40,
    }


VERDICTS = [
    (figures(LEARNABLE + 0.02, LEARNABLE), "knowledge"),
    (figures(LEARNABLE + 0.005, LEARNABLE), "undecided"),
    (figures(LEARNABLE + 0.02, None, None), "undecided"),
    (figures(LEARNABLE / 2, LEARNABLE / 2), "noise"),
    (figures(LEARNABLE / 2, None), "undecided"),
    (figures(LEARNABLE * 0.6, LEARNABLE * 0.1), "undecided"),
    (figures(LEARNABLE * 0.6, LEARNABLE * 0.5), "noise"),
    (figures(0.052, 0.009, 0.012), "undecided"),
    (figures(0.052, -0.009, 0.012), "undecided"),
    (figures(0.052, 0.045, 0.012), "noise"),
]


@pytest.mark.parametrize(("found", "verdict"), VERDICTS)
def test_verdict(found, verdict):
    assert judge(found) == verdict


@pytest.mark.parametrize(
    ("possible", "verdict", "regions"),
    [
        (["intermediate"], "knowledge", ["weak"]),
        (["strong"], "knowledge", ["weak"]),
        (["weak"], "noise", ["intermediate"]),
        (["weak", "intermediate"], "noise", ["intermediate"]),
        (["strong"], "noise", ["strong"]),
        (["intermediate"], "undecided", ["intermediate"]),
    ],
)
def test_recommendation_follows_the_probe(possible, verdict, regions, checkpoint, tmp_path):
    report = diagnosis(tmp_path, checkpoint, save(rows_of("pairs", 12), tmp_path / "data")).run()
    report["placement"] |= {"possible": possible, "region": possible[0]}
    report["learnability"] = {**figures(0.1, 0.1), "verdict": verdict}
    advice = recommend(report, Threshold(above=0.1))
    arms = [arm for region in regions for arm in SWEPT[region]]
    assert advice["arms"][: len(arms)] == arms
    assert any("threshold" in arm for arm in advice["arms"]) == (regions != ["weak"])
    assert advice["reasons"][0].startswith("Of all targets 0.500 are improbable (p < 0.1), and 0.100 (0.090 to 0.110) could be")


def test_report_shows_it(checkpoint, tmp_path):
    data = save(mapping_rows(0.0, 400), tmp_path / "data")
    recipe = write_recipe(tmp_path, checkpoint, data, **QUICK)
    main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report"), "--probe_steps", "60"])
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Knowledge or noise" in html
    assert "could be foretold after 60 steps" in html
    arms = yaml.safe_load((tmp_path / "report" / "sweep.yaml").read_text())["arms"]
    assert arms[:2] == SWEPT["weak"]


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


def test_two_processes(checkpoint, tmp_path):
    """Each asks about its own part; all agree on the sums, and the pool of controls is everybody's."""
    data = save(mapping_rows(0.0, 300), tmp_path / "data")
    recipe = write_recipe(tmp_path, checkpoint, data, per_device_train_batch_size=8, learning_rate=1e-3)
    done = launch(2, SCRIPT, "--config", recipe, "--report", tmp_path / "two", "--probe_steps", "20")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two" / "report.json").read_text())["learnability"]
    recipe = write_recipe(tmp_path, checkpoint, data, **QUICK)
    alone = diagnosis(tmp_path, checkpoint, data, "--probe_steps", "20", **QUICK).run()["learnability"]
    for key in ("tokens", "examples", "trained"):
        assert found[key] == alone[key]
    assert found["low"] == pytest.approx(alone["low"], abs=1e-3)
    assert found["learnable"] == pytest.approx(alone["learnable"], abs=0.05)  # roundings grow over the steps
