"""Runs that are killed, terminated or starved of disk, and data that can't be read: what is said, and what is left."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import nullcontext
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import SFTConfig

import crashing
from bl_trainer import BLConfig, BLTrainer
from bl_trainer.cli import main
from bl_trainer.errors import CheckpointError, LossError, RecipeError
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.training.callbacks import RefuseNonfinite
from bl_trainer.training.checkpoints import MANIFEST_FILE, RECORD_FILE, why_broken
from bl_trainer.training.metrics_log import Curve, MetricsLog
from bl_trainer.training.record import RunRecord
from bl_trainer.training.resume import planned_resume, refuse_lost_epoch, take_up
from conftest import make_llama, write_recipe
from forking import SERVER, ranks
from test_processes import SCRIPT, launcher
from test_trainer import Ordered, build, train, weights


def start(recipe, *fault):
    process = SERVER.Process(target=crashing.run, args=(recipe, recipe.with_suffix(".log"), *fault))
    process.start()
    return process


def run(recipe, *fault):
    """Train in another process; return its exit code and all that it printed."""
    process = start(recipe, *fault)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, recipe.with_suffix(".log").read_text()


FORGETS = version("accelerate") < "1.15" and version("transformers") < "5"  # see `refuse_lost_epoch`
SIGTERM = pytest.mark.skipif(
    "enable_jit_checkpoint" not in BLConfig.__dataclass_fields__, reason="this transformers has no `enable_jit_checkpoint`"
)

KINDS = {
    "lora": {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"], "lora_dropout": 0.2},
    "full": {"save_total_limit": 1, "threshold": {"above_percentile": 10}, "objective": {"name": "power", "alpha": 0.5}},
}
FILE = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def make(kind, checkpoint, data_folder):
    def make(folder, **changes):
        folder.mkdir(exist_ok=True)
        options = {
            "objective": "neg_p", "learning_rate": 0.05, "max_steps": 6, "save_steps": 2, "eval_strategy": "steps",
            "eval_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "resume_from_checkpoint": True, "disable_tqdm": True, **KINDS[kind],
        }  # fmt: skip
        return write_recipe(folder, checkpoint, data_folder, **{**options, **changes})

    return make


@pytest.fixture(scope="module")
def uninterrupted(make, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, said = run(make(folder))
    assert code == 0, said
    return load_file(folder / "out" / FILE[kind])


def assert_same(folder, kind, expected):
    found = load_file(folder / "out" / FILE[kind])
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def killed(make, tmp_path_factory):
    """Returns a function that gives the folder of a run that was killed after a call for its second checkpoint."""
    folders = {}

    def killed(where):
        if where not in folders:
            folders[where] = tmp_path_factory.mktemp(where)
            code, said = run(make(folders[where], save_total_limit=2), crashing.kill, where, 2)
            assert code == -signal.SIGKILL, said
        return folders[where]

    return killed


CUTS = [
    # before the state is there
    ("weights", "{weights}", 0.5), ("optimizer", "optimizer.pt", 0.5), ("rng", "rng_state.pth", 0.5),
    # all but one is there
    ("state", "{weights}", 0.5), ("state", "{weights}", 0), ("state", "optimizer.pt", 0.5), ("state", "optimizer.pt", 0),
    ("state", "scheduler.pt", 0.9), ("state", "rng_state.pth", 0.5), ("state", "rng_state.pth", 0),
    ("state", "bl_trainer.json", 0.5),
    ("state", "trainer_state.json", 0.7), ("state", "trainer_state.json", 0), ("saved", "optimizer.pt", 0.5),
    # the manifest is there as well
    ("manifest", "{weights}", 0), ("manifest", "optimizer.pt", 0.5), ("manifest", "training_args.bin", 0),
]  # fmt: skip


# An adapter's checkpoint differs in its weights alone
CUTS_OF = [("full", *cut) for cut in CUTS] + [("lora", *cut) for cut in CUTS if cut[1] == "{weights}"]


@pytest.mark.parametrize(("kind", "where", "name", "to"), CUTS_OF, ids=str, indirect=["kind"], scope="module")
def test_killed_while_a_checkpoint_is_written(where, name, to, make, kind, killed, uninterrupted, tmp_path):
    """A kill leaves a file of the last checkpoint cut short, or out."""
    name = name.format(weights=FILE[kind])
    shutil.copytree(killed(where) / "out", tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-4" / name
    os.truncate(path, int(to * path.stat().st_size))
    if to == 0:
        path.unlink()
    code, said = run(make(tmp_path, save_total_limit=2))
    assert code == 0, said
    found = re.search(r"warning: .*checkpoint-4 is skipped, since its (\S+) (?:is|are) (missing|truncated)", said)
    assert found, said
    expected = "weights" if name == FILE[kind] and to == 0 and where != "manifest" else name
    has_state = where in ("state", "saved", "manifest")
    assert found.groups() == ((expected, "truncated" if to else "missing") if has_state else ("trainer_state.json", "missing"))
    assert_same(tmp_path, kind, uninterrupted)


@pytest.mark.parametrize(("where", "number"), [("step", 1), ("step", 7), ("evaluation", 3), ("card", 1), ("saved", 2)])
def test_killed_in_a_step_an_evaluation_or_the_first_checkpoint(where, number, make, kind, uninterrupted, tmp_path):
    recipe = make(tmp_path)
    code, _ = run(recipe, crashing.kill, where, number)
    assert code == -signal.SIGKILL
    code, said = run(recipe)
    assert code == 0, said
    assert_same(tmp_path, kind, uninterrupted)


@pytest.mark.skipif(FORGETS, reason="these versions can't resume in later epochs, which is refused")
def test_killed_at_random_moments_again_and_again(make, kind, tmp_path):
    longer = {"max_steps": 40, "save_steps": 2, "eval_steps": 4, "logging_steps": 4}
    reference, recipe = make(tmp_path / "reference", **longer), make(tmp_path / "killed", **longer)
    code, said = run(reference)
    assert code == 0, said
    rng, killed = random.Random(kind), 0
    while True:
        before, process = set((tmp_path / "killed" / "out").glob("checkpoint-*")), start(recipe)
        while process.is_alive() and set((tmp_path / "killed" / "out").glob("checkpoint-*")) <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        if killed < 6:
            process.kill()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), recipe.with_suffix(".log").read_text()
        if process.exitcode == 0:
            break
        killed += 1
    assert killed >= 3
    assert_same(tmp_path / "killed", kind, load_file(tmp_path / "reference" / "out" / FILE[kind]))


@SIGTERM
@pytest.mark.parametrize(("where", "number"), [("step", 5), ("step", 6), ("evaluation", 2)])
def test_sigterm_saves_and_stops_and_the_same_command_goes_on(where, number, make, kind, uninterrupted, tmp_path):
    recipe = make(tmp_path, enable_jit_checkpoint=True)
    code, said = run(recipe, crashing.terminate, where, number)
    step = (number + 1) // 2 if where == "step" else 4
    assert (
        f"Stopped by SIGTERM after step {step} of 6; checkpoint-{step} is saved. The same command resumes from there." in said
    )
    assert code == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / FILE[kind]).exists()
    code, said = run(recipe)
    assert code == 0, said
    assert_same(tmp_path, kind, uninterrupted)


@SIGTERM
def test_sigterm_keeps_its_checkpoint_beside_the_best(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=6, save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="eval_nll", greater_is_better=True, learning_rate=0.01,
        enable_jit_checkpoint=True, per_device_train_batch_size=2, resume_from_checkpoint=True,
    )  # fmt: skip
    code, said = run(recipe, crashing.terminate, "step", 5)
    assert code == 128 + signal.SIGTERM, said
    assert "checkpoint-5 is saved" in said
    assert why_broken(tmp_path / "out" / "checkpoint-5") is None
    code, said = run(recipe)
    assert code == 0, said
    assert "Resuming from" in said


@SIGTERM
def test_sigterm_means_what_it_did_outside_of_training(tokenizer, text_data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, enable_jit_checkpoint=True, max_steps=2)
    assert signal.getsignal(signal.SIGTERM) is before
    trainer._sigterm.received = True  # of an earlier training
    assert trainer.train().global_step == 2
    assert signal.getsignal(signal.SIGTERM) is before
    trainer = build(
        BLTrainer, tokenizer, text_data, tmp_path, enable_jit_checkpoint=True, stop_on_nan=True,
        objective=f"{__name__}:nan_on_an_x",
    )  # fmt: skip
    with pytest.raises(LossError):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


@SIGTERM
def test_sigterm_to_one_process_stops_all_at_the_same_step(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=50, save_strategy="steps", save_steps=50, enable_jit_checkpoint=True
    )
    codes, said = ranks(tmp_path, crashing.run_rank, recipe, crashing.terminate, "step", 3, "1")
    assert "Stopped by SIGTERM after step 3 of 50; checkpoint-3 is saved." in "".join(said), said[0][-3000:]
    assert "With `resume_from_checkpoint: true` the command resumes from there." in "".join(said)
    assert all(codes)
    assert why_broken(tmp_path / "out" / "checkpoint-3") is None


@SIGTERM
def test_sigterm_to_the_launcher_reaches_all_processes(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=100_000, save_steps=100_000, logging_steps=1, enable_jit_checkpoint=True
    )
    process = subprocess.Popen(
        [*launcher(2), str(SCRIPT), "--config", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    guard = threading.Timer(120, process.kill)
    guard.start()
    said = ""
    for line in process.stdout:
        if "'grad_norm'" in line and "'grad_norm'" not in said:
            process.terminate()
        said += line
    process.wait()
    guard.cancel()
    found = re.search(r"Stopped by SIGTERM after step (\d+) of 100000; checkpoint-\1 is saved", said)
    assert found, said[-3000:]
    assert process.returncode != 0
    assert why_broken(tmp_path / "out" / f"checkpoint-{found[1]}") is None


@pytest.mark.parametrize("kind", ["full"], indirect=True, scope="module")  # an adapter's files are small
def test_full_disk(make, kind, uninterrupted, tmp_path):
    recipe = make(tmp_path)
    code, said = run(recipe, crashing.fill_disk, "step", 6)
    assert code == 2, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: Cannot write {tmp_path / 'out'}/checkpoint-4: ")
    assert "Earlier checkpoints are complete." in line
    assert "Traceback" not in said
    assert why_broken(tmp_path / "out" / "checkpoint-2") is None
    code, said = run(recipe)
    assert code == 0, said
    assert_same(tmp_path, kind, uninterrupted)


def test_resuming_in_python_takes_the_last_whole_checkpoint(tokenizer, text_data, tmp_path, capsys):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = train(Ordered, tokenizer, text_data, tmp_path, **options)
    (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").unlink()
    again = build(Ordered, tokenizer, text_data, tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is skipped, since its optimizer.pt is missing" in capsys.readouterr().err
    for name, p in weights(whole).items():
        assert torch.equal(weights(again)[name], p), name
    nothing = build(Ordered, tokenizer, text_data, tmp_path / "nothing", **options)
    with pytest.raises(CheckpointError, match=r"Cannot resume: .*nothing/out has no complete checkpoint"):
        nothing.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_run_resumed_in_a_later_epoch_sees_the_same_examples(step, tokenizer, text_data, tmp_path):
    data, options = text_data.select(range(12)), {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    options |= {"per_device_train_batch_size": 4, "objective": "neg_p"}
    whole = train(BLTrainer, tokenizer, data, tmp_path, **options)
    again = build(BLTrainer, tokenizer, data, tmp_path, **options)
    again_from = str(tmp_path / "out" / f"checkpoint-{step}")
    if FORGETS and step > 3:
        with pytest.raises(CheckpointError, match=r"would continue with the examples of the first\. Run `pip install"):
            again.train(resume_from_checkpoint=again_from)
        return
    again.train(resume_from_checkpoint=again_from)
    for name, p in weights(whole).items():
        assert torch.equal(weights(again)[name], p), name


def test_versions_that_would_lose_the_epoch_are_refused(monkeypatch, tmp_path):
    def check(epoch):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
        refuse_lost_epoch(str(tmp_path))

    installed = {"accelerate": "1.14.0", "transformers": "4.57.6"}
    monkeypatch.setattr("bl_trainer.training.resume.version", installed.get)
    for epoch in (0.5, 1.0, 2.0):
        check(epoch)
    with pytest.raises(CheckpointError, match=r" is 1\.333 epochs into its run, and accelerate 1\.14\.0 with transformers"):
        check(4 / 3)
    installed["transformers"] = "5.0.0"
    check(4 / 3)


def test_every_part_of_a_checkpoint_is_missed(tokenizer, text_data, tmp_path):
    train(Ordered, tokenizer, text_data, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / MANIFEST_FILE).unlink()  # as an older version leaves it
    assert why_broken(folder) is None
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert why_broken(folder) == f"its {'weights are' if name[0] == 'm' else f'{name} is'} missing"
        for part in (content[:-1], content[: len(content) // 2], b""):
            (folder / name).write_bytes(part)
            if name != "trainer_state.json" or part != content[:-1]:  # its last byte is but the end of the line
                assert why_broken(folder) == f"its {name} is truncated"
        (folder / name).write_bytes(content)
    (folder / "checkpoint-is-incomplete.txt").touch()
    assert why_broken(folder) == "it holds checkpoint-is-incomplete.txt"
    (folder / "checkpoint-is-incomplete.txt").unlink()
    record = json.loads((folder / "bl_trainer.json").read_text())
    (folder / "bl_trainer.json").write_text(json.dumps({**record, "processes": 2}))
    assert why_broken(folder) == "its rng_state_0.pth is missing"
    (folder / "bl_trainer.json").write_text(json.dumps(record))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert why_broken(folder) == "its model-00001-of-00002.safetensors is missing"


def test_a_checkpoint_is_judged_by_its_manifest(tokenizer, text_data, tmp_path):
    train(Ordered, tokenizer, text_data, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    folder = tmp_path / "out" / "checkpoint-1"
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).unlink()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert json.loads(text) == {"files": sizes}
    assert sizes.keys() >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    (folder / MANIFEST_FILE).write_text(text)
    (folder / "notes.txt").write_text("my own")
    for name in sizes:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert why_broken(folder) == f"its {name} is missing"
        for part in (content[: len(content) // 2], b"", *([] if name.endswith(".json") else [content[:-1]])):
            (folder / name).write_bytes(part)
            assert why_broken(folder) == f"its {name} is truncated"
        (folder / name).write_bytes(content)
        assert why_broken(folder) is None
    (folder / "config.json").write_text("{}")  # by hand
    assert why_broken(folder) is None
    (folder / MANIFEST_FILE).write_text(text[:-9])
    assert why_broken(folder) == f"its {MANIFEST_FILE} is truncated"
    (folder / MANIFEST_FILE).write_text("[]")  # which says nothing, so that names are gone by
    assert why_broken(folder) is None
    (folder / "optimizer.pt").unlink()
    assert why_broken(folder) == "its optimizer.pt is missing"


def test_a_checkpoint_that_is_written_anew_has_no_old_manifest(tokenizer, text_data, tmp_path, monkeypatch):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train(Ordered, tokenizer, text_data, tmp_path, **options)
    folder = tmp_path / "out" / "checkpoint-1"
    assert (folder / MANIFEST_FILE).exists()
    monkeypatch.setattr("bl_trainer.training.checkpoints.write_manifest", lambda checkpoint: None)
    train(Ordered, tokenizer, text_data, tmp_path, **options)
    assert not (folder / MANIFEST_FILE).exists()
    assert why_broken(folder) is None


def test_parts_of_sharded_checkpoints_are_missed(tmp_path):
    def write(name, content=b""):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    write("trainer_state.json", b'{"global_step": 1}')
    write("bl_trainer.json", b'{"processes": 2}')
    for rank in range(2):
        torch.save({}, tmp_path / f"rng_state_{rank}.pth")
    (tmp_path / "global_step1").mkdir()
    assert why_broken(tmp_path) == "its latest is missing"
    write("latest", b"global_step1")
    torch.save({}, tmp_path / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert why_broken(tmp_path) == "its global_step1/*optim_states.pt of process 1 is missing"
    torch.save({}, tmp_path / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert why_broken(tmp_path) is None
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    assert why_broken(tmp_path) == "its pytorch_model_fsdp_0/.metadata is missing"


def test_what_a_broken_checkpoint_held_does_not_stay(tokenizer, text_data, tmp_path):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "checkpoint-is-incomplete.txt").touch()
    train(Ordered, tokenizer, text_data, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    assert why_broken(tmp_path / "out" / "checkpoint-1") is None


def test_a_finished_run_is_left_as_it_is(make, kind, tmp_path):
    recipe = make(tmp_path, max_steps=-1, num_train_epochs=0.5, lr_scheduler_type="constant")
    assert run(recipe)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for _ in range(2):
        code, said = run(recipe)
        assert code == 0, said
        assert "out is left as it is." in said
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "out" / FILE[kind]).unlink()  # as if killed before the model was saved
    assert run(recipe)[0] == 0
    assert (tmp_path / "out" / FILE[kind]).exists()


def resumed(folder, checkpoint, data_folder, **changes):
    recipe = write_recipe(folder, checkpoint, data_folder, max_steps=2, save_steps=1, **changes)
    return Recipe.read(["--config", str(recipe)])


def test_a_save_that_is_killed_leaves_no_record_of_an_earlier_one(tmp_path):
    """The record tells a complete model; beside an earlier run's, old and new weights could stand side by side."""
    (tmp_path / RECORD_FILE).touch()
    trainer = SimpleNamespace(args=SimpleNamespace(should_save=True))

    def save():
        with RunRecord.last_in(trainer, tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save()
    assert not (tmp_path / RECORD_FILE).exists()


def test_what_a_run_can_not_go_on_with(checkpoint, data_folder, tmp_path, capsys):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"], "save_only_model": False}
    main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data_folder, max_steps=2, save_steps=1, **lora))])
    again = {**lora, "resume_from_checkpoint": True}
    capsys.readouterr()
    assert resumed(tmp_path, checkpoint, data_folder, **again).plan_resume().checkpoint == tmp_path / "out" / "checkpoint-2"
    assert "warning" not in capsys.readouterr().err
    resumed(tmp_path, checkpoint, data_folder, **again, seed=7).plan_resume()
    assert "checkpoint-2 the recipe has changed: `seed` from 42 to 7." in capsys.readouterr().err
    for key, value in (("lora_r", 8), ("use_dora", True), ("optim", "sgd"), ("learning_rate", 1e-3), ("adam_beta1", 0.5)):
        with pytest.raises(
            RecipeError, match=f"Cannot resume from .*: the recipe changes `{key}` from .* to .*. Change it back"
        ):
            resumed(tmp_path, checkpoint, data_folder, **{**again, key: value}).plan_resume()
    first = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(RecipeError, match=r"checkpoint-2 is later, and would be overwritten\. Write another `output_dir`"):
        resumed(tmp_path, checkpoint, data_folder, **{**again, "resume_from_checkpoint": first}).plan_resume()
    path = tmp_path / "out" / "checkpoint-2" / "bl_trainer.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "save_only_model": True}))
    with pytest.raises(RecipeError, match="was saved with `save_only_model: true`, without what resuming needs"):
        resumed(tmp_path, checkpoint, data_folder, **again).plan_resume()
    path.unlink()  # as TRL's own trainer leaves it
    path.with_name(MANIFEST_FILE).unlink()
    assert resumed(tmp_path, checkpoint, data_folder, **again).plan_resume().checkpoint
    with pytest.raises(RecipeError, match=r"was trained with objective \{'name': 'nll'\}, the recipe says"):
        resumed(tmp_path, checkpoint, data_folder, **again, objective="neg_p").plan_resume()


