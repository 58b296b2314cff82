"""What a recipe may not do: run code that the user didn't name, write elsewhere, or leave secrets behind."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.dynamic_module_utils

from bl_trainer import BLConfig
from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.recipe.recipe import Recipe
from conftest import write_recipe
from forking import ranks
from test_processes import SCRIPT

SECRET = "hf_" + "x7" * 17
PACKAGE = Path(__file__).parent.parent / "bl_trainer"


def files_with_secret(folder):
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_secrets_are_left_nowhere(checkpoint, data_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", "")
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=1, save_steps=1, env={"MY_KEY": SECRET}, hub_token=SECRET, log_level="info"
    )
    main(["train", "--config", str(recipe)])
    assert os.environ["MY_KEY"] == SECRET
    assert (tmp_path / "out" / "checkpoint-1" / "training_args.bin").exists()
    assert not files_with_secret(tmp_path / "out")
    assert SECRET not in "".join(capfd.readouterr())
    record = json.loads((tmp_path / "out" / "bl_trainer.json").read_text())
    assert record["recipe"]["env"] == {"MY_KEY": "<redacted>"}
    assert record["recipe"]["hub_token"] == "<redacted>"
    assert record["recipe"]["max_steps"] == 1


def test_the_recorded_recipe_has_the_command_line(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, data_folder, max_steps=9)
    read = Recipe.read(
        ["--config", str(recipe), "--max_steps", "1", "--objective", "neg_p", "--hub_token", SECRET, "--eos_token", "<end>"]
    )
    assert read.given["eos_token"] == "<end>"
    assert (read.given["max_steps"], read.given["objective"], read.given["hub_token"]) == (1, "neg_p", "<redacted>")
    assert read.training.hub_token == SECRET


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"env: [{SECRET}]", "`env` must be a mapping of environment variables to values, got list."),
        (f"env: {SECRET}", "`env` must be a mapping of environment variables to values, got str."),
        (f"env:\n  HF_TOKEN: {SECRET}: x", "line 8: mapping values are not allowed here."),
        (
            f"model_init_kwargs: {{token: {SECRET}}}",
            "A token in `model_init_kwargs` would be logged. Put it in the environment",
        ),
        (f"hub_token: [{SECRET}]", "`hub_token: <redacted>` is of the wrong type. Write a text."),
        (f"hub_tokn: {SECRET}", "Unknown recipe key 'hub_tokn'. Did you mean 'hub_token'?"),
    ],
)
def test_messages_do_not_quote_secrets(text, message, checkpoint, data_folder, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, data_folder)
    recipe.write_text(recipe.read_text() + text)
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        Recipe.read(["--config", str(recipe)])
    assert SECRET not in str(caught.value)


def test_yaml_can_not_run_code(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, data_folder)
    recipe.write_text(recipe.read_text() + f"objective: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
        Recipe.read(["--config", str(recipe)])
    assert not (tmp_path / "made").exists()


def main_with_modules(folder, argv):
    """Run a verb, with a cache of its own for what is imported from models."""
    transformers.dynamic_module_utils.HF_MODULES_CACHE = folder
    main(argv)


def test_code_of_a_model_runs_only_if_the_recipe_says_so(checkpoint, data_folder, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    config["architectures"] = ["Mine"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    recipe = write_recipe(tmp_path, model, data_folder, max_steps=1, save_strategy="no")
    for trusted in (False, True):
        more = ["--trust_remote_code", "true"] if trusted else []
        argv = ["train", "--config", str(recipe), *more]
        (code,), said = ranks(tmp_path, main_with_modules, str(tmp_path / "modules"), argv, processes=None)
        assert (code == 0) is trusted, said[0][-3000:]
        assert (tmp_path / "ran").exists() is trusted
    assert not (tmp_path / "model" / "__pycache__").exists()


def test_an_import_path_in_a_checkpoint_is_not_imported(checkpoint, data_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(logp):\n    return -logp\n")
    recipe = write_recipe(tmp_path, checkpoint, data_folder, max_steps=1, resume_from_checkpoint=True)
    main(["train", "--config", str(recipe)])
    path = tmp_path / "out" / "checkpoint-1" / "bl_trainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "objective": {"name": "evil:f"}}))
    with pytest.raises(RecipeError, match="was trained with objective"):
        Recipe.read(["--config", str(recipe)]).plan_resume()
    assert not (tmp_path / "ran").exists()


def test_nothing_is_written_elsewhere(checkpoint, data_folder, tmp_path):
    """With a home, cache, temporary and working folder of its own, all of them empty."""
    folders = {name: tmp_path / name for name in ("home", "cache", "temporary", "work")}
    for folder in folders.values():
        folder.mkdir()
    model, data = (sorted((path, path.stat().st_mtime_ns) for path in f.rglob("*")) for f in (checkpoint, data_folder))
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=2, save_steps=1, eval_strategy="epoch", threshold={"above_percentile": 5}
    )
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "TMP", "TEMP"))}
    environment = {
        **keep, "HOME": str(folders["home"]), "HF_HOME": str(folders["cache"]), "TMPDIR": str(folders["temporary"]),
        "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, SCRIPT, "--config", recipe], capture_output=True, text=True, check=False, timeout=600,
        cwd=folders["work"], env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("home", "temporary", "work"):
        assert [path for path in folders[name].rglob("*") if path.is_file()] == [], name
    assert {path.name for path in folders["cache"].iterdir()} <= {"bl_trainer", "datasets", "hub", "modules", "xet"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "recipe.yaml", *folders}
    for folder, before in ((checkpoint, model), (data_folder, data)):
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_the_package_neither_pickles_nor_evaluates():
    for path in PACKAGE.rglob("*.py"):
        for word in (
            r"(import|from) pickle\b",
            r"torch\.(load|save)\b",
            r"(?<!\.)\beval\(",
            r"\bexec\(",
            r"yaml\.(unsafe_|full_)?load\((?!.*_UniqueKeys)",
        ):
            assert not re.search(word, path.read_text()), (path.name, word)


def test_arguments_survive_a_copy_but_for_the_token(tmp_path):
    import copy

    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, objective="neg_p", hub_token=SECRET)
    assert args.hub_token == SECRET
    copied = copy.deepcopy(args)
    assert (copied.objective, copied.hub_token) == ("neg_p", None)


def test_a_trainers_arguments_keep_what_pickles_leave_out(tmp_path):
    args = BLConfig(output_dir=str(tmp_path), use_cpu=True, objective="neg_p", hub_token=SECRET)
    copied = copy.copy(args)
    assert copied.hub_token == SECRET
    assert copied.parsed_objective is args.parsed_objective
