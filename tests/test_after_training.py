"""After training: the last lines are commands that work, the card is true, and the merged model answers alike."""

import importlib.util
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from bl_trainer import BLTrainer
from bl_trainer.cli import main
from bl_trainer.recipe.keys import TRACKERS
from bl_trainer.recipe.parser import DATACLASSES, Parser
from bl_trainer.training.card import before_and_after, is_ours, snippet, write_card
from bl_trainer.training.checkpoints import RECORD_FILE
from bl_trainer.training.merge import MergeArguments
from bl_trainer.training.metrics_log import group
from bl_trainer.training.next_steps import CHECKPOINTS, next_steps
from conftest import make_mixtral, write_recipe
from ways import build, train

DOCS = Path(__file__).parents[1] / "docs" / "guide"
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 0.02}


def answer_of(card, capsys):
    """Run the Python lines of a card and return what they print."""
    (code,) = re.findall(r"```python\n(.*?)```", Path(card).read_text(encoding="utf-8"), re.DOTALL)
    assert all(len(line) < 130 for line in code.splitlines())
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


def last_lines(said):
    """Return what a run's last lines say to do, by its name."""
    return dict(re.findall(r"^  (\w+): +(.*)$", said[said.index("Model saved to") :], re.M))


def load_quickstart(data, model):
    """Return scripts/quickstart.py as a module, with a stand-in for its model and data."""
    spec = importlib.util.spec_from_file_location("quickstart", DOCS.parents[1] / "scripts/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER, module.MODEL = data.parent, model
    return module


def test_the_last_lines_of_a_run_work(checkpoint, tmp_path, monkeypatch, capsys, recwarn):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": [{"role": "user", "content": "hello"}], "completion": [{"role": "assistant", "content": letters}]}
        for letters in ("abc", "abd")
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    recipe = write_recipe(tmp_path, checkpoint, "data", output_dir="out", max_steps=2, **LORA, **evaluates)
    argv = ["--config", recipe.name, "--objective", '{"name": "power", "alpha": 0.5}', "--threshold", "0.001"]
    main(["train", *argv])
    steps = last_lines(capsys.readouterr().out)
    assert not [str(each.message) for each in recwarn if "checkpointing` is deprecated" in str(each.message)]
    assert list(steps) == ["Generate", "Evaluate", "Compare", "Merge", "Push"]
    quickstart = load_quickstart(tmp_path / "data", checkpoint)
    with pytest.raises(SystemExit, match=r"error: nothere holds no checkpoint. Name a run's output_dir with `--run`"):
        quickstart.compare(Path("nothere"))
    quickstart.compare(Path("out"))
    said = capsys.readouterr().out
    assert "2 held-out records" in said
    assert said.count(steps["Merge"]) == 1, "the quickstart ends with the same lines"
    for name in ("Merge", "Evaluate", "Compare"):
        program, *command = shlex.split(steps[name])
        assert program == "bl-trainer"
        main(command)
    said = capsys.readouterr()
    assert "git" not in said.err
    assert "Difference from" in said.out
    assert (tmp_path / "out-compared/report.html").is_file()
    assert steps["Generate"] == "run the Python lines of out/README.md"
    assert answer_of("out/README.md", capsys) == answer_of("out-merged/README.md", capsys) != "\n"
    *_, name, folder, option, pattern = shlex.split(steps["Push"])
    assert name == f"{checkpoint.name}-power"
    assert (folder, option) == ("out", "--exclude")
    files = ["model.safetensors", "checkpoint-2/optimizer.pt"]
    assert list(filter_repo_objects(files, ignore_patterns=[pattern])) == files[:1]
    assert pattern == CHECKPOINTS

    card = ModelCard.load("out/README.md")
    assert (card.data.model_name, card.data.library_name, card.data.get("licence")) == ("out", "peft", None)
    assert is_ours(Path("out/README.md"))
    assert "None" not in card.text
    first = f'This model is a LoRA adapter on `{checkpoint}`, trained on `data` with the objective `power` ({{"alpha": 0.5}}).'
    assert first in card.text
    evaluated = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    nll = [entry["eval_nll"] for entry in evaluated if "eval_nll" in entry]
    assert f"| `eval_nll` | {nll[0]:.4g} | {nll[-1]:.4g} |" in card.text
    merged = json.loads(Path("out-merged", RECORD_FILE).read_text())
    assert merged["merged"] == {"adapter": "out", "base": str(checkpoint)}
    assert merged["objective"] == {"name": "power", "alpha": 0.5}
    assert (
        f"a fine-tuned version of `{checkpoint}`, an adapter merged into it, trained on"
        in Path("out-merged/README.md").read_text()
    )


def test_the_card_of_a_resumed_run_has_the_metrics_before_training(checkpoint, data_folder, tmp_path):
    """transformers evaluates again where it resumes, for `eval_on_start`."""
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    keys = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.02, **evaluates}
    main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data_folder, **keys))])
    resumes = {"resume_from_checkpoint": str(tmp_path / "out/checkpoint-2"), "output_dir": str(tmp_path / "resumed")}
    main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data_folder, **keys, **resumes))])
    history = json.loads((tmp_path / "resumed/checkpoint-4/trainer_state.json").read_text())["log_history"]
    nll = {
        step: [entry["eval_nll"] for entry in history if "eval_nll" in entry and entry["step"] == step] for step in (0, 2, 4)
    }
    assert [len(found) for found in nll.values()] == [1, 2, 1]
    for folder in ("out", "resumed"):
        assert f"| `eval_nll` | {nll[0][0]:.4g} | {nll[4][0]:.4g} |" in (tmp_path / folder / "README.md").read_text()
    assert f"{nll[0][0]:.4g}" != f"{nll[2][0]:.4g}"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({"model_name_or_path": "Qwen/Qwen2.5-1.5B"}, "Qwen2.5-1.5B-nll"),
        ({"model_name_or_path": "models/my  model/", "objective": {"name": "my_losses:f"}}, "my-model-my_losses-f"),
        ({"model_name_or_path": "a--b..c", "objective": "neg_p"}, "a-b-c-neg_p"),
        ({"model_name_or_path": "x" * 100, "objective": "neg_p"}, "x" * 90 + "-neg_p"),
    ],
)
def test_the_name_to_push_to_is_one_that_the_hub_takes(recipe, name, tmp_path):
    assert shlex.split(next_steps(str(tmp_path), recipe, [])[-1])[3] == name
    validate_repo_id(name)


