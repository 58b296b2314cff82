"""The evaluate verb: item by item what a plain greedy loop gives, resumed, compared, and every mistake in one sentence."""

import copy
import functools
import gzip
import importlib.metadata
import itertools
import json
import os
import random
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy import stats
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl.data_utils import _tokenize

from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.evaluation import EvaluateArguments, evaluate, paired_difference, read_items
from bl_trainer.evaluation.exploration import diversity, names_of
from bl_trainer.evaluation.items import item_rows
from bl_trainer.evaluation.options import Checkpoint
from bl_trainer.evaluation.scores import macro
from bl_trainer.prepare.format import Format
from bl_trainer.prepare.sources import FIGLET, Example, math_row
from conftest import LETTERS, make_llama, sentence
from forking import ranks

pytest.importorskip("lm_eval")
from bl_trainer.evaluation import harness
from bl_trainer.evaluation.completion import normalise, score
from bl_trainer.evaluation.exploration import at_temperature
from bl_trainer.evaluation.grading import grade_math

GENERATION_PROMPT = "{% if add_generation_prompt %}{{ 'answer:' }}{% endif %}"
TASK = """
task: capital
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The list of the harness's tasks is read once, and it doesn't ask the machine for its hardware."""
    monkeypatch.setattr(harness, "TaskManager", MANAGER)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


MANAGER = functools.cache(harness.TaskManager)


