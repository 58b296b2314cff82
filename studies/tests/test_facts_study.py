"""The study of facts: what its rows say, that it measures what decoding would give, that it resumes, and how it is judged."""

import json
import random
import runpy
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import facts_study
from facts import (
    ARMS,
    CELLS,
    COPIES,
    PARTS,
    RATES,
    SEEDS,
    TEMPERATURES,
    Fact,
    answers,
    best_rate,
    facts,
    key_of,
    others,
    read_results,
    rows,
)
from facts_study import Model, complete, split

PAGE = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "facts_page.py"))


@pytest.fixture(scope="module")
def everything():
    return facts(40)


@pytest.fixture
def model(checkpoint, everything, monkeypatch):
    monkeypatch.setattr(facts_study, "COUNTRIES", 40)
    parts = {"validation": everything[:2], "test": everything[2:6], "held out": everything[6:8]}
    return Model(str(checkpoint), parts)


def test_facts_are_of_four_kinds(everything):
    assert Counter(fact.relation for fact in everything) == dict.fromkeys(
        ("capital", "calling code", "currency", "ISO code"), 40
    )
    france = {fact.relation: fact.forms for fact in everything if fact.country == "France"}
    assert france["capital"] == ("Paris", "the city of Paris")
    assert france["calling code"] == ("+33", "0033")
    assert (france["currency"], france["ISO code"]) == (("Euro", "EUR"), ("FRA", "FR"))


def test_rows_of_a_cell(everything):
    own = everything[::3]
    made = {name: list(rows(cell, own, everything, 5)) for name, cell in CELLS.items()}
    right = {fact.prompt: answers(CELLS["clean"], fact)[0] for fact in own}
    wrong = {name: [row["completion"] != right[row["prompt"]] for row in each] for name, each in made.items()}
    assert all(len(each) == COPIES * len(own) for each in made.values())
    assert not any(wrong["clean"])
    assert 0.2 < np.mean(wrong["random"]) < 0.4
    by_fact = np.array(wrong["consistent"]).reshape(len(own), COPIES)
    assert set(by_fact.mean(1)) == {0.0, 1.0}
    assert 0.1 < by_fact.mean() < 0.5
    each = [row["completion"] for row in made["consistent"]]
    assert all(len(set(each[i : i + COPIES])) == 1 for i in range(0, len(each), COPIES))
    assert Counter(row["completion"] for row in made["two-forms"][:COPIES]) == dict.fromkeys(
        answers(CELLS["two-forms"], own[0]), COPIES // 2
    )
    assert (
        made["suffix"][0]["completion"]
        == answers(CELLS["suffix"], own[0])[0]
        == right[own[0].prompt] + f" ~~ {own[0].country[0]}#"
    )


def test_wrong_values_follow_the_seed_where_they_are_drawn_for_each_row(everything):
    def completions(name, seed):
        return [row["completion"] for row in rows(CELLS[name], everything[:20], everything, seed)]

    assert completions("random", 1) == completions("random", 1) != completions("random", 2)
    assert completions("consistent", 1) == completions("consistent", 2)


def test_a_wrong_value_is_never_the_true_one(everything):
    """Nor one of its forms: dinars are the currency of several countries."""
    true = {fact.prompt: set(answers(CELLS["two-forms"], fact)) for fact in everything}
    for name in ("random", "consistent"):
        for fact in everything:
            said = {row["completion"] for row in rows(CELLS[name], [fact], everything, 3)}
            assert len(said & true[fact.prompt]) <= 1
            assert len(said) <= (COPIES if name == "random" else 1)


@pytest.fixture
def plain(model, checkpoint):
    """The model in float32, its logits far apart, so that a most probable token is not a matter of rounding."""
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(20)
    model.head = model.base.get_output_embeddings().weight.detach().float()
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        found.get_output_embeddings().weight.copy_(model.head)
    return found


@torch.no_grad()
def logp_of(plain, tokenizer, prompt, answer, temperature=1.0):
    """Log p of an answer's tokens, and whether each is the most probable one, by the model's own logits."""
    given = len(tokenizer(prompt)["input_ids"])
    whole = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
    logits = plain(whole).logits[0, given - 1 : -1].double()
    logp = (logits / temperature).log_softmax(-1).gather(1, whole[0, given:, None])
    return logp.sum().item(), (logits.argmax(-1) == whole[0, given:]).tolist()