def test_a_recipe_is_compared_with_its_checkpoint_once(checkpoint, data_folder, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, checkpoint, data_folder, max_steps=1, save_steps=1, resume_from_checkpoint=True)
    main(["train", "--config", str(recipe)])
    compared = []
    monkeypatch.setattr("bl_trainer.training.resume.refuse_lost_epoch", compared.append)
    main(["train", "--config", str(recipe)])
    assert compared == [str(tmp_path / "out" / "checkpoint-1")]


def test_a_log_goes_on_after_a_line_that_was_cut_short(tmp_path):
    log, args = MetricsLog(), SimpleNamespace(output_dir=str(tmp_path))
    for step, nll in ((1, 3.0), (2, 2.0)):
        log.on_log(args, SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=4), None, {"eval_nll": nll})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-12])  # as by a kill
    for step, nll in ((2, 2.0), (3, 1.0)):
        log.on_log(args, SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=4), None, {"eval_nll": nll})
    assert Curve(tmp_path).points("eval_nll") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_an_objective_is_the_same_with_its_defaults_written(checkpoint, data_folder, tmp_path, capsys):
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=2, save_steps=1, save_only_model=False, objective="anneal"
    )
    main(["train", "--config", str(recipe)])
    record = json.loads((tmp_path / "out" / "checkpoint-2" / "bl_trainer.json").read_text())
    assert record["objective"] == {"name": "anneal", "start": 0.5, "end": 5.0}  # which may be others in another version
    capsys.readouterr()
    again = {"resume_from_checkpoint": True, "save_only_model": False}
    written = {"name": "anneal", "start": 0.5, "end": 5}
    for spec in ("anneal", written):
        assert resumed(tmp_path, checkpoint, data_folder, **again, objective=spec).plan_resume().checkpoint
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"was trained with objective .*'end': 5.0}, the recipe says .*'end': 4"):
        resumed(tmp_path, checkpoint, data_folder, **again, objective={**written, "end": 4}).plan_resume()
    path = write_recipe(tmp_path, checkpoint, data_folder, save_steps=1, **again, objective="anneal", max_steps=4)
    Recipe.read(["--config", str(path)]).plan_resume()
    assert "`max_steps` from 2 to 4." in capsys.readouterr().err