@pytest.fixture(scope="session")
def speller(tokenizer):
    """A tokenizer that decodes what it encoded, and puts a token before plain texts, which its chat template doesn't."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<begin>"})
    made.backend_tokenizer.decoder = decoders.Fuse()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", made.bos_token_id)]
    )
    made.chat_template += GENERATION_PROMPT
    return made


@pytest.fixture(scope="session")
def models(speller, tmp_path_factory):
    """Folders: a model whose own settings are for another way to generate, an adapter over it, a model that says nothing."""
    folder = tmp_path_factory.mktemp("models")
    model = make_llama(speller, max_position_embeddings=2048)
    traps = {"eos_token_id": speller.unk_token_id, "do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5}
    model.generation_config.update(**traps)
    model.save_pretrained(folder / "plain")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "plain")
    adapted.save_pretrained(folder / "adapter")
    silent = make_llama(speller)
    silent.lm_head.weight.data.zero_()
    silent.save_pretrained(folder / "silent")
    for name in ("plain", "silent"):
        speller.save_pretrained(folder / name)
    return folder


def load(models, name):
    model = AutoModelForCausalLM.from_pretrained(models / "plain" if name == "adapter" else models / name)
    if name == "adapter":
        model.load_adapter(models / name)
    return model.eval(), AutoTokenizer.from_pretrained(models / "plain")


@torch.no_grad()
def greedy(model, tokenizer, prompt, count):
    """A loop over whole forward passes, one prompt at a time, tokenised as TRL does."""
    kwargs = {"add_generation_prompt": True} if isinstance(prompt, list) else {}
    ids = list(_tokenize(tokenizer, prompt, **kwargs)["input_ids"])
    begin = len(ids)
    while len(ids) < begin + count:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=True)


def prompts(kind):
    rng = random.Random(5)
    texts = [sentence(rng, 3, 20) for _ in range(12)]
    if kind == "plain":
        return texts
    return [
        [
            {"role": "system", "content": "be brief"},
            *({"role": role, "content": sentence(rng, 2, 8)} for _ in range(i % 3) for role in ("user", "assistant")),
            {"role": "user", "content": text},
        ]
        for i, text in enumerate(texts)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(kind, models, name):
    """Rows whose gold answers are, in turn, what the model says, the same in other case and punctuation, and something else."""
    model, tokenizer = load(models, name)
    rows = []
    for i, prompt in enumerate(prompts(kind)):
        said = greedy(model, tokenizer, prompt, 20)
        gold = [said or "a", f"  {said.upper()} !", "z" * 12][i % 3]
        answer = [{"role": "assistant", "content": gold}]
        if kind == "messages":
            rows.append({"messages": prompt + answer})
        else:
            rows.append({"prompt": prompt, "completion": gold if kind == "plain" else answer})
    return rows


def run(models, tmp_path, *names, out="out", **others):
    options = {"model": [str(models / name) for name in names], "tasks": ["completion"], "output": str(tmp_path / out)}
    return evaluate(EvaluateArguments(**{**options, "batch_size": "5", **others}))


@pytest.mark.parametrize("name", ["plain", "adapter"])
@pytest.mark.parametrize("kind", ["plain", "chat", "messages"])
def test_completion_is_the_plain_greedy_loop(kind, name, models, tmp_path, capsys):
    rows = rows_of(kind, models, name)
    path = write_rows(tmp_path / "test.jsonl", rows)
    (entry,) = run(models, tmp_path, name, data=[f"completion={path}"], max_new_tokens=20)["evaluations"]
    items = [json.loads(line) for line in (tmp_path / "out" / entry["scores"][0]["samples"]).read_text().splitlines()]
    model, tokenizer = load(models, name)
    assert [item["id"] for item in items] == list(range(12))
    for item, row, prompt in zip(items, rows, prompts(kind), strict=True):
        said = greedy(model, tokenizer, prompt, 20)
        gold = row["completion"] if kind == "plain" else [*row.get("messages", []), *row.get("completion", [])][-1]["content"]
        assert (item["answer"], item["gold"]) == (said, gold)
        assert item["metrics"] == score(row, [said])
        shown = prompt if kind == "plain" else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert item["prompt"] == shown
    exact, normalised = entry["scores"]
    values = [item["metrics"]["exact_match"] for item in items]
    assert 0 < sum(values) < 12
    assert (exact["value"], exact["items"]) == (pytest.approx(np.mean(values)), 12)
    assert exact["stderr"] == pytest.approx(np.std(values, ddof=1) / 12**0.5)
    assert normalised["value"] > exact["value"]
    assert entry["chat_template"] == (kind != "plain")
    assert f"chat template {'not ' if kind == 'plain' else ''}applied" in capsys.readouterr().out
    assert entry["versions"]["lm_eval"] == importlib.metadata.version("lm_eval")


def test_format_is_the_share_of_answers_that_match_it_whole(models, tmp_path):
    rows = rows_of("plain", models, "plain")
    said = [greedy(*load(models, "plain"), row["prompt"], 20) for row in rows]
    begin = next(answer[0] for answer in said if answer)
    options = {"data": [f"completion={write_rows(tmp_path / 'test.jsonl', rows)}"], "max_new_tokens": 20}
    (entry,) = run(models, tmp_path, "plain", **options, format=f"{re.escape(begin)}.*")["evaluations"]
    found = {score["metric"]: score["value"] for score in entry["scores"]}
    assert found["format"] == pytest.approx(np.mean([answer.strip().startswith(begin) for answer in said]))
    assert 0 < found["format"] < 1
    with pytest.raises(RecipeError, match=r"other options \(`format`: .*, now None\)"):
        run(models, tmp_path, "plain", **options)
    with pytest.raises(RecipeError, match=r"`--format \(` is not a regular expression: missing \), unterminated subpattern"):
        run(models, tmp_path, "plain", **options, format="(")


def test_temperatures_are_evaluations_of_their_own(models, tmp_path):
    """Greedy answers, and those sampled at each temperature, are those of commands for one of them; each has its items."""
    path = write_rows(tmp_path / "test.jsonl", [{"prompt": each, "completion": "c"} for each in ("ab", "b", "ca", "bb")])
    options = {"data": [f"completion={path}"], "max_new_tokens": 4}
    for name in ("plain", "adapter"):
        found = run(models, tmp_path, name, out=f"all-{name}", temperatures=[1.0, 0.5], samples=3, **options)["evaluations"][0]
        items = {}
        for one in found["scores"]:
            lines = (tmp_path / f"all-{name}" / one["samples"]).read_text().splitlines()
            items[one["metric"]] = [json.loads(line) for line in lines]
        for suffix, single in (("", {}), ("@T1", {"samples": 3}), ("@T0.5", {"samples": 3, "temperature": 0.5})):
            out = f"one-{name}{suffix}"
            alone = run(models, tmp_path, name, out=out, **single, **options)["evaluations"][0]
            for one in alone["scores"]:
                metric = at_temperature(one["metric"], float(suffix[2:]) if suffix else None)
                (own,) = [each for each in found["scores"] if each["metric"] == metric]
                assert {**own, "metric": "", "samples": ""} == {**one, "metric": "", "samples": ""}
                expected = [json.loads(line) for line in (tmp_path / out / one["samples"]).read_text().splitlines()]
                assert [item["answer"] for item in items[metric]] == [item["answer"] for item in expected]
                assert [item["metrics"][metric] for item in items[metric]] == [i["metrics"][one["metric"]] for i in expected]
        names = {one["metric"] for one in found["scores"]}
        assert {"exact_match", "exact_match@T1", "exact_match@T0.5,pass@2", "distinct_answers@T1"} <= names
        assert "distinct_answers" not in names


def test_adapter_over_a_named_base_and_the_default_length(models, tmp_path):
    path = write_rows(tmp_path / "test.jsonl", rows_of("plain", models, "adapter"))
    own = run(models, tmp_path, "adapter", data=[f"completion={path}"])["evaluations"][0]
    over = run(models, tmp_path, "plain", out="over", adapter=str(models / "adapter"), data=[f"completion={path}"])
    longest = max(len(json.loads(line)["completion"]) for line in open(path))
    assert own["generation"]["completion"]["max_gen_toks"] == longest + 8
    assert [s["value"] for s in over["evaluations"][0]["scores"]] == [s["value"] for s in own["scores"]]
    assert over["evaluations"][0]["checkpoint"] == f"{models / 'plain'}+{models / 'adapter'}"


def test_adapter_that_holds_a_head_larger_than_the_tokenizer(models, speller, tmp_path):
    model = make_llama(speller, vocab_size=len(speller) + 7)
    model.save_pretrained(tmp_path / "base")
    speller.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    path = write_rows(tmp_path / "test.jsonl", GOOD)
    found = run(tmp_path, tmp_path, "base", "adapter", data=[f"completion={path}"])
    base, adapter = ((tmp_path / "out" / entry["scores"][0]["samples"]).read_text() for entry in found["evaluations"])
    assert base == adapter  # which does nothing yet


def test_empty_generations_are_wrong(models, tmp_path, capsys):
    path = write_rows(tmp_path / "test.jsonl", [{"prompt": "ab", "completion": "?"}, {"prompt": "b", "completion": "c"}])
    (entry,) = run(models, tmp_path, "silent", data=[f"completion={path}"])["evaluations"]
    items = (tmp_path / "out" / entry["scores"][0]["samples"]).read_text().splitlines()
    assert [json.loads(item)["answer"] for item in items] == ["", ""]
    assert [score["value"] for score in entry["scores"]] == [0, 0]
    table = capsys.readouterr().out
    assert "items  empty answers" in table
    assert table.count("2      2 of 2") == 2


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Paris.", " paris", True),
        ('{"age": 24}', "age 24", True),
        ("a\n  b", "A B!", True),
        ("-5", "5", False),
        ("3.14", "314", False),
        ("1/2", "12", False),
        ("", "?!", False),
        ("$5", "5", True),
        ("Straße", "STRASSE", True),
    ],
)
def test_normalised_answers(one, other, equal):
    assert (normalise(one) == normalise(other)) == equal


@pytest.fixture
def capital(tmp_path):
    """A task file, and rows for it."""
    path = write_rows(
        tmp_path / "rows.jsonl", [{"question": sentence(random.Random(i), 5, 9), "answer": i % 2} for i in range(12)]
    )
    task = tmp_path / "capital.yaml"
    task.write_text(TASK.replace("FILE", path))
    return str(task)


def test_differences_are_those_computed_by_hand(models, tmp_path, capital, capsys):
    data = write_rows(tmp_path / "test.jsonl", rows_of("plain", models, "plain"))
    found = run(models, tmp_path, "adapter", "plain", tasks=["completion", capital], data=[f"completion={data}"])
    items = {}
    for entry in found["evaluations"]:
        for s in entry["scores"]:
            lines = [json.loads(line) for line in (tmp_path / "out" / s["samples"]).read_text().splitlines()]
            items[entry["checkpoint"], s["task"], s["metric"]] = np.array([line["metrics"][s["metric"]] for line in lines])
    assert {(d["task"], d["metric"]) for d in found["differences"]} == {
        ("completion", "exact_match"),
        ("completion", "normalised_match"),
        ("capital", "acc"),
    }
    for d in found["differences"]:
        new, old = (items[str(models / name), d["task"], d["metric"]] for name in ("plain", "adapter"))
        assert (d["checkpoint"], d["baseline"], d["items"]) == (str(models / "plain"), str(models / "adapter"), 12)
        stderr = np.std(new - old, ddof=1) / 12**0.5
        assert d["difference"] == pytest.approx(np.mean(new - old))
        assert d["stderr"] == pytest.approx(stderr)
        half = 2.200985 * stderr or 1 - 0.05 ** (1 / 12)  # of Student's t with 11 degrees of freedom
        assert d["interval"] == pytest.approx([np.mean(new - old) - half, np.mean(new - old) + half], abs=1e-3)
    out = capsys.readouterr().out
    exact = found["differences"][0]
    assert f"{exact['difference']:+.4f} ± {exact['stderr']:.4f}" in out
    assert "empty answers" not in out
    values = read_items(tmp_path / "out" / found["evaluations"][0]["scores"][0]["samples"], "exact_match")
    assert list(values.values()) == items[str(models / "adapter"), "completion", "exact_match"].tolist()


def test_pairs_are_of_the_same_items():
    new, old = {"0 a": 1.0, "1 b": 1.0, "2 c": 1.0}, {"0 a": 0.0, "1 x": 0.0, "2 c": 1.0}
    assert paired_difference(new, old) == {"difference": 0.5, "stderr": pytest.approx(0.5), "interval": None, "items": 2}
    assert paired_difference({"0 a": 1.0}, {"1 b": 1.0})["difference"] is None


def test_interval_of_a_difference_stays_within_its_bounds():
    new = {str(i): float(i % 6 > 0) for i in range(12)}
    old = {str(i): float(i % 6 == 0) for i in range(12)}
    found = paired_difference(new, old)
    low, high = found["interval"]
    assert (0 < low < found["difference"] < high, high) == (True, 1)
    scaled = paired_difference(*({item: 100 * value for item, value in each.items()} for each in (new, old)))
    assert scaled["interval"][0] == pytest.approx(100 * low)
    assert scaled["interval"][1] > 100  # of which no bound is known
    parts = [{**found, "stderr": 0.5}] * 2
    assert macro(parts, "difference")["interval"][1] > 1
    assert macro(parts, "difference", (-1.0, 1.0))["interval"] == [macro(parts, "difference")["interval"][0], 1]


def test_interval_over_groups_is_welchs():
    rng = np.random.default_rng(5)
    groups = [rng.normal(0.3, scale, size) for scale, size in ((3.0, 10), (1.0, 400))]
    zeros = [{str(i): 0.0 for i in range(len(group))} for group in groups]
    parts = [
        paired_difference({str(i): float(x) for i, x in enumerate(g)}, zero) for g, zero in zip(groups, zeros, strict=True)
    ]
    one, other = groups
    for bound in macro(parts, "difference")["interval"]:
        assert stats.ttest_ind(one - bound, bound - other, equal_var=False).pvalue == pytest.approx(0.05)
    few = paired_difference({str(i): float(i) for i in range(9)}, {str(i): 0.0 for i in range(9)})
    assert macro([few, parts[1]], "difference")["interval"] is None


@pytest.mark.parametrize(("new", "old"), [(1.0, 0.0), (0.0, 0.0), (0.7, 0.6)])
def test_items_that_all_differ_alike_have_an_interval_with_width(new, old):
    found = paired_difference(*({str(i): value for i in range(10)} for value in (new, old)))
    share, mean = 1 - 0.05**0.1, new - old
    assert found["interval"] == pytest.approx([mean - share * (1 + mean), mean + share * (1 - mean)])
    scaled = paired_difference(*({str(i): 100 * value for i in range(10)} for value in (new, old)))
    assert (scaled["interval"] is None) == (new + old > 0)  # of which no bound is known
    part = {**found, "stderr": 0.0}
    whole = macro([part, {**part, "items": 40}], "difference", (-1.0, 1.0))["interval"]
    share = 1 - 0.05 ** (1 / 20)
    assert whole == pytest.approx([mean - share * (1 + mean), mean + share * (1 - mean)])


def test_choices_and_filters_give_one_row_for_each_item():
    common = {"doc_id": 0, "doc_hash": "h", "target": 1, "metrics": ["acc"], "acc": 1.0}
    choice = {
        **common,
        "arguments": [("q", " yes"), ("q", " no")],
        "resps": [],
        "filter": "none",
        "filtered_resps": [(-2.0, False), (-1.0, True)],
    }
    (row,) = item_rows([choice])
    assert (row["answer"], row["metrics"], row["prompt"]) == (" no", {"acc": 1.0}, "q")
    said = {**common, "arguments": [("q", {})], "resps": [["it is 5"]]}
    (row,) = item_rows([{**said, "filter": name, "filtered_resps": [text]} for name, text in (("first", "it"), ("last", "5"))])
    assert row["extracted"] == {"first": "it", "last": "5"}
    assert (row["answer"], row["metrics"]) == ("it is 5", {"acc,first": 1.0, "acc,last": 1.0})


def test_broken_off_evaluation_goes_on(models, tmp_path, capital, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", rows_of("plain", models, "plain"))
    options = {"tasks": [f"completion,{capital}"], "data": [f"completion={data}"]}
    whole = run(models, tmp_path, "plain", "adapter", out="whole", **options)
    plain, done = harness.run, []

    def breaks(lm, loaded, tasks, options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(loaded)
        return plain(lm, loaded, tasks, options)

    with monkeypatch.context() as patch:
        patch.setattr(harness, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            run(models, tmp_path, "plain", "adapter", **options)
    (kept,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    samples = tmp_path / "out" / kept["scores"][0]["samples"]
    written = samples.stat().st_mtime_ns
    assert run(models, tmp_path, "plain", "adapter", **options) == whole
    assert samples.stat().st_mtime_ns == written
    with monkeypatch.context() as patch:
        patch.setattr(harness, "load_model", lambda *args: pytest.fail("nothing is to be done"))
        assert run(models, tmp_path, "plain", "adapter", **options, batch_size="3") == whole
    assert not list((tmp_path / "out").rglob("*.part"))


def test_groups_have_their_own_scores(models, tmp_path, capital, monkeypatch):
    task = (tmp_path / "capital.yaml").read_text()
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(task.replace("capital", name))
    (tmp_path / "capital.yaml").write_text(
        "group: capital\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    monkeypatch.setattr(harness, "OWN", tmp_path)
    monkeypatch.setattr(harness, "TaskManager", lambda **kwargs: MANAGER(**{**kwargs, "include_defaults": False}))
    with pytest.raises(ValueError, match=r"capital.yaml` is a group of tasks. Give the files of these"):
        run(models, tmp_path, "plain", tasks=[capital])
    (entry,) = run(models, tmp_path, "plain", tasks=["capital"])["evaluations"]
    one, two, group = entry["scores"]
    assert [score["task"] for score in entry["scores"]] == ["one", "two", "capital"]
    assert one["value"] == two["value"] == group["value"]
    assert one["samples"] != two["samples"]


def test_two_processes_do_what_one_does(models, tmp_path, capital):
    data = write_rows(tmp_path / "test.jsonl", rows_of("plain", models, "plain")[:5])
    argv = ["--model", str(models / "plain"), "--tasks", "completion", capital, "--data", f"completion={data}"]
    codes, said = ranks(tmp_path, main, ["evaluate", *argv, "--output", str(tmp_path / "two")])
    assert codes == [0, 0], said[0][-4000:]
    assert "".join(said).count("value ± standard error") == 1
    run(models, tmp_path, "plain", tasks=["completion", capital], data=[f"completion={data}"])
    for path in (tmp_path / "out" / "samples").rglob("*.jsonl"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "out")).read_text() == path.read_text()
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["evaluations"] for name in ("out", "two"))
    assert [entry["scores"] for entry in one] == [entry["scores"] for entry in two]


def test_local_data_stand_in_for_a_task_of_the_harness(models, tmp_path):
    rows = [{"question": f"what is {i} and {i}?", "answer": f"it is {2 * i}. #### {2 * i}"} for i in range(4)]
    data = write_rows(tmp_path / "test.jsonl", rows)
    options = {"tasks": ["gsm8k_platinum"], "data": [f"gsm8k_platinum={data}"], "num_fewshot": 3, "limit": 2}
    (entry,) = run(models, tmp_path, "plain", **options)["evaluations"]
    assert {(s["metric"], s["items"]) for s in entry["scores"]} == {
        ("exact_match,strict-match", 2),
        ("exact_match,flexible-extract", 2),
    }
    assert entry["chat_template"]
    items = [json.loads(line) for line in (tmp_path / "out" / entry["scores"][0]["samples"]).read_text().splitlines()]
    for item, row in zip(items, rows, strict=False):
        assert row["question"] in item["prompt"]
        assert row["answer"] not in item["prompt"]  # an item is no example for itself
        assert item["prompt"].count("####") == 3


GOOD = [{"prompt": "ab", "completion": "c"}, {"prompt": "b", "completion": "d"}]


def files(folder, models):
    """What the mistakes below point to."""
    made = {
        "good": GOOD,
        "chat": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "unanswered": [{"messages": [{"role": "user", "content": "a"}]}],
        "promptonly": [{"prompt": "ab"}],
        "holes": [*GOOD, {"prompt": "c"}],
        "blank": [*GOOD, {"prompt": "c", "completion": ""}],
        "questions": [{"question": "a"}],
        "answers": [{"answer": "1"}],
        "hole": [{"question": "a", "answer": "1"}, {"question": "b", "answer": None}],
        "unasked": [{"question": "a", "answer": "1"}, {"question": None, "answer": "1"}],
        "beyond": [{"question": "a", "options": ["b", "c"], "answer": "E"}],
        "long": [{"prompt": "ab" * 20, "completion": "c"}],
        "capital": [{"question": "a", "answer": 1}],
    }
    for name, rows in made.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (folder / "unsafe.yaml").write_text(TASK.replace("FILE", str(folder / "good.jsonl")) + "unsafe_code: true\n")
    (folder / "capital.yaml").write_text(TASK.replace("FILE", str(folder / "capital.jsonl")))
    (folder / "nobase").mkdir()
    (folder / "nobase" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "lostbase").mkdir()
    (folder / "lostbase" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "/nowhere/model"}'
    )
    (folder / "badadapter").mkdir()
    (folder / "badadapter" / "adapter_config.json").write_text('{"peft_type": ')
    (folder / "shapeless").mkdir()
    (folder / "shapeless" / "results.json").write_text('{"evaluations": [{"task": "completion"}]}')
    (folder / "nothing").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "results.json").write_text("[]")
    short = AutoTokenizer.from_pretrained(models / "plain")
    make_llama(short, max_position_embeddings=32).save_pretrained(folder / "short")
    short.save_pretrained(folder / "short")
    untold = AutoTokenizer.from_pretrained(models / "plain")
    untold.chat_template = None
    AutoModelForCausalLM.from_pretrained(models / "plain").save_pretrained(folder / "untold")
    untold.save_pretrained(folder / "untold")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modl": "x"},
            "Unknown option 'modl'. Did you mean `--model`? See `bl-trainer evaluate --help` for all options.",
        ),
        ({"model": None}, "`--model` is missing. Write e.g. `--model out/model`."),
        ({"tasks": None}, "`--tasks` is missing. Write e.g. `--tasks gsm8k`."),
        ({"output": None}, "`--output` is missing. Write e.g. `--output out/evaluation`."),
        ({"model": "./gone"}, "`--model ./gone` is not a folder."),
        ({"model": "TMP/nothing"}, "TMP/nothing` holds no model: there is no config.json."),
        ({"model": "TMP/nobase"}, "names no base model. Write `--model BASE --adapter TMP/nobase`."),
        ({"model": "TMP/lostbase"}, "/nowhere/model, the base of the adapter `--model TMP/lostbase`, is not a folder. Write"),
        ({"adapter": "TMP/nothing"}, "`--adapter TMP/nothing` holds no adapter_config.json. Give an adapter's folder."),
        ({"model": "TMP/nobase", "adapter": "TMP/nobase"}, "`--model TMP/nobase` is an adapter too. Write its base model"),
        ({"model": ["a", "b"], "adapter": "c"}, "`--adapter` goes with one `--model`."),
        ({"model": "gone/model"}, "Can't load `--model gone/model`: "),
        (
            {"tasks": "gsm8kk", "data": None},
            "Unknown task 'gsm8kk'. Did you mean 'gsm8k'? `lm-eval ls tasks` lists the harness's.",
        ),
        ({"tasks": "gone.yaml", "data": None}, "`--tasks gone.yaml` is not a file."),
        (
            {"tasks": "TMP/unsafe.yaml", "data": None},
            "runs code that the model writes. Add `--confirm_run_unsafe_code`, best in a container.",
        ),
        ({"tasks": "humaneval", "data": None}, "The task 'humaneval' runs code that the model writes."),
        ({"tasks": "gsm8k", "data": None}, "it needs the data set openai/gsm8k, but it is not in the cache, and HF_HUB_OFF"),
        ({"data": None}, "`--tasks completion` needs your data. Write `--data completion=path.jsonl`."),
        ({"data": "test.jsonl"}, "`--data test.jsonl` must be task=path, of a .jsonl, .json, .parquet or .csv file."),
        ({"data": "completion=gone.jsonl"}, "`--data completion=gone.jsonl`: there is no such file."),
        ({"data": "compltion=TMP/good.jsonl"}, "`--tasks` names no such task. Did you mean 'completion'?"),
        ({"data": "completion=TMP/empty.jsonl"}, "`--data completion=TMP/empty.jsonl` is empty."),
        ({"data": "completion=TMP/broken.jsonl"}, "TMP/broken.jsonl, line 2: Expecting ':' delimiter"),
        ({"data": "completion=TMP/promptonly.jsonl"}, "has the columns prompt. Needed: prompt and completion, or messages."),
        ({"data": "completion=TMP/holes.jsonl"}, "TMP/holes.jsonl, line 3: it has no 'completion'."),
        ({"data": "completion=TMP/blank.jsonl"}, "TMP/blank.jsonl`: row 3 has no gold answer."),
        ({"data": "completion=TMP/unanswered.jsonl"}, "TMP/unanswered.jsonl`: row 1 has no gold answer."),
        (
            {"tasks": "gsm8k_platinum", "data": "gsm8k_platinum=TMP/questions.jsonl"},
            "can't be read by the task: UndefinedError: 'answer' is undefined",
        ),
        (
            {"tasks": "gsm8k", "data": "gsm8k=TMP/questions.jsonl"},
            "`--data gsm8k=TMP/questions.jsonl`: it has the columns question. Needed: one of final_answer, answer,",
        ),
        (
            {"tasks": "math500", "data": "math500=TMP/answers.jsonl"},
            "TMP/answers.jsonl`: it has the columns answer. Needed: one of prompt, question, problem.",
        ),
        ({"tasks": "math500", "data": "math500=TMP/hole.jsonl"}, "TMP/hole.jsonl`: row 2 has no gold answer."),
        ({"tasks": "math500", "data": "math500=TMP/empty.jsonl"}, "`--data math500=TMP/empty.jsonl`: it is empty."),
        ({"tasks": "math500", "data": "math500=TMP/broken.jsonl"}, "TMP/broken.jsonl, line 2: Expecting ':' delimiter"),
        ({"tasks": "math50", "data": None}, "Unknown task 'math50'. Did you mean 'math500'?"),
        ({"tasks": "medical", "data": None}, "`--tasks medical` needs your data. Write `--data medical=path.jsonl`."),
        ({"tasks": "figfont", "data": None}, "`--tasks figfont` needs your data. Write `--data figfont=path.jsonl`."),
        ({"samples": "0"}, "`--samples 0` must be at least 1."),
        ({"temperature": "-1"}, "`--temperature -1.0` must be at least 0."),
        (
            {"samples": "4", "temperature": "0"},
            "`--temperature 0` gives 4 equal answers. Write a higher one, or `--samples 1`.",
        ),
        ({"temperatures": "0"}, "`--temperatures 0` must be different numbers above 0, e.g. `--temperatures 1 0.5 0.25`."),
        ({"temperatures": "nan"}, "`--temperatures nan` must be different numbers above 0"),
        ({"temperatures": "1", "temperature": "1"}, "`--temperatures` has greedy answers beside it. Remove `--temperature`"),
        (
            {"temperatures": "1", "tasks": "TMP/capital.yaml", "data": None},
            "`--temperatures 1.0`: the harness's task 'capital' says itself how to answer.",
        ),
        (
            {"samples": "4", "tasks": "TMP/capital.yaml", "data": None},
            "`--samples 4`: the harness's task 'capital' says itself how to answer. Leave it out, or evaluate",
        ),
        (
            {"max_new_tokens": "4", "tasks": "TMP/capital.yaml", "data": None},
            "`--max_new_tokens 4`: the harness's task 'capital'",
        ),
        ({"backend": "tpu"}, "`--backend tpu` is not allowed. Allowed: hf, vllm."),
        (
            {"backend": "vllm"},
            "`--backend vllm` needs vLLM, which isn't installed. Run `pip install '.[vllm]'`, or write `hf`.",
        ),
        ({"max_new_tokens": "2047"}, "the model takes 2048 in all: `--max_new_tokens` can be 2045 at most."),
        (
            {"model": "TMP/short", "data": "completion=TMP/long.jsonl"},
            "and the model takes 32 in all: take it out of the data.",
        ),
        ({"tasks": "mmlu", "data": "mmlu=TMP/good.jsonl"}, "`--data mmlu=...`: that is a group of tasks. Name one of them."),
        ({"limit": "0"}, "`--limit 0` must be a number of items, or a share between 0 and 1."),
        ({"limit": "nan"}, "`--limit nan` must be a number of items, or a share between 0 and 1."),
        ({"limit": "inf"}, "`--limit inf` must be a number of items, or a share between 0 and 1."),
        ({"temperature": "nan"}, "`--temperature nan` must be a number."),
        ({"temperature": "inf"}, "`--temperature inf` must be a number."),
        (
            {"data": ["completion=TMP/good.jsonl", "completion=TMP/chat.jsonl"]},
            "`--data completion=...` is given more than once. Put the rows into one file.",
        ),
        ({"model": "TMP/badadapter"}, "The adapter_config.json of `--model TMP/badadapter` can't be read: "),
        ({"output": "TMP/shapeless"}, "`--output TMP/shapeless` holds a results.json of something else. Write another"),
        ({"tasks": "math500", "data": "math500=TMP/unasked.jsonl"}, "TMP/unasked.jsonl`: row 2 has no question."),
        (
            {"tasks": "medical", "data": "medical=TMP/beyond.jsonl"},
            "TMP/beyond.jsonl`: row 1: the gold answer 'E' is none of the options A to B.",
        ),
        ({"limit": "1.5"}, "`--limit 1.5` must be a number of items, or a share between 0 and 1."),
        ({"max_new_tokens": "0"}, "`--max_new_tokens 0` must be at least 1."),
        ({"num_fewshot": "-1"}, "`--num_fewshot -1` must be at least 0."),
        ({"num_fewshot": "3"}, "`--num_fewshot 3`: the task 'completion' takes no examples. Leave it out."),
        ({"batch_size": "many"}, "`--batch_size many` must be a number above 0, or auto."),
        ({"dtype": "fp8"}, "`--dtype fp8` is not allowed. Allowed: auto, float32, bfloat16, float16."),
        ({"apply_chat_template": "true"}, "The data of 'completion' are plain text, which takes no chat template."),
        ({"apply_chat_template": "false", "data": "completion=TMP/chat.jsonl"}, "are messages, which need the chat template."),
        ({"model": "TMP/untold", "data": "completion=TMP/chat.jsonl"}, "are messages, but the tokenizer has no chat template."),
        (
            {"output": "TMP/foreign"},
            "`--output TMP/foreign` holds a results.json of something else. Write another folder, or add",
        ),
        (
            {"output": "TMP/good.jsonl/out"},
            "`--output TMP/good.jsonl/out` can't be written: Not a directory. Write another folder.",
        ),
    ],
    ids=str,
)
def test_mistake_ends_in_one_sentence(changes, message, models, tmp_path, capsys):
    files(tmp_path, models)
    given = {
        "model": str(models / "plain"),
        "tasks": "completion",
        "data": "completion=TMP/good.jsonl",
        "output": "TMP/out",
        **changes,
    }
    argv = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        argv += [] if value is None else [f"--{key}", *(part.replace("TMP", str(tmp_path)) for part in values)]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *argv])
    assert caught.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message.replace("TMP", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()


def test_without_the_harness(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(models / "plain"), "--tasks", "gsm8k", "--output", str(tmp_path / "out")])
    assert "Run `pip install '.[evaluation]'`." in capsys.readouterr().err


def test_other_results_are_refused(models, speller, tmp_path, capsys):
    data = write_rows(tmp_path / "test.jsonl", GOOD)
    model = tmp_path / "model"
    make_llama(speller, seed=1).save_pretrained(model)
    speller.save_pretrained(model)
    argv = ["evaluate", "--model", str(model), "--tasks", "completion", "--data", f"completion={data}"]
    argv += ["--output", str(tmp_path / "out")]

    def refused(*more):
        with pytest.raises(SystemExit):
            main([*argv, *more])
        return capsys.readouterr().err

    main(argv)
    assert "holds results of completion with other options (`limit`: None, now 1.0)" in refused("--limit", "1")
    write_rows(tmp_path / "test.jsonl", [*GOOD, *GOOD])
    assert "with other options (`files`: " in refused()
    write_rows(tmp_path / "test.jsonl", GOOD)
    make_llama(speller, seed=2).save_pretrained(model)
    assert f"holds results of another model that was at {model}. Write another folder, or add `--overwrite`." in refused()
    main([*argv, "--overwrite", "--limit", "1"])
    (entry,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    assert entry["scores"][0]["items"] == 1


NEW = 12  # tokens of an answer
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@torch.no_grad()
def sampled(model, tokenizer, prompt, count, temperature):
    """As `greedy`, each token drawn from the whole distribution; `prompt` is a text in its chat template."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begin = len(ids)
    while len(ids) < begin + count:
        p = (model(torch.tensor([ids])).logits[0, -1].float() / temperature).softmax(-1)
        ids.append(int(torch.multinomial(p, 1)))
        if ids[-1] in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=True)