def test_a_full_fine_tune_has_nothing_to_merge(checkpoint, data_folder, tmp_path, capsys):
    recipe = write_recipe(tmp_path, checkpoint, data_folder, max_steps=1)
    main(["train", "--config", str(recipe)])
    steps = last_lines(capsys.readouterr().out)
    assert "Merge" not in steps
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "out"), "--output", str(tmp_path / "merged")])
    assert f"Use {tmp_path / 'out'} as it is." in capsys.readouterr().err
    assert ModelCard.load(tmp_path / "out/README.md").data.library_name == "transformers"


def test_card_of_names_on_the_hub(tmp_path):
    record = {
        "objective": {"name": "neg_p"}, "threshold": {}, "versions": {}, "is_adapter": False, "base_model": "org/base",
        "recipe": {"datasets": [{"path": "org/a"}, {"path": "org/b"}]}, "metrics": {},
    }  # fmt: skip
    write_card(tmp_path / "README.md", record, "mine", "me/mine", chats=False)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base"
    assert "a fine-tuned version of [org/base](https://huggingface.co/org/base), trained on `org/a, org/b`" in card.text
    assert 'model="me/mine"' in card.text
    assert 'prompt = "What' in card.text
    assert "## Evaluation" not in card.text
    write_card(tmp_path / "README.md", record, "mine", "me/mine", chats=False, data="org/data")
    assert "trained on [org/data](https://huggingface.co/datasets/org/data)" in ModelCard.load(tmp_path / "README.md").text


def test_metrics_before_and_after():
    history = [
        {"step": 0, "eval_nll": 3.0, "eval_loss": 1.0}, {"step": 1, "nll": 2.5}, {"step": 2, "eval_nll": 1.0},
        {"step": 4, "eval_nll": 2.0, "eval_math_target_prob": 0.5},
    ]  # fmt: skip
    assert before_and_after(history) == {"eval_nll": (3.0, 2.0), "eval_math_target_prob": (None, 0.5)}
    assert before_and_after(history, best=2)["eval_nll"] == (3.0, 1.0)
    assert before_and_after([]) == {}
    assert before_and_after(history[:1]) == {}, "a checkpoint between evaluations has no metrics of its own yet"
    assert before_and_after(history[:1], best=0)["eval_nll"] == (3.0, 3.0)


# While it trains


class Tracker(TrainerCallback):
    """A tracker, which names metrics as transformers' own do."""

    def __init__(self):
        self.logged = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged |= integration_utils.rewrite_logs(logs)