def test_other_numbers_of_processes_and_later_epochs_of_streams_are_said(tokenizer, text_data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("bl_trainer.training.resume.logger.warning", said.append)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 8}
    stream = text_data.select(range(16)).to_iterable_dataset()
    train(Ordered, tokenizer, stream, tmp_path, **options)
    path = tmp_path / "out" / "checkpoint-3"
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "epoch": 0.5 if FORGETS else 1.5}))
    record = json.loads((path / "bl_trainer.json").read_text())
    (path / "bl_trainer.json").write_text(json.dumps({**record, "processes": 2}))
    again = build(Ordered, tokenizer, stream, tmp_path, **options)
    take_up(again, planned_resume(again.args, str(path), 1))
    assert any("is of 2 processes, and now there are 1" in line for line in said)
    assert any("from a stream the examples may come in another order" in line for line in said) or FORGETS


SAVES = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture
def said(monkeypatch):
    """What resuming warns of."""
    lines = []
    monkeypatch.setattr("bl_trainer.training.resume.logger.warning", lines.append)
    return lines


def taken_up(folder, tokenizer, rows, **options):
    """Return a trainer that has taken up the last checkpoint of a run, and whether that was finished."""
    trainer = build(Ordered, tokenizer, rows, folder, **{**SAVES, **options})
    return trainer, take_up(trainer, planned_resume(trainer.args, True, 1))