def solvable(said):
    """A digit that `said` would be the right answer to, or another one."""
    return next((str(digit) for digit in range(10) if grade_math({"gold": str(digit)}, [said])["accuracy"]), "77")


def math_loop(models, questions, samples, temperature):
    """Prompts and answers by plain transformers, in the harness's order: the longest prompt first, each `samples` times."""
    model, tokenizer = load(models, "plain")
    turns = [[{"role": "user", "content": question.strip() + SUFFIX}] for question in questions]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    if not temperature:
        return texts, [[greedy(model, tokenizer, turn, NEW)] for turn in turns]
    torch.manual_seed(1234)
    said = {}
    for text in sorted(texts, key=lambda text: (-len(tokenizer(text, add_special_tokens=False)["input_ids"]), text)):
        said[text] = [sampled(model, tokenizer, text, NEW, temperature) for _ in range(samples)]
    return texts, [said[text] for text in texts]


@pytest.mark.parametrize(
    ("task", "samples", "temperature"), [("gsm8k", 1, None), ("gsm8k", 4, None), ("math500", 1, None), ("math500", 3, 0.7)]
)
def test_math_is_the_plain_loop(task, samples, temperature, models, tmp_path, capsys):
    rng = random.Random(7)
    questions = [sentence(rng, 5, 30) for _ in range(12)]
    used = temperature or (1.0 if samples > 1 else 0)
    texts, said = math_loop(models, questions, samples, used)
    gold = [solvable(answers[0]) for answers in said]
    column, form = ("question", "so it is\n#### {}") if task == "gsm8k" else ("problem", "{}")
    rows = [{column: q, "answer": form.format(g)} for q, g in zip(questions, gold, strict=True)]
    path = write_rows(tmp_path / "test.jsonl", rows)
    options = {"samples": samples, "temperature": temperature, "max_new_tokens": NEW, "batch_size": "1"}
    (entry,) = run(models, tmp_path, "plain", tasks=[task], data=[f"{task}={path}"], **options)["evaluations"]
    found, *others = entry["scores"]
    assert [each["metric"] for each in others] == names_of(["accuracy"], EvaluateArguments(samples=samples).ks, samples)
    items = [json.loads(line) for line in (tmp_path / "out" / found["samples"]).read_text().splitlines()]
    means = []
    for item, text, answers, right in zip(items, texts, said, gold, strict=True):
        graded = [grade_math({"gold": right}, [answer])["accuracy"] for answer in answers]
        means.append(np.mean(graded))
        assert (item["prompt"], item["gold"]) == (text, right)
        assert item["answer"] == (answers if samples > 1 else answers[0])
        assert item["metrics"]["accuracy"] == pytest.approx(means[-1])
        if samples > 1:
            assert item["metrics"][f"accuracy,pass@{samples}"] == float(any(graded))
            assert item["metrics"]["distinct_answers"] == diversity(answers)["distinct_answers"]
        assert item.get("graded", {"accuracy": graded}) == {"accuracy": graded}
    if samples > 1:
        assert 0 < np.mean(means)
        assert len({answer for answers in said for answer in answers}) > 12  # not one answer again and again
        assert f"accuracy, Avg@{samples}" in capsys.readouterr().out
    assert found["value"] == pytest.approx(np.mean(means))
    assert found["stderr"] == pytest.approx(np.std(means, ddof=1) / 12**0.5)  # items are the clusters
    assert (found["items"], found["answers"]) == (12, samples)


