"""Several processes, with gloo, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import worker
from bl_trainer.cli import main
from conftest import make_double, write_recipe
from forking import free_port, ranks, run_script
from multimodal import SHOWN
from ways import relative_difference

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "scripts" / "train.py"


def launcher(processes):
    """The words of `accelerate launch`; `--multi_gpu` is its word for torchrun, the recipe's `use_cpu` makes it gloo."""
    several = ["--multi_gpu"] if processes > 1 else []
    return [
        sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
    ]  # fmt: skip


def most_probable_first(model, tokenizer, data):
    """Sort examples by the probability of their most probable target token, and say which those are."""
    peaks = []
    for row in data:
        ids = torch.tensor([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            p = model(ids[None]).logits[0, :-1].softmax(-1).gather(1, ids[1:, None])
        peaks.append(p.max().item())
    order = sorted(range(len(data)), key=lambda i: -peaks[i])
    return [data[i] for i in order], [peaks[i] for i in order]


COMPOSED = {
    "name": "power", "alpha": {"from": 0, "to": 2}, "floor": 0.1, "mix": {"test_trainer:pushes_entropy": 0.5},
    "special_tokens": "nll",
}  # fmt: skip
CASES = {
    "padded": {"objective": {"name": "power", "alpha": 0.5}},
    "padding_free": {"objective": "neg_p", "padding_free": True},
    "flattened": {"objective": "neg_p"},  # by a collator of the user's own
    "entropy": {"objective": "test_trainer:pushes_entropy"},
    "nll": {},
    "kept": {"objective": "neg_p"},
    "streamed_evaluation": {"objective": "neg_p", "accelerator_config": {"dispatch_batches": False}},
    "reference": {"objective": "asft"},
    "composed": {"objective": COMPOSED, "padding_free": True},
    "weighted": {"objective": COMPOSED, "assistant_only_loss": True},
    "nothing_for_one_process": {"objective": "neg_p", "completion_only_loss": True},
    "float32": {"objective": "neg_p"},
}


def weighted(text, i):
    """Two answers, of unequal weights; one process gets more of weight 0."""
    answers = [
        {"role": "assistant", "content": text[:9], "weight": float(i % 4 < 2) * i},
        {"role": "assistant", "content": text},
    ]
    return [{"role": "user", "content": "a"}, *({"weight": 1.5, **answer} for answer in answers)]


def examples(name, tokenizer, text_data):
    """Training set, evaluation set, and a threshold between their tokens.

    Of two processes, one takes examples 0, 1, 4, 5 of a step and the other 2, 3, 6, 7: that one starts with two improbable
    ones, or gets none with a target token.
    """
    if name == "nothing_for_one_process":
        train = []
        for i, row in enumerate(text_data.select(range(16))):
            ids = tokenizer(row["text"])["input_ids"]
            train.append({"input_ids": ids, "completion_mask": [int(i % 4 < 2)] * len(ids)})
        return train, train[:4], None
    if name == "weighted":
        train = [{"messages": weighted(row["text"], i)} for i, row in enumerate(text_data.select(range(16)))]
        return train, train[:12], None
    ordered, peaks = most_probable_first(make_double(tokenizer), tokenizer, text_data)
    threshold = (peaks[-2] + peaks[5]) / 2
    assert peaks[-2] < threshold < peaks[5]
    # 13 is no multiple of 2 x 3; where the length is unknown, so are the examples repeated to make it one
    evaluation = text_data.select(range(12 if name == "streamed_evaluation" else 13))
    train = ordered[:2] + ordered[-2:] + ordered[2:14]
    if name == "composed":
        train = [{**row, "objective_weight": i % 3} for i, row in enumerate(train)]
    return train, list(evaluation), threshold


def cases_for(processes, tokenizer, text_data):
    cases = []
    for name, options in CASES.items():
        train, evaluation, threshold = examples(name, tokenizer, text_data)
        normalize = {"normalize": "kept" if name == "kept" else "tokens"}
        sizes = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4 // processes,
            "per_device_eval_batch_size": 3,
        }
        limits = {"threshold": None if threshold is None else {"above": threshold, **normalize}}
        cases.append({"name": name, "train": train, "eval": evaluation, "options": {**options, **limits, **sizes}})
    return cases


@pytest.fixture(scope="module")
def results(tokenizer, text_data, checkpoint, tmp_path_factory):
    """What one process and two make of each case, and what two say on stderr."""
    folder = tmp_path_factory.mktemp("processes")
    path = folder / "cases.json"
    path.write_text(json.dumps(cases_for(2, tokenizer, text_data)))
    codes, said = ranks(folder, worker.main, checkpoint, path)
    assert codes == [0, 0], said[0][-6000:]
    two = torch.load(path.with_suffix(".pt"), weights_only=False)
    assert two["processes"] == 2
    with mock.patch.dict(os.environ):
        one = {case["name"]: worker.run(case, tokenizer, str(folder))[1] for case in cases_for(1, tokenizer, text_data)}
    return {1: one, 2: two}, "".join(said)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_as_one(name, results):
    """Unequal token counts, a process whose micro-batches keep nothing, and an uneven evaluation set."""
    found, said = results
    one, two = found[1][name], found[2][name]
    assert one["gradient"].norm() > 0
    bound = 1e-4 if name == "float32" else 1e-9
    assert (one["gradient"] - two["gradient"]).norm() / one["gradient"].norm() < bound
    for part in ("log", "eval"):
        for metric in ("loss", "nll", "target_prob", "kept_fraction", "gradient_weight", "entropy", "mean_token_accuracy"):
            key = metric if part == "log" else f"eval_{metric}"
            assert two[part][key] == pytest.approx(one[part][key], rel=max(bound, 1e-6)), key  # losses are logged in float32
    assert said.count("count twice in the metrics") == 1  # of the stream alone


def test_gradient_of_sharded_heads(results):
    """FSDP2, the head tied, with the rest, and as a unit of its own."""
    errors = results[0][2]["sharded"]
    assert {where[:2] for where in errors} == {(True, False), (False, False), (False, True)}
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("name", SHOWN)
def test_two_processes_see_images_as_one(name, results, tokenizer, tmp_path):
    with mock.patch.dict(os.environ):
        one = worker.shown(name, tokenizer, 1, tmp_path)
    assert relative_difference(results[0][2]["shown"][name], one) < 1e-6


def test_train_script_end_to_end(checkpoint, data_folder, tmp_path, capsys):
    """Local JSONL, LoRA, two processes, evaluation, best checkpoint by eval_nll, resumed by the same command."""
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"],
        objective={"name": "power", "alpha": 0.5}, threshold=0.001, learning_rate=0.5, max_steps=6, eval_strategy="steps",
        eval_steps=2, save_steps=2, logging_steps=2, per_device_train_batch_size=4, load_best_model_at_end=True,
        metric_for_best_model="eval_nll", resume_from_checkpoint=True,
    )  # fmt: skip
    codes, said = ranks(tmp_path, run_script, SCRIPT, "--config", recipe)
    assert codes == [0, 0], said[0][-6000:]
    out = tmp_path / "out"
    assert "".join(said).count(f"Model saved to {out}.") == 1
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_nll"] for entry in state["log_history"] if "eval_nll" in entry}
    assert sorted(evaluated) == [2, 4, 6]
    best = min(evaluated, key=evaluated.get)
    assert state["best_metric"] == evaluated[best]
    saved = load_file(out / "adapter_model.safetensors")
    for name, tensor in load_file(out / f"checkpoint-{best}" / "adapter_model.safetensors").items():
        assert torch.equal(saved[name], tensor)
    assert json.loads((out / "bl_trainer.json").read_text())["objective"] == {"name": "power", "alpha": 0.5}
    assert "## Objective" in (out / "README.md").read_text()
    main(["train", "--config", str(recipe)])
    assert "out is left as it is." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe), "--objective", "neg_p"])
    said = capsys.readouterr().err
    assert "was trained with objective {'name': 'power', 'alpha': 0.5}, the recipe says" in said