def test_a_run_is_finished_by_the_steps_that_it_has_now(tokenizer, text_data, tmp_path):
    """What a run was shortened by, or its rows and batches, may be others now."""
    rows, epochs = text_data.select(range(8)), {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    train(Ordered, tokenizer, rows, tmp_path, **{**SAVES, **epochs, "max_steps": 2})
    assert taken_up(tmp_path, tokenizer, rows, **{**epochs, "max_steps": 2})[1]
    assert taken_up(tmp_path, tokenizer, rows, **{**epochs, "gradient_accumulation_steps": 2})[1]
    assert not taken_up(tmp_path, tokenizer, text_data.select(range(20)), **{**epochs, "gradient_accumulation_steps": 2})[1]
    trainer, is_finished = taken_up(tmp_path, tokenizer, rows, **epochs)
    assert not is_finished
    drawn = torch.random.get_rng_state()
    take_up(trainer, planned_resume(trainer.args, True, 1))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


def test_a_moved_place_in_the_data_and_the_schedule_is_said(tokenizer, text_data, tmp_path, said):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "objective": "anneal"}
    train(Ordered, tokenizer, text_data, tmp_path, **SAVES, **options, max_steps=1)
    for batch, accumulation in ((4, 2), (2, 4), (8, 1)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        taken_up(tmp_path, tokenizer, text_data, **{**options, **changes}, max_steps=2)
        assert not any("trained twice" in line for line in said)
    assert all("from 1 to 2 steps moves: it resumes at 50% of its schedule, where it was at 100%" in line for line in said)
    taken_up(tmp_path, tokenizer, text_data, **{**options, "gradient_accumulation_steps": 1}, max_steps=2)
    assert any("up to example 8 of epoch 1, and the run resumes after example 4 of epoch 1: some" in line for line in said)
    said.clear()
    options |= {"gradient_accumulation_steps": 1, "ignore_data_skip": True}
    taken_up(tmp_path, tokenizer, text_data, **options, max_steps=2)
    assert not any("trained twice" in line for line in said)


def test_an_order_that_is_not_seeded_is_said(tokenizer, text_data, tmp_path, said):
    options = {"accelerator_config": {"use_seedable_sampler": False}}
    train(BLTrainer, tokenizer, text_data, tmp_path, **SAVES, **options, max_steps=1)
    taken_up(tmp_path, tokenizer, text_data, max_steps=2)
    assert not said
    taken_up(tmp_path, tokenizer, text_data, **options, max_steps=2)
    assert "use_seedable_sampler: false}` draws the order anew where a run resumes" in said[0]


def test_the_best_score_is_compared_with_its_own_metric(tokenizer, text_data, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_nll", "max_steps": 1}
    train(BLTrainer, tokenizer, text_data, tmp_path, eval_data=text_data.select(range(8)), **SAVES, **options)
    for change in ({}, {"metric_for_best_model": "nll"}, {"metric_for_best_model": None}):
        taken_up(tmp_path, tokenizer, text_data, eval_data=text_data, **{**options, **change})
    for change in ({"metric_for_best_model": "eval_target_prob"}, {"greater_is_better": True}):
        with pytest.raises(CheckpointError, match=r"its best score is by `metric_for_best_model: eval_nll`, .* is asked for"):
            taken_up(tmp_path, tokenizer, text_data, eval_data=text_data, **{**options, **change})


def test_the_key_of_a_configuration_resumes_too(tokenizer, text_data, tmp_path):
    options = {**SAVES, "resume_from_checkpoint": True}
    assert train(Ordered, tokenizer, text_data, tmp_path, **options, max_steps=1).state.global_step == 1
    trainer = build(Ordered, tokenizer, text_data, tmp_path, **options, max_steps=2)
    trainer.train()
    assert (trainer.state.global_step, trainer._begin.steps) == (2, 1)


def test_a_loss_that_another_trainer_had_is_read_from_its_arguments(tokenizer, text_data, tmp_path, said):
    train(Ordered, tokenizer, text_data, tmp_path, **SAVES, max_steps=1)
    path = tmp_path / "out" / "checkpoint-1"
    for name in (RECORD_FILE, MANIFEST_FILE):  # which TRL's own trainer doesn't write
        (path / name).unlink()
    taken_up(tmp_path, tokenizer, text_data, max_steps=1)
    assert not said
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type="dft")
    torch.save(args, path / "training_args.bin")
    with pytest.raises(CheckpointError, match="it was trained with `loss_type: dft`"):
        taken_up(tmp_path, tokenizer, text_data, max_steps=1)
    (path / "training_args.bin").unlink()
    taken_up(tmp_path, tokenizer, text_data, max_steps=1)
    assert "does not record its loss, which is taken for NLL" in said[0]


def test_other_code_of_an_objective_is_said(tokenizer, text_data, tmp_path, said, monkeypatch):
    options = {"objective": f"{__name__}:nan_on_an_x", "max_steps": 1}
    train(Ordered, tokenizer, text_data, tmp_path, **SAVES, **options)
    taken_up(tmp_path, tokenizer, text_data, **options)
    assert not said
    monkeypatch.setattr("bl_trainer.training.record.inspect.getsource", str)
    taken_up(tmp_path, tokenizer, text_data, **options)
    assert "the code of the objective has changed since" in said[0]


def test_checkpoints_are_ordered_by_their_steps(checkpoint, data_folder, tmp_path):
    """Their names may be others."""
    keys = {"save_only_model": False, "lr_scheduler_type": "constant"}
    main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data_folder, max_steps=2, save_steps=1, **keys))])
    out = tmp_path / "out"
    os.symlink(out / "checkpoint-2", out / "last-checkpoint")
    os.rename(out / "checkpoint-1", out / "first")
    asked = str(out / "last-checkpoint")
    assert resumed(tmp_path, checkpoint, data_folder, **keys, resume_from_checkpoint=asked).plan_resume().checkpoint
    with pytest.raises(RecipeError, match=r"checkpoint-2 is later, and would be overwritten"):
        resumed(tmp_path, checkpoint, data_folder, **keys, resume_from_checkpoint=str(out / "first")).plan_resume()