@pytest.mark.parametrize(
    ("task", "row", "gold"),
    [
        ("gsm8k", {"question": "a", "answer": "b\n#### 1,234"}, "1,234"),
        ("math500", {"problem": "a", "answer": "\\frac{1}{2}", "solution": "\\boxed{3}"}, "\\frac{1}{2}"),
        ("minerva_math", {"problem": "a", "solution": "so \\boxed{4.5e33} cm"}, "4.5e33"),
        ("olympiadbench", {"question": "a", "solution": ["b"], "final_answer": ["$69$,$84$"], "error": None}, "$69$,$84$"),
        ("aime24", {"Problem": "a", "Answer": 25, "Solution": "b"}, "25"),
        ("amc23", {"question": "a", "problem": "a", "answer": 27.0}, "27"),
        ("figfont", {"question": "a", "answer": "WORD"}, "WORD"),
        ("medical", {"prompt": [{"role": "user", "content": "a"}], "completion": [], "answer": "C"}, "C"),
        ("medical", {"question": "a", "options": {"A": "b", "B": "c"}, "answer_idx": "B", "source": "d"}, "B"),
    ],
)
def test_rows_of_each_task(task, row, gold, models, tmp_path):
    path = write_rows(tmp_path / "test.jsonl", [row, row])
    (entry,) = run(models, tmp_path, "silent", tasks=[task], data=[f"{task}={path}"])["evaluations"]
    items = [json.loads(line) for line in (tmp_path / "out" / entry["scores"][0]["samples"]).read_text().splitlines()]
    assert [(item["gold"], item["answer"]) for item in items] == [(gold, "")] * 2
    for each in entry["scores"]:
        assert (each["value"], each["stderr"], each["empty"], each["items"]) == (0, 0, 2, 2)
    room = 256 - len(load(models, "silent")[1](items[0]["prompt"], add_special_tokens=False)["input_ids"])
    assert entry["generation"][task]["max_gen_toks"] == (5 if task == "figfont" else room)
    assert items[0]["prompt"].count("<user>a") == 1  # the chat template once
    assert items[0]["prompt"].endswith("answer:")
    assert ("Figlet Font ASCII art" in items[0]["prompt"]) == (task == "figfont")