def test_module_verb_full_fine_tune_and_own_objective_beside_the_recipe(checkpoint, data_folder, tmp_path):
    (tmp_path / "my_losses.py").write_text(
        "def tilted(logp, entropy, *, gamma=1.0):\n    return -logp * (1 + gamma * entropy.detach())\n"
    )
    recipe = write_recipe(tmp_path, checkpoint, data_folder, max_steps=2, learning_rate=0.1, save_strategy="no")
    objective = json.dumps({"name": "my_losses:tilted", "gamma": 0.5})
    command = [*launcher(1), "-m", "bl_trainer", "train", "--config", str(recipe), "--objective", objective]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    trained, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", checkpoint))
    assert any(not torch.equal(trained[name], start[name]) for name in start)


def test_qlora(checkpoint, data_folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` isn't installed")
    recipe = write_recipe(
        tmp_path, checkpoint, data_folder, max_steps=2, learning_rate=0.1, objective="neg_p", save_strategy="no",
        load_in_4bit=True, use_peft=True, lora_r=4,
    )  # fmt: skip
    main(["train", "--config", str(recipe)])
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_user_mistake_is_one_sentence(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, data_folder, objective="negp")
    codes, said = ranks(tmp_path, main, ["train", "--config", str(recipe)])
    assert all(codes)
    assert "".join(said).count("error: `objective`: Unknown objective 'negp'. Did you mean 'neg_p'?") == 1
    assert not (tmp_path / "out").exists()


def test_processes_that_would_train_alone_are_refused(checkpoint, data_folder, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, data_folder, use_cpu=False)
    environment = {"WORLD_SIZE": 2, "RANK": 0}
    codes, said = ranks(tmp_path, main, ["train", "--config", str(recipe)], processes=None, environment=environment)
    assert codes == [2]
    assert "error: 2 processes were launched, and each would train alone. On CPUs write `use_cpu: true`" in said[0]


@pytest.mark.parametrize(("argv", "message"), [([], "no verb"), (["trian"], "unknown verb 'trian'")])
def test_unknown_verb(argv, message):
    done = subprocess.run([sys.executable, "-m", "bl_trainer", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "accelerate launch -m bl_trainer train --config recipe.yaml" in done.stderr


def test_help_lists_our_keys(capsys):
    main(["train", "--help"])
    said = capsys.readouterr().out
    assert "--objective" in said
    assert "--threshold" in said
