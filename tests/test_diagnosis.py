"""Diagnosis against an independent loop in float64 over plain transformers; its report, its errors, its thresholds."""

import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import verbs
from bl_trainer import BLConfig, BLTrainer, Objective, Threshold
from bl_trainer.cli import main
from bl_trainer.diagnosis.advice import recommend, sweep_yaml
from bl_trainer.diagnosis.continuum import ANCHORS, CUTS, objective_name, place
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.diagnosis.page import page, write_report
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.diagnosis.summary import gradient_mass
from bl_trainer.diagnosis.terminal import terminal_summary
from bl_trainer.errors import RecipeError
from bl_trainer.measurement import percentiles
from bl_trainer.measurement.histogram import PERCENTILE_ERROR, ProbabilityHistogram
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.tokens.annotation import Annotation, group_name
from bl_trainer.tokens.template import template_mask
from bl_trainer.tokens.vocabulary import token_texts
from conftest import make_double, make_llama, sentence, write_recipe
from forking import ranks

SCRIPT = Path(__file__).parent.parent / "scripts" / "diagnose.py"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setattr(percentiles, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(double_checkpoint):
    """The tests' model, which `diagnosis` takes in float64, so that no token is by its rounding above a cut."""
    return double_checkpoint


def save(rows, folder, name="train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(kind, count=40, seed=3):
    rng = random.Random(seed)
    if kind == "text":
        return [{"text": sentence(rng, 2, 50), "source": rng.choice("ab")} for _ in range(count)]
    if kind == "pairs":
        return [
            {"prompt": sentence(rng, 2, 30), "completion": sentence(rng, 1, 30), "source": rng.choice("ab")}
            for _ in range(count)
        ]
    turn = lambda role: {"role": role, "content": sentence(rng, 2, 12)}  # noqa: E731
    return [
        {"messages": [turn("user"), turn("assistant")] * rng.randint(1, 3), "source": rng.choice("ab")} for _ in range(count)
    ]


def by_hand(row, tokenizer, assistant_only):
    """Token ids of a row and which of them train, without TRL."""
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    end = tokenizer.eos_token_id
    if "text" in row:
        tokens = [*ids(row["text"]), end]
        return tokens, [True] * len(tokens)
    if "prompt" in row:
        prompt, completion = ids(row["prompt"]), [*ids(row["completion"]), end]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    tokens, trains = [], []
    for message in row["messages"]:
        is_answer = message["role"] == "assistant"
        part = [*([] if is_answer else ids("<user>")), *ids(message["content"]), *ids("<end>")]
        tokens += part
        trains += [is_answer or not assistant_only] * len(part)
    return tokens, trains


def oracle(model, sequences):
    """Per target token, from plain forward passes in float64: p, entropy, most probable, its p, id, example, and position."""
    model, found = model.double().eval(), []
    for e, (tokens, trains) in enumerate(sequences):
        with torch.no_grad():
            logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        position = 0
        for i in range(1, len(tokens)):
            position = position + 1 if trains[i - 1] and i > 1 and trains[i] else 0
            if trains[i]:
                row = logp[i - 1]
                stop = next((j for j in range(i, len(tokens)) if not trains[j]), len(tokens))
                found.append((row[tokens[i]].exp().item(), -(row.exp() * row).sum().item(), row.argmax().item() == tokens[i],
                              row.max().exp().item(), tokens[i], e, position, stop - i))  # fmt: skip
    return np.array(found)


class Measured(Diagnosis):
    """Keeps the report, and returns it as a mapping, with the examples of examples.json."""

    def run(self):
        self.report = super().run()
        return {**self.report.to_json(), "reader": self.report.reader}


def diagnosis(folder, checkpoint, data, *flags, **changes):
    unlimited = changes.pop("unlimited", False)
    recipe = write_recipe(folder, checkpoint, data, dtype="auto", **changes)
    if unlimited:
        recipe.write_text(recipe.read_text() + "max_length: null\n")
    argv = ["--config", str(recipe), "--report", str(folder / "report"), *flags]
    read = Recipe.read(argv, "diagnose", DiagnoseArguments)
    read.options.check()
    return Measured(read)


def diagnosed(*args, **options):
    """Return the report itself."""
    found = diagnosis(*args, **options)
    found.run()
    return found.report


def check_against(report, expected, groups=None):
    """Compare a report with what `oracle` found."""
    p, entropy, hit, confidence, token, example, position, from_end = expected.T
    exact = pytest.approx
    total = report["total"]
    assert total["tokens"] == len(p)
    assert total["prob"] == exact(p.mean(), abs=1e-6)
    assert total["nll"] == exact(-np.log(p).mean(), abs=5e-6)
    assert total["entropy"] == exact(entropy.mean(), abs=1e-6)
    assert total["top1"] == exact(hit.mean(), abs=1e-9)
    assert total["above_paper"] == exact((p > 0.55).mean(), abs=1e-9)
    assert total["conflicts"] == exact(((entropy <= 0.5) & (p <= 0.05)).mean(), abs=1e-9)
    for rank, value in report["percentiles"].items():
        wanted = np.sort(p)[max(0, math.ceil(Fraction(rank) * len(p) / 100) - 1)]  # NumPy's own rounds 0.29 x 600 up
        assert abs(value - wanted) <= PERCENTILE_ERROR * min(wanted, 1 - wanted) + 1e-6
    numbers = np.unique(example)
    means = np.array([p[example == e].mean() for e in numbers])
    assert total["examples"] == len(numbers)
    assert report["examples"]["mean"] == exact(means.mean(), abs=1e-6)
    assert report["examples"]["deviation"] == exact(means.std(ddof=1), abs=1e-6)
    for k, (count, mean) in enumerate(report["positions"]["first"]):
        at = position == k
        assert count == at.sum()
        assert mean is None if not count else mean == exact(p[at].mean(), abs=1e-6)
    for k, (count, mean) in enumerate(report["positions"]["last"]):
        at = from_end - 1 == k
        assert count == at.sum()
        assert mean is None if not count else mean == exact(p[at].mean(), abs=1e-6)
    assert sum(count for count, _ in report["positions"]["relative"]) == len(p)
    bins = np.minimum((confidence * 20).astype(int), 19)
    gaps = [
        abs(confidence[bins == b].mean() - hit[bins == b].mean()) * (bins == b).mean() for b in range(20) if (bins == b).any()
    ]
    assert report["calibration"]["error"] == exact(sum(gaps), abs=1e-6)
    ends, users = token == 1, token <= 3
    if ends.any():
        assert report["kinds"]["eos"]["tokens"] == ends.sum()
        assert report["kinds"]["eos"]["prob"] == exact(p[ends].mean(), abs=1e-6)
        assert report["kinds"]["special"]["tokens"] == users.sum()
    if groups is not None:
        for name in set(groups):
            mine = np.isin(example, [e for e, group in enumerate(groups) if group == name])
            assert report["groups"][name]["tokens"] == mine.sum()
            assert report["groups"][name]["prob"] == exact(p[mine].mean(), abs=1e-6)


WAYS = {
    "text": ("text", {}),
    "completion_only": ("pairs", {}),
    "chat": ("chat", {}),
    "assistant_only": ("chat", {"assistant_only_loss": True}),
    "padding_free": ("pairs", {"padding_free": True, "unlimited": True}),
    "packed_text": ("text", {"packing": True, "max_length": 64}),
    "packed_pairs": ("pairs", {"packing": True, "max_length": 80}),
    "packed_chat": ("chat", {"packing": True, "max_length": 90}),
    "streamed": ("pairs", {"dataset_streaming": True, "max_steps": 1}),
    "lora": ("pairs", {"use_peft": True, "lora_r": 4}),
    "workers": ("pairs", {"dataloader_num_workers": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_an_independent_loop(way, tokenizer, checkpoint, tmp_path):
    kind, options = WAYS[way]
    rows = rows_of(kind)
    report = diagnosis(
        tmp_path, checkpoint, save(rows, tmp_path / "data"), "--by", "source", "--percentiles", "2.5", "99.9", **options
    ).run()
    sequences = [by_hand(row, tokenizer, options.get("assistant_only_loss")) for row in rows]
    check_against(report, oracle(make_llama(tokenizer), sequences), [row["source"] for row in rows])
    assert {"2.5", "99.9"} <= report["percentiles"].keys()
    assert not report["sampled"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_is_trainings_own(mode, tokenizer, checkpoint, tmp_path):
    rows = rows_of("pairs")
    report = diagnosis(tmp_path, checkpoint, save(rows, tmp_path / "data"), max_length=20, truncation_mode=mode).run()
    part = slice(None, 20) if mode == "keep_start" else slice(-20, None)
    sequences = [tuple(values[part] for values in by_hand(row, tokenizer, False)) for row in rows]
    sequences = [sequence for sequence in sequences if any(sequence[1][1:])]
    check_against(report, oracle(make_llama(tokenizer), sequences))


def test_wrapped_packing_cuts_examples_as_training_does(tokenizer, checkpoint, tmp_path):
    rows = rows_of("text")
    found = diagnosis(
        tmp_path, checkpoint, save(rows, tmp_path / "data"), packing=True, packing_strategy="wrapped", max_length=32
    )
    packed = [row["input_ids"] for row in found.trainer.train_dataset]
    assert [len(line) for line in packed[:-1]] == [32] * (len(packed) - 1)
    everything = sorted(tuple(by_hand(row, tokenizer, False)[0]) for row in rows)
    joined, end = [token for line in packed for token in line], tokenizer.eos_token_id
    cut = [i + 1 for i, token in enumerate(joined) if token == end]
    assert sorted(tuple(joined[a:b]) for a, b in zip([0, *cut[:-1]], cut, strict=True)) == everything
    report, expected = found.run(), oracle(make_llama(tokenizer), [(line, [True] * len(line)) for line in packed])
    assert report["total"]["prob"] == pytest.approx(expected[:, 0].mean(), abs=1e-6)
    assert report["total"]["tokens"] == len(expected)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_keeps_examples_together(strategy, tokenizer, checkpoint, tmp_path):
    """Examples, not their parts, are counted, and their intervals are those of unpacked data."""
    rows = rows_of("text", count=60)
    data = save(rows, tmp_path / "data")
    packed = diagnosis(tmp_path, checkpoint, data, packing=True, max_length=24, packing_strategy=strategy).run()
    sequences = [by_hand(row, tokenizer, False) for row in rows]
    assert packed["total"]["examples"] == sum(len(tokens) > 1 for tokens, _ in sequences)
    positions = [count for count, _ in packed["positions"]["first"]]
    lengths = [min(len(tokens), 24 if strategy == "bfd" else 10**9) for tokens, _ in sequences]
    assert positions[0] >= sum(length > 1 for length in lengths)
    assert positions[5] <= sum(length > 6 for length in lengths) <= positions[5] + (0 if strategy == "bfd" else 10)
    whole = diagnosis(tmp_path, checkpoint, data, max_length=24).run() if strategy == "bfd" else None
    if whole:
        assert packed["total"]["prob_interval"] == pytest.approx(whole["total"]["prob_interval"], abs=1e-6)


def test_packed_sample_is_random(tokenizer, checkpoint, tmp_path):
    """Packed rows come longest first; a sample of them would be of the longest examples."""
    rng = random.Random(0)
    rows = [{"text": sentence(rng, 2, 60)} for _ in range(400)]
    data = save(rows, tmp_path / "data")
    reports = [
        diagnosis(tmp_path, checkpoint, data, "--max_tokens", "3000", **options).run()
        for options in ({"packing": True, "max_length": 64}, {"max_length": 64})
    ]
    for report in reports:
        assert report["sampled"]
        assert 3000 <= report["total"]["tokens"] < 3600
    lengths = [report["total"]["tokens"] / report["total"]["examples"] for report in reports]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)
    whole = diagnosis(tmp_path, checkpoint, data, "--max_tokens", "0", packing=True, max_length=64).run()
    assert not whole["sampled"]
    assert whole["total"]["examples"] == 400


def test_a_stream_has_no_row_numbers_and_says_what_its_sample_is(checkpoint, tmp_path):
    data = save(rows_of("pairs", count=80), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, "--max_tokens", "200", dataset_streaming=True, max_steps=1)
    report = found.run()
    assert report["sampled"]
    assert report["recommendation"]["warnings"][0].startswith("Only the beginning of the stream was measured")
    rows = [record["row"] for record in report["reader"]["surprising"]]
    assert max(rows) < 0
    assert len(set(rows)) == len(rows)
    assert "(the beginning of a stream)" in terminal_summary(found.report, "out")


STREAM = [{**row, "text": row["text"] + "x"} for row in rows_of("text", count=60)] + [{"text": "the same", "source": "a"}] * 10
SHARED = ("completion_only", "packed_text")


@pytest.fixture(scope="module")
def two_processes(checkpoint, tmp_path_factory):
    """The folder of what two processes found: a report and what they printed, for each of some diagnoses."""
    home, jobs = tmp_path_factory.mktemp("two"), {}

    def add(name, rows, *flags, **options):
        (home / name).mkdir()
        data = save(rows, home / name / "data")
        recipe = write_recipe(home / name, checkpoint, data, dtype="auto", **options)
        report = str(home / name / "report")
        jobs[name] = ["diagnose", "--config", str(recipe), "--report", report, "--by", "source", *flags]

    for way in SHARED:
        kind, options = WAYS[way]
        add(way, rows_of(kind, count=41), per_device_train_batch_size=3, **options)  # odd: one process runs out first
    for strategy in ("bfd", "wrapped"):
        options = {"packing": True, "max_length": 32, "packing_strategy": strategy, "dataset_streaming": True, "max_steps": 1}
        for name, limit in (("whole", 0), ("sample", 600)):
            add(f"{strategy}-{name}", STREAM, "--max_tokens", str(limit), **options)
    (home / "jobs.json").write_text(json.dumps(jobs))
    codes, said = ranks(home, verbs.main, home / "jobs.json")
    assert codes == [0, 0], said[0][-4000:]
    return home


def found_by(two_processes, name, file="report"):
    return json.loads((two_processes / name / "report" / f"{file}.json").read_text())


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_two_processes_share_a_packed_stream(strategy, tokenizer, two_processes):
    tokens = sum(len(by_hand(row, tokenizer, False)[0]) - 1 for row in STREAM)
    whole, sample = (found_by(two_processes, f"{strategy}-{name}") for name in ("whole", "sample"))
    assert whole["total"]["examples"] == 70
    assert not whole["sampled"]
    assert sample["sampled"]
    assert 560 <= sample["total"]["tokens"] <= 800
    if strategy == "bfd":
        lengths = [min(32, len(by_hand(row, tokenizer, False)[0])) for row in STREAM]
        assert whole["total"]["tokens"] == sum(lengths) - 70 < tokens


@pytest.mark.parametrize("way", SHARED)
def test_two_processes_measure_what_one_does(way, tokenizer, checkpoint, two_processes, tmp_path):
    kind, options = WAYS[way]
    rows = rows_of(kind, count=41)
    report = found_by(two_processes, way)
    sequences = [by_hand(row, tokenizer, False) for row in rows]
    check_against(report, oracle(make_llama(tokenizer), sequences), [row["source"] for row in rows])
    data = save(rows, tmp_path / "data")
    alone = diagnosis(tmp_path, checkpoint, data, "--by", "source", per_device_train_batch_size=3, **options).run()
    examples = found_by(two_processes, way, "examples")
    assert {name: [r["row"] for r in records] for name, records in examples.items()} == {
        name: [r["row"] for r in records] for name, records in alone["reader"].items()
    }
    for ours, theirs in zip(report["objectives"], alone["objectives"], strict=True):
        assert ours["buckets"] == pytest.approx(theirs["buckets"], abs=1e-6)
        assert ours["effective_tokens"] == pytest.approx(theirs["effective_tokens"], rel=1e-5)
    printed = (two_processes / f"{way}.0.txt").read_text()
    assert len(printed.strip().splitlines()) <= 25
    assert "Placement: " in printed
    assert "Placement: " not in (two_processes / f"{way}.1.txt").read_text()


def test_compares_an_adapter_with_its_base(tokenizer, checkpoint, tmp_path):
    rows, probe = rows_of("pairs"), rows_of("text", seed=9)
    torch.manual_seed(5)
    tuned = get_peft_model(
        make_double(tokenizer),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    whole = tmp_path / "whole"
    tuned.merge_and_unload().save_pretrained(whole)
    probe_folder = save(probe, tmp_path / "probe", "test")
    data = save(rows, tmp_path / "data")
    runs = [
        diagnosis(tmp_path, checkpoint, data, "--compare", str(path), "--probe", str(probe_folder))
        for path in (tmp_path / "adapter", whole)
    ]
    assert all(each.trainer.completion_only_loss for each in runs)  # as the training set's prompts want it, not the probe
    reports = [each.run() for each in runs]
    base_model, model = make_double(tokenizer), AutoModelForCausalLM.from_pretrained(whole).double()
    for report in reports:
        assert report["compare"]["probe"]["split"] == "test"
        assert report["data"] == str(tmp_path / "data")
        for part, data in ((report["compare"]["train"], rows), (report["compare"]["probe"], probe)):
            sums = []
            for tokens, trains in (by_hand(row, tokenizer, False) for row in data):
                with torch.no_grad():
                    base, logq = (m(torch.tensor([tokens])).logits[0].log_softmax(-1) for m in (base_model, model))
                where = [i for i in range(1, len(tokens)) if trains[i]]
                p, q, lp, lq = base.exp(), logq.exp(), base, logq
                middle = ((p + q) / 2).log()
                for i in where:
                    j, t = i - 1, tokens[i]
                    js = ((p[j] * (lp[j] - middle[j])).sum() + (q[j] * (lq[j] - middle[j])).sum()) / 2
                    sums.append([(p[j] * (lp[j] - lq[j])).sum(), (q[j] * (lq[j] - lp[j])).sum(), js, p[j, t], q[j, t],
                                 -lp[j, t], -lq[j, t]])  # fmt: skip
            wanted = np.array(sums).mean(0)
            for name, value in zip(("kl", "reverse_kl", "js", "base_prob", "prob", "base_nll", "nll"), wanted, strict=True):
                assert part[name] == pytest.approx(value, abs=5e-6), name
            assert sum(map(sum, part["moved"])) == part["tokens"] == len(sums)
            low, high = part["intervals"]["kl"]
            assert low < part["kl"] < high
    assert reports[0]["total"]["prob"] == pytest.approx(reports[0]["compare"]["train"]["base_prob"], abs=1e-9)


def test_sample_stops_at_max_tokens(tokenizer, checkpoint, tmp_path):
    rows = rows_of("text", count=60)
    found = diagnosis(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--max_tokens", "300", per_device_train_batch_size=2)
    report = found.run()
    assert report["sampled"]
    assert 300 <= report["total"]["tokens"] < 300 + 2 * 51
    sampled = {record["row"] for records in report["reader"].values() for record in records}
    assert max(sampled) > report["total"]["examples"]  # not the first rows: a random sample
    whole = diagnosis(tmp_path, checkpoint, tmp_path / "data", "--max_tokens", "0").run()
    assert whole["total"]["examples"] == 60


def test_reader_names_the_row_and_shows_its_tokens(tokenizer, checkpoint, tmp_path):
    rows = rows_of("pairs")
    report = diagnosis(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--by", "source").run()
    expected = oracle(make_llama(tokenizer), [by_hand(row, tokenizer, False) for row in rows])
    nll = {e: -np.log(expected[expected[:, 5] == e, 0]).mean() for e in range(len(rows))}
    surprising = report["reader"]["surprising"]
    assert [record["row"] for record in surprising] == sorted(nll, key=lambda e: -nll[e])[:20]
    for record in surprising:
        row = rows[record["row"]]
        plain = lambda *parts: "".join(parts).replace(" ", "")  # noqa: E731 - this tokenizer writes a blank between tokens
        assert plain(*record["text"]) == plain(row["prompt"], row["completion"], "<end>")
        assert record["group"] == row["source"]
        assert plain(*(record["text"][i] for i in record["targets"])) == plain(row["completion"], "<end>")
        assert record["p"] == pytest.approx(expected[expected[:, 5] == record["row"], 0], rel=6e-3)


TEMPLATES = {
    "chatml": "{% for m in messages %}<user>{{ m.role + ':' + m.content }}<end>:{% endfor %}",
    "trimmed": "{% for m in messages %}<user>{{ m.role + '. ' + m.content.strip() + ' ' }}{% endfor %}<end>",
    "no_special_tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("cut", [slice(None), slice(0, 25), slice(-25, None)], ids=["whole", "start", "end"])
def test_template_tokens_are_all_but_the_contents(name, cut, tokenizer):
    contents = ["user", " what is it? ", "a: ", "it is: it"]
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": content} for i, content in enumerate(contents)]
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    mask = template_mask(tokenizer, TEMPLATES[name], {"messages": messages}, ids[cut])
    shown = [content.strip() if name == "trimmed" else content for content in contents]
    tokens = tokenizer.convert_ids_to_tokens(ids[cut])
    kept = "".join(token for token, made in zip(tokens, mask, strict=True) if not made)
    if cut == slice(None):
        assert kept == "".join(shown)
    assert len(mask) == len(ids[cut])
    assert kept in "".join(shown)
    assert sum(mask) > 0


def test_template_tokens_of_more_than_text_are_unknown(tokenizer):
    for extra in ({"tool_calls": [{"type": "function"}]}, {"reasoning_content": "so"}, {"content": None}):
        example = {"messages": [{"role": "assistant", "content": "a", **extra}]}
        assert template_mask(tokenizer, TEMPLATES["chatml"], example, [5, 6]) == [-1, -1]


def test_template_that_changes_messages_is_said(tokenizer, checkpoint, tmp_path):
    upper = "{% for m in messages %}<user>{{ m.content[:3] }}<end>{% endfor %}"
    example = {"messages": [{"role": "user", "content": "abcdef"}]}
    ids = tokenizer(tokenizer.apply_chat_template(example["messages"], chat_template=upper, tokenize=False))["input_ids"]
    assert template_mask(tokenizer, upper, example, ids) == [-1] * len(ids)
    (tmp_path / "t.jinja").write_text(upper)
    report = diagnosis(
        tmp_path, checkpoint, save(rows_of("chat"), tmp_path / "data"), chat_template_path=str(tmp_path / "t.jinja")
    ).run()
    assert any("the chat template's own could not be told" in warning for warning in report["recommendation"]["warnings"])


def test_template_kind(tokenizer, checkpoint, tmp_path):
    rows = rows_of("chat")
    report = diagnosis(tmp_path, checkpoint, save(rows, tmp_path / "data")).run()
    expected = oracle(make_llama(tokenizer), [by_hand(row, tokenizer, False) for row in rows])
    made = np.isin(expected[:, 4], [1, 2])
    assert report["kinds"]["template"]["tokens"] == made.sum()
    assert report["kinds"]["template"]["prob"] == pytest.approx(expected[made, 0].mean(), abs=1e-6)
    assert report["kinds"]["content"]["tokens"] == (~made).sum()


def test_characters_of_several_tokens_stay_whole():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    text = "a🙂é\n<b>"
    pieces = token_texts(Bytes(), list(text.encode()))
    assert "".join(pieces).replace("·", "") == text
    assert pieces[1:5] == ["·", "·", "·", "🙂"]


@pytest.mark.parametrize(
    ("mean", "interval", "possible"),
    [
        (0.01, (0.0, 0.02), ["weak"]),
        (0.55, (0.5, 0.6), ["intermediate"]),
        (0.8, (0.79, 0.81), ["strong"]),
        (0.3, (0.25, 0.35), ["weak", "intermediate"]),
        (0.5, (0.2, 0.8), ["weak", "intermediate", "strong"]),
        (0.8, None, ["weak", "intermediate", "strong"]),
    ],
)
def test_placement(mean, interval, possible):
    placement = place(mean, interval)
    assert placement.possible == possible
    assert placement.decided is (len(possible) == 1)
    assert pytest.approx((0.285, 0.675)) == CUTS
    for (low, high), cut in zip([("weak", "intermediate"), ("intermediate", "strong")], CUTS, strict=True):
        assert cut - max(p for *_, p in ANCHORS[low]) == pytest.approx(min(p for *_, p in ANCHORS[high]) - cut)


@pytest.mark.parametrize("spec", ["nll", "neg_p", {"name": "power", "alpha": 10}, "log_one_minus_p"], ids=str)
@pytest.mark.parametrize("above", [0.0, 0.2])
def test_gradient_mass_is_that_of_the_tokens(spec, above):
    logp = torch.tensor(np.log(np.random.default_rng(0).beta(0.5, 0.5, size=20_000)))
    histogram = ProbabilityHistogram(5)
    histogram.add(logp)
    histogram.add(logp[:500], 1)
    objective, threshold = Objective.parse(spec), Threshold(above=above)
    found = gradient_mass(histogram, objective, threshold)
    p = logp.exp()
    weight = objective.gradient_weight(logp) * (p >= above)
    pull = weight * (1 - p)
    buckets = [(pull[(p * 10).long().clamp(max=9) == b].sum() / pull.sum()).item() for b in range(10)]
    assert found.buckets == pytest.approx(buckets, abs=2e-3)  # tokens in a bin across two buckets
    assert found.effective_tokens == pytest.approx((pull.sum() ** 2 / (pull**2).sum()).item(), rel=1e-3)
    assert found.scale == pytest.approx((pull.sum() / (1 - p).sum()).item(), rel=1e-3)
    assert found.gradient_weight == pytest.approx(weight.mean().item(), rel=1e-3)
    assert found.kinds["eos"] == pytest.approx((pull[:500].sum() / pull.sum()).item(), rel=1e-3)
    assert found.kept == pytest.approx((p >= above).double().mean().item(), abs=2e-4)


def test_sweep_arms_are_recipes(checkpoint, tmp_path):
    found = diagnosis(tmp_path, checkpoint, save(rows_of("pairs"), tmp_path / "data"), objective="log_one_minus_p")
    found.run()
    for mean in (0.02, 0.5, 0.8):
        report = replace(found.report, placement=place(mean, (mean, mean)))
        sweep = yaml.safe_load(sweep_yaml(report))
        assert sweep["learning_rate"][1] == found.recipe.training.learning_rate
        for arm in sweep["arms"]:
            path = write_recipe(tmp_path, checkpoint, tmp_path / "data", **arm, learning_rate=sweep["learning_rate"][0])
            Recipe.read(["--config", str(path)])
    assert {"objective": "log_one_minus_p"} in found.report.recommendation.arms


def test_arms_run_where_the_recipe_chooses_by_loss(checkpoint, tmp_path):
    data = save(rows_of("pairs"), tmp_path / "data")
    save(rows_of("pairs"), tmp_path / "data", "test")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    report = replace(diagnosed(tmp_path, checkpoint, data, **options), placement=place(0.8, (0.8, 0.8)))
    report = replace(report, recommendation=recommend(report))
    for arm in yaml.safe_load(sweep_yaml(report))["arms"]:
        Recipe.read(["--config", str(write_recipe(tmp_path, checkpoint, data, **options, **arm))])


def test_a_schedule_that_waits_for_evaluations_is_training_s_alone(checkpoint, tmp_path):
    data = save(rows_of("pairs", 12), tmp_path / "data")
    save(rows_of("pairs", 4, seed=4), tmp_path / "data", "test")
    keys = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 3}, "eval_strategy": "epoch"}
    plain, changed = (diagnosed(tmp_path, checkpoint, data, **each) for each in ({}, keys))
    assert changed.to_json()["total"] == plain.to_json()["total"]


def test_threshold_that_keeps_nothing_does_not_lose_the_report(checkpoint, tmp_path):
    data = save(rows_of("pairs"), tmp_path / "data")
    report = diagnosis(tmp_path, checkpoint, data, threshold={"above_percentile": 90, "below": 1e-6}).run()
    assert report["objectives"][-1]["kept"] == 0


def test_already_packed_rows_are_taken_as_they_are(tokenizer, checkpoint, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 1] * 2, "labels": [5, 6, 7, 1] * 2} for _ in range(30)]
    for strategy, lengths in (("bfd", {"seq_lengths": [4, 4]}), ("wrapped", {})):
        data = save([{**row, **lengths} for row in rows], tmp_path / strategy)
        report = diagnosis(
            tmp_path, checkpoint, data, "--max_tokens", "60", packing=True, max_length=8, packing_strategy=strategy,
            dataset_kwargs={"skip_prepare_dataset": True},
        ).run()  # fmt: skip
        assert report["sampled"]
        assert 60 <= report["total"]["tokens"] < 120


def test_groups_are_named_by_the_values_in_the_data(checkpoint, tmp_path):
    data = save([{"text": text} for text in ("ab", "cd") for _ in range(5)], tmp_path / "data")
    for options in ({}, {"packing": True, "max_length": 8}):
        assert diagnosis(tmp_path, checkpoint, data, "--by", "text", **options).run()["groups"].keys() == {"ab", "cd"}


def test_recipes_threshold_is_not_inherited_by_the_arms(checkpoint, tmp_path):
    data = save(rows_of("pairs"), tmp_path / "data")
    found = diagnosis(tmp_path, checkpoint, data, objective="neg_p", threshold={"above": 0.02, "normalize": "kept"})
    report = found.run()
    assert found.recipe.training.threshold == {"above": 0.02, "normalize": "kept"}
    assert [objective_name(item) for item in report["objectives"]].count("neg_p, p >= 0.02") == 1
    arms = yaml.safe_load(sweep_yaml(found.report))["arms"]
    assert all("threshold" in arm for arm in arms)
    assert {"objective": "neg_p", "threshold": {"above": 0.02, "normalize": "kept"}} in arms
    plain = Recipe.read(["--config", str(tmp_path / "recipe.yaml"), "--threshold", "null"])
    assert Threshold.parse(plain.training.threshold).keeps_all
    percentile = diagnosis(tmp_path, checkpoint, data, threshold={"above_percentile": 30}).run()
    assert percentile["objectives"][-1]["threshold"]["above"] == percentile["percentiles"]["30"]
    same = diagnosis(tmp_path, checkpoint, data, threshold={"above_percentile": 10}).run()
    assert len({json.dumps([item["objective"], item["threshold"]]) for item in same["objectives"]}) == 5
    own = diagnosis(tmp_path, checkpoint, data, objective="test_trainer:pushes_entropy").run()
    assert any("depends on more than p (entropy)" in warning for warning in own["recommendation"]["warnings"])
    for name in ("asft", "psft"):
        report = diagnosed(tmp_path, checkpoint, data, objective=name, use_peft=True)
        assert any("depends on more than p (ref_logp)" in warning for warning in report.recommendation.warnings)
        assert {"objective": name} in yaml.safe_load(sweep_yaml(report))["arms"]


def test_a_composed_objective_is_shown_as_it_begins_and_ends(checkpoint, tmp_path):
    diagnosis_of_no_weights = diagnosis(tmp_path, checkpoint, save(rows_of("chat"), tmp_path / "plain")).run()
    rows = [{**row, "objective_weight": 0.5} for row in rows_of("chat")]  # which count as one each
    data = save(rows, tmp_path / "data")
    plain = diagnosis(tmp_path, checkpoint, data).run()
    spec = {"name": "power", "alpha": {"from": 0.25, "to": 2}, "floor": 0.1}
    found = diagnosis(tmp_path, checkpoint, data, objective=spec)
    report = found.run()
    assert report["total"] == plain["total"]
    assert [objective_name(item) for item in report["objectives"][5:]] == ["power 0.25, floor 0.1", "power 2, floor 0.1"]
    for item, alpha in zip(report["objectives"][5:], (0.25, 2), strict=True):
        assert item["objective"] == {"name": "power", "alpha": alpha, "floor": 0.1}
        assert item["gradient_weight"] > 0.1
    assert yaml.safe_load(sweep_yaml(found.report))["arms"][-1] == {"objective": spec}
    assert found.recipe.training.objective == spec
    special = diagnosis(tmp_path, checkpoint, data, objective={**spec, "special_tokens": "nll"}).run()
    warning = "special tokens nll comes from is not shown: it depends on more than p (which tokens are special)."
    assert any(warning in said for said in special["recommendation"]["warnings"])
    assert len(special["objectives"]) == 5
    annealed = diagnosis(tmp_path, checkpoint, data, objective="anneal").run()
    assert len(annealed["objectives"]) == 5
    from_nll = diagnosis(tmp_path, checkpoint, data, objective={"name": "power", "alpha": {"from": 0, "to": 3}}).run()
    assert [objective_name(item) for item in from_nll["objectives"][5:]] == ["power 3"]  # nll is there
    warning = "Where the gradient of anneal comes from is not shown: it depends on more than p (entropy, training progress)."
    (told,) = (said for said in annealed["recommendation"]["warnings"] if said.startswith(warning))
    assert "Its effective temperature: " in told
    assert "are left out here: every target token counts once" in annealed["recommendation"]["warnings"][0]
    assert not any("objective_weight" in said for said in diagnosis_of_no_weights["recommendation"]["warnings"])


def test_what_has_no_reference_is_refused_as_in_training(checkpoint, tmp_path):
    data = save(rows_of("chat"), tmp_path / "data")
    for objective in ("asft", {"name": "nll", "mix": [{"name": "nll", "weight": 1, "mix": {"asft": 1}}]}):
        with pytest.raises(RecipeError, match="Objective 'asft' needs a reference model"):
            diagnosis(tmp_path, checkpoint, data, objective=objective)


class Page(HTMLParser):
    """Collects what a page refers to, and its tags."""

    def __init__(self):
        super().__init__()
        self.links, self.tags, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]


HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "<!-- ", "שלום עולם مرحبا", "🙂🧑‍🚀 e\u0301",
    "x" * 3000,
    "\u2028\u2029\u202e backwards", "$\\frac{1}{2}$ $", "&lt;b&gt;", '" onmouseover="alert(1)', "\x00\x07",
]  # fmt: skip


def test_hostile_text_is_escaped(tokenizer, checkpoint, tmp_path):
    rows = [{"text": "a", "source": text} for text in HOSTILE] + [{"text": "bc", "source": "$x_1$"}] * 12
    report = diagnosed(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--by", "source")
    report = replace(report, model=HOSTILE[1], data=HOSTILE[1])
    for records in report.reader.values():
        for i, record in enumerate(records):
            record["text"] = [HOSTILE[i % len(HOSTILE)]] * len(record["text"])
            record["expected"] = [HOSTILE[(i + 1) % len(HOSTILE)]] * len(record["expected"])
    write_report(report, str(tmp_path / "report"))
    text = (tmp_path / "report" / "report.html").read_text()
    parsed = Page()
    parsed.feed(text)
    assert parsed.tags.count("script") == 3
    assert "alert(1)</script>" not in text
    assert all(link.startswith("data:") for link in parsed.links)
    assert not re.search(r"(https?:)?//(?!www\.w3\.org)[a-z]", re.sub(r"base64,[\w+/=]+", "", text))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    shown = {piece for records in data.values() for record in records for piece in record["text"]}
    assert set(HOSTILE) <= shown
    assert set(HOSTILE[:3]) <= set(report.groups)


def test_report_is_complete(checkpoint, tmp_path, capsys):
    data = save(rows_of("pairs"), tmp_path / "data")
    recipe = write_recipe(tmp_path, checkpoint, data, objective={"name": "power", "alpha": 0.3})
    folder = tmp_path / "deep" / "report"
    argv = ["diagnose", "--config", str(recipe), "--report", str(folder), "--by", "source"]
    main(argv)
    printed = capsys.readouterr().out
    summary = printed[printed.index(str(checkpoint)[-20:]) - 30 :].strip().splitlines()
    assert len(summary) <= 25
    assert sorted(path.name for path in folder.iterdir()) == [
        "examples.json",
        "figures",
        "report.html",
        "report.json",
        "sweep.yaml",
    ]
    figures = {path.stem for path in (folder / "figures").iterdir()}
    assert figures == {"continuum", "histogram", "gradient", "reliability", "positions", "examples"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "figures").iterdir())
    report = json.loads((folder / "report.json").read_text())
    assert report["schema"] == 1
    assert "power 0.3" in [objective_name(item) for item in report["objectives"]]
    assert not (tmp_path / "out").exists()  # the recipe's own folder is for training
    with pytest.raises(SystemExit):
        main(argv)
    assert "holds report.json already. Write another folder, or add `--overwrite`." in capsys.readouterr().err
    main([*argv, "--overwrite"])


def test_page_of_thousands_of_examples_is_small(tokenizer, checkpoint, tmp_path):
    rng = random.Random(0)
    rows = [{"text": sentence(rng, 200, 230) if i < 30 else sentence(rng, 1, 6), "source": str(i % 200)} for i in range(3_000)]
    report = diagnosed(
        tmp_path,
        checkpoint,
        save(rows, tmp_path / "data"),
        "--by",
        "source",
        "--max_tokens",
        "0",
        per_device_train_batch_size=100,
    )
    assert report.total.examples == 3_000
    assert len(page(report, tmp_path).encode()) < 1e6
    assert len(report.groups) == 101
    assert len(terminal_summary(report, "out").splitlines()) <= 25


ERRORS = {
    "empty": (lambda rows: [], {}, [], "The train set is empty|a file is empty|Can't load"),
    "truncated": (
        lambda rows: [{"prompt": "a" * 50, "completion": "b"}] * 3, {"max_length": 8}, [],
        "There is no example with a target token. Raise `max_length`",
    ),
    "by": (lambda rows: rows, {}, ["--by", "sauce"], "`--by sauce`: the data set has no such column, only"),
    "max_tokens": (lambda rows: rows, {}, ["--max_tokens", "-1"], "`--max_tokens -1` must not be negative"),
    "percentiles": (lambda rows: rows, {}, ["--percentiles", "101"], "`--percentiles 101` must be between 0 and 100"),
    "compare": (lambda rows: rows, {}, ["--compare", "nowhere"], "`--compare nowhere` is not a folder"),
    "probe_alone": (lambda rows: rows, {}, ["--probe", "x.jsonl"], "`--probe` does nothing without `--compare`"),
    "by_list": (
        lambda rows: [{**row, "tags": ["x"]} for row in rows], {}, ["--by", "tags"], "`--by tags` is a column of lists or",
    ),
    "number": (lambda rows: [{"prompt": "a", "completion": 5}], {}, [], "line 1: 'completion' is 5, not a text. Correct"),
    "endless_rows": (lambda rows: rows, {"packing": True}, ["--max_length", "null"], "`packing: true` needs `max_length`"),
    "key": (lambda rows: rows, {"by": "source"}, [], "`by` is not a recipe key. Give it on the command line: `--by ...`"),
    "unknown": (lambda rows: rows, {}, ["--reprot", "x"], "Unknown recipe key 'reprot'. Did you mean `--report`"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_sentence(name, checkpoint, tmp_path, capsys):
    change, options, flags, message = ERRORS[name]
    data = save(change(rows_of("pairs")), tmp_path / "data")
    recipe = write_recipe(tmp_path, checkpoint, data, **options)
    with pytest.raises(SystemExit) as exit_code:
        main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report"), *flags])
    assert exit_code.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "report").exists()


def test_no_report_folder(checkpoint, data_folder, tmp_path, capsys):
    recipe = write_recipe(tmp_path, checkpoint, data_folder)
    with pytest.raises(SystemExit):
        main(["diagnose", "--config", str(recipe)])
    assert "`--report` is missing" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "file" / "report")])
    assert "Can't write to `--report" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "file")])
    assert "it is a file, not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["diagnose", "--report", str(tmp_path / "report")])
    assert "error: No recipe is given. Write `diagnose --config recipe.yaml`, or `--model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report"), "--compare", str(tmp_path)])
    assert "error: Can't load the model `--compare" in capsys.readouterr().err