def test_another_spelling_of_a_key_is_no_change(checkpoint, data_folder, tmp_path, capsys):
    keys = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": "1e-3", "seed": "8"}
    main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data_folder, max_steps=2, save_steps=1, **keys))])
    path = tmp_path / "out" / "checkpoint-2" / "bl_trainer.json"
    record = json.loads(path.read_text())
    assert (record["recipe"]["learning_rate"], record["recipe"]["seed"]) == (0.001, 8)
    path.write_text(json.dumps({**record, "recipe": {**record["recipe"], "learning_rate": "1e-3", "adam_epsilon": "1e-8"}}))
    spelled = {"lora_target_modules": ["v_proj", "q_proj"], "learning_rate": 0.001, "seed": 8, "resume_from_checkpoint": True}
    capsys.readouterr()
    resumed(tmp_path, checkpoint, data_folder, **{**keys, **spelled}).plan_resume()
    assert "warning" not in capsys.readouterr().err


# Output folders, models


def test_an_output_folder_that_cannot_be_written(checkpoint, data_folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    recipe = write_recipe(tmp_path, checkpoint, data_folder, output_dir=str(tmp_path / "file" / "out"))
    with pytest.raises(RecipeError, match=r"`output_dir: .*file/out` can't be written: Not a directory\. Write another"):
        Recipe.read(["--config", str(recipe)]).plan_resume()

    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    recipe = write_recipe(tmp_path, checkpoint, data_folder)
    with pytest.raises(RecipeError, match="can't be written: Read-only file system"):
        Recipe.read(["--config", str(recipe)]).plan_resume()


def test_a_checkpoint_of_another_model(checkpoint, data_folder, tmp_path):
    lora = {"use_peft": True, "lora_target_modules": ["q_proj"], "max_steps": 1, "resume_from_checkpoint": True}
    recipe = write_recipe(tmp_path, checkpoint, data_folder, **lora)
    main(["train", "--config", str(recipe)])
    for key, model, message in (
        ("model_name_or_path", str(data_folder), f"is an adapter of {checkpoint}, and the model is {data_folder}"),
        ("use_peft", None, r"holds an adapter, and the recipe has no `use_peft`"),
    ):
        changes = {**lora, key: model} if model else {key: lora[key] for key in ("max_steps", "resume_from_checkpoint")}
        recipe = write_recipe(tmp_path, checkpoint, data_folder, **changes)
        with pytest.raises(RecipeError, match=re.escape(message)):
            Recipe.read(["--config", str(recipe)]).plan_resume()
    recipe = write_recipe(tmp_path, tmp_path / "out" / "checkpoint-1", data_folder)
    with pytest.raises(RecipeError, match=re.escape(f"checkpoint-1` is an adapter of {checkpoint}. Write `model_")):
        Recipe.read(["--config", str(recipe)])
    shutil.copytree(checkpoint, tmp_path / "other")
    whole = {"max_steps": 1, "save_steps": 1, "resume_from_checkpoint": True, "output_dir": str(tmp_path / "whole")}
    main(["train", "--config", str(write_recipe(tmp_path, checkpoint, data_folder, **whole))])
    for model, is_same in ((checkpoint, True), (tmp_path / "whole" / "checkpoint-1", True), (tmp_path / "other", False)):
        argv = ["--config", str(write_recipe(tmp_path, model, data_folder, **whole))]
        if is_same:
            assert Recipe.read(argv).plan_resume().checkpoint
        else:
            with pytest.raises(RecipeError, match=f"it was trained from {checkpoint}, and the model is {model}. Write `model"):
                Recipe.read(argv).plan_resume()
    os.symlink(checkpoint, tmp_path / "link")
    recipe = write_recipe(tmp_path, tmp_path / "link", data_folder, **lora)
    assert Recipe.read(["--config", str(recipe)]).plan_resume().checkpoint == tmp_path / "out" / "checkpoint-1"


# A loss that is not finite


def nan_on_an_x(logp, label):
    return -logp * torch.where(label == 4 + ord("x") - ord("a"), float("nan"), 1.0)


ROWS = ["abc", "hello", "some words", "axe", "def", "fox", "more", "end"]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, "3"),
        ({"padding_free": True}, "3"),
        ({"packing": True, "max_length": 16}, None),
        ({"shuffle_dataset": True, "seed": 3}, None),
        ({"packing": True, "max_length": 10, "packing_strategy": "wrapped"}, None),
        ({"stream": True}, "3"),
    ],
    ids=str,
)
def test_a_nan_loss_stops_with_the_step_and_the_rows(options, rows, tokenizer, tmp_path):
    data = Dataset.from_list([{"text": text} for text in ROWS])
    options = dict(options)
    data = data.to_iterable_dataset() if options.pop("stream", False) else data
    options |= {"objective": f"{__name__}:nan_on_an_x", "stop_on_nan": True, "per_device_train_batch_size": 1}
    trainer = build(Ordered, tokenizer, data, tmp_path, max_steps=8, **options)
    with pytest.raises(LossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "weights, as far as they are on this process, are finite: look at these rows and at the objective" in message
    step, named = re.search(
        r"The loss is nan in step (\d+) on process 0, whose micro-batch holds the rows ([\d, ]+) of", message
    ).groups()
    assert int(step) == trainer.state.global_step + 1
    assert rows is None or named == rows
    assert any("x" in ROWS[int(row)] for row in named.split(", "))


def test_a_nan_loss_without_row_numbers(tokenizer, tmp_path):
    ids = [[4, 5, 6], [7, 4 + ord("x") - ord("a"), 5]]
    data = Dataset.from_list([{"input_ids": each, "labels": each} for each in ids])
    options = {"objective": f"{__name__}:nan_on_an_x", "stop_on_nan": True, "dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(LossError, match="whose micro-batch holds unknown rows of the training set"):
        train(Ordered, tokenizer, data, tmp_path, **options)


def test_a_gradient_that_is_not_finite_is_not_stepped_with(tokenizer, text_data, tmp_path):
    model = make_llama(tokenizer)
    model.lm_head.weight.data *= 20
    options = {"objective": {"name": "power", "alpha": -2}, "stop_on_nan": True, "save_strategy": "steps", "save_steps": 1}
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, model, max_steps=3, **options)
    with pytest.raises(LossError) as caught:
        trainer.train()
    (step,) = re.search(
        r"The (?:gradient of step (?=\d+ is not finite, and the step is not made)|loss is inf in step )(\d+)", str(caught.value)
    ).groups()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == int(step) - 1


class Elsewhere(torch.Tensor):
    """A tensor on another device than the others, as of a model that is spread over several."""

    device = torch.device("cuda", 1)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.stack and not all(isinstance(each, cls) for each in args[0]):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_gradients_on_several_devices(wrong):
    gradients = [torch.ones(2), torch.ones(2).as_subclass(Elsewhere)]
    if wrong is not None:
        gradients[wrong][1] = float("inf")
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(grad=each) for each in gradients])
    with nullcontext() if wrong is None else pytest.raises(LossError, match="gradient of step 1 is not finite"):
        RefuseNonfinite().on_pre_optimizer_step(SimpleNamespace(fp16=False), SimpleNamespace(global_step=0), None, model)


