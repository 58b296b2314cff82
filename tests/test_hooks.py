"""What transformers does around the loss: restarts, hyperparameter searches, schedule-free optimizers; a replaced loss."""

import functools
import importlib.util

import optuna
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from bl_trainer import BLTrainer
from conftest import make_llama
from ways import Ordered, build, train, weights

# A loss that is replaced


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module of somebody else's, whose `compute_loss` takes the model's own loss."""
    (tmp_path / "stranger.py").write_text(
        "from transformers import Trainer\n"
        "def compute_loss(self, model, inputs, *args, **kwargs):\n"
        "    return Trainer.compute_loss(self, model, inputs, *args, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.find_spec("stranger")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_a_replaced_loss_of_trls_does_not_matter(verb, wraps, stranger, tokenizer, text_data, tmp_path, monkeypatch):
    def done():
        trainer = build(Ordered, tokenizer, text_data, tmp_path, eval_data=text_data, objective="neg_p")
        result = getattr(trainer, verb)(*([trainer.eval_dataset] if verb == "predict" else []))
        return weights(trainer), result.metrics if verb != "evaluate" else result

    expected, log = done()
    replaced = stranger.compute_loss
    if wraps:
        functools.update_wrapper(replaced, SFTTrainer.compute_loss)
    monkeypatch.setattr(SFTTrainer, "compute_loss", replaced)
    found, other = done()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    for name in ("train_loss", "eval_loss", "eval_nll", "test_loss"):
        assert other.get(name) == log.get(name)


# `auto_find_batch_size`


class RunsOut(Ordered):
    """Finds no memory for the second micro-batch, the first time."""

    steps = 0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_the_first_log_after_a_restart_has_no_abandoned_micro_batch(tokenizer, text_data, tmp_path):
    options = {"objective": "neg_p", "max_steps": 2, "gradient_accumulation_steps": 3}
    restarted = train(
        RunsOut, tokenizer, text_data, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, **options
    )
    size = restarted._train_batch_size
    assert 0 < size < 8
    direct = train(Ordered, tokenizer, text_data, tmp_path, per_device_train_batch_size=size, **options)
    logs, expected = ([log for log in each.state.log_history if "nll" in log] for each in (restarted, direct))
    for log, other in zip(logs, expected, strict=True):
        own = {name: value for name, value in other.items() if not name.startswith("train_")}
        assert own.items() <= log.items()
    assert logs[0]["num_tokens"] < logs[1]["num_tokens"]


# Hyperparameter search

RATES = [1e-5, 1e-2]
LORA = LoraConfig(r=4, target_modules="all-linear")


def space(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", *RATES)}


def search(trainer, hp_space=space, values=RATES, **kwargs):
    sampler = optuna.samplers.GridSampler({"learning_rate": values})
    return trainer.hyperparameter_search(
        hp_space=hp_space, n_trials=len(values), direction="minimize", backend="optuna", sampler=sampler, **kwargs
    )


@pytest.mark.parametrize(("adapts", "head"), [(False, "auto"), (True, "trl")])
def test_hyperparameter_search_trains_the_objective(adapts, head, tokenizer, text_data, tmp_path):
    options = {
        "loss_head": head,
        "eval_data": text_data, "max_steps": 4, "objective": f"{__name__}:neg_p_and_more", "threshold": 0.001,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip
    peft_config = {"peft_config": LORA} if adapts else {}

    def model_init():
        torch.manual_seed(0)
        return get_peft_model(make_llama(tokenizer), LORA) if adapts else make_llama(tokenizer)

    expected = []
    for rate in RATES:
        torch.manual_seed(42)
        model = model_init()
        alone = train(Ordered, tokenizer, text_data, tmp_path / "alone", model=model, learning_rate=rate, **options)
        expected.append(alone.evaluate()["eval_nll"])
    trainer = build(Ordered, tokenizer, text_data, tmp_path / "searched", **options, **peft_config)
    trainer.model_init = model_init
    found = {}

    def score(metrics):
        found[trainer.args.learning_rate] = metrics["eval_nll"]
        return metrics["eval_nll"]

    best = search(trainer, compute_objective=score)
    assert [found[rate] for rate in RATES] == pytest.approx(expected, rel=1e-6)
    assert best.hyperparameters == {"learning_rate": RATES[expected.index(min(expected))]}
    assert abs(expected[0] - expected[1]) > 0.01
    for run in range(2):
        assert (tmp_path / "searched" / "out" / f"run-{run}" / "checkpoint-4" / "bl_trainer.json").is_file()


def neg_p_and_more(logp, log_sum_sq_probs):
    return -torch.expm1(logp) - 0.1 * logp * log_sum_sq_probs.exp()


def test_a_percentile_is_that_of_each_runs_model(tokenizer, text_data, tmp_path):
    trainer = build(Ordered, tokenizer, text_data, tmp_path, eval_data=text_data, threshold={"above_percentile": 50})
    trainer.model_init = lambda trial: make_llama(tokenizer, seed=trial.number)
    found = []

    def score(metrics):
        found.append(trainer.threshold.above)
        return metrics["eval_nll"]

    search(trainer, compute_objective=score)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective", "neg_p", "Cannot search over `objective` or `threshold`"),
        ("threshold", 0.5, "Cannot search over `objective` or `threshold`"),
        ("label_smoothing_factor", 0.1, "`label_smoothing_factor: 0.1` would replace the objective"),
    ],
)
def test_a_search_over_what_the_trainer_is_built_with_is_refused(key, value, message, tokenizer, text_data, tmp_path):
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, eval_data=text_data)
    trainer.model_init = lambda: make_llama(tokenizer)
    with pytest.raises(ValueError, match=message):
        search(trainer, lambda trial: {**space(trial), key: value})


def test_a_search_without_the_adapter_is_refused(tokenizer, text_data, tmp_path):
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, eval_data=text_data, peft_config=LORA)
    trainer.model_init = lambda: make_llama(tokenizer)
    with pytest.raises(ValueError, match=r"the trainer's model has an adapter, .* Return `get_peft_model"):
        search(trainer)


# Schedule-free optimizers, which train at one point and have another as their result


class KeepsAverages(TrainerCallback):
    """Keeps the averaged weights after each step, from where the model trains and the optimizer's other sequence."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        (group, *_) = optimizer.param_groups
        assert group["train_mode"]
        weight = 1 - 1 / group["betas"][0]
        self.after[state.global_step] = {
            name: torch.lerp(p.detach(), optimizer.state[p]["z"], weight) for name, p in model.named_parameters()
        }