def test_nan_and_missing_targets(tokenizer, checkpoint, tmp_path, capsys):
    broken = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "broken")
    data = save(rows_of("pairs"), tmp_path / "data")
    for recipe, message in (
        (write_recipe(tmp_path, tmp_path / "broken", data), "gives probabilities that are NaN in row"),
        (None, "has a target token: all labels are -100"),
    ):
        if recipe is None:
            masked = save([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4, tmp_path / "masked")
            recipe = write_recipe(tmp_path, checkpoint, masked, packing=True, max_length=8)
        with pytest.raises(SystemExit):
            main(["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report")])
        assert message in capsys.readouterr().err


def test_more_processes_than_examples(checkpoint, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, save(rows_of("pairs", count=1), tmp_path / "data"))
    codes, said = ranks(tmp_path, main, ["diagnose", "--config", str(recipe), "--report", str(tmp_path / "report")])
    assert all(codes)
    assert "error: The data set has 1 examples for 2 processes. Launch fewer." in said[0]


def test_probe_that_does_not_fit(tokenizer, checkpoint, tmp_path):
    data = save(rows_of("pairs"), tmp_path / "data")
    with pytest.raises(RecipeError, match="Can't load `--probe nowhere"):
        diagnosis(tmp_path, checkpoint, data, "--compare", str(checkpoint), "--probe", "nowhere.jsonl")
    odd = save([{"x": 1}], tmp_path / "odd")
    with pytest.raises(RecipeError, match="TRL can't make a training text of its columns x"):
        diagnosis(tmp_path, checkpoint, data, "--compare", str(checkpoint), "--probe", str(odd))


