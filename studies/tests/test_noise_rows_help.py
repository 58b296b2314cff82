"""The study of what a noise score is good for: what its arms train on, that they share their order, and that it resumes."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import noise_rows
import noise_rows_help
from bl_trainer.objectives import Objective
from noise_rows import Reader, Row, Words, encoded, rows_of
from noise_rows_help import ARMS, COMPARED, RATES, SEEDS, VALIDATION, Set, batches, held_out, judged, loss_of

NAME = "records 30 %"


@pytest.fixture
def reader():
    words = Words.of([row.prompt + row.answer for row in rows_of(NAME, 9, 100)])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Reader(LlamaForCausalLM(LlamaConfig(vocab_size=len(words.ids) + 1, **sizes)).eval(), words.encode, 0)


@pytest.fixture
def data(monkeypatch):
    """A set of ten rows, the first four wrong, scored 9, 8, ..., 0 but for row 1, which has the least."""
    monkeypatch.setattr(noise_rows_help, "ROWS", 10)
    found = object.__new__(Set)
    found.rows, found.seed = [Row("", "", "wrong" if i < 4 else "right") for i in range(10)], 3
    found.scores = np.array([9.0, -1.0, *range(7, -1, -1)])
    return found


def test_rows_of_an_arm(data):
    kept = {name: np.flatnonzero(arm.weights(data) == 1).tolist() for name, arm in ARMS.items()}
    for name in ("all rows, nll", "all rows, neg_p", "all rows, anneal"):
        assert kept[name] == list(range(10))
    assert kept["flagged dropped"] == kept["flagged at weight 0.1"] == [1, 4, 5, 6, 7, 8, 9]
    assert ARMS["flagged at weight 0.1"].weights(data)[[0, 2, 3]].tolist() == [0.1] * 3
    assert kept["wrong rows dropped"] == [4, 5, 6, 7, 8, 9]
    assert len(kept["random rows dropped"]) == 7
    np.testing.assert_allclose(ARMS["weight exp(-score)"].weights(data), np.exp(-data.scores))


def test_arms_share_their_order():
    every, some = np.ones(20), np.ones(20)
    some[[2, 5, 11]] = 0
    long, short = ([i for batch in islice(batches(each, 3), 40) for i in batch] for each in (every, some))
    assert sorted(long[:20]) == list(range(20)) != long[:20]
    left = [i for i in long if some[i]]
    assert short[: len(left)] == left


def test_rows_held_out_are_right_and_new():
    for name in COMPARED:
        first = held_out(name, 3, set())[0]
        found = held_out(name, 3, {first.prompt})
        assert {row.kind for row in found} == {"right"}
        assert first.prompt not in {row.prompt for row in found}


def test_a_weight_multiplies_its_row_s_cost(reader):
    examples = [encoded(reader, row) for row in rows_of(NAME, 3, 2)]
    costs, sizes = [], [len(each.ids) - each.start for each in examples]
    for each in examples:
        rows = reader.model(torch.tensor([each.ids])).logits[0].log_softmax(-1)
        costs.append(sum(1 - rows[i - 1, each.ids[i]].exp() for i in range(each.start, len(each.ids))))
    found = loss_of(reader, examples, [0.1, 3.0], Objective.parse("neg_p"), 0.5)
    assert found.item() == pytest.approx((0.1 * costs[0] + 3 * costs[1]).item() / sum(sizes), rel=1e-4)


def test_accuracy_is_that_of_greedy_decoding(reader):
    row = rows_of(NAME, 3, 1)[0]
    ids = reader.encode(row.prompt)
    start = len(ids)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(reader.model(torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = noise_rows.Example(ids, start)
    other = noise_rows.Example([*ids[:-1], (ids[-1] + 1) % 30], start)
    assert judged(reader, [greedy, other])["accuracy"] == 0.5


def test_a_run_resumes(reader, monkeypatch, tmp_path, capsys):
    small = {"ROWS": 20, "HELD_OUT": 5, "STEPS": 2, "SEEDS": (2,), "RATES": (1e-3, 1e-2), "tiny": lambda folder, name: reader}
    for name, value in small.items():
        monkeypatch.setattr(noise_rows_help, name, value)
    monkeypatch.setattr(noise_rows, "STEPS", 2)
    monkeypatch.setattr(noise_rows, "CHECKS", (2,))
    before = {name: value.clone() for name, value in reader.model.state_dict().items()}
    path = tmp_path / "found.json"
    noise_rows_help.run(path, tmp_path, [NAME])
    text = path.read_text()
    found = json.loads(text)
    assert len(found) == 2 + 3 * len(ARMS)
    assert capsys.readouterr().out.count("\n") == 3 * len(ARMS)
    assert all(torch.equal(reader.model.state_dict()[name], value) for name, value in before.items())
    for arm in ARMS:
        best = max(small["RATES"], key=lambda rate: [*found[f"{NAME} | 1 | {arm} | {rate:g}"].values()])
        assert f"{NAME} | 2 | {arm} | {best:g}" in found
    del found[f"{NAME} | 2 | all rows, anneal | {best:g}"]
    noise_rows.write(path, found)
    noise_rows_help.run(path, tmp_path, [NAME])
    assert path.read_text() == text
    assert capsys.readouterr().out.count("\n") == 1


def test_the_stored_results_are_of_these_arms():
    """Each data set that has been judged has every run of every arm."""
    path = Path(__file__).parents[2] / "docs" / "results" / "noise_rows_help.json"
    runs = [key.split(" | ") for key in json.loads(path.read_text()) if key.count(" | ") == 3]
    wanted = {(seed, arm): len(RATES) if seed == VALIDATION else 1 for seed in (VALIDATION, *SEEDS) for arm in ARMS}
    for name in {name for name, seed, *_ in runs if int(seed) == SEEDS[-1]}:
        assert Counter((int(seed), arm) for its, seed, arm, _ in runs if its == name) == wanted