SCHEDULE_FREE = {"optim": "schedule_free_adamw", "max_steps": 5, "save_strategy": "steps", "save_steps": 2}


def free(tokenizer, data, tmp_path, resume=None, callbacks=None, **changes):
    options = {"model": make_llama(tokenizer).double(), "objective": "neg_p", **SCHEDULE_FREE, **changes}
    trainer = build(Ordered, tokenizer, data, tmp_path, eval_data=data.select(range(4)), callbacks=callbacks, **options)
    trainer.train(resume)
    return trainer


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("evaluates", [False, True])
def test_averaged_weights_are_saved_and_stay_in_the_model(evaluates, tokenizer, text_data, tmp_path):
    averages = KeepsAverages()
    changes = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
    trainer = free(tokenizer, text_data, tmp_path, callbacks=[averages], **changes)
    assert_same(weights(trainer), averages.after[5])
    trainer.save_model()
    out = tmp_path / "out"
    for step, folder in {2: out / "checkpoint-2", 4: out / "checkpoint-4", 5: out}.items():
        assert_same(load_file(folder / "model.safetensors"), averages.after[step])
    unsaved = KeepsAverages()
    free(tokenizer, text_data, tmp_path / "unsaved", callbacks=[unsaved], save_strategy="no")
    assert_same(averages.after[5], unsaved.after[5])
    start = dict(make_llama(tokenizer).double().named_parameters())
    assert not any(torch.allclose(p, start[name], atol=1e-3) for name, p in averages.after[5].items() if "proj" in name)


def test_a_schedule_free_run_resumes_as_if_uninterrupted(tokenizer, text_data, tmp_path):
    whole, resumed = KeepsAverages(), KeepsAverages()
    trainer = free(tokenizer, text_data, tmp_path, callbacks=[whole])
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    other = free(tokenizer, text_data, tmp_path / "resumed", resume=checkpoint, callbacks=[resumed])
    assert resumed.after.keys() == {3, 4, 5}
    assert_same(resumed.after[5], whole.after[5])
    assert_same(weights(other), weights(trainer))


def test_the_best_schedule_free_model_is_the_one_of_its_checkpoint(tokenizer, text_data, tmp_path):
    trainer = free(
        tokenizer, text_data, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_nll", eval_strategy="steps",
        eval_steps=2,
    )  # fmt: skip
    trainer.save_model()
    best = load_file(trainer.state.best_model_checkpoint + "/model.safetensors")
    assert_same(weights(trainer), best)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), best)


# Inference mode


@pytest.mark.parametrize(
    "objective", ["anneal", {"name": "power", "alpha": 10, "floor": 0.1, "special_tokens": "nll"}], ids=str
)
def test_evaluation_is_the_same_in_inference_mode(objective, tokenizer, text_data, tmp_path):
    data = text_data.add_column("objective_weight", [0.5, 2.0] * 16)
    trainer = build(BLTrainer, tokenizer, data, tmp_path, eval_data=data, objective=objective, threshold=0.001)
    expected = trainer.evaluate()
    with torch.inference_mode():
        found = trainer.evaluate()
    for name in ("loss", "nll", "gradient_weight", "kept_fraction", "entropy"):
        assert found[f"eval_{name}"] == expected[f"eval_{name}"], name
