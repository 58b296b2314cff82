"""The shell commands of README and the guides work, one after the other, on tiny models and data.

All run in this process: what starts them is left out, since `test_launchers.py` and `test_command.py` start processes.
Those of docs/paper are in `test_paper.py`.
"""

import contextlib
import json
import random
import runpy
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

import bl_trainer.diagnosis.page as diagnosis_page
from bl_trainer.cli import main
from bl_trainer.pages import html
from conftest import sentence
from forking import run_script
from test_convert import stand_in
from test_docs import PAGES, ROOT, blocks, verb_of

pytest.importorskip("lm_eval")
sweep_verb = pytest.importorskip("bl_trainer.sweep.verb")
GUIDES = ["README.md", *(page for page in PAGES if page.startswith("docs/guide/")), "docs/results/quickstart.md"]

# What commands and recipes name -> what is here
STAND_INS = {
    "Qwen/Qwen2.5-1.5B": "model",
    "trl-lib/Capybara": "data",
    "MODEL": "model",
    "DATA.jsonl": "data/train.jsonl",
    "old.yaml": "examples/recipes/old/trl-example.yaml",
    "out/sft": "quickstart/run",
    "--tasks gsm8k": "--tasks gsm8k --data gsm8k=gsm8k.jsonl --max_new_tokens 4",
    "--noise_steps 80": "--noise_steps 2",
    "checkpoint-200": "checkpoint-2",
}
# Keys of every recipe
SHORT = {
    "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 4, "per_device_train_batch_size": 2,
    "save_strategy": "steps", "save_steps": 2, "use_peft": True, "lora_r": 2, "lora_alpha": 4,
    "lora_target_modules": "all-linear",
}  # fmt: skip
DIAGNOSED = "accelerate launch scripts/diagnose.py --config recipe.yaml --report out/diagnosis"
# Commands of another page that a page takes for done
BEFORE = {"docs/guide/sweep.md": [DIAGNOSED], "docs/guide/sweep-presets.md": [DIAGNOSED]}
# Pages whose sweep file is the one that they show
SHOWN = {"docs/guide/sweep.md": "sweep.yaml", "docs/guide/worked-example.md": "out/diagnosis/sweep.yaml"}
# What a reader runs in place of an earlier command of the page: nothing of that is there
INSTEAD = {
    "bl-trainer train --config recipe.yaml --show 3",
    "accelerate launch --config_file configs/accelerate/context_parallel.yaml scripts/train.py --config recipe.yaml "
    "--pad_to_multiple_of 8",
    "bl-trainer sweep --config recipe.yaml --sweep sweep.yaml --jobs 4",
    "bl-trainer sweep --config recipe.yaml --sweep sweep.yaml --jobs 2 --launch '--multi_gpu --num_processes 2'",
}
NETWORK = "needs the network; `test_command.py` installs the wheel"
LEFT_OUT = {
    "pip install .": NETWORK,
    "pip install '.[sweep,evaluation]'": NETWORK,
    "pip install '.[qlora,deepspeed,data,notebook]'": NETWORK,
    "pip install '.[sweep]'": NETWORK,
    "pip install --no-deps .": NETWORK,
    "make quickstart": "installs, and downloads weights; `given` trains and test_after_training.py compares",
    "hf upload my-model out/capybara --exclude 'checkpoint-*'": "needs the Hub and a token",
    "tensorboard --logdir out": "another package's server",
    "trackio show --project capybara": "another package's server",
    "bl-trainer score my_losses:my_objective --output out/score": "four minutes; `test_score.py` runs it on smaller models",
}


def commands(page):
    """The shell commands of a page, in order, without comments."""
    for block in blocks("bash", page):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield line if ">" in words else shlex.join(words)


def with_stand_ins(text):
    for real, tiny in STAND_INS.items():
        text = text.replace(real, tiny)
    return text


