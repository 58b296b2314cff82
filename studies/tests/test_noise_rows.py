"""The study of noisy rows: what is wrong in its data, what judges, and that no row is scored by an adapter that saw it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import gsm8k
import noise_rows
from miniature import write_rows
from noise_rows import SETS, Reader, Words, auroc, cell, encoded, read, rows_of, scored, top


@pytest.fixture
def reader():
    words = Words.of([row.prompt + row.answer for name in SETS for row in rows_of(name, 9, 100)])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words.ids) + 1, initializer_range=0.3, **sizes)
    return Reader(LlamaForCausalLM(config).eval(), words.encode, 0)


@pytest.mark.parametrize("name", SETS)
def test_a_share_of_the_rows_is_wrong(name):
    rows = rows_of(name, 3, 1000)
    assert rows == rows_of(name, 3, 1000) != rows_of(name, 4, 1000)
    share = int(re.search(r"(\d+) %", name)[1]) / 100
    assert np.mean([row.kind == "wrong" for row in rows]) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", ["records 30 %", "records 20 %, hard rows 10 %", "consistent mistakes 20 %"])
def test_wrong_records_contradict_their_sentence(name):
    for row in rows_of(name, 3, 300):
        values = [str(value) for value in json.loads(row.answer).values()] if row.kind != "fact" else []
        assert (row.kind == "wrong") == any(not re.search(rf"\b{value}\b", row.prompt) for value in values), row


def test_wrong_sums_are_wrong():
    for name in ("final numbers 20 %", "reasoning-gym chain_sum 20 %"):
        for row in rows_of(name, 3, 300):
            terms = re.findall(r"\d+", row.prompt)[:2]
            signs = 1 if "coins" in row.prompt or " + " in row.prompt else -1
            right = int(terms[0]) + signs * int(terms[1])
            assert (int(re.findall(r"-?\d+", row.answer)[-1]) == right) == (row.kind == "right"), row


def test_wrong_answers_of_gsm8k(tmp_path, monkeypatch):
    problems = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i:,}"} for i in range(1, 4000)]
    problems.append({"question": "What is long?", "answer": "so " * gsm8k.LONGEST + "\n#### 5"})
    write_rows(tmp_path / "train.jsonl", problems)
    monkeypatch.setattr(noise_rows, "SETS", gsm8k.noisy(str(tmp_path)))
    assert tuple(noise_rows.SETS) == noise_rows.OF_GSM8K
    for name in noise_rows.OF_GSM8K:
        rows = rows_of(name, 3, 1500)
        assert rows == rows_of(name, 3, 1500) != rows_of(name, 4, 1500)
        assert len({row.prompt for row in rows}) == len(rows)
        assert np.mean([row.kind == "wrong" for row in rows]) == pytest.approx(0.2, abs=0.03)
        for row in rows:
            number = int(row.prompt.split()[2][:-1])
            right = f"It is {number}.\n#### {number:,}"
            assert (row.answer == right) == (row.kind == "right"), row
            if row.kind == "wrong" and "final" in name:
                assert row.answer.startswith(f"It is {number}.\n#### ")
                assert 1 <= abs(int(row.answer.split("#### ")[1]) - number) <= 20


def test_judges():
    rng = np.random.default_rng(0)
    score, wrong = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.3
    pairs = [(score[i] > score[j]) + (score[i] == score[j]) / 2 for i in range(60) for j in range(60) if wrong[i] > wrong[j]]
    assert auroc(score, wrong) == pytest.approx(sum(map(float, pairs)) / len(pairs))
    assert sorted(score[top(score, 10)]) == sorted(score)[-10:]


def test_rows_are_scored_by_the_adapter_that_has_not_seen_them(reader, monkeypatch):
    """Training is replaced by a mark: each adapter gets other weights."""
    rows, trained = rows_of("records 10 %", 3, 10), []

    def marked(here, examples, seed, rate, check):
        trained.append(examples)
        mark(here.model, 0.02 * len(trained))

    def mark(model, value):
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data.fill_(value)

    monkeypatch.setattr(noise_rows, "fitted", marked)
    monkeypatch.setattr(np, "mean", lambda *args, **kwargs: None)  # no margins were read
    found = scored(reader, rows, 0, 1.0)
    monkeypatch.undo()
    examples = [encoded(reader, row) for row in rows]
    assert trained == [examples[::2], examples[1::2]]
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    for half in (0, 1):
        adapted = get_peft_model(reader.model, config)
        mark(adapted, 0.02 * (2 - half))  # of the other half
        wanted = read(Reader(adapted.base_model.model, reader.encode, 0), examples).logp
        adapted.unload()
        for i in range(half, len(rows), 2):
            np.testing.assert_allclose(found.unseen.logp[i], wanted[i], atol=1e-5)
            assert abs(found.unseen.logp[i] - found.seen.logp[i]).max() > 1e-3


def test_log_p_is_that_of_a_plain_pass(reader):
    examples = [encoded(reader, row) for row in rows_of("swapped answers 20 %", 3, 4)]
    for each, found, margin in zip(examples, *read(reader, examples)[:2], strict=True):
        with torch.no_grad():
            rows = reader.model(torch.tensor([each.ids])).logits[0].double().log_softmax(-1)
        for place in range(each.start, len(each.ids)):
            own = rows[place - 1, each.ids[place]].item()
            others = [value for token, value in enumerate(rows[place - 1].tolist()) if token != each.ids[place]]
            assert found[place - each.start] == pytest.approx(own, abs=1e-4)
            assert margin[place - each.start] == pytest.approx(own - max(others), abs=1e-4)


def test_a_cell_has_all_scores(reader, monkeypatch):
    monkeypatch.setattr(noise_rows, "STEPS", 4)
    monkeypatch.setattr(noise_rows, "CHECKS", (2, 4))
    found = cell(reader, "records 20 %, hard rows 10 %", 3, 60, 1e-3)
    assert {*found["scores"]} == {*noise_rows.SCORES}
    for values in found["scores"].values():
        assert {*values} == {"auroc", "precision", "rare", "long", "fact"}
        assert all(0 <= value <= 1 for value in values.values())


def test_the_stored_results_are_of_these_scores():
    path = Path(__file__).parents[2] / "docs" / "results" / "noise_rows.json"
    for each in json.loads(path.read_text()).values():
        assert {*each["scores"]} == {*noise_rows.SCORES}