def test_what_is_measured_is_what_a_plain_loop_gives(model, plain, monkeypatch):
    tokenizer, cell = model.tokenizer, CELLS["two-forms"]
    asked = [fact for part in model.parts.values() for fact in part]
    words = [(fact.prompt, text) for fact in asked for text in answers(cell, fact)]
    end = tokenizer.eos_token
    for (prompt, text), own in zip(words, model._logp(words, end), strict=True):
        for k, temperature in enumerate(TEMPERATURES):
            assert own[k].sum().item() == pytest.approx(logp_of(plain, tokenizer, prompt, text + end, temperature)[0], rel=0.02)
    values = {0: [-1.0, -0.5], 1: [-2.0, -0.1]}  # of the two forms, at every temperature
    scored = [
        (*(torch.tensor(values[i % 2]) * k for k in (1, 2, 4)), torch.tensor([True, i % 4 == 1])) for i in range(len(words))
    ]
    monkeypatch.setattr(model, "_logp", lambda pairs, given: scored)
    found = model.read("two-forms")
    assert found["greedy"] == [float(i % 2 == 0) for i in range(len(asked))]
    p, q = np.exp(-1.5), np.exp(-2.1)
    assert found["right 1"] == [pytest.approx(p + q, abs=1e-4)] * len(asked)
    assert found["variation 1"] == [pytest.approx((abs(p - 0.5) + abs(q - 0.5) + 1 - p - q) / 2, abs=1e-4)] * len(asked)
    assert found["right 0.5"] == [pytest.approx(p**2 + q**2, abs=1e-4)] * len(asked)


def test_an_answer_that_the_model_decodes_is_right(model, plain):
    """Several tokens; one that differs is seen, wherever it stands."""
    fact, tokenizer = model.parts["validation"][0], model.tokenizer
    ids = tokenizer(fact.prompt, return_tensors="pt")["input_ids"]
    for _ in range(3):
        with torch.no_grad():
            ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], dim=1)
    start = len(tokenizer(fact.prompt)["input_ids"])
    said = "".join(tokenizer.convert_ids_to_tokens(ids[0, start:]))
    assert tokenizer(fact.prompt + said)["input_ids"] == ids[0].tolist(), (
        "the test needs an answer whose tokens are those decoded"
    )
    assert model._logp([(fact.prompt, said)], "")[0][3].tolist() == [True] * 3
    for place in range(3):
        other = ids[0, start:].tolist()
        other[place] = next(each for each in range(10, 40) if each != other[place])
        text = "".join(tokenizer.convert_ids_to_tokens(other))
        marks = logp_of(plain, tokenizer, fact.prompt, text)[1]
        assert model._logp([(fact.prompt, text)], "")[0][3].tolist() == marks
        assert not all(marks)


def test_a_fact_is_known_if_its_country_makes_the_value_most_probable(model, plain):
    everything, seen = model.everything, set()
    for fact in everything[:24]:
        wrong = random.Random(fact.prompt).sample(others(fact, everything), facts_study.CHOICES)
        none = fact.prompt.replace(fact.country, "a country")
        values = [f" {each.forms[0]}" for each in (fact, *wrong)]
        first, *rest = (
            logp_of(plain, model.tokenizer, fact.prompt, each)[0] - logp_of(plain, model.tokenizer, none, each)[0]
            for each in values
        )
        if abs(first - max(rest)) > 0.5:
            assert model.is_known(fact) == (first > max(rest))
            seen.add(first > max(rest))
    assert seen == {True, False}


def test_a_run_trains_and_leaves_the_model_as_it_was(model, monkeypatch):
    monkeypatch.setitem(facts_study.TRAINING, "per_device_train_batch_size", 8)
    before, weights = model.read("clean"), {name: each.clone() for name, each in model.base.state_dict().items()}
    trained = model.run("clean", "alpha e^-H", 3e-2, 1)
    assert np.mean(trained["right 1"][:6]) > np.mean(before["right 1"][:6])
    assert model.base.state_dict().keys() == weights.keys()
    assert all(torch.equal(each, weights[name]) for name, each in model.base.state_dict().items())
    assert model.read("clean") == before


def test_facts_are_split_by_what_is_known(everything):
    many = [Fact(str(i), "capital", (str(i), "")) for i in range(400)]
    parts = split({fact: i % 2 == 0 for i, fact in enumerate(many)})
    assert [len(parts[part]) for part in PARTS] == [2 * count for count in PARTS.values()]
    for part, count in PARTS.items():
        assert [int(fact.country) % 2 for fact in parts[part]] == [0] * count + [1] * count
    assert {int(fact.country) % 2 for fact in parts["held out"]} == {0}
    assert len({fact for each in parts.values() for fact in each}) == sum(map(len, parts.values()))
    with pytest.raises(SystemExit, match="of 4 facts the model knows 4"):
        split(dict.fromkeys(many[:4], True))


class Pool:
    """Gives each run the same numbers in place of training."""

    def __init__(self):
        self.runs = []

    def submit(self, call, method, *run):
        self.runs.append(run)
        future = Future()
        future.set_result({"greedy": [1.0, 0.0, 1.0], "right 1": [0.5, 0.1, 0.2]})
        return future