def test_prompts_of_the_data_are_used_as_they_are(models, tmp_path):
    _, tokenizer = load(models, "plain")
    chat = prompts("messages")
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "\\boxed{5}"}]} for prompt in chat]
    made = {
        "chat": rows,
        "plain": [{"prompt": text, "answer": "5"} for text in prompts("plain")],
        "raw": [{"question": "a b", "answer": "5"}],
    }
    shown = {}
    for name, part in made.items():
        path = write_rows(tmp_path / f"{name}.jsonl", part)
        for chat_template in (None, False) if name == "raw" else (None,):
            out = f"{name}{chat_template}"
            options = {"max_new_tokens": 2, "apply_chat_template": chat_template}
            (entry,) = run(models, tmp_path, "plain", out=out, tasks=["math500"], data=[f"math500={path}"], **options)[
                "evaluations"
            ]
            lines = (tmp_path / out / entry["scores"][0]["samples"]).read_text().splitlines()
            shown[out] = [json.loads(line)["prompt"] for line in lines]
            assert entry["chat_template"] == (name != "plain" and chat_template is None)
    rendered = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in chat]
    assert shown["chatNone"] == rendered
    assert shown["plainNone"] == prompts("plain")
    assert shown["rawNone"] == [f"<user>a b{SUFFIX}<end>answer:"]
    assert shown["rawFalse"] == [f"User: a b{SUFFIX}\n\nAssistant:"]


