"""The study on a pretrained model: its data, its arms on a tiny model, and its report."""

import copy
import json
import math
import random
import re
import runpy
import statistics
from pathlib import Path

import pytest
import torch
from tokenizers import decoders

import continuum
import gsm8k
import pretrained_study
from anneal_study import ANNEAL, NLL, TEMPERED
from miniature import cell_folder, read_rows, write_rows
from pretrained_study import Pretrained, Task

TOY = Task("toy", 60, 12, examples=3)
SUMS = Task("gsm8k", 1, 12, examples=3, pilot="accuracy")
PEOPLE = Task("records", 1, 12, examples=3)


def said(prompt, completion):
    return {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": completion}]}


@pytest.fixture
def toy(checkpoint, tmp_path, monkeypatch):
    """Trains on what it is judged by."""
    monkeypatch.setattr(pretrained_study, "TASKS", (TOY, SUMS, PEOPLE))
    rows = [said("one", "abc"), said("number two", "de 2"), said("3", "fghij")]
    for task in (TOY, SUMS, PEOPLE):
        home = cell_folder(tmp_path, task.name, 0.0)
        home.mkdir()
        write_rows(home / "train.jsonl", rows)
        write_rows(home / "test.jsonl", rows)
    made = Pretrained(tmp_path, str(checkpoint))
    made.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return made


def plain_logp(model, tokenizer, row):
    """Return log p of all tokens at the places of the target, and the target, by the model's own logits."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    begin, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(whole, return_tensors="pt")["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    return logits[0, begin - 1 : -1].double().log_softmax(-1), ids[0, begin:].tolist()


def test_the_base_is_measured_as_by_a_plain_loop(toy, tmp_path):
    found = toy.evaluate("toy", 0.0)
    for i, row in enumerate(read_rows(tmp_path / "toy-0" / "test.jsonl")):
        logp, targets = plain_logp(toy.base, toy.tokenizer, row)
        assert targets.pop() == toy.tokenizer.eos_token_id
        chosen = [logp[t, v].item() for t, v in enumerate(targets)]
        assert found["targets"][i] == len(targets) == len(row["completion"][0]["content"])
        assert found["nll"][i] == pytest.approx(-sum(chosen), rel=0.01)  # logits in bfloat16 here
        assert found["prob"][i] == pytest.approx(sum(map(math.exp, chosen)), rel=0.05)
        assert found["top1"][i] == sum(logp[t].argmax().item() == v for t, v in enumerate(targets))
    assert found["kl"] == [0, 0, 0]
    assert found["greedy"] == [0, 0, 0]


def test_an_arm_learns_and_leaves_the_base_as_it_was(toy, tmp_path):
    before = toy.evaluate("toy", 0.0)
    kept, untouched = [], copy.deepcopy(toy.base)
    evaluate = toy.evaluate
    toy.evaluate = lambda *where: kept.extend(drifts()) or evaluate(*where)

    def drifts():
        toy.base.eval()
        for row in read_rows(tmp_path / "toy-0" / "test.jsonl"):
            tuned, _ = plain_logp(toy.base, toy.tokenizer, row)
            base, _ = plain_logp(untouched, toy.tokenizer, row)
            yield (base.exp() * (base - tuned))[:-1].sum().item()

    found = toy.arm("toy", 0.0, "nll", 1e-2, 0)
    assert found["greedy"] == [1, 1, 1]
    assert found["top1"] == found["targets"] == [3, 4, 5]
    assert found["kl"] == pytest.approx(kept, rel=0.05)
    toy.evaluate = evaluate
    assert toy.evaluate("toy", 0.0) == before
    again = toy.arm("toy", 0.0, "nll", 1e-2, 0)
    assert again == found
    assert toy.arm("toy", 0.0, "nll", 1e-2, 1)["nll"] != found["nll"]


def test_problems_are_solved_by_their_final_number(toy, tmp_path, monkeypatch):
    rows = [said("a", "2 + 2 = 4\n#### 4"), said("b", "#### 1,200"), said("c", "#### 7")]
    write_rows(tmp_path / "gsm8k-0" / "test.jsonl", rows)
    answers = ["so it is\n#### 4", "that makes \\boxed{1200}", "#### 8, not 7"]
    monkeypatch.setattr(toy.tokenizer, "batch_decode", lambda ids, **_: answers)
    found = toy.evaluate("gsm8k", 0.0)
    assert found["greedy"] == [1, 1, 0]
    assert continuum.means(found)["greedy"] == pytest.approx(2 / 3)


def test_a_pilot_answers_only_what_it_chooses_by(toy, tmp_path):
    """Most of an arm's time goes by in answering."""
    write_rows(tmp_path / "records-0" / "test.jsonl", [said("a", json.dumps({"name": "b", "age": 20, "city": "oslo"}))])
    found = [toy.evaluate(name, 0.0, pretrained_study.PILOT_SEED) for name in ("records", "gsm8k")]
    assert [{"greedy", "sampled", "cooler"} & each.keys() for each in found] == [{"greedy"}, set()]
    assert {"greedy", "sampled", "cooler"} < toy.evaluate("records", 0.0).keys()
    assert "accuracy" in continuum.means(found[1])


def test_records_are_right_however_they_are_written(toy, tmp_path, monkeypatch):
    """Also in other tokens than the target's; figures are of cities, of which examples share."""
    people = [{"name": "a b", "age": 20 + i, "city": city} for i, city in enumerate(("oslo", "lima", "oslo"))]
    write_rows(tmp_path / "records-0" / "test.jsonl", [said("a", json.dumps(person)) for person in people])
    answers = [json.dumps(people[0], indent=1), json.dumps(people[1]), json.dumps(people[1])]
    monkeypatch.setattr(toy.tokenizer, "batch_decode", lambda ids, **_: answers)
    found = toy.evaluate("records", 0.0)
    assert found["greedy"] == found["sampled"] == found["cooler"] == [1, 1, 0]
    assert continuum.values_of(continuum.Scored(0, {}, {}, items=found), "greedy") == {"oslo": (2, 1), "lima": (1, 1)}
    sums = continuum.values_of(continuum.Scored(0, {}, {}, items=found), "nll")
    assert sums["oslo"] == (found["targets"][0] + found["targets"][2], pytest.approx(found["nll"][0] + found["nll"][2]))


def test_samples_are_drawn_by_the_seed_at_their_temperature(toy, monkeypatch):
    drawn = []
    generate = toy.base.generate
    monkeypatch.setattr(toy.base, "generate", lambda **how: drawn.append(how) or generate(**how))
    texts = []
    decode = toy.tokenizer.batch_decode
    monkeypatch.setattr(toy.tokenizer, "batch_decode", lambda ids, **how: texts.append(decode(ids, **how)) or texts[-1])
    for temperature, seed in ((None, 1), (None, 2), (1.0, 1), (1.0, 1), (1.0, 2), (0.5, 1)):
        toy._right(TOY, temperature, seed)
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    assert [how["do_sample"] for how in drawn] == [False, False, True, True, True, True]
    assert [(how["temperature"], how["top_k"], how["top_p"]) for how in drawn[2:]] == [(1, 0, 1)] * 3 + [(0.5, 0, 1)]


def test_records_and_codes_are_the_same_people():
    plain, coded = (pretrained_study.records(1, 200, 0.3, name) for name in ("records", "codes"))
    codes, wrong = {}, 0
    for one, other in zip(plain, coded, strict=True):
        assert one["prompt"] == other["prompt"]
        person, code = (json.loads(row["completion"][0]["content"]) for row in (one, other))
        assert re.fullmatch(r"[B-Z]{2}\d\d", code["city"])
        assert codes.setdefault(person["city"], code["city"]) == code["city"]
        assert {**code, "city": person["city"]} == person
        text = one["prompt"][1]["content"]
        is_right = str(person["age"]) in text and person["city"] in text
        wrong += not is_right
    assert len(set(codes.values())) == len(codes) == 20
    assert 0.2 < wrong / 200 < 0.4


def test_calculator_annotations_are_left_out(tmp_path):
    write_rows(tmp_path / "test.jsonl", [{"question": "q", "answer": "48/2 = <<48/2=24>>24 clips\n#### 24", "idx": 1}])
    (row,) = pretrained_study.problems(gsm8k.read(str(tmp_path), "test"))
    assert row == said("q", "48/2 = 24 clips\n#### 24")


def test_what_is_prepared_is_a_recipe_and_stays(checkpoint, tmp_path, monkeypatch):
    tasks = tuple(task for task in pretrained_study.TASKS if task.name not in ("figfont",))
    monkeypatch.setattr(pretrained_study, "TASKS", tasks)
    monkeypatch.setattr(pretrained_study, "POOL", 20)
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        write_rows(source / f"{split}.jsonl", [{"question": f"{split} {i}", "answer": f"#### {i}"} for i in range(150)])
    pretrained_study.prepare(tmp_path, str(checkpoint), str(source), pretrained_study.TASKS)
    for task in tasks:
        home = cell_folder(tmp_path, task.name, task.noise)
        assert len(read_rows(home / "train.jsonl")) == 20
        assert len(read_rows(home / "test.jsonl")) == task.examples
    train, test = (read_rows(tmp_path / "gsm8k-0" / f"{split}.jsonl") for split in ("train", "test"))
    assert all(row["prompt"][0]["content"].startswith("train") for row in train)
    assert all(row["prompt"][0]["content"].startswith("test") for row in test)
    clean, noisy = (read_rows(tmp_path / f"records-{noise}" / "test.jsonl") for noise in (0, 30))
    assert clean == noisy
    (tmp_path / "codes-30" / "train.jsonl").write_text("mine")
    pretrained_study.prepare(tmp_path, str(checkpoint), str(source), pretrained_study.TASKS)
    assert (tmp_path / "codes-30" / "train.jsonl").read_text() == "mine"
    with pytest.raises(SystemExit, match=r"holds the study of .*, not of another-model. Give another --folder"):
        pretrained_study.prepare(tmp_path, "another-model", str(source), pretrained_study.TASKS)


def test_the_page_holds_the_arms(checkpoint, tmp_path, monkeypatch):
    tasks = tuple(task for task in pretrained_study.TASKS if task.option in ("records", "codes"))
    monkeypatch.setattr(pretrained_study, "TASKS", tasks)
    pretrained_study.prepare(tmp_path, str(checkpoint), None, tasks)
    ran, output = [], tmp_path / "pretrained.json.gz"

    def run(plan, folder, name, noise):
        found = {}
        for i, setting in enumerate(plan.listed()):
            rng = random.Random(f"{name} {noise} {setting}")
            items = {
                key: [rng.random() for _ in range(50)] for key in ("greedy", "sampled", "cooler", "nll", "prob", "top1", "kl")
            }
            items |= {"targets": [4] * 50, "calibration_error": [0.1], "cluster": [f"city {i % 5}" for i in range(50)]}
            ran.append((folder.name, name, setting, items))
            found[i] = continuum.Scored(i, setting, continuum.means(items), items=items)
        return found

    base = {"greedy": 0.0, "sampled": 0.25, "cooler": 0.375, "accuracy": 0.5, "target_prob": 0.5, "nll": 0.75}
    base |= {"calibration_error": 0.125, "drift": 0.0}
    for task in tasks:
        pretrained_study.write_results(output, task, base, *pretrained_study.run_task(tmp_path, task, 3, run))
    pilot = [each[1:] for each in ran if each[0] == "pilot"]
    main = [each[1:] for each in ran if each[0] == f"seed-{each[2]['seed']}"]
    assert (len(pilot), len(main)) == (2 * (6 + 4), 3 * (6 + 4))  # rates or seeds, and objectives of both sets
    assert {setting["seed"] for _, setting, _ in pilot} == {99}
    assert {setting["seed"] for _, setting, _ in main} == {100, 101, 102}
    own = {
        setting["learning_rate"]: statistics.mean(items["greedy"])
        for name, setting, items in pilot
        if name == "codes" and setting == setting | ANNEAL
    }
    assert len(own) == 2
    rate = max(own, key=own.get)

    def arms(name, arm):
        return [items for where, setting, items in main if where == name and setting == setting | arm]

    page = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "pretrained_page.py"))
    text = page["text"](pretrained_study.read_results(output))
    levels = text.partition("**`codes`**: mean")[2]
    (line,) = (line for line in levels.splitlines() if line.startswith("| `anneal` | " + f"{rate:g}"))
    for place, found in (
        (4, [statistics.mean(each["sampled"]) for each in arms("codes", ANNEAL)]),
        (8, [sum(each["nll"]) / 200 for each in arms("codes", ANNEAL)]),
    ):
        assert line.split(" | ")[place - 1] == f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
    (line,) = (line for line in levels.splitlines() if line.startswith("| *untrained* |"))
    assert "| 0.000 | 0.250 | 0.375 | 0.500 | 0.500 | 0.750 | 0.125 | 0.000 |" in line
    apart = text.partition("**`codes`**: share of right answers")[2]
    (line,) = (line for line in apart.splitlines() if line.startswith("| `alpha 0.5 e^-H` | "))
    for cell, ours, theirs in zip(
        line.split(" | ")[1:],
        ("greedy", "sampled", "cooler", "sampled"),
        ("greedy", "sampled", "cooler", "cooler"),
        strict=True,
    ):
        mean = statistics.mean(statistics.mean(each[ours]) for each in arms("codes", TEMPERED[0]))
        mean -= statistics.mean(statistics.mean(each[theirs]) for each in arms("codes", NLL))
        assert cell.startswith(f"{mean:+.3f} (")
    assert all(f"| 100 to 102 | `--tasks {name} --seeds 3` |" in text for name in ("records", "codes"))


def test_a_task_is_stored_beside_the_others(tmp_path):
    first, second = pretrained_study.TASKS[:2]
    run = continuum.Scored(0, {"objective": "nll"}, {}, items={"nll": [1 / 3]})
    pilot = continuum.Scored(0, {"objective": "nll"}, {"greedy": 0.25}, items={"greedy": [0.0, 0.5]})
    for task, base in ((first, {"nll": 1.0}), (second, {"nll": 2.0}), (first, {"nll": 3.0})):
        pretrained_study.write_results(tmp_path / "found", task, base, [pilot], [run])
    arms = [{"setting": {"objective": "nll"}, "items": {"nll": [0.333333]}}]
    own = {"pilot": [{"setting": {"objective": "nll"}, "greedy": 0.25}], "arms": arms}
    stored = {"codes": {"base": {"nll": 2.0}, **own}, "records": {"base": {"nll": 3.0}, **own}}
    assert pretrained_study.read_results(tmp_path / "found") == stored