# --- thresholds by percentile


def trainer_of(tokenizer, folder, data, model=None, callbacks=None, **options):
    arguments = {
        "output_dir": str(folder), "learning_rate": 0.05, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", **options,
    }  # fmt: skip
    return BLTrainer(
        model=model or make_llama(tokenizer), args=BLConfig(**arguments), processing_class=tokenizer, train_dataset=data,
        callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}], ids=str
)
def test_percentile_threshold_trains_as_its_value(options, tokenizer, tmp_path, capsys, cache):
    rows = rows_of("pairs")
    data = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    percentile = trainer_of(tokenizer, tmp_path / "a", data, threshold={"above_percentile": 30}, **options)
    percentile.train()
    value = percentile.threshold.above
    p = oracle(make_llama(tokenizer), [by_hand(row, tokenizer, False) for row in rows])[:, 0]
    wanted = np.percentile(p, 30, method="inverted_cdf")
    assert abs(value - wanted) <= PERCENTILE_ERROR * min(wanted, 1 - wanted) + 1e-6
    plain = trainer_of(tokenizer, tmp_path / "b", data, threshold=value, **options)
    plain.train()
    for a, b in zip(percentile.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert f"The threshold is p >= {value:.6g}: percentile 30 of" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "checkpoint-4" / "bl_trainer.json").read_text())
    assert record["threshold"] == {"above": value, "above_percentile": 30, "below": 1.0, "normalize": "tokens"}
    assert len(list(cache.iterdir())) == 1


