"""`configs/accelerate`: what each starts, and, where gloo and CPUs allow, that it trains the weights of one process."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gloo
import tensor
from bl_trainer import BLConfig, BLTrainer
from bl_trainer.cli import main
from conftest import fake_checkpoint, make_llama, write_recipe
from forking import free_port, launching, ranks
from test_docs import PAGES, table
from test_trainer import build
from ways import make_mixture

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs" / "accelerate"
SHARDED = ("fsdp2", "zero2", "zero3", "context_parallel")
STEPS, SAVED = 6, 3
# Processes on which a config has trained the weights of one process here; `context_parallel` with a stand-in for attention
TRIED = {
    "single_gpu": [1], "ddp": [2], "two_nodes": [4], "fsdp2": [2], "zero2": [2], "zero3": [2], "context_parallel": [4],
}  # fmt: skip
METRICS = ("loss", "nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy")
FLOAT32 = ("zero2", "zero3")  # DeepSpeed makes all other weights so
ROUNDING = {True: 1e-4, False: 1e-9}  # of weights and metrics, in float32 and in float64
LORA = {"objective": "asft", "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def start(config, processes, *command, dies_at=-1, **options):
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
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def told(config, processes, **options):
    """The environment in which a config's launcher would start its processes."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    words = ["--config_file", CONFIGS / f"{config}.yaml", "--num_processes", processes, *words, "train.py"]
    return {**launching(*words)[1], **({"ACCELERATE_TORCH_DEVICE": "cpu"} if config in SHARDED else {})}


def finish(*started):
    """Wait for launchers; returns their exit codes and stderrs. None outlives a test that they hang."""
    try:
        errors = [process.communicate(timeout=600)[1] for process in started]
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

    The highest nll counts as the best, so that another checkpoint than the last is. With a small `adam_epsilon` the least
    gradients would move weights by their rounding.
    """
    return write_recipe(
        folder, checkpoint, data,
        **{
            "objective": {"name": "power", "alpha": 0.5}, "threshold": 0.002, "learning_rate": 1e-2, "max_steps": STEPS,
            "dtype": "auto", "adam_epsilon": 1e-3,
            "per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3,
            "eval_strategy": "steps", "eval_steps": SAVED, "save_steps": SAVED, "logging_steps": 1, "disable_tqdm": True,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_nll", "greater_is_better": True,
            "resume_from_checkpoint": True, "use_cpu": None, **changes,
        },
    )  # fmt: skip


ENVIRONMENT = {
    "single_gpu": {"CUDA_VISIBLE_DEVICES": "0"},
    "ddp": {},
    "two_nodes": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
    "context_parallel": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_CP_SIZE": "4",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    },
}


PAGE = "docs/guide/multi-gpu.md"


def test_every_config_is_in_the_docs_with_how_it_was_tried():
    rows = {Path(row[0].strip("`")).stem: row for row in table("config", PAGE)}
    assert list(rows) == list(TRIED) == list(ENVIRONMENT)
    assert set(rows) == {path.stem for path in CONFIGS.glob("*.yaml")}
    for name, row in rows.items():
        for processes in TRIED[name]:
            assert str(processes) in row[2].split(), (name, processes)
    assert "not the attention" in rows["context_parallel"][2]


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_line_in_the_docs_starts_its_config(name, monkeypatch):
    start = f"accelerate launch --config_file configs/accelerate/{name}"
    (line,) = (line for line in PAGES[PAGE].splitlines() if line.startswith(start) and "configs/paper" not in line)
    accelerate, launch, *words = shlex.split(line)
    assert (accelerate, launch) == ("accelerate", "launch")
    monkeypatch.chdir(TESTS.parent)
    args, environment = launching(*words)
    known = {key: value for key, value in environment.items() if key in ENVIRONMENT[name]}
    assert known == ENVIRONMENT[name]
    for switch in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        assert (switch in environment) is (switch in ENVIRONMENT[name])
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    machines = 2 if name == "two_nodes" else 1
    assert (args.num_machines, args.num_processes) == (machines, 1 if name == "single_gpu" else 8 * machines)
    if machines == 2:
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "10.0.0.1", 29500)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_recipe_decides_the_precision(name, tmp_path, monkeypatch):
    """The launcher says none, and the recipe's `bf16` reaches FSDP and DeepSpeed."""
    for key, value in {**ENVIRONMENT[name], "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(key, value)
    args = BLConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True, pad_to_multiple_of=8)
    assert args.mixed_precision == "bf16"
    if "zero" in name:
        assert args.deepspeed_plugin.deepspeed_config["bf16"]["enabled"] is True
    if "ACCELERATE_USE_FSDP" in ENVIRONMENT[name]:
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_mixed_precision(args.mixed_precision)
        assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    if name == "context_parallel":
        assert ParallelismConfig().total_size == 8