def test_weights_that_are_not_finite_are_told_apart(tokenizer, text_data, tmp_path):
    trainer = build(Ordered, tokenizer, text_data, tmp_path, stop_on_nan=True)
    trainer.model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LossError, match=r"1 of the model's weights are not finite either, from model\.layers\.0\.self"):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_free": True},
        {"packing": True, "max_length": 64, "shuffle_dataset": True},
        {"packing": True, "max_length": 24, "dataset_num_proc": 2},
    ],
    ids=str,
)
def test_looking_for_nan_changes_nothing(options, tokenizer, text_data, tmp_path):
    options = {"objective": "neg_p", "max_steps": 3, "threshold": {"above_percentile": 20}, **options}
    plain, looking = (train(Ordered, tokenizer, text_data, tmp_path, stop_on_nan=on, **options) for on in (False, True))
    for name, p in weights(plain).items():
        assert torch.equal(weights(looking)[name], p), name
    assert looking.threshold == plain.threshold


def test_a_nan_loss_in_the_verb(checkpoint, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    recipe = write_recipe(
        tmp_path,
        checkpoint,
        data,
        objective=f"{__name__}:nan_on_an_x",
        stop_on_nan=True,
        max_steps=20,
        per_device_train_batch_size=1,
    )
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(recipe)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"error: The loss is nan in step \d+ on process 0, whose micro-batch holds the rows [35] of", said)
    assert "Traceback" not in said