def test_measured_probabilities_are_kept_and_fit_other_percentiles(tokenizer, tmp_path, monkeypatch, capsys, cache):
    data = Dataset.from_list([{"text": row["text"]} for row in rows_of("text")])
    first = trainer_of(tokenizer, tmp_path / "a", data, threshold={"above_percentile": 10})
    first.resolve_threshold()
    monkeypatch.setattr(percentiles, "measure", None)  # a second measurement would fail
    lora = get_peft_model(make_llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    second = trainer_of(tokenizer, tmp_path / "b", data, model=lora, threshold={"above_percentile": 50})
    second.resolve_threshold()
    assert second.threshold.above > first.threshold.above
    assert f"from {cache}" in capsys.readouterr().out
    with torch.no_grad():
        lora.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight += 0.1
    for other in (
        trainer_of(tokenizer, tmp_path / "h", data, model=lora, threshold={"above_percentile": 10}),
        trainer_of(tokenizer, tmp_path / "c", data, model=make_llama(tokenizer, seed=1), threshold={"above_percentile": 10}),
        trainer_of(
            tokenizer,
            tmp_path / "f",
            data,
            threshold={"above_percentile": 10},
            model=make_llama(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 2.0}),
        ),
        trainer_of(tokenizer, tmp_path / "g", data, threshold={"above_percentile": 10}, bf16=True),
        trainer_of(tokenizer, tmp_path / "d", data.select(range(30)), threshold={"above_percentile": 10}),
        trainer_of(tokenizer, tmp_path / "e", data, max_length=20, threshold={"above_percentile": 10}),
    ):
        with pytest.raises(TypeError):  # another model, data set or length is measured anew
            other.resolve_threshold()