def test_fsdp1_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match=r"FSDP1 is not supported: .* Write `fsdp_version: 2` in the launcher's configuration"):
        BLConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    BLConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("padding", [None, 4, 12])
def test_context_parallelism_wants_pieces_of_one_length(padding, tmp_path, monkeypatch):
    for key, value in ENVIRONMENT["context_parallel"].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=r"\(cp_size = 4\) cuts sequences into 8 pieces .* Write `pad_to_multiple_of: 8`"):
        BLConfig(output_dir=str(tmp_path), use_cpu=True, pad_to_multiple_of=padding)
    BLConfig(output_dir=str(tmp_path), use_cpu=True, pad_to_multiple_of=16)


def test_several_gpus_without_a_launcher_are_refused(tokenizer, text_data, tmp_path, monkeypatch):
    monkeypatch.setattr(BLConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"BLTrainer does not support `nn.DataParallel`.*`accelerate launch`"):
        build(BLTrainer, tokenizer, text_data, tmp_path, model=make_llama(tokenizer))


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


def assert_same(one, other, bound=1e-9):
    """The same weights after the last step, the same evaluations, and the same best weights saved whole."""
    assert largest_difference(one / "out" / f"checkpoint-{STEPS}", other / "out" / f"checkpoint-{STEPS}") < bound
    found, wanted = evaluations(other), evaluations(one)
    assert list(found) == list(wanted) == [SAVED, STEPS]
    for step, metric in ((step, f"eval_{metric}") for step in wanted for metric in METRICS):
        assert found[step][metric] == pytest.approx(wanted[step][metric], rel=bound), (step, metric)
    assert largest_difference(one / "out", other / "out") < bound
    assert largest_difference(other / "out" / f"checkpoint-{SAVED}", other / "out") == 0


@pytest.fixture(scope="module")
def data(pair_data, tmp_path_factory):
    """32 examples, two steps, to train on; 13 of them, no multiple of any batch, to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 32), ("test", 13)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in list(pair_data)[:count]))
    return folder


@pytest.fixture(scope="module")
def start_of(checkpoint, double_checkpoint):
    """The model that a config starts from, and what its recipe says of it.

    In float32 there is no threshold, on one of whose sides a token is by its rounding.
    """

    def start_of(config):
        return (checkpoint, {"threshold": None}) if config in FLOAT32 else (double_checkpoint, {})

    return start_of


@pytest.fixture(scope="module")
def run_as(start_of, data, tmp_path_factory):
    """Run a verb on forked ranks as a config would start them; returns its folder, exit codes and outputs."""

    def run(config, processes, verb="train", launcher=None, folder=None, environment=(), nodes=1, **changes):
        folder, (model, own) = folder or tmp_path_factory.mktemp(config), start_of(config)
        recipe = recipe_in(folder, model, data, processes, use_cpu=config not in SHARDED, **{**own, **changes})
        argv = ["--config", str(recipe), *(["--report", str(folder / "report")] if verb == "diagnose" else [])]
        environment = {**told(config, processes, **(launcher or {})), **dict(environment)}
        forks = {"processes": None if config == "single_gpu" else processes, "nodes": nodes, "environment": environment}
        return folder, *ranks(tmp_path_factory.mktemp("logs"), gloo.run, verb, argv, **forks)

    return run


@pytest.fixture(scope="module")
def train(run_as):
    """Run a config's training on some processes to its end, and return its folder; it may be the rest of a broken run."""

    def run(config, processes, **options):
        folder, codes, said = run_as(config, processes, **options)
        assert not any(codes), said[0][-6000:]
        return folder

    return run


@pytest.fixture(scope="module")
def alone(start_of, data, tmp_path_factory):
    """Train or diagnose as a config would, in this process alone; returns the folder."""

    def run(config, verb="train", **changes):
        folder, (model, own) = tmp_path_factory.mktemp("alone"), start_of(config)
        recipe = recipe_in(folder, model, data, 1, use_cpu=True, **{**own, **changes})
        with mock.patch.dict(os.environ):
            main([verb, "--config", str(recipe), *(["--report", str(folder / "report")] if verb == "diagnose" else [])])
        torch.set_flush_denormal(False)
        return folder

    return run