# Data

GOOD = [json.dumps({"prompt": f"a {i}", "completion": "b"}) for i in range(20)]


def spoilt(line):
    lines = list(GOOD)
    lines[10] = line
    return "\n".join(lines).encode() + b"\n"


FAULTS = {
    "cut": ("data.jsonl", spoilt('{"prompt": "x", "compl'), "line 11: Unterminated string starting at column 17"),
    "cut at the end": ("data.jsonl", spoilt(GOOD[10])[:-9], "line 20: "),
    "not UTF-8": ("data.jsonl", spoilt('{"prompt": "?"}').replace(b"?", b"\xe9"), "line 11: byte 0xe9 is not UTF-8"),
    "not an object": ("data.jsonl", spoilt('"only text"'), 'line 11: it holds "only text", not an object'),
    "null": ("data.jsonl", spoilt('{"prompt": "a", "completion": null}'), "line 11: 'completion' is null, not a text"),
    "number": ("data.jsonl", spoilt('{"prompt": 7, "completion": "b"}'), "line 11: 'prompt' is 7, not a text"),
    "missing": ("data.jsonl", spoilt('{"prompt": "a"}'), "line 11: it has no 'completion'"),
    "array": ("data.json", b'[\n{"text": "a"},\n{"text": \n', "line 4: Expecting value"),
    "array not UTF-8": ("data.json", b'[\n{"text": "a"},\n{"text": "\xff"}]', "line 3: byte 0xff is not UTF-8 text"),
    "text not UTF-8": ("data.txt", b"a\nb\xff\n", "line 2: byte 0xff is not UTF-8 text. Save the file as UTF-8"),
    "csv": ("data.csv", b"prompt,completion\na,b\nc\n", "line 3: 'completion' is empty"),
    "content": ("data.jsonl", b'{"messages": [{"role": "user", "content": null}]}', "line 1: 'messages' has "),
    "text for messages": ("data.jsonl", b'{"messages": "hi"}', "line 1: 'messages' is \"hi\""),
    "csv not UTF-8": ("data.csv", b"text\na\nb\xff\n", "line 3: byte 0xff is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_line_is_named(name, streaming, checkpoint, tmp_path, capsys):
    file, content, message = FAULTS[name]
    (tmp_path / file).write_bytes(content)
    stream = {"dataset_streaming": True, "max_steps": 30} if streaming else {}
    recipe = write_recipe(tmp_path, checkpoint, tmp_path / file, per_device_train_batch_size=1, **stream)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", str(recipe)])
    assert caught.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"{tmp_path / file}, {message}" in line


def test_messages_without_content_are_named(checkpoint, tmp_path, capsys):
    good, bad = ([{"role": "user", "content": "a"}, {"role": "assistant", **more}] for more in ({"content": "b"}, {}))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in (good, bad)))
    recipe = write_recipe(tmp_path, checkpoint, tmp_path / "data.jsonl")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe)])
    assert "data.jsonl, line 2: 'messages' has " in capsys.readouterr().err


def test_the_files_of_a_folder_and_of_a_mixture_are_searched(checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(spoilt("{"))
    mixture = {"dataset_name": None, "datasets": [{"path": "json", "data_files": str(tmp_path / "folder" / "*.jsonl")}]}
    for source in ({"dataset_name": str(tmp_path / "folder")}, mixture):
        recipe = write_recipe(tmp_path, checkpoint, tmp_path, **source)
        with pytest.raises(RecipeError, match=r"folder/train\.jsonl, line 11: Expecting property name"):
            Recipe.read(["--config", str(recipe)]).load_datasets()