def shorten(recipe):
    """Name stand-ins in a recipe, and have it train few steps."""
    keys = {**yaml.safe_load(with_stand_ins(recipe.read_text())), **SHORT}
    recipe.write_text(yaml.safe_dump({**keys, "eval_steps": 4} if "eval_steps" in keys else keys, sort_keys=False))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def given(checkpoint, tmp_path_factory):
    """What the pages take for given: a recipe, its model and data, and what `make quickstart` and `make continuum` leave."""
    folder, rng = tmp_path_factory.mktemp("given"), random.Random(0)
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "examples/recipes", folder / "examples/recipes")
    for name in ("model", "quickstart/SmolLM2-135M-Instruct", "continuum/model"):
        shutil.copytree(checkpoint, folder / name)
    for name in ("data", "continuum/mid-fact-30"):
        for split, count in (("train", 28), ("test", 8)):
            rows = [{"prompt": sentence(rng, 3, 20), "completion": sentence(rng, 2, 20)} for _ in range(count)]
            write_rows(folder / name / f"{split}.jsonl", rows)
    write_rows(folder / "gsm8k.jsonl", [{"question": f"{n} plus {n}?", "answer": f"#### {n + n}"} for n in (2, 3)])
    make_records = runpy.run_path(str(ROOT / "scripts/quickstart.py"))["make_records"]
    write_rows(folder / "quickstart/data/train.jsonl", make_records(1, 16, wrong=0.3))
    write_rows(folder / "quickstart/data/test.jsonl", make_records(2, 4, wrong=0.0))
    (folder / "recipe.yaml").write_text(blocks("yaml", "README.md")[0])
    assert (folder / "recipe.yaml").read_text() in blocks("yaml", "docs/guide/training.md")
    names = {"model_name_or_path": "continuum/model", "dataset_name": "continuum/mid-fact-30", "output_dir": "out"}
    (folder / "continuum/mid-fact-30/recipe.yaml").write_text(yaml.safe_dump(names))
    for recipe in ("recipe.yaml", "configs/quickstart.yaml", "continuum/mid-fact-30/recipe.yaml"):
        shorten(folder / recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--config", "configs/quickstart.yaml"])
    return {(): folder}  # commands that have run -> the folder that they leave


class Here:
    """A step of a sweep's run, in this process and without its launcher."""

    def __init__(self, folder, command, environment, log):
        verb, arguments = verb_of(command)
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            main([verb, *arguments])

    def poll(self):
        return 0

    def stop(self):
        pass

    wait = stop


def write_sweep_file(path, page):
    """Put the sweep file that a page shows in its place, and leave two runs of any."""
    if SHOWN.get(page) == str(path):
        (text,) = (block for block in blocks("yaml", page) if "arms:" in block)
        path.write_text(text)
    plan = yaml.safe_load(path.read_text())
    two = {"preset": "full", "arms": plan["arms"][:2], "learning_rate": plan["learning_rate"][:1], "seed": [0]}
    path.write_text(yaml.safe_dump({**plan, **two}))


def run(line, page):
    verb, arguments = verb_of(shlex.split(line))
    options = dict(pairwise(arguments))
    if verb is None:
        assert line.startswith("printf "), f"{line}: name it in LEFT_OUT"
        subprocess.run(line, shell=True, check=True)
    elif verb == "quickstart":
        run_script(ROOT / "scripts/quickstart.py", *arguments)
    else:
        if verb == "sweep":
            write_sweep_file(Path(options["--sweep"]), page)
        if options.get("--config") == "zephyr.yaml":
            Path("zephyr").mkdir()
            made = stand_in(yaml.safe_load(Path("zephyr.yaml").read_text()), Path("zephyr").absolute(), Path("model"))
            Path("zephyr.yaml").write_text(yaml.safe_dump(made))
        main([verb, *arguments])
    for option in {"--report", "--output", "--scores"} & {*options}:
        assert Path(options[option]).exists(), line


@pytest.mark.parametrize("page", [page for page in GUIDES if {*commands(page)} - {*LEFT_OUT}])
def test_commands_work_one_after_the_other(page, given, tmp_path_factory, monkeypatch):
    """Where pages begin alike, so do their folders: the same commands run once."""
    monkeypatch.setattr(sweep_verb, "starter", lambda *arguments: Here)
    for module in (html, diagnosis_page):
        monkeypatch.setattr(module, "render", lambda *arguments: b"")  # figures are nine tenths of a report's time
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # runs pip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = ()
    for line in [*BEFORE.get(page, ()), *(line for line in commands(page) if line not in LEFT_OUT)]:
        command = with_stand_ins(line)
        verb, arguments = verb_of(shlex.split(command))
        step = verb, *(arguments or [command])
        if step in done:  # with another launcher
            continue
        if (*done, step) not in given:
            folder = tmp_path_factory.mktemp("folder")
            shutil.copytree(given[done], folder, dirs_exist_ok=True)
            monkeypatch.chdir(folder)
            if line in INSTEAD:
                shutil.rmtree("out")
            run(command, page)
            given[(*done, step)] = folder
        done = *done, step


def test_no_list_names_a_command_that_is_gone():
    lines = {line for page in GUIDES for line in commands(page)}
    assert {*LEFT_OUT, *INSTEAD, DIAGNOSED} <= lines
    named = "\n".join([*(lines - {*LEFT_OUT}), *blocks("yaml", "README.md")])
    assert [name for name in STAND_INS if name not in named] == []


@pytest.mark.parametrize("page", PAGES)
def test_launchers_know_their_options(page):
    for line in commands(page):
        words = shlex.split(line)
        if words[:2] == ["accelerate", "launch"]:
            given = launch_command_parser().parse_args(words[2:])
            assert given.training_script == "bl_trainer" if given.module else (ROOT / given.training_script).exists(), line