@pytest.fixture(scope="module")
def one(train):
    """What the others are compared with: one process."""
    folder = train("single_gpu", 1)
    start_weights, end = (load_file(folder / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (SAVED, STEPS))
    assert {weight.dtype for weight in end.values()} == {torch.float64}
    assert max((end[key] - start_weights[key]).abs().max() for key in end) > 1e-3
    assert state(folder)["best_model_checkpoint"].endswith(f"checkpoint-{SAVED}")
    kept = [entry["kept_fraction"] for entry in state(folder)["log_history"] if "kept_fraction" in entry]
    assert all(0 < share < 1 for share in kept)
    return folder


@pytest.fixture(scope="module")
def one_in_float32(alone):
    return alone("zero3")


def test_auxiliary_loss_of_experts_counts_tokens_on_all_processes(train, alone, tokenizer, tmp_path_factory):
    """Each micro-batch's auxiliary loss has the weight of its tokens, whichever process it falls to."""
    model = tmp_path_factory.mktemp("experts")
    make_mixture("Qwen3Moe", tokenizer).double().save_pretrained(model)
    tokenizer.save_pretrained(model)
    eager = {"experts_implementation": "eager"}  # the grouped product has no float64
    changes = {"model_name_or_path": str(model), "threshold": None, "router_aux_loss_coef": 0.1, "model_init_kwargs": eager}
    two = train("ddp", 2, **changes)
    one = alone("ddp", **changes, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert largest_difference(one / "out", two / "out") < 1e-9
    logs = [[entry["aux_loss"] for entry in state(folder)["log_history"] if "aux_loss" in entry] for folder in (one, two)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    assert min(logs[0]) > 0


@pytest.mark.parametrize("processes", TRIED["ddp"])
def test_ddp(processes, one, train, double_checkpoint, data, tmp_path):
    """What a launcher starts and what these tests fork train the same weights, bit for bit."""
    forked = train("ddp", processes)
    assert_same(one, forked)
    recipe = recipe_in(tmp_path, double_checkpoint, data, processes, use_cpu=True)
    codes, errors = finish(start("ddp", processes, TESTS.parent / "scripts" / "train.py", "--config", recipe))
    assert codes == [0], errors[0][-6000:]
    assert largest_difference(tmp_path / "out", forked / "out") == 0


def test_two_nodes(one, train):
    """Two nodes, each with two processes."""
    pieces = {"machine_rank": 0, "main_process_ip": "127.0.0.1", "num_machines": 2}
    assert_same(one, train("two_nodes", 4, launcher=pieces, nodes=2))


def test_a_node_that_loses_a_process_ends_the_other(one, double_checkpoint, data, tmp_path):
    """Two launchers that meet on the loopback; up to its end they train the weights of one process."""
    recipe = recipe_in(tmp_path, double_checkpoint, data, 2, use_cpu=True)
    command = [TESTS / "gloo.py", "train", "--config", recipe]
    codes, errors = finish(*nodes(command, command, processes=2, dies_at=SAVED + 1))
    assert all(codes), codes
    assert "SIGKILL" in errors[1]
    assert largest_difference(tmp_path / "out" / f"checkpoint-{SAVED}", one / "out" / f"checkpoint-{SAVED}") < 1e-9
    assert not (tmp_path / "out" / f"checkpoint-{STEPS}").exists()


def test_machines_that_see_different_checkpoints_are_refused(checkpoint, data, tmp_path):
    argv = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        recipe = recipe_in(tmp_path / name, checkpoint, data, 2, use_cpu=True, objective=None, threshold=None)
        argv.append(["--config", str(recipe)])
    fake_checkpoint(tmp_path / "first" / "out" / "checkpoint-3")
    codes, said = ranks(tmp_path, gloo.run, "train", each=argv, nodes=2)
    assert codes == [2, 2]
    for each in said:
        assert "error: `resume_from_checkpoint` finds checkpoint-3 on one machine, none on another. Put `output_dir`" in each


# What shows in a checkpoint that the optimizer's state was shared out
SHARES = {"fsdp2": "pytorch_model_fsdp.bin", "zero2": "global_step*/*rank_1*optim_states.pt"}
SHARES["zero3"] = "global_step*/zero_pp_rank_1*model_states.pt"


LAUNCHED = ("fsdp2", "zero3")  # one of each kind of launcher; what the others start is forked


@pytest.mark.parametrize("config", SHARES)
def test_sharded_run_that_loses_a_process_and_goes_on(
    config, one, one_in_float32, train, run_as, start_of, data, tmp_path
):  # fmt: skip
    """Ends without a hang, goes on from its checkpoint by the same command, has the weights of one process, and stays."""
    reference, bound = (one_in_float32 if config in FLOAT32 else one), ROUNDING[config in FLOAT32]
    if config in LAUNCHED:
        model, own = start_of(config)
        recipe = recipe_in(tmp_path, model, data, 2, use_cpu=False, **own)
        codes, errors = finish(start(config, 2, TESTS / "gloo.py", "train", "--config", recipe, dies_at=SAVED + 1))
        assert "SIGKILL" in errors[0], errors[0]
    else:
        _, codes, _ = run_as(config, 2, folder=tmp_path, environment={"DIES_AT": SAVED + 1})
        assert -signal.SIGKILL in codes
    assert all(codes), codes
    saved = Path("out", f"checkpoint-{SAVED}")
    assert list((tmp_path / saved).glob(SHARES[config]))
    assert largest_difference(tmp_path / saved, reference / saved) < bound
    assert_same(reference, train(config, 2, folder=tmp_path), bound)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(reference / "out").state_dict()
    assert max((whole[key] - wanted[key]).abs().max() for key in wanted) < bound
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    train(config, 2, folder=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_context_parallel(alone, train):
    """Two by two processes, which count the kept tokens of all pieces of their sequences.

    Keys and values are gathered, since torch's ring attention has no CPU kernel.
    """
    options = {"threshold": {"above": 0.002, "normalize": "kept"}, "per_device_train_batch_size": 4}
    pieces = {"parallelism_config_cp_size": 2, "parallelism_config_dp_shard_size": 2}
    found = train("context_parallel", 4, launcher=pieces, pad_to_multiple_of=4, **options)
    wanted = alone("context_parallel", gradient_accumulation_steps=4, **options)
    assert_same(wanted, found, 1e-6)  # TRL's head adds in float32
    logs = [
        [(log["loss"], log["grad_norm"]) for log in state(folder)["log_history"] if "loss" in log] for folder in (wanted, found)
    ]
    assert len(logs[0]) == STEPS
    assert logs[1] == [pytest.approx(log, rel=1e-5) for log in logs[0]]


def test_tensor_parallel(checkpoint, data, tmp_path):
    """Two processes share out the weights, the head's vocabulary too."""
    found, objective = [], {"name": "power", "alpha": 0.5}
    for name, processes in (("one", None), ("two", 2)):
        given = (checkpoint, data / "train.jsonl", tmp_path / name, objective)
        codes, said = ranks(tmp_path, tensor.main, *given, processes=processes, environment={"ACCELERATE_TORCH_DEVICE": "cpu"})
        assert not any(codes), said[0][-4000:]
        found.append(torch.load(tmp_path / name / "trained.pt"))
    one, two = found
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-9, atol=1e-12)
    for name in ("loss", "grad_norm", "nll", "target_prob", "kept_fraction", "entropy", "num_tokens"):
        assert [log[name] for log in two["log"]] == pytest.approx([log[name] for log in one["log"]], rel=1e-6), name


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_sharded_lora(config, alone, train):
    assert_same(alone(config, **LORA), train(config, 2, **LORA), ROUNDING[config in FLOAT32])


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_sharded_models_are_diagnosed(config, alone, run_as):
    folder, codes, said = run_as(config, 2, "diagnose")
    assert codes == [0, 0], said[0][-6000:]
    found, wanted = (
        json.loads((each / "report" / "report.json").read_text())["total"] for each in (folder, alone(config, "diagnose"))
    )
    assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in wanted.items()}


def test_diagnosis_under_zero2_is_refused(run_as):
    folder, codes, said = run_as("zero2", 1, "diagnose")
    assert codes == [2]
    assert "error: DeepSpeed evaluates under ZeRO-3 only. Launch diagnosis without DeepSpeed, or with ZeRO-3." in said[0]
    assert not (folder / "report").exists()
