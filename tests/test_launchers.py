"""`configs/accelerate`: what each starts, and, where gloo and CPUs allow, that it trains the weights of one process."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from conftest import make_llama, write_recipe
from safetensors.torch import load_file
from test_processes import free_port
from test_readme import README, table
from transformers import AutoModelForCausalLM

from bl_trainer import BLConfig
from bl_trainer.recipe import Recipe, RecipeError

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs" / "accelerate"
SHARDED = ("fsdp2", "zero2", "zero3", "context_parallel")
STEPS, SAVED = 6, 3
METRICS = ("loss", "nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy")
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def start(config, processes, *command, dies_at=-1, cwd=None, **options):
    """Start a launcher: the script itself, or `gloo.py` in its place where accelerate would want GPUs."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        "DIES_AT": str(dies_at), **({"ACCELERATE_TORCH_DEVICE": "cpu"} if config in SHARDED else {}),
    }  # fmt: skip
    options = {"num_processes": processes, "main_process_port": free_port(), **options}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    for name, value in options.items():
        launcher += [f"--{name}", value]
    return subprocess.Popen(
        [*map(str, launcher), *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd, start_new_session=True,
    )  # fmt: skip


def finish(*started):
    """Wait for launchers; returns their exit codes and stderrs. None outlives a test that they hang."""
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
        return [process.returncode for process in started], errors
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def nodes(*commands, processes=4, **options):
    """Start `commands` as the nodes of `two_nodes.yaml`, on this machine."""
    port = free_port()
    shared = {"main_process_ip": "127.0.0.1", "main_process_port": port, "num_machines": len(commands)}
    return [
        start("two_nodes", processes, *command, machine_rank=rank, **shared, **options) for rank, command in enumerate(commands)
    ]


def recipe_in(folder, checkpoint, data, processes, **changes):
    """Write a recipe whose step is over the same 16 examples, in the same order, on any number of processes.

    The highest nll counts as the best, so that another checkpoint than the last is.
    """
    return write_recipe(
        folder, checkpoint, data,
        **{
            "objective": {"name": "power", "alpha": 0.5}, "threshold": 0.002, "learning_rate": 1e-2, "max_steps": STEPS,
            "per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3,
            "eval_strategy": "steps", "eval_steps": SAVED, "save_steps": SAVED, "logging_steps": 1, "disable_tqdm": True,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_nll", "greater_is_better": True,
            "resume_from_checkpoint": True, "use_cpu": None, **changes,
        },
    )  # fmt: skip


def largest_difference(one, other):
    """Between two folders' saved weights."""
    (name,) = {path.name for path in one.glob("*.safetensors")}
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def state(folder):
    return json.loads((folder / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())


def evaluations(folder):
    return {entry["step"]: entry for entry in state(folder)["log_history"] if "eval_nll" in entry}


def assert_same(one, other):
    """The same weights after the last step, the same evaluations, and the same best weights saved whole."""
    assert largest_difference(one / "out" / f"checkpoint-{STEPS}", other / "out" / f"checkpoint-{STEPS}") < 1e-5
    found, wanted = evaluations(other), evaluations(one)
    assert list(found) == list(wanted) == [SAVED, STEPS]
    for step, metric in ((step, f"eval_{metric}") for step in wanted for metric in METRICS):
        assert found[step][metric] == pytest.approx(wanted[step][metric], rel=1e-6), (step, metric)
    assert largest_difference(one / "out", other / "out") < 1e-5
    assert largest_difference(other / "out" / f"checkpoint-{SAVED}", other / "out") == 0


@pytest.fixture(scope="module")
def data(pair_data, tmp_path_factory):
    """32 examples, two steps, to train on; 13 of them, no multiple of any batch, to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 32), ("test", 13)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in list(pair_data)[:count]))
    return folder


@pytest.fixture(scope="module")
def train(checkpoint, data, tmp_path_factory):
    """Run a config's training on some processes to its end, and return its folder; it may be the rest of a broken run."""

    def run(config, processes, folder=None, **changes):
        folder = folder or tmp_path_factory.mktemp(config)
        recipe = recipe_in(folder, checkpoint, data, processes, use_cpu=config not in SHARDED, **changes)
        script = [TESTS / "gloo.py", "train"] if config in SHARDED else [TESTS.parent / "scripts" / "train.py"]
        codes, errors = finish(start(config, processes, *script, "--config", recipe))
        assert codes == [0], errors[0][-6000:]
        return folder

    return run


@pytest.fixture(scope="module")
def one(train):
    """What the others are compared with: one process."""
    folder = train("single_gpu", 1)
    start_weights, end = (load_file(folder / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (SAVED, STEPS))
    assert max((end[key] - start_weights[key]).abs().max() for key in end) > 1e-3
    assert state(folder)["best_model_checkpoint"].endswith(f"checkpoint-{SAVED}")
    kept = [entry["kept_fraction"] for entry in state(folder)["log_history"] if "kept_fraction" in entry]
    assert all(0 < share < 1 for share in kept)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_ddp(processes, one, train):
    assert_same(one, train("ddp", processes))


def test_two_nodes(one, checkpoint, data, tmp_path):
    """Two launchers that meet on the loopback, each with two processes."""
    recipe = recipe_in(tmp_path, checkpoint, data, 4, use_cpu=True)
    command = [TESTS.parent / "scripts" / "train.py", "--config", recipe]
    codes, errors = finish(*nodes(command, command))
    assert codes == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    assert_same(one, tmp_path)


def test_a_node_that_loses_a_process_ends_the_other(checkpoint, data, tmp_path):
    recipe = recipe_in(tmp_path, checkpoint, data, 2, use_cpu=True)
    command = [TESTS / "gloo.py", "train", "--config", recipe]
    codes, errors = finish(*nodes(command, command, processes=2, dies_at=SAVED + 1))
    assert all(codes), codes
    assert "SIGKILL" in errors[1]
    assert (tmp_path / "out" / f"checkpoint-{SAVED}").is_dir()
    assert not (tmp_path / "out" / f"checkpoint-{STEPS}").exists()


def test_machines_that_see_different_checkpoints_are_refused(checkpoint, data, tmp_path):
    commands = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        recipe = recipe_in(folder, checkpoint, data, 2, use_cpu=True)
        commands.append([TESTS.parent / "scripts" / "train.py", "--config", recipe])
    saved = tmp_path / "first" / "out" / "checkpoint-3"
    saved.mkdir(parents=True)
    (saved / "trainer_state.json").write_text("{}")
    codes, errors = finish(*nodes(*commands, processes=2))
    assert all(codes), codes
    for error in errors:
        assert "error: `resume_from_checkpoint` finds checkpoint-3 on one machine, none on another. Put `output_dir`" in error


# What shows in a checkpoint that the optimizer's state was shared out
SHARES = {"fsdp2": "pytorch_model_fsdp.bin", "zero2": "global_step*/*rank_1*optim_states.pt"}
SHARES["zero3"] = "global_step*/zero_pp_rank_1*model_states.pt"


@pytest.mark.parametrize("config", SHARES)
def test_sharded_run_that_loses_a_process_and_goes_on(config, one, train, checkpoint, data, tmp_path):
    """Ends without a hang, goes on from its checkpoint by the same command, and has the weights of one process."""
    recipe = recipe_in(tmp_path, checkpoint, data, 2, use_cpu=False)
    codes, errors = finish(start(config, 2, TESTS / "gloo.py", "train", "--config", recipe, dies_at=SAVED + 1))
    assert all(codes), codes
    assert "SIGKILL" in errors[0]
    assert list((tmp_path / "out" / f"checkpoint-{SAVED}").glob(SHARES[config]))
    assert_same(one, train(config, 2, folder=tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(one / "out").state_dict()
    assert max((whole[key] - wanted[key]).abs().max() for key in wanted) < 1e-5


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_sharded_lora(config, lora, train):
    assert_same(lora, train(config, 2, **LORA))


@pytest.fixture(scope="module")
def lora(train):
    return train("single_gpu", 1, **LORA)


@pytest.fixture(scope="module")
def diagnosis(checkpoint, data, tmp_path_factory):
    def run(config, processes):
        folder = tmp_path_factory.mktemp(config)
        recipe = recipe_in(folder, checkpoint, data, processes, use_cpu=config not in SHARDED)
        command = [TESTS / "gloo.py", "diagnose", "--config", recipe, "--report", folder / "report"]
        return folder / "report" / "report.json", *finish(start(config, processes, *command))

    return run


def test_sharded_models_are_diagnosed(diagnosis):
    totals = {}
    for config, processes in (("single_gpu", 1), ("fsdp2", 2), ("zero3", 2)):
        report, codes, errors = diagnosis(config, processes)
        assert codes == [0], errors[0][-6000:]
        totals[config] = json.loads(report.read_text())["total"]
    for config in ("fsdp2", "zero3"):
        assert totals[config] == {
            name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in totals["single_gpu"].items()
        }