def retemplate(models, folder, template):
    """The model `plain` with another chat template."""
    model, tokenizer = load(models, "plain")
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


TEMPLATES = {
    "none": None,
    "system": "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<end>{% endfor %}",
    "dated": "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("task", ["math500", "figfont"])
def test_questions_are_asked_as_prepared_data_ask_them(task, template, models, tmp_path):
    tokenizer = retemplate(models, tmp_path / "model", TEMPLATES[template])
    question, prepare = "\n a b \n c  \n", {"math500": math_row, "figfont": lambda q, a: Example(q, a, FIGLET)}[task]
    written = Format(str(tmp_path / "model")).write(prepare(question, "5"))
    prepared = {**written, "answer": "5"}
    shown = []
    for name, row in (("raw", {"question": question, "answer": "5"}), ("prepared", prepared)):
        data = [f"{task}={write_rows(tmp_path / f'{name}.jsonl', [row])}"]
        (entry,) = run(tmp_path, tmp_path, "model", out=name, tasks=[task], data=data, max_new_tokens=1)["evaluations"]
        shown.append(json.loads((tmp_path / name / entry["scores"][0]["samples"]).read_text())["prompt"])
    kwargs = written.get("chat_template_kwargs", {})
    trained = (
        written["prompt"] if template == "none" else tokenizer.apply_chat_template(written["prompt"], tokenize=False, **kwargs)
    )
    assert shown == [trained, trained]


def scripted(folder, text, template=None, after_a=None, tags=()):
    """A model that says `text`, whatever it is asked, and the tokenizer, of whole words; its end token isn't <turn>."""
    words = dict.fromkeys(
        ["<pad>", "<eos>", "<turn>", "<unk>", "<im_start>", "Assistant:", *tags, *re.findall(r"<\w+>|\w+|\W", text), *"abU"]
    )
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"Assistant:|\w+|\W"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<im_start>"]})
    tokenizer.add_tokens(list(tags))
    tokenizer.chat_template = template
    said = tokenizer(text)["input_ids"]
    assert len(set(said)) == len(said)
    model = make_llama(tokenizer, hidden_size=len(words) + len(words) % 2, num_attention_heads=1, num_key_value_heads=1)
    for name, weight in model.named_parameters():  # the last token alone says what comes next
        weight.data.fill_(1.0 if "norm" in name else 0.0)
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    head = model.lm_head.weight.data
    head[said[0], :] = 0.5
    head[:, said] = 0
    for one, other in itertools.pairwise(said):
        head[other, one] = 1
    if after_a:
        head[tokenizer(after_a)["input_ids"][0], tokenizer("a")["input_ids"][0]] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_bases_stop_where_the_turn_ends(tmp_path):
    ask = "{% if add_generation_prompt %}<im_start>{{ messages[-1].content[0] }}{% endif %}"
    template = "{% for m in messages %}<im_start>{{ m.content }}<turn>{% endfor %}" + ask
    for name in ("base", "trained"):
        scripted(tmp_path / name, "x 5<turn>7", template, after_a="5")  # it begins with 5 where the prompt ends in "a"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    tokenizer.eos_token = "<turn>"
    tokenizer.save_pretrained(tmp_path / "trained")
    rows = [{"question": question, "answer": "5"} for question in "ab"]
    data = [f"math500={write_rows(tmp_path / 'test.jsonl', rows)}"]
    found = run(tmp_path, tmp_path, "base", "trained", tasks=["math500"], data=data, max_new_tokens=8)["evaluations"]
    for entry in found:
        lines = (tmp_path / "out" / entry["scores"][0]["samples"]).read_text().splitlines()
        assert [json.loads(line)["answer"] for line in lines] == ["5", "x 5"]


def test_text_stops_before_the_next_turn_and_loses_its_blank(tmp_path):
    scripted(tmp_path / "model", " WORD\nUser:ab")
    data = [f"figfont={write_rows(tmp_path / 'test.jsonl', [{'question': 'a', 'answer': 'WORD'}])}"]
    (entry,) = run(tmp_path, tmp_path, "model", tasks=["figfont"], data=data, max_new_tokens=8)["evaluations"]
    assert json.loads((tmp_path / "out" / entry["scores"][0]["samples"]).read_text())["answer"] == " WORD"
    assert [score["value"] for score in entry["scores"]] == [1, 1, 1]


def test_folders_of_items_are_one_for_each_name():
    names = ["a/b", "a__b", "a_/b", "a/_b", "a/../b", "..", "/a/b", "__a/b", "a___b"]
    labels = {Checkpoint(name, name, None).label for name in names}
    assert len(labels) == len(names)
    assert "a__b" in labels
    assert not any("/" in label or label in (".", "..") for label in labels)


def test_limit_leaves_long_prompts_out(models, tmp_path):
    data = [f"completion={write_rows(tmp_path / 'test.jsonl', [GOOD[0], {'prompt': 'ab' * 2000, 'completion': 'c'}])}"]
    with pytest.raises(ValueError, match="take it out of the data"):
        run(models, tmp_path, "plain", data=data)
    (entry,) = run(models, tmp_path, "plain", data=data, limit=0.5)["evaluations"]
    assert entry["scores"][0]["items"] == 1


def test_overwriting_keeps_the_other_tasks(models, tmp_path, capital):
    data = [f"completion={write_rows(tmp_path / 'test.jsonl', GOOD)}"]
    run(models, tmp_path, "plain", tasks=["completion", capital], data=data)
    found = run(models, tmp_path, "plain", data=data, overwrite=True, limit=1)["evaluations"]
    assert [(entry["task"], entry["scores"][0]["items"]) for entry in found] == [(capital, 12), ("completion", 1)]


def test_the_same_file_under_another_path(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "test.jsonl", GOOD)
    whole = run(models, tmp_path, "plain", data=["completion=test.jsonl"])
    assert run(models, tmp_path, "plain", data=[f"completion={tmp_path / 'test.jsonl'}"]) == whole


def test_lost_items_are_told(models, tmp_path):
    data = [f"completion={write_rows(tmp_path / 'test.jsonl', GOOD)}"]
    (entry,) = run(models, tmp_path, "plain", data=data)["evaluations"]
    lost = entry["scores"][0]["samples"]
    (tmp_path / "out" / lost).unlink()
    with pytest.raises(ValueError, match=rf"holds results of completion whose items, {re.escape(lost)}, are gone"):
        run(models, tmp_path, "plain", data=data)
    run(models, tmp_path, "plain", data=data, overwrite=True)
    assert (tmp_path / "out" / lost).is_file()


@pytest.fixture
def exam(models, tmp_path):
    """Rows of three sources, of which a third are answered rightly by the model `plain`: its answer is an option."""
    model, tokenizer = load(models, "plain")
    rng, sources = random.Random(9), {"one": 15, "two": 12, "three": 3}
    made = {source: [] for source in sources}
    for source, count in sources.items():
        for i in range(count):
            question = sentence(rng, 5, 20)
            listed = f"{question}\nA. zzz\nB. yyy"
            said = greedy(model, tokenizer, [{"role": "user", "content": listed + SUFFIX}], 6)
            made[source].append(
                {"question": question, "options": {"A": "zzz", "B": "yyy"}, "said": said, "answer_idx": "AB"[i % 2]}
            )
    path = tmp_path / "exam.json"
    path.write_text(json.dumps(made, indent=1))
    return path, made


def test_medical_scores_by_source(models, tmp_path, exam, monkeypatch):
    path, made = exam
    monkeypatch.setattr(
        "bl_trainer.evaluation.grading.letters.letter", lambda text, choices: "AB"[len(text.split()) % 2] if choices else text
    )
    options = {"tasks": ["medical"], "data": [f"medical={path}"], "max_new_tokens": 6}
    found = run(models, tmp_path, "adapter", "plain", **options)
    values = {}
    for entry in found["evaluations"]:
        scores = {score["metric"]: score for score in entry["scores"]}
        names = ["accuracy", "accuracy:one", "accuracy:three", "accuracy:two", "accuracy:macro"]
        assert list(scores) == names
        lines = (tmp_path / "out" / scores["accuracy"]["samples"]).read_text().splitlines()
        graded = np.array([json.loads(line)["metrics"]["accuracy"] for line in lines])
        parts = values[entry["checkpoint"]] = dict(zip(made, np.split(graded, [15, 27]), strict=True))
        for source, part in parts.items():
            score = scores[f"accuracy:{source}"]
            assert (score["value"], score["items"]) == (pytest.approx(part.mean()), len(part))
            assert score["stderr"] == pytest.approx(part.std(ddof=1) / len(part) ** 0.5)
        macro = scores["accuracy:macro"]
        assert macro["value"] == pytest.approx(np.mean([part.mean() for part in parts.values()]))
        squares = [part.var(ddof=1) / len(part) for part in parts.values()]
        assert macro["stderr"] == pytest.approx(np.sqrt(sum(squares)) / 3)
        assert macro["items"] == scores["accuracy"]["items"] == 30
    old, new = values.values()
    differences = {d["metric"]: d for d in found["differences"]}
    assert list(differences) == ["accuracy", "accuracy:one", "accuracy:three", "accuracy:two", "accuracy:macro"]
    parts = [new[source] - old[source] for source in made]
    assert np.any(np.concatenate(parts))
    macro = differences["accuracy:macro"]
    assert macro["difference"] == pytest.approx(np.mean([part.mean() for part in parts]))
    assert macro["stderr"] == pytest.approx(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 3)
    assert macro["interval"] is None  # one group has 3 items


def test_files_of_all_kinds_hold_the_same_items(models, tmp_path):
    rows = [{"question": q, "options": dict.fromkeys("ABCDEFG"[: 2 + i], "x"), "answer_idx": "A"} for i, q in enumerate("abc")]
    write_rows(tmp_path / "lines.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "mapping.json").write_text(json.dumps({"one": rows[:1], "two": rows[1:]}, indent=2))
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    found = {}
    for name in ("lines.jsonl", "array.json", "mapping.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("lines.jsonl", "array.json", "mapping.json", "table.parquet", "lines.jsonl.gz", "mapping.json.gz"):
        data = [f"medical={tmp_path / name}"]
        (entry,) = run(models, tmp_path, "silent", out=f"of-{name}", tasks=["medical"], data=data, max_new_tokens=1)[
            "evaluations"
        ]
        lines = (tmp_path / f"of-{name}" / entry["scores"][0]["samples"]).read_text().splitlines()
        found[name] = [(item["prompt"], item["gold"]) for item in map(json.loads, lines)]
    assert len({str(items) for items in found.values()}) == 1
    assert "C. x" not in found["table.parquet"][0][0]


@pytest.mark.parametrize(("task", "package"), [("math500", "math_verify"), ("figfont", "rapidfuzz.distance")])
def test_without_a_grader(task, package, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    data = write_rows(tmp_path / "test.jsonl", [{"question": "a", "answer": "1"}])
    argv = ["--model", str(models / "plain"), "--tasks", task, "--data", f"{task}={data}", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["evaluate", *argv])
    said = capsys.readouterr().err
    assert f"grading it needs {package.split('.')[0].replace('_', '-')} (" in said
    assert "Run `pip install '.[evaluation]'`." in said


def test_stopped_by_hand(models, tmp_path, monkeypatch, capsys):
    def breaks(lm, loaded, tasks, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", breaks)
    data = write_rows(tmp_path / "test.jsonl", GOOD)
    argv = ["--model", str(models / "plain"), "--tasks", "completion", "--data", f"completion={data}"]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *argv, "--output", str(tmp_path / "out")])
    assert caught.value.code == 130
    assert f"Stopped. The same command resumes after the tasks that {tmp_path / 'out'} holds." in capsys.readouterr().err


def test_consent_to_code_is_passed_on(models, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": 1}])
    (tmp_path / "unsafe.yaml").write_text(TASK.replace("FILE", data) + "unsafe_code: true\n")
    run(models, tmp_path, "plain", tasks=[str(tmp_path / "unsafe.yaml")], confirm_run_unsafe_code=True)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


def test_other_sampling_is_refused(models, tmp_path):
    options = {"tasks": ["completion"], "data": [f"completion={write_rows(tmp_path / 'test.jsonl', GOOD)}"]}
    run(models, tmp_path, "plain", **options)
    with pytest.raises(ValueError, match=r"results of completion with other options \(`samples`: 1, now 4\)"):
        run(models, tmp_path, "plain", samples=4, **options)
    path = tmp_path / "out" / "results.json"
    held = json.loads(path.read_text())
    for key in ("samples", "temperature", "backend"):  # as results of earlier versions are
        del held["evaluations"][0]["options"][key]
    path.write_text(json.dumps(held))
    run(models, tmp_path, "plain", **options)
    with pytest.raises(ValueError, match=r"`temperature`: None, now 0\.5"):
        run(models, tmp_path, "plain", temperature=0.5, **options)


def test_vllm_is_given_the_checkpoint(models, tmp_path, monkeypatch):
    given = []
    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = lambda *args, **kwargs: given.append((args, kwargs))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("bl_trainer.evaluation.options.find_spec", lambda name: name in ("lm_eval", "vllm"))
    options = EvaluateArguments(
        model=[str(models / "plain"), str(models / "adapter")],
        tasks=["gsm8k"],
        output=str(tmp_path / "out"),
        backend="vllm",
        seed=3,
    )
    options.check()
    for checkpoint in options.checkpoints():
        harness.load_model(checkpoint, options)
    shared = {"dtype": "auto", "seed": 3, "batch_size": 8}
    lora = {"lora_local_path": str(models / "adapter"), "max_lora_rank": 8}
    assert given == [((str(models / "plain"),), shared), ((str(models / "plain"),), {**shared, **lora})]


def test_group_of_languages_is_the_harnesss():
    index = MANAGER(include_path=harness.OWN).task_index
    children = index["mmlu_prox"].cfg["task"]
    assert len(children) == 7
    assert all(index[child].cfg["group"] == child for child in children)


def test_letters_have_tokens(speller):
    assert speller.decode(speller(LETTERS)["input_ids"], skip_special_tokens=True) == LETTERS