class Quantised(torch.nn.Module):
    """A linear layer whose weights are buffers, as those of GPTQ and AWQ are."""

    def __init__(self, linear, saved):
        super().__init__()
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 127, persistent=saved)
        self.register_buffer("qweight", (linear.weight.detach() / self.scales).round().to(torch.int32), persistent=saved)

    def forward(self, x):
        return x @ (self.qweight * self.scales).T


class Stored(torch.nn.Linear):
    """A linear layer that keeps a part of its weights neither as a parameter nor as a buffer, as bitsandbytes does."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.scale = linear.weight, torch.ones(1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = self.scale

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("name", ["qweight", "scales", "unsaved", "scale"])
def test_quantised_weights_are_part_of_the_fingerprint(name, tokenizer, tmp_path, monkeypatch, cache):
    data = Dataset.from_list([{"text": row["text"]} for row in rows_of("text")])

    def made(folder, changes):
        model = make_llama(tokenizer)
        block = model.model.layers[0].mlp
        block.down_proj = Stored(block.down_proj) if name == "scale" else Quantised(block.down_proj, name != "unsaved")
        with torch.no_grad():
            changed = getattr(block.down_proj, "scales" if name == "unsaved" else name)
            changed.view(-1)[-1] += changes
        return trainer_of(tokenizer, tmp_path / folder, data, model=model, threshold={"above_percentile": 10})

    made("first", 0).resolve_threshold()
    monkeypatch.setattr(percentiles, "measure", None)  # a second measurement would fail
    made("same", 0).resolve_threshold()
    with pytest.raises(TypeError):
        made("other", 1).resolve_threshold()


def test_a_broken_cache_is_said_and_measured_again(tokenizer, tmp_path, caplog, cache):
    data = Dataset.from_list([{"text": row["text"]} for row in rows_of("text")])
    first = trainer_of(tokenizer, tmp_path / "a", data, threshold={"above_percentile": 10})
    first.resolve_threshold()
    (path,) = cache.iterdir()
    path.write_text("{")
    second = trainer_of(tokenizer, tmp_path / "b", data, threshold={"above_percentile": 10})
    second.resolve_threshold()
    assert second.threshold.above == first.threshold.above
    assert "the probabilities are measured anew" in caplog.text


def test_percentile_is_not_measured_again_on_resume(tokenizer, tmp_path, monkeypatch, capsys):
    data = Dataset.from_list([{"text": row["text"]} for row in rows_of("text")])
    options = {"threshold": {"above_percentile": 20}, "save_steps": 2}
    whole = trainer_of(tokenizer, tmp_path / "whole", data, **options)
    whole.train()
    monkeypatch.setattr("bl_trainer.training.trainer.resolve_percentile", None)
    resumed = trainer_of(tokenizer, tmp_path / "resumed", data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.threshold == whole.threshold
    assert f"percentile 20, as {tmp_path / 'whole' / 'checkpoint-2'} records it." in capsys.readouterr().out
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = trainer_of(tokenizer, tmp_path / "other", data, threshold={"above_percentile": 30})
    with pytest.raises(ValueError, match=r"the recipe says \{'above_percentile': 30"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    (tmp_path / "whole" / "checkpoint-2" / "bl_trainer.json").unlink()
    with pytest.raises(ValueError, match="doesn't record the probability that `above_percentile: 20` means"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_percentile_above_the_upper_end(tokenizer, tmp_path):
    data = Dataset.from_list([{"text": row["text"]} for row in rows_of("text")])
    made = trainer_of(tokenizer, tmp_path / "a", data, threshold={"above_percentile": 90, "below": 1e-6})
    with pytest.raises(ValueError, match="keeps no token: percentile 90 is p ="):
        made.train()


def test_percentile_of_a_streamed_set(tokenizer, tmp_path):
    data = Dataset.from_list([{"text": row["text"]} for row in rows_of("text")])
    a = trainer_of(tokenizer, tmp_path / "a", data, threshold={"above_percentile": 25})
    b = trainer_of(tokenizer, tmp_path / "b", data.to_iterable_dataset(), threshold={"above_percentile": 25})
    a.resolve_threshold()
    b.resolve_threshold()
    assert b.threshold.above == a.threshold.above


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"above": 0.2, "above_percentile": 10}, "has both `above` and `above_percentile`"),
        ({"above_percentile": 0}, "must be a number above 0 and below 100, got 0"),
        ({"above_percentile": 100}, "must be a number above 0 and below 100, got 100"),
        ({"above_percentile": "ten"}, "must be a number above 0 and below 100, got 'ten'"),
        (10, "must be a probability between 0 and 1, got 10. For a percentile write `threshold: {above_percentile: 10}`"),
        ({"above_percentil": 10}, "Did you mean 'above_percentile'"),
        ({"above": 0, 2: None}, "A decimal comma must be a point"),
    ],
    ids=str,
)
def test_wrong_percentiles(spec, message):
    with pytest.raises(RecipeError, match=message):
        Threshold.parse(spec)


def test_percentile_threshold_does_not_choose_by_loss(tmp_path):
    with pytest.raises(ValueError, match="only the loss of `objective: nll` without `threshold`"):
        BLConfig(output_dir=str(tmp_path), threshold={"above_percentile": 10}, metric_for_best_model="eval_loss", bf16=False)


def test_what_cannot_be_measured_ends_training_in_one_sentence(checkpoint, data_folder, tmp_path, capsys):
    recipe = write_recipe(tmp_path, checkpoint, data_folder, threshold={"above_percentile": 90, "below": 1e-6}, max_steps=1)
    with pytest.raises(SystemExit) as exit_code:
        main(["train", "--config", str(recipe)])
    assert exit_code.value.code == 2
    assert "error: `threshold` keeps no token: percentile 90 is p =" in capsys.readouterr().err


def test_two_processes_resolve_the_same_percentile(checkpoint, data_folder, tmp_path, capsys, cache):
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, threshold={"above_percentile": 40}, max_steps=1, per_device_train_batch_size=5
    )
    argv = ["train", "--config", str(recipe), "--output_dir", str(tmp_path / "two")]
    codes, printed = ranks(tmp_path, verbs.run, argv, tmp_path / "theirs")
    assert codes == [0, 0], printed[0][-4000:]
    main(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "one")])
    for said, home in (("".join(printed), tmp_path / "theirs"), (capsys.readouterr().out, cache)):
        assert said.count("(measured now)") == 1
        assert len(list(home.iterdir())) == 1
    found = [json.loads((tmp_path / each / "bl_trainer.json").read_text())["threshold"]["above"] for each in ("one", "two")]
    assert found[0] == pytest.approx(found[1], rel=2 * PERCENTILE_ERROR)


def test_percentile_of_a_stream_without_targets(tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3).to_iterable_dataset()
    made = trainer_of(tokenizer, tmp_path / "a", data, threshold={"above_percentile": 25}, max_length=8)
    made.train_dataset = made.train_dataset.take(0)
    with pytest.raises(percentiles.MeasurementError, match="There is no example with a target token"):
        made.resolve_threshold()


def test_long_group_names_are_cut_and_told_apart():
    assert group_name(7) == "7"
    names = {group_name("x" * 90 + end) for end in "ab"}
    assert len(names) == 2
    assert max(map(len, names)) < 80


def test_a_response_keeps_its_place_through_packing(tokenizer):
    note = Annotation(tokenizer, None, True)(
        {"bl_row": 3, "input_ids": list(range(8)), "labels": [5, 5, -100, 5, 5, 5, -100, 5]}
    )
    assert note["bl_position"] == [0, 0, 0, 0, 1, 2, 0, 0]
    assert note["bl_length"] == [1, 1, 1, 3, 3, 3, 1, 1]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's package chromium is not installed")
def test_page_opens_without_errors_and_asks_for_nothing(checkpoint, tmp_path):
    report = diagnosed(tmp_path, checkpoint, save(rows_of("pairs"), tmp_path / "data"))
    write_report(report, str(tmp_path / "report"))
    (tmp_path / "bad.html").write_text("<script>throw new Error('seen')</script><img src='http://192.0.2.1/x.png'>")
    logs = []
    for page_file in (tmp_path / "bad.html", tmp_path / "report" / "report.html"):
        log = tmp_path / "net.json"
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             f"--log-net-log={log}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page_file.as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        logs.append((done.stderr.count("CONSOLE"), "192.0.2.1" in log.read_text(), done.stdout))
    assert logs[0][:2] == (1, True)  # so that both would be noticed
    assert logs[1][:2] == (0, False)
    assert logs[1][2].count('class="example"') == 20
