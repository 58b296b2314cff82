"""The continuum in miniature: its data, its evaluation against transformers', and that its arms repeat."""

import copy
import json
import random
import re
import string
from types import SimpleNamespace

import pytest
import torch

import continuum
import miniature
from bl_trainer import BLConfig, BLTrainer
from bl_trainer.sweep.plan import Plan
from miniature import CELLS, CORRUPTIONS, LENGTH, Miniature, cell_folder, encode, example, generate, read_rows, score

RIGHT = {
    "copy": str,
    "next": lambda text: text.translate(str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")),
    "strong": lambda text: "".join(sorted(text)),
    "mid-rule": lambda text: "".join(reversed(text)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A miniature of few examples, whose model has hardly been pretrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "POOL", 400)
        patch.setattr(miniature, "HELD_OUT", 40)
        short = {"steps": 60, "most_further_steps": 10, "batch": 32}
        patch.setattr(miniature, "PRETRAINING", {**miniature.PRETRAINING, **short})
        made = [tmp_path_factory.mktemp(name) for name in ("first", "second", "other")]
        for path, seed in zip(made, (0, 0, 1), strict=True):
            miniature.prepare(path, seed)
    return made


@pytest.fixture(scope="module")
def mini(folder):
    return Miniature(folder[0])


def contents(folder):
    """Return the bytes of all files that don't hold the folder's own name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "recipe.yaml")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_seed_makes_the_same_data_and_model(folder):
    first, second, other = map(contents, folder)
    assert first == second
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith((".jsonl", ".safetensors", "pretraining_seed"))}


def test_a_finished_miniature_is_kept(folder):
    before = contents(folder[0])
    miniature.prepare(folder[0], 0)
    assert contents(folder[0]) == before
    with pytest.raises(SystemExit, match=r"made with the pretraining seed 0, not 5\. Give another --folder"):
        miniature.prepare(folder[0], 5)


@pytest.mark.parametrize("task", miniature.TASKS)
def test_answers(task):
    for seed in range(50):
        row = example(task, random.Random(seed))
        name, text, end = row["prompt"][0], row["prompt"][1:-1], row["prompt"][-1]
        assert (name, end, len(text)) == (miniature.TASKS[task], ":", LENGTH)
        if task in RIGHT:
            assert row["completion"] == RIGHT[task](text)
    if task not in RIGHT:
        answers = [miniature.ANSWERS[task](letter) for letter in string.ascii_lowercase]
        assert sorted(answers) == list(string.ascii_lowercase)


def test_pretraining_shows_one_half_of_the_cipher_and_nothing_of_the_unseen_one(monkeypatch):
    seen = []
    monkeypatch.setattr(miniature, "PRETRAINING", {**miniature.PRETRAINING, "steps": 50})
    monkeypatch.setattr(miniature, "train", lambda model, dataset, *args, **keys: seen.extend(dataset["input_ids"]))
    miniature.pretrain(0)
    texts = ["".join(miniature.make_tokenizer().convert_ids_to_tokens(ids)) for ids in seen[::4]]
    assert {text[0] for text in texts} == set("CNSRF")
    assert {letter for text in texts if text[0] == "F" for letter in text[1 : LENGTH + 1]} == set(miniature.SEEN)


@pytest.mark.parametrize("cell", CELLS)
def test_only_letters_of_training_targets_are_corrupted(folder, cell):
    clean, noisy = (read_rows(cell_folder(folder[0], cell, share) / "train.jsonl") for share in CORRUPTIONS)
    assert [row["prompt"] for row in clean] == [row["prompt"] for row in noisy]
    assert all(row["completion"] == miniature.ANSWERS[cell](row["prompt"][1:-1]) for row in clean)
    pairs = [pair for a, b in zip(clean, noisy, strict=True) for pair in zip(a["completion"], b["completion"], strict=True)]
    wrong = [b for a, b in pairs if a != b]
    assert abs(len(wrong) / len(pairs) - 0.3) < 4 * (0.3 * 0.7 / len(pairs)) ** 0.5
    assert set(wrong) == set(string.ascii_lowercase)
    tests = [read_rows(cell_folder(folder[0], cell, share) / "test.jsonl") for share in CORRUPTIONS]
    assert tests[0] == tests[1]
    assert all(row["completion"] == miniature.ANSWERS[cell](row["prompt"][1:-1]) for row in tests[0])
    assert not {row["prompt"] for row in tests[0]} & {row["prompt"] for row in clean}


def test_tokens_are_those_that_trl_makes_of_the_recipe(folder, mini, tmp_path):
    rows = read_rows(cell_folder(folder[0], "strong", 0.3) / "train.jsonl")
    args = BLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    data = miniature.Dataset.from_list(rows)
    trainer = BLTrainer(copy.deepcopy(mini.base), args, train_dataset=data, processing_class=mini.tokenizer)
    expected, mine = trainer.train_dataset, mini.data("strong", 0.3)
    assert mine["input_ids"][:] == expected["input_ids"][:]
    assert mine["labels"][:] == expected["labels"][:]
    assert all(ids[-1] == mini.tokenizer.eos_token_id for ids in mine["input_ids"])


def test_text_survives_the_tokenizer(mini):
    assert mini.tokenizer.decode(mini.tokenizer("Sabc:cab")["input_ids"]) == "Sabc:cab"


def test_generates_as_transformers_does(folder, mini):
    prompts, _ = encode(read_rows(cell_folder(folder[0], "strong", 0.0) / "test.jsonl"), mini.tokenizer)
    ours = generate(mini.base, prompts, 16)
    theirs = mini.base.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False)
    theirs = torch.nn.functional.pad(theirs[:, prompts.shape[1] :], (0, 16), value=mini.tokenizer.pad_token_id)[:, :16]
    assert torch.equal(ours, theirs)
    assert (ours == mini.tokenizer.eos_token_id).any()


def test_samples_follow_the_probabilities(mini):
    prompts, _ = encode([{"prompt": "Sabcdefgh:", "completion": ""}] * 4000, mini.tokenizer)
    found = generate(mini.base, prompts, 1, torch.Generator().manual_seed(0)).flatten().bincount(minlength=40)[:40] / 4000
    with torch.no_grad():
        expected = mini.base(prompts[:1]).logits[0, -1].softmax(-1)
    assert (found[: len(expected)] - expected).abs().max() < 0.04


def test_evaluation_agrees_with_itself(mini):
    """Greedy text is right where each target token is the most probable; samples are right as often as nll says."""
    for cell in CELLS:
        prompts, targets = encode(read_rows(cell_folder(mini.folder, cell, 0.0) / "test.jsonl"), mini.tokenizer)
        found, (logp, is_top1) = mini.evaluate(mini.base, cell), score(mini.base, prompts, targets)
        assert found["greedy"] == [int(row.all()) for row in is_top1]
        assert found["top1"] == is_top1.sum(1).tolist()
        assert found["nll"] == pytest.approx((-logp).sum(1).tolist(), rel=1e-4)
        assert found["prob"] == pytest.approx(logp.exp().sum(1).tolist(), rel=1e-4)


def test_exact_match(mini, monkeypatch):
    """A text counts if all of it is right, and the end token comes at its end."""
    end, pad = mini.tokenizer.eos_token_id, mini.tokenizer.pad_token_id
    _, targets = encode(read_rows(cell_folder(mini.folder, "weak", 0.0) / "test.jsonl"), mini.tokenizer)
    answers = targets.clone()
    answers[0, 0] = 2 + (answers[0, 0] - 1) % 26
    answers[1, -1] = 5
    answers[2, -2:] = torch.tensor([end, pad])
    monkeypatch.setattr(miniature, "generate", lambda *args: answers)
    assert mini.evaluate(mini.base, "weak")["greedy"] == [0, 0, 0] + [1] * (len(targets) - 3)


def test_arms_repeat_and_leave_the_model_as_it_was(mini):
    before = {name: value.clone() for name, value in mini.base.state_dict().items()}
    keys = {"objective": {"name": "power", "alpha": 0.5}, "threshold": 0.01, "learning_rate": 3e-3, "max_steps": 5}
    first, again, other = (mini.arm("strong", 0.3, **keys, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["nll"] != other["nll"]
    assert json.loads(json.dumps(first)) == first
    assert all(torch.equal(value, before[name]) for name, value in mini.base.state_dict().items())


def test_diagnosis_measures_the_cell(mini, monkeypatch):
    report = mini.diagnose("mid-fact", 0.3)
    rows = read_rows(cell_folder(mini.folder, "mid-fact", 0.3) / "train.jsonl")
    logp, _ = score(mini.base, *encode(rows, mini.tokenizer))
    assert report["total"]["tokens"] == logp.numel()
    assert report["total"]["prob"] == pytest.approx(logp.exp().mean().item(), rel=1e-5)


def test_a_cell_is_swept_and_goes_on(folder, mini, monkeypatch, tmp_path):
    """The table's figures are those of the arms' files, and arms that are done are not run again."""
    monkeypatch.setattr(continuum, "LEARNING_RATES", [1e-3, 3e-3])
    monkeypatch.setattr(continuum, "ARMS", [continuum.NLL, continuum.NEG_P])
    home, ran = cell_folder(folder[0], "weak", 0.3), []

    class Here:
        """An executor that runs in this process."""

        def submit(self, function, method, *args, **kwargs):
            ran.append(kwargs)
            found = getattr(mini, method)(*args, **kwargs, max_steps=3)
            return SimpleNamespace(result=lambda: found)

    for _ in range(2):
        plan = continuum.plan_of(folder[0], "weak", 0.3, 2, False)
        boards = continuum.boards_of(plan, continuum.sweep(plan, home / "sweep", "weak", 0.3, Here(), 1))
    assert len(ran) == plan.count == 8
    files = [json.loads(path.read_text()) for path in sorted(home.glob("sweep/arms/*/result.json"))]
    assert [each["setting"] for each in files] == ran
    for ruler in ("greedy", "sampled"):
        row = continuum.row_of(boards[ruler], continuum.NLL)
        mine = [each for each in files if each["setting"]["objective"] == "nll"]
        by_rate = {
            rate: sum(sum(each["items"][ruler]) for each in mine if each["setting"]["learning_rate"] == rate) / 80
            for rate in (1e-3, 3e-3)
        }
        assert row.values[ruler][0] == pytest.approx(max(by_rate.values()))
    base = mini.evaluate(None, "weak")
    cell = {"cell": "weak", "corruption": 0.3, "prob": 0.15, "learnable": 0.5, "boards": boards}
    cell["base"] = continuum.means(base)
    head, _, line = continuum.table([cell], "greedy").splitlines()
    assert head.split(" | ")[3:] == ["foretold", "base", "nll", "neg_p", "neg_p - nll |"]
    assert line.startswith("| weak | 30% | 0.150 | 0.500 | 0.000 | 0.000")
    assert files[0]["rulers"]["nll"] == pytest.approx(sum(files[0]["items"]["nll"]) / (40 * 9))


def test_neg_p_against_nll():
    settings = [{"objective": o, "learning_rate": 1e-3, "seed": s} for o in ("nll", "neg_p") for s in (0, 1)]
    values = [
        [1] * 3 + [0] * 37,
        [1] * 4 + [0] * 36,
        [1] * 30 + [0] * 10,
        [1] * 32 + [0] * 8,
    ]  # differences that differ
    rulers = [{"greedy": sum(each) / 40} for each in values]
    arms = {
        i: continuum.Scored(i, s, r, items={"greedy": v})
        for i, (s, r, v) in enumerate(zip(settings, rulers, values, strict=True))
    }
    plan = Plan({}, [continuum.NLL, continuum.NEG_P], {"learning_rate": [1e-3]}, [0, 1], rank_by="greedy")
    mean, said = continuum.nll_against_neg_p(continuum.board_by("greedy", plan, arms))
    assert mean == pytest.approx(27.5 / 40)
    assert re.fullmatch(r"\+0\.688 \(\+0\.5\d+ to \+0\.8\d+\): neg_p", said)