def test_trackers_group_our_metrics(tokenizer, text_data, tmp_path):
    tracker = Tracker()
    options = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, objective="anneal", eval_data=text_data, **options)
    trainer.add_callback(tracker)
    trainer.train()
    ours = {key for key in tracker.logged if key.startswith("objective/")}
    names = ("nll", "target_prob", "kept_fraction", "gradient_weight", "alpha")
    assert ours == {"objective/eval_perplexity", *(f"objective/{kind}{name}" for kind in ("", "eval_") for name in names)}
    assert {"train/loss", "eval/loss", "train/entropy", "train/grad_norm"} <= tracker.logged.keys()
    assert {"nll", "eval_nll", "objective_alpha"} <= {key for entry in trainer.state.log_history for key in entry}
    assert group("eval_math_nll") == "objective/eval_math_nll"
    assert integration_utils.rewrite_logs({"nll": 1}) == {"train/nll": 1}, "other trainers' trackers are as before"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"logging_steps": 1}, None),
        ({"logging_steps": 2}, None),
        ({"logging_steps": 1, "threshold": 0.01}, "the threshold drops tokens from it"),
        ({"logging_steps": 1, "objective": "neg_p", "threshold": 0.01}, None),
    ],
    ids=str,
)
def test_loss_is_nll_or_the_log_says_why_not(options, reason, tokenizer, text_data, tmp_path, capsys):
    trainer = train(BLTrainer, tokenizer, text_data, tmp_path, max_steps=2, **options)
    said = re.findall(r"^`loss` is not `nll` here: (.*)\.$", capsys.readouterr().out, re.M)
    assert said == ([reason] if reason else [])
    if options == {"logging_steps": 1}:
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in logged] == pytest.approx([entry["nll"] for entry in logged], rel=1e-5)


def test_experts_add_their_own_loss(tokenizer, text_data, tmp_path, capsys):
    train(BLTrainer, tokenizer, text_data, tmp_path, model=make_mixtral(tokenizer), max_steps=1, logging_steps=1)
    assert "`loss` is not `nll` here: it has the auxiliary loss of the experts." in capsys.readouterr().out


# docs/guide/after_training.md and docs/guide/tracking.md

AFTER, TRACKING = ((DOCS / name).read_text(encoding="utf-8") for name in ("after_training.md", "tracking.md"))


def test_page_shows_the_last_lines_and_the_card_of_the_quickstart(tmp_path, monkeypatch):
    shown = re.search(r"```text\n.*?\n(.*?)```", AFTER, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((DOCS.parents[1] / "configs/quickstart.yaml").read_text())
    data, run = tmp_path / recipe["dataset_name"], tmp_path / recipe["output_dir"]
    data.mkdir(parents=True)
    run.mkdir()
    (data / "test.jsonl").write_text('{"prompt": [], "completion": []}\n')
    (run / "adapter_config.json").write_text("{}")
    given = recipe["output_dir"], recipe, ["--config", "configs/quickstart.yaml"]
    lines = next_steps(*given)
    assert lines[:-1] == next_steps(*given, pushed=True)
    assert shown.splitlines() == lines
    assert f"```python\n{snippet(recipe['output_dir'], chats=True)}\n```" in AFTER
    assert re.findall(r"^bl-trainer merge .*", AFTER, re.M) == [lines[3].split(": ", 1)[1].strip()]
    assert {f"--{field.name}" for field in fields(MergeArguments) if field.init} == {*re.findall(r"^\| `(--\w+)`", AFTER, re.M)}


def test_page_of_tracking_names_what_there_is():
    rows = re.findall(r"^\| `(\w+)` \|", TRACKING, re.M)
    assert {*rows} == {"loss", "nll", "target_prob", "kept_fraction", "gradient_weight", "objective_alpha"}
    assert {group(name) for name in rows} <= {None, *(f"objective/{name.removeprefix('objective_')}" for name in rows)}
    known = Parser(DATACLASSES).known
    for block in re.findall(r"```yaml\n(.*?)```", TRACKING, re.DOTALL):
        keys = yaml.safe_load(block)
        assert keys.keys() <= {*known}
        reported = keys["report_to"] if isinstance(keys["report_to"], list) else [keys["report_to"]]
        assert {*reported} <= TRACKERS.keys()
    assert {*re.findall(r"`(objective/\w+)`", TRACKING)} <= {group(name) for name in [*rows, "eval_nll"]}
