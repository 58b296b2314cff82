"""Recipes and objectives at random: trained as written, or refused in one sentence that names the key or the function."""

import enum
import json
import math
import re

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bl_trainer import Objective, Threshold
from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.recipe.keys import REPLACED
from bl_trainer.recipe.parser import DATACLASSES, Parser
from bl_trainer.recipe.recipe import Recipe
from conftest import write_recipe

ACTIONS = {action.dest: action for action in Parser(DATACLASSES)._actions if action.dest != "help"}
SET_HERE = ("model_name_or_path", "dataset_name", "output_dir", "use_cpu", "bf16", "report_to")
KEYS = [key for key in ACTIONS if key not in SET_HERE and key not in REPLACED]
QUIET = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)

words = st.text("abcdefghij_-/.: é", max_size=8)
numbers = st.one_of(st.integers(-3, 70), st.floats(-2, 2), st.sampled_from([1e-5, 1e12, math.nan, math.inf, 10**30]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=3,
)
objectives = st.one_of(
    st.sampled_from(["nll", "neg_p", "log_one_minus_p", "power", "negp", "math:sin", "no_module:f", "json:dumps", ":", "a:b"]),
    st.builds(lambda alpha: {"name": "power", "alpha": alpha}, numbers | words),
    st.builds(lambda key, value: {"name": "log_one_minus_p", key: value}, st.sampled_from(["epsilon", "eps"]), numbers),
    anything,
)
bounds = dict.fromkeys(("above", "below", "above_percentile"), numbers) | {"normalize": st.sampled_from(["kept", "all"])}
thresholds = st.one_of(numbers, st.fixed_dictionaries({}, optional=bounds), anything)


def values(key):
    """Values for a key: mostly likely ones for its type."""
    if key in ("objective", "threshold"):
        return {"objective": objectives, "threshold": thresholds}[key]
    action = ACTIONS[key]
    if action.choices:
        return st.sampled_from([*map(str, action.choices), "nosuch"])
    likely = {int: st.integers(-1, 9), float: st.floats(-0.5, 2)}.get(action.type, words | st.booleans())
    return st.one_of(likely, likely, likely, anything)


def recipes(keys, most):
    chosen = st.lists(st.sampled_from(keys), min_size=1, max_size=most, unique=True)
    return chosen.flatmap(lambda some: st.fixed_dictionaries({key: values(key) for key in some}))


# By TRL, for the CPU, into an object
NORMALISED = {
    "loss_type",
    "include_num_input_tokens_seen",
    "dataloader_pin_memory",
    "accelerator_config",
}  # by TRL, for the CPU, into an object


def mistakes(message):
    """The lines of an error that lists several mistakes, or its only one."""
    return re.findall(r"^  - (.*)", message, re.M) or [message.splitlines()[0]]


def is_same(written, found):
    """Whether `found` is what a recipe gives, as the libraries keep it."""
    if written is None:  # the default, whatever that is
        return True
    found = found.value if isinstance(found, enum.Enum) else found
    if isinstance(written, str) and isinstance(found, bool):
        return written.lower() in (("true", "yes", "t", "y", "1") if found else ("false", "no", "f", "n", "0"))
    return found == written or str(found).lower() == str(written).lower() or found == [written]


@pytest.fixture(scope="module")
def write(tmp_path_factory, checkpoint, data_folder):
    folder = tmp_path_factory.mktemp("fuzz")

    def write(changes, **base):
        path = write_recipe(folder, checkpoint, data_folder, **base)
        path.write_text(path.read_text() + yaml.safe_dump(changes, allow_unicode=True))
        return ["--config", str(path)]

    return write


@settings(QUIET, max_examples=600)
@given(changes=recipes(KEYS, 2))
def test_a_recipe_is_read_as_written_or_refused_by_a_key(write, changes):
    refusal = None
    try:
        recipe = Recipe.read(write(changes))
    except RecipeError as error:
        refusal = str(error)
    if refusal is not None:
        for line in mistakes(refusal):
            assert any(re.search(rf"\b{key}\b", line) for key in changes), refusal
        return
    parts = (recipe.script, recipe.training, recipe.model, recipe.mixture)
    for key in changes.keys() - NORMALISED:
        assert is_same(changes[key], next(getattr(part, key) for part in parts if hasattr(part, key))), key


TRAINED = (
    "objective", "threshold", "packing", "packing_strategy", "max_length", "padding_free", "completion_only_loss",
    "assistant_only_loss", "use_peft", "lora_r", "lora_target_modules", "use_dora", "optim", "lr_scheduler_type",
    "lr_scheduler_kwargs", "learning_rate", "weight_decay", "adam_beta2", "warmup_steps", "max_grad_norm", "dtype",
    "gradient_accumulation_steps", "per_device_train_batch_size", "neftune_noise_alpha", "eval_strategy", "eval_steps",
    "save_strategy", "save_total_limit", "logging_steps", "seed", "shuffle_dataset", "stop_on_nan", "dataset_text_field",
    "dataset_train_split", "attn_implementation", "gradient_checkpointing", "load_best_model_at_end", "metric_for_best_model",
    "dataloader_drop_last", "model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "activation_offloading",
)  # fmt: skip


@settings(QUIET, max_examples=60)
@given(changes=recipes([key for key in TRAINED if key in ACTIONS], 4))
def test_a_recipe_is_trained_as_written_or_refused_in_one_sentence(write, capsys, tmp_path_factory, changes):
    out = tmp_path_factory.mktemp("out") / "run"
    argv = write(changes, output_dir=str(out), max_steps=2, disable_tqdm=True)
    code = 0
    try:
        main(["train", *argv])
    except SystemExit as exit:
        code = exit.code
    torch.set_flush_denormal(False)  # which hypothesis can't do with
    said = capsys.readouterr().err
    if code:
        assert code == 2
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert "Traceback" not in said
        for mistake in mistakes(said[said.index(line) :]):
            assert any(re.search(rf"\b{key}\b", mistake) for key in changes), mistake
        assert not list(out.glob("*.safetensors"))
        return
    record = json.loads((out / "bl_trainer.json").read_text())
    assert record["objective"] == Objective.parse(changes.get("objective", "nll")).resolved.to_dict()
    threshold = Threshold.parse(changes.get("threshold"))
    assert record["threshold"].items() >= {key: threshold.to_dict()[key] for key in ("below", "normalize")}.items()
    assert record["recipe"].keys() >= changes.keys()
    args = torch.load(next(out.glob("training_args.bin")), weights_only=False)
    for key in changes.keys() - NORMALISED - {"objective", "threshold"}:
        assert is_same(changes[key], getattr(args, key, changes[key])), key
    assert list(out.glob("*.safetensors"))


# Objectives by import path


def means(logp):
    return -logp.mean()


def sums(logp):
    return -logp.sum(-1)


def counts(logp):
    return (logp < -1).long()


def transposes(logp):
    return -logp.t()


def is_nan(logp):
    return logp * float("nan")


def is_infinite_at_one(logp):
    return -torch.log(-logp)


def detaches(logp):
    return -logp.detach()


def returns_a_list(logp):
    return (-logp).tolist()


def returns_nothing(logp):
    pass


def raises(logp):
    return logp["no such thing"]


def changes_logp(logp):
    return -logp.exp_()


def changes_logp_unseen(logp):
    logp.data.clamp_(min=-10)
    return -logp


def changes_label(logp, label):
    label.add_(1)
    return -logp


def changes_is_top1(logp, is_top1):
    is_top1.logical_not_()
    return -logp * (1 + is_top1)


def changes_the_entropy(logp, entropy):
    entropy.data.zero_()
    return -logp * (1 + entropy)


WRONG = {
    means: "must return one float per token",
    sums: "must return one float per token",
    counts: "it gave torch.int64",
    transposes: "must return one float per token",
    is_nan: "is not finite at log p",
    is_infinite_at_one: "is not finite at log p",
    detaches: "has no gradient",
    returns_a_list: "it gave list",
    returns_nothing: "it gave NoneType",
    raises: "failed when tried on a few tokens: IndexError",
    changes_logp: "is being used in an in-place operation",
    changes_logp_unseen: "changes `logp` in place",
    changes_label: "changes `label` in place",
    changes_is_top1: "changes `is_top1` in place",
    changes_the_entropy: "changes `entropy` in place",
}


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_an_objective_that_breaks_the_contract_is_named(function, write):
    name = f"{__name__}:{function.__name__}"
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write({"objective": name}))
    assert f"Objective '{name}'" in str(caught.value)
    assert WRONG[function] in str(caught.value)


@settings(QUIET, max_examples=200)
@given(name=st.sampled_from(["power", "log_one_minus_p"]), value=st.floats() | st.integers() | anything)
def test_parameters_are_taken_or_refused_by_name(name, value):
    key = {"power": "alpha", "log_one_minus_p": "epsilon"}[name]
    refusal = None
    try:
        objective = Objective.parse({"name": name, key: value})
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert key in refusal
        return
    logp = torch.tensor([-30.0, -1.0, -1e-3])
    assert float(objective.parameters[key]) == float(value)  # an integer may be none that a float can hold
    assert objective(logp).shape == logp.shape
    assert not objective(logp).isnan().any()