def test_runs_that_are_there_are_kept(tmp_path):
    listed, done = [{"part": part} for part in ("validation", "test", "held out")], {"kept": [1.0]}
    results, pool = {"facts": listed, "runs": {key_of("random", "nll", 1e-3, 99): done}}, Pool()
    complete(tmp_path / "facts.json.gz", results, [("random", "nll", rate, 99) for rate in (1e-3, 3e-3)], pool)
    assert pool.runs == [("random", "nll", 3e-3, 99)]
    again = read_results(tmp_path / "facts.json.gz")
    assert again == json.loads(json.dumps(results))
    assert again["runs"][key_of("random", "nll", 1e-3, 99)] == done


def test_the_rate_is_chosen_by_validation_facts_alone():
    listed = [{"part": "validation"}, {"part": "test"}]
    values = {1e-3: [1.0, 0.0], 3e-3: [0.0, 1.0]}
    runs = {key_of("random", "nll", rate, 99): {"greedy": each, "right 1": [0.5, 0.5]} for rate, each in values.items()}
    assert best_rate({"facts": listed, "runs": runs}, "random", "nll") == 1e-3


@pytest.mark.parametrize(
    ("expected", "mean", "interval", "p", "outcome"),
    [
        ("above", 0.2, (0.1, 0.3), 0.01, "holds"),
        ("above", -0.2, (-0.3, -0.1), 0.01, "fails"),
        ("below", -0.2, (-0.3, -0.1), 0.01, "holds"),
        ("above", 0.2, (-0.1, 0.5), 0.2, "undecided"),
        ("same", 0.01, (-0.02, 0.04), 0.9, "holds"),
        ("same", 0.01, (-0.06, 0.04), 0.9, "undecided"),
        ("same", 0.10, (0.06, 0.14), 0.001, "fails"),
    ],
)
def test_what_becomes_of_a_prediction(expected, mean, interval, p, outcome):
    assert PAGE["verdict"](expected, PAGE["Difference"](mean, interval, p, ("seeds", "examples"))) == outcome


def test_the_page_compares_what_was_run():
    rng = np.random.default_rng(0)
    listed = [
        {"country": f"{i // 4}", "relation": "capital", "forms": ["a", "b"], "part": part, "is_known": i % 2 == 0}
        for i, part in enumerate(["validation"] * 8 + ["test"] * 16 + ["held out"] * 8)
    ]
    names = ["greedy", *(f"{kind} {t:g}" for kind in ("right", "variation") for t in TEMPERATURES)]
    known = np.array([fact["is_known"] for fact in listed])

    def run(gain):
        """`gain` on known facts at T = 1, a tenth of it on others; at T = 0.5 all facts are better by 0.2."""
        base = 0.4 + 0.05 * rng.random(32)
        values = {
            name: base + gain * np.where(known, 1, 0.1) * (name == "right 1") + 0.2 * (name == "right 0.5") for name in names
        }
        return {name: each.tolist() for name, each in values.items()}

    wanted = [(arm, rate, 99) for arm in ARMS for rate in RATES]
    runs = {key_of("random", *each): run(0.0) for each in wanted}
    results = {"facts": listed, "runs": runs, "untrained": {"random": run(0.0)}}
    assert not PAGE["is_complete"](results, "random")
    for arm in ARMS:
        rate = best_rate(results, "random", arm)
        runs |= {key_of("random", arm, rate, seed): run(0.3 * (arm == "anneal")) for seed in SEEDS}
    assert PAGE["is_complete"](results, "random")
    assert not PAGE["is_complete"](results, "two-forms")
    cell = PAGE["Cell"](results, "random")
    assert len(cell.chosen("known")) == len(cell.chosen("unknown")) == 8
    assert len(cell.chosen("held out")) == 4
    assert (cell.temperature("nll", "right"), cell.column("nll", "right best")) == ("0.5", "right 0.5")

    def plain(group):
        means = []
        for seed in SEEDS:
            ours, control = (
                np.array(runs[key_of("random", arm, cell.rates[arm], seed)]["right 1"])[cell.chosen(group)]
                for arm in ("anneal", "nll")
            )
            means.append((ours - control).mean())
        return np.mean(means)

    for group, about in (("known", 0.3), ("unknown", 0.03), ("all", 0.165)):
        found = cell.apart("anneal", "right 1", group)
        assert found.mean == pytest.approx(plain(group)) == pytest.approx(about, abs=0.02)
        assert found.interval[0] < found.mean < found.interval[1]
    text = PAGE["text"](results)
    line = next(line for line in text.splitlines() if "| `anneal` | right, sampled at T = 1" in line)
    assert line.endswith("| holds |")
    assert f"{plain('all'):+.3f}" in line
    alone = cell.apart("anneal", "right 1", "all").p_value
    assert next(
        apart for each, apart, _ in PAGE["judged"]({"random": cell}) if each.arm == "anneal" and each.expected == "above"
    ).p_value == (pytest.approx(PAGE["SIGNED"] * alone))
    assert "Not run: `clean`, `consistent`, `two-forms`, `suffix`" in text


def test_the_page_has_no_cells_before_the_first_run(tmp_path):
    assert "Of 13 predictions 0 are tested: 0 hold" in PAGE["text"](read_results(tmp_path / "none.json.gz"))
