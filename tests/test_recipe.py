"""The recipe reader: what it takes, and one sentence for every mistake."""

import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from enum import Enum
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import transformers
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from bl_trainer import BLConfig, Threshold
from bl_trainer.cells.verb import ScoreArguments
from bl_trainer.cli import arguments_of, main
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.errors import DependencyError, RecipeError
from bl_trainer.evaluation import EvaluateArguments
from bl_trainer.objectives.objective import OBJECTIVES
from bl_trainer.prepare import PrepareArguments
from bl_trainer.recipe.convert import ConvertArguments
from bl_trainer.recipe.fields import KINDS, SOURCES, fields_of, objective_parameters, recipe_fields
from bl_trainer.recipe.help import OPTIONS
from bl_trainer.recipe.keys import NEEDS, RENAMED, REPLACED, TRACKERS
from bl_trainer.recipe.parser import DATACLASSES, Parser
from bl_trainer.recipe.reading import read_keys
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.recipe.yaml_file import load_yaml
from bl_trainer.training.merge import MergeArguments
from bl_trainer.training.preview import TrainArguments
from conftest import fake_checkpoint, write_recipe

KEYS = {f.name for c in (ScriptArguments, BLConfig, ModelConfig, DatasetMixtureConfig) for f in fields(c)}


@pytest.fixture
def write(tmp_path, checkpoint, data_folder):
    """Write a good recipe with changes, or a text of its own, and give the arguments that name it."""

    def write(text=None, **changes):
        path = write_recipe(tmp_path, checkpoint, data_folder, **changes)
        if text is not None:
            path.write_text(text)
        return ["--config", str(path)]

    return write


def test_reads_file_and_command_line(write):
    argv = write(objective={"name": "power", "alpha": 10}, learning_rate="1e-4", threshold=0.2, lora_r=4, use_peft=True)
    recipe = Recipe.read(argv)
    assert recipe.training.objective == {"name": "power", "alpha": 10}
    assert recipe.training.threshold == 0.2
    assert recipe.training.learning_rate == 1e-4
    assert recipe.peft_config.r == 4
    recipe = Recipe.read(
        [argv[0] + "=" + argv[1], "--objective", "neg_p", "--threshold", '{"below": 0.9}', "--lora_r=8", "--max_steps", "3"]
    )
    assert recipe.training.objective == "neg_p"
    assert recipe.training.threshold == {"below": 0.9}
    assert recipe.peft_config.r == 8
    assert recipe.training.max_steps == 3
    recipe = Recipe.read([*argv, "--objective", '{"name": "power", "alpha": 2}', "--no-gradient-checkpointing", "--packing"])
    assert recipe.training.objective["alpha"] == 2
    assert (recipe.training.gradient_checkpointing, recipe.training.packing) == (False, True)


def test_the_arguments_of_the_trainer_leave_the_recipe_as_it_is(write):
    recipe = Recipe.read(write(model_init_kwargs={"pad_token_id": 0}, dtype="bfloat16"))
    assert arguments_of(recipe).model_init_kwargs == {**recipe.model_init_kwargs(), "pad_token_id": 0}
    assert arguments_of(recipe).model_init_kwargs["dtype"] == "bfloat16"
    assert recipe.training.model_init_kwargs == {"pad_token_id": 0}


def test_mappings_may_be_json_text(write):
    """A file may spell them so too; what they hold is checked as a mapping's."""
    recipe = Recipe.read([*write(model_init_kwargs='{"pad_token_id": 0}'), "--lr_scheduler_kwargs", "{}"])
    assert recipe.training.model_init_kwargs == {"pad_token_id": 0}
    with pytest.raises(RecipeError, match="A token in `model_init_kwargs` would be logged"):
        Recipe.read([*write(), "--model_init_kwargs", '{"token": "x"}'])


TAKEN = {
    "lora_target_modules": "all-linear",
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "learning_rate": "2e-5", "max_steps": -1, "num_train_epochs": 1, "eval_steps": 0.1, "logging_first_step": True,
    "hub_strategy": "every_save", "dataset_kwargs": {"skip_prepare_dataset": False},
    "warmup_steps": 0.1 if transformers.__version__ >= "5" else 2,
    "model_init_kwargs": {"pad_token_id": 0}, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "torch_compile": True, "run_name": 7,
    "accelerator_config": {"split_batches": True}, "metric_for_best_model": "eval_steps_per_second",
}  # fmt: skip


if transformers.__version__ >= "5":  # an older one reads no arguments of SGD
    TAKEN["optim_args"] = "momentum=0.0,nesterov=false"

READ_AS = {"learning_rate": 2e-5, "run_name": "7"}


@pytest.mark.parametrize("key", TAKEN)
def test_values_that_trl_takes_are_taken(key, write):
    besides = {
        "lora_target_modules": {"use_peft": True},
        "eval_steps": {"eval_strategy": "steps"},
        "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr"},
        "optim_args": {"optim": "sgd"},
    }
    read = Recipe.read(write(**{key: TAKEN[key], **besides.get(key, {})}))
    found = next(getattr(part, key) for part in (read.training, read.model) if hasattr(part, key))
    if key == "accelerator_config":
        found = {name: getattr(found, name) for name in TAKEN[key]}
    assert found == READ_AS.get(key, TAKEN[key])


def test_a_default_test_split_may_be_written_out(write):
    assert Recipe.read(write(dataset_test_split="test")).script.dataset_test_split == "test"


def test_a_null_a_number_and_a_truth_may_be_spelled_as_trl_takes_them(write):
    spelled = {"max_length": "None", "neftune_noise_alpha": "none", "ddp_backend": None, "shuffle_dataset": 1}
    spelled |= {"logging_first_step": 0, "seed": "7", "learning_rate": "1e-5", "eval_accumulation_steps": 2.0}
    read = Recipe.read(write(**spelled)).training
    found = {key: getattr(read, key) for key in spelled}
    nulls = dict.fromkeys(("max_length", "neftune_noise_alpha", "ddp_backend"))
    others = {"shuffle_dataset": True, "logging_first_step": False, "seed": 7, "learning_rate": 1e-5}
    assert found == {**nulls, **others, "eval_accumulation_steps": 2}


def test_yaml_may_merge_mappings(tmp_path):
    (tmp_path / "r.yaml").write_text("env: &own {A: 1, B: 2}\ndataset_kwargs: {<<: *own, B: 3}\n")
    assert load_yaml([str(tmp_path / "r.yaml")])["dataset_kwargs"] == {"A": 1, "B": 3}


def test_template_that_is_broken(write, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}\n{% if %}")
    with pytest.raises(RecipeError, match=r"broken\.jinja`, line 2: Expected an expression"):
        Recipe.read(write(chat_template_path=str(tmp_path / "broken.jinja")))
    (tmp_path / "good.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    )
    Recipe.read(write(chat_template_path=str(tmp_path / "good.jinja")))


def test_unquoted_no_and_env(write, monkeypatch):
    monkeypatch.delenv("BL_TEST_VARIABLE", raising=False)
    text = Path(write(env={"BL_TEST_VARIABLE": 1})[1]).read_text() + "eval_strategy: no\nsave_strategy: no\n"
    recipe = Recipe.read(write(text))
    assert (recipe.training.eval_strategy, recipe.training.save_strategy) == ("no", "no")
    assert os.environ.pop("BL_TEST_VARIABLE") == "1"


def test_command_line_alone(checkpoint, data_folder, tmp_path):
    paths = {"model_name_or_path": checkpoint, "dataset_name": data_folder, "output_dir": tmp_path}
    argv = [part for key, path in paths.items() for part in (f"--{key}", str(path))]
    recipe = Recipe.read([*argv, "--use_cpu", "--bf16", "false", "--objective", "neg_p"])
    assert recipe.training.objective == "neg_p"


def test_loads_folders_files_and_mixtures(write, data_folder):
    train, test = Recipe.read(write(eval_strategy="epoch")).load_datasets()
    assert (len(train), len(test)) == (24, 8)
    train, test = Recipe.read(write(dataset_name=str(data_folder / "train.jsonl"))).load_datasets()
    assert (len(train), test) == (24, None)
    file = {"path": "json", "data_files": str(data_folder / "train.jsonl")}
    mixture = {"dataset_name": None, "datasets": [file, {**file, "data_files": str(data_folder / "test.jsonl")}]}
    train, _ = Recipe.read(write(**mixture)).load_datasets()
    assert len(train) == 32
    train, _ = Recipe.read(write(dataset_streaming=True, max_steps=2)).load_datasets()
    assert len(list(train)) == 24


def test_mixture_is_split_alike_every_time(write, data_folder):
    options = {
        "dataset_name": None, "datasets": [{"path": "json", "data_files": str(data_folder / "train.jsonl")}],
        "test_split_size": 0.25, "eval_strategy": "epoch",
    }  # fmt: skip
    first, second = (Recipe.read(write(**options)).load_datasets() for _ in range(2))
    assert [list(part) for part in first] == [list(part) for part in second]
    assert [len(part) for part in first] == [18, 6]


BAD_RECIPES = [
    ({"floor": 0.1}, "Unknown recipe key 'floor'. It belongs to the objective: write `objective: {name: ..., floor: 0.1}`."),
    ({"objective": "power", "alpha": 2}, "It belongs to the objective: write `objective: {name: ..., alpha: 2}`."),
    ({"objectve": "neg_p"}, "Unknown recipe key 'objectve'. Did you mean 'objective'?"),
    ({"lerning_rate": 1e-4}, "Did you mean 'learning_rate'?"),
    ({"objective": "negp"}, "Unknown objective 'negp'. Did you mean 'neg_p'?"),
    ({"objective": "power"}, "Objective 'power' takes alpha: 'alpha' is missing."),
    ({"objective": {"name": "nll", "alpha": 3}}, "takes no parameters of its own: 'alpha' is not one of them"),
    *(
        (
            {"objective": text},
            f"Cannot read `objective: {text}`: parameters go in a mapping. Write `objective: {{name: power, alpha: 2}}`, on "
            """the command line as JSON: `--objective '{"name": "power", "alpha": 2}'`.""",
        )
        for text in ("power:2", "power alpha=2", "power 2", "power:alpha=2")
    ),
    ({"threshold": 1.2}, "`threshold` `above` must be a probability between 0 and 1, got 1.2. For a percentile write"),
    ({"threshold": -0.1}, "`threshold` `above` must be a probability between 0 and 1, got -0.1.\n"),
    ({"threshold": {"below": 10}}, "`threshold` `below` must be a probability between 0 and 1, got 10.\n"),
    ({"threshold": {"above": 0.9, "below": 0.2}}, "`threshold` keeps no token: above = 0.9 exceeds below = 0.2."),
    ({"threshold": {"above_percentil": 10}}, "Unknown key 'above_percentil' in `threshold`."),
    ({"loss_type": "dft"}, "`loss_type: dft` would change the objective."),
    ({"loss_type": "dtf"}, "`loss_type: dtf` is not allowed. Did you mean 'dft'? Allowed: nll, dft, chunked_nll."),
    ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor: 0.1` would replace the objective"),
    ({"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]}, "A PEFT adapter on `lm_head` would not train"),
    (
        {"max_seq_length": 512, "max_length": 512},
        "`max_seq_length` is the old name of `max_length`, and the",
    ),
    *(  # a key of the oldest transformers
        []
        if "warmup_ratio" in recipe_fields()
        else [({"warmup_ratio": 1}, "`warmup_ratio` is not a recipe key any more. Write `warmup_steps: ...` instead.")]
    ),
    ({"overwrite_output_dir": True}, "`overwrite_output_dir` is not a recipe key any more. Remove it"),
    ({"dataset_mixer": {"a/b": 1.0}}, "Write `datasets: [{path: ..., split: train, fraction: ...}]` instead."),
    ({"dataset_mixture": {"datasets": []}}, "`datasets: [{path: ..., split: train, fraction: ...}], and test_split"),
    ({"evaluation_strategy": "stepz"}, "`evaluation_strategy: stepz` is not allowed. Did you mean 'steps'?"),
    ({"gradient_checkpointing_use_reentrant": False}, "`gradient_checkpointing_kwargs: {use_reentrant: false}` instead."),
    ({"model_name_or_path": None}, "The recipe names no model."),
    ({"model_name_or_path": "./no/such/folder"}, "`model_name_or_path: ./no/such/folder` is not a folder."),
    ({"dataset_name": None}, "The recipe names no data set."),
    ({"datasets": [{"path": "json"}]}, "The recipe names both `dataset_name` and `datasets`."),
    ({"dataset_name": None, "datasets": [{"pth": "json"}]}, "Each of `datasets` must be a mapping with `path`"),
    (
        {"dataset_name": None, "datasets": [{"path": "json", "spilt": "a"}]},
        "Unknown key 'spilt' in `datasets`. Did",
    ),
    ({"dataset_name": None, "datasets": "json"}, "`datasets` must be a list of mappings with `path`, got 'json'."),
    ({"dataset_streaming": True}, "A streamed data set (`dataset_streaming: true`) has no length. Write `max_steps: ...`"),
    (
        {"dataset_name": None, "datasets": [{"path": "json"}], "streaming": True, "max_steps": 1, "test_split_size": 0.1},
        "`test_split_size` can't split a streamed mixture.",
    ),
    (
        {"dataset_name": None, "datasets": [{"path": "json"}], "dataset_config": "main"},
        "`dataset_config` does nothing without `dataset_name`.",
    ),
    ({"model_init_kwargs": "fast"}, "`model_init_kwargs` must be a mapping, got 'fast'."),
    ({"dataset_kwargs": "fast"}, "`dataset_kwargs` must be a mapping, got 'fast'."),
    ({"use_peft": True, "lora_target_parameters": ["lm_head.weight"]}, "A PEFT adapter on `lm_head` would not train"),
    ({"eval_steps": 5}, "`eval_steps` does nothing without `eval_strategy`."),
    ({"dataset_test_split": "dev"}, "`dataset_test_split` does nothing without `eval_strategy`."),
    ({"liger_kernel_config": {"rope": True}}, "`liger_kernel_config` does nothing without `use_liger_kernel`."),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size: 0` must be at least 1."),
    ({"learning_rate": -1.0}, "`learning_rate: -1.0` must be at least 0."),
    ({"learning_rate": 0}, "`learning_rate: 0` trains nothing. Write a number above 0."),
    ({"use_peft": True, "lora_alpha": 0}, "`lora_alpha: 0` trains nothing: the adapter's part is 0."),
    ({"use_peft": True, "lora_dropout": 1}, "`lora_dropout: 1` trains nothing: the adapter's part is 0."),
    ({"max_steps": -5}, "`max_steps: -5` must be at least -1."),
    ({"num_train_epochs": 0}, "`num_train_epochs: 0` trains nothing. Write a number above 0."),
    ({"max_steps": 0}, "`max_steps: 0` trains nothing. Write a number above 0, or -1 to train by `num_train_epochs`."),
    ({"save_steps": 0}, "`save_steps: 0` must be above 0; to switch it off write `save_strategy: no`."),
    ({"use_peft": True, "lora_r": 0}, "`lora_r: 0` must be at least 1."),
    ({"use_peft": True, "lora_dropout": 2.0}, "`lora_dropout: 2.0` must be from 0 to 1."),
    ({"adam_beta1": 2.0}, "`adam_beta1: 2.0` must be at least 0 and below 1."),
    ({"adam_beta2": 1.0}, "`adam_beta2: 1.0` must be at least 0 and below 1."),
    ({"eval_strategy": "epoch", "eval_steps": 5}, "`eval_steps` does nothing under `eval_strategy: epoch`."),
    ({"save_strategy": "epoch", "save_steps": 5}, "`save_steps` does nothing under `save_strategy: epoch`."),
    ({"logging_strategy": "epoch", "logging_steps": 5}, "`logging_steps` does nothing under `logging_strategy: epoch`."),
    ({"eval_delay": 5}, "`eval_delay` does nothing without `eval_strategy`."),
    ({"do_train": False}, "`do_train: false` does nothing: `train` trains."),
    ({"do_predict": True}, "`do_predict: true` does nothing."),
    ({"do_eval": True}, "`do_eval: true` does nothing: `eval_strategy: no` decides."),
    ({"do_eval": False, "eval_strategy": "epoch"}, "`do_eval: false` does nothing: `eval_strategy: epoch` decides."),
    (
        {"torch_compile": False, "torch_compile_mode": "default"},
        "`torch_compile_mode` switches compilation on, and `torch_compile: false` off. Remove one of them.",
    ),
    (
        {"lr_scheduler_type": "constant", "warmup_steps": 2},
        "`warmup_steps: 2` does nothing under `lr_scheduler_type: constant`. Remove it, or write `constant_with_warmup`",
    ),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 3, "eval_strategy": "epoch"}, "`warmup_steps: 3` does"),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0.03}, "`warmup_ratio: 0.03` does nothing under `lr_scheduler_type"),
    *(
        ({"lr_scheduler_type": name, "lr_scheduler_kwargs": {"min_lr": 0}}, f"`lr_scheduler_type: {name}` does not read")
        for name in ("constant", "constant_with_warmup")
    ),
    ({"data_seed": 3, "dataset_streaming": True, "max_steps": 1}, "`data_seed` does not order the training rows under"),
    ({"data_seed": 3, "accelerator_config": {"use_seedable_sampler": False}}, "under `accelerator_config: {use_seedable_s"),
    *(
        ({"dataset_streaming": True, "max_steps": 1, "train_sampling_strategy": name}, f"_strategy: {name}` has no effect on a")
        for name in ("group_by_length", "batch_rebalance")
        if name in recipe_fields().get("train_sampling_strategy", SimpleNamespace(choices=())).choices
    ),
    *(
        [({"data_seed": 3, "train_sampling_strategy": "sequential"}, "under `train_sampling_strategy: sequential`. Remove")]
        if "train_sampling_strategy" in recipe_fields()
        else []
    ),
    *(
        [
            (
                {"gradient_checkpointing": True, "activation_checkpointing": False},
                "`gradient_checkpointing` is another name of `activation_checkpointing`, and the recipe gives both",
            )
        ]
        if "activation_checkpointing" in recipe_fields()
        else []
    ),
    ({"optim": "adafactor", "adam_beta1": 0.9}, "`optim: adafactor` does not read `adam_beta1`. Remove what it does not read."),
    ({"optim": "adamw_torch", "optim_args": "foo=1"}, "`optim: adamw_torch` does not read `optim_args: foo=1`."),
    ({"optim": "sgd", "optim_target_modules": ["q_proj"]}, "`optim: sgd` does not read `optim_target_modules`."),
    ({"dtype": "float16"}, "Cannot train weights in float16, such as model.embed_tokens.weight"),
    ({"max_length": 1}, "`max_length: 1` must be at least 2."),
    ({"chat_template_path": "missing.jinja"}, "`chat_template_path: missing.jinja` can't be read: No such file or directory."),
    ({"chat_template_path": "README.md"}, "`chat_template_path: README.md` has no tokenizer, and is no .jinja file"),
    ({"learning_rate": float("nan")}, "`learning_rate"),
    ({"optim": "adamw_torch_xla"}, "`optim: adamw_torch_xla` can't be had"),
    ({"lr_scheduler_kwargs": {"speed": 1}}, "with `lr_scheduler_kwargs: {'speed': 1}` can't be had"),
    ({"lr_scheduler_kwargs": ""}, "with `lr_scheduler_kwargs: ''` can't be had"),
    ({"save_only_model": True, "resume_from_checkpoint": True}, "`save_only_model: true` leaves out of the checkpoints what"),
    ({"eval_on_start": True}, "`eval_on_start` needs an evaluation set."),
    ({"metric_for_best_model": "eval_nlll"}, "`metric_for_best_model: eval_nlll` is not reported. Did you mean 'eval_nll'?"),
    ({"dtype": "bfloat16", "model_init_kwargs": {"dtype": "float32"}}, "`dtype` and `dtype` in `model_init_kwargs` say the"),
    ({"accelerator_config": "no.json"}, "Cannot use `accelerator_config`: [Errno 2] No such file or directory: 'no.json'"),
    ({"ddp_backend": "gloo"}, "Cannot use one of the keys `model_name_or_path`, `dataset_name`, `output_dir`, `use_cpu`, "),
    ({"env": 3}, "`env` must be a mapping of environment variables to values, got int."),
    ({"lora_r": 8}, "`lora_r` does nothing without `use_peft`. Write `use_peft: true`, or remove `lora_r`."),
    ({"bnb_4bit_quant_type": "nf4"}, "`bnb_4bit_quant_type` does nothing without `load_in_4bit`."),
    ({"test_split_size": 0.1}, "`test_split_size` does nothing without `datasets`."),
    ({"packing_strategy": "bfd_split"}, "`packing_strategy` does nothing without `packing`."),
    ({"ignore_bias_buffers": True}, "`ignore_bias_buffers` does nothing in SFT."),
    ({"load_in_4bit": True}, "`load_in_4bit`: such a model can't be trained as it is. Write `use_peft: true` for QLoRA."),
    ({"packing_strategy": "bdf", "packing": True}, "`packing_strategy: bdf` is not allowed. Did you mean 'bfd'?"),
    ({"learning_rate": "fast"}, "`learning_rate: fast` is of the wrong type. Write a number."),
    ({"learning_rate": [1e-4]}, "`learning_rate: [0.0001]` is of the wrong type. Write a number."),
    ({"per_device_train_batch_size": 2.5}, "`per_device_train_batch_size: 2.5` is of the wrong type. Write a whole number."),
    ({"packing": 2}, "`packing: 2` is of the wrong type. Write true or false."),
    (
        {"load_best_model_at_end": True},
        "needs an evaluation at each checkpoint, got `eval_strategy: no` and `save_strategy: steps`. Write `eval_strategy: ste",
    ),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "`save_strategy: steps`. Write `save_strategy: epoch`."),
    (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        "Write `eval_strategy: steps` and `save_strategy: steps`.",
    ),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 20, "save_steps": 50},
        "`save_steps: 50` must be a multiple of `eval_steps: 20`. Write `save_steps: 20`.",
    ),
]
# An older transformers still has, and obeys, some of the keys that the newest one lacks
BAD_RECIPES = [(changes, message) for changes, message in BAD_RECIPES if not changes.keys() & REPLACED.keys() & KEYS]


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES, ids=[str(changes) for changes, _ in BAD_RECIPES])
def test_mistake_ends_in_one_sentence_and_exit_code_2(changes, message, write, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *write(**changes)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset_config": "none"}, "`dataset_config` does nothing beside a file, `dataset_name: {path}`. Remove it."),
        ({"data_files": "other.jsonl"}, "`data_files` does nothing beside a file, `path: {path}` in `datasets`. Remove it."),
        ({"name": "main"}, "`name` does nothing beside a file, `path: {path}` in `datasets`. Remove it."),
        ({"fraction": -1}, "`fraction: -1` of {path} must be at least 0."),
    ],
    ids=str,
)
def test_what_a_file_can_not_have_is_an_error(keys, message, write, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab"}\n')
    source = {"dataset_name": str(path), **keys} if "dataset_config" in keys else {"datasets": [{"path": str(path), **keys}]}
    with pytest.raises(RecipeError, match=re.escape(message.format(path=path))):
        Recipe.read(write(**{"dataset_name": None, **source}))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"bf16": True}, ["`bf16: true` needs"]),
        ({"bf16": None}, ["`bf16: true`, the default, needs"]),
        ({"bf16": None, "max_steps": 0, "objective": "neg_q"}, ["`max_steps: 0`", "`bf16: true`, the", "Unknown objective"]),
        ({"bf16": None, "max_steps": 0}, ["`max_steps: 0` trains nothing"]),
        ({"bf16_full_eval": True}, ["`bf16_full_eval: true` needs"]),
    ],
    ids=str,
)
def test_bfloat16_without_a_gpu_is_listed_with_the_other_mistakes(changes, found, write, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write(use_cpu=None, **changes))
    said = str(caught.value).splitlines()[-len(found) :]
    assert all(start in line for start, line in zip(found, said, strict=True)), said
    if "needs" in found[0]:
        assert str(caught.value).endswith(
            "a GPU, and this machine has none. Write `use_cpu: true`, and `bf16: false` for float32."
        )
    assert Recipe.read(write(use_cpu=True, bf16=True)).training.bf16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: neg_p\nobjective: nll\n", "The file gives 'objective' twice (line 2). Keep one of them."),
        ("- a\n- b\n", "must be a YAML mapping of keys to values, got list."),
        ("", "must be a YAML mapping of keys to values, got NoneType."),
        ("objective: [neg_p\n", "Cannot read the recipe"),
        ("seed: 1\n? [a]\n: 2\n", "A key is ['a'] (line 2). Write a text."),
    ],
)
def test_broken_file(text, message, write):
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config"], "`--config` needs the path of a recipe."),
        (["--config", "missing.yaml"], "Cannot read the recipe missing.yaml"),
        (["--objectiv", "neg_p"], "Unknown recipe key 'objectiv'. Did you mean 'objective'?"),
        (["--chars-per-token", "3"], "`chars_per_token` is not a recipe key any more. Remove it"),
        (["neg_p"], "Cannot use the argument 'neg_p': it belongs to no option. Write `--KEY VALUE`."),
        (["--seed", "1", "2"], "Cannot use the argument '2': `--seed` takes one value."),
        (["--seed"], "`--seed` needs a value."),
        (["--seed", "one"], "`seed: one` is of the wrong type. Write a whole number."),
        (["--accelerator_config", "{"], "`accelerator_config` is not valid JSON"),
        (
            ["--eval_strategy", "stepz"],
            "`eval_strategy: stepz` is not allowed. Did you mean 'steps'? Allowed: no, ",
        ),
        (["--optim", "adamw_torhc"], "`optim: adamw_torhc` is not allowed. Did you mean 'adamw_torch'?"),
        (["--objective", "{name: power}"], "`objective` is not valid JSON"),
    ],
    ids=str,
)
def test_bad_command_line(argv, message, write):
    with pytest.raises(RecipeError) as caught:
        Recipe.read(argv if "--config" in argv else [*write(), *argv])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "./missing"}, "Cannot load `dataset_name: ./missing`: there is no such file or folder"),
        ({"dataset_train_split": "trian"}, "The data set has no split 'trian', only 'train', 'test'. Write `dataset_train_sp"),
        (
            {"dataset_test_split": "dev", "eval_strategy": "epoch"},
            "no split 'dev', only 'train', 'test'. Write `dataset_test_s",
        ),
    ],
    ids=str,
)
def test_data_that_is_not_there(changes, message, write, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *write(**changes)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_without_a_format(write, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(RecipeError, match="Rename `question` to `prompt` and `answer` to `completion`, or write"):
        Recipe.read(write(dataset_name=str(tmp_path / "data.jsonl"))).load_datasets()
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecipeError, match=r"Cannot load `dataset_name: .*empty\.jsonl`: a file is empty"):
        Recipe.read(write(dataset_name=str(tmp_path / "empty.jsonl"))).load_datasets()
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(RecipeError, match=r'empty\.csv`: Instruction "train" corresponds to no data'):
        Recipe.read(write(dataset_name=str(tmp_path / "empty.csv"))).load_datasets()
    streamed = write(dataset_name=str(tmp_path / "empty.csv"), dataset_streaming=True, max_steps=1)
    with pytest.raises(RecipeError, match=r"The train set is empty"):
        Recipe.read(streamed).load_datasets()
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RecipeError, match=r"broken\.jsonl, line 2: Expecting value at column 1"):
        Recipe.read(write(dataset_name=str(tmp_path / "broken.jsonl"))).load_datasets()
    (tmp_path / "data.xlsx").write_text("")
    with pytest.raises(RecipeError, match=r"'\.xlsx' is none of .jsonl, .json, .parquet, .csv, .txt"):
        Recipe.read(write(dataset_name=str(tmp_path / "data.xlsx"))).load_datasets()


def found(argv):
    """The checkpoint that a recipe resumes from, None for a new run."""
    return Recipe.read(argv).plan_resume().checkpoint


def test_earlier_run_is_neither_lost_nor_silently_resumed(write, tmp_path):
    out = tmp_path / "out"
    assert found(write()) is None
    assert found(write(resume_from_checkpoint=True)) is None  # nothing there yet: the first start
    last = out / "checkpoint-50"
    for step in (9, 50):
        fake_checkpoint(out / f"checkpoint-{step}")
    (out / "checkpoint-60").mkdir()  # left by a run killed while it saved
    with pytest.raises(RecipeError, match=r"holds checkpoint-50, of an earlier run or your own, which would be overwritten"):
        found(write())
    assert found(write(resume_from_checkpoint=True)) == last
    assert found([*write(), "--resume_from_checkpoint", "true"]) == last
    assert found(write(resume_from_checkpoint=str(last))) == last
    with pytest.raises(RecipeError, match="Cannot resume from nowhere: it is not a folder"):
        found(write(resume_from_checkpoint="nowhere"))
    with pytest.raises(RecipeError, match=r"out/checkpoint-60: its trainer_state.json is missing"):
        found(write(resume_from_checkpoint=str(out / "checkpoint-60")))
    record = {"objective": {"name": "neg_p"}, "threshold": Threshold().to_dict()}
    (last / "bl_trainer.json").write_text(json.dumps(record))
    assert found(write(resume_from_checkpoint=True, objective="neg_p")) == last
    with pytest.raises(RecipeError, match=r"was trained with objective \{'name': 'neg_p'\}, the recipe says"):
        found(write(resume_from_checkpoint=True))


def test_a_checkpoint_of_another_run_does_not_overwrite_this_one(write, tmp_path):
    other = tmp_path / "other" / "checkpoint-5"
    fake_checkpoint(other)
    assert found(write(resume_from_checkpoint=str(other))) == other
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(RecipeError, match=r"holds model.safetensors.* Write another `output_dir`"):
        found(write(resume_from_checkpoint=str(other)))


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "tokenizer.json"])
def test_own_files_are_not_overwritten(name, write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    for resume in (False, True):  # there is nothing to resume from
        with pytest.raises(RecipeError, match=rf"holds {name}.* Write another `output_dir`"):
            found(write(resume_from_checkpoint=resume))


def test_missing_bitsandbytes_is_named(write, monkeypatch):
    monkeypatch.setattr("bl_trainer.recipe.rules.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"bitsandbytes is not installed\. Run `pip install bitsandbytes`"):
        Recipe.read(write(load_in_4bit=True, use_peft=True))


def test_what_fails_in_the_libraries_is_one_sentence_too(write, capsys, monkeypatch, tmp_path):
    for traceback in (False, True):
        if traceback:
            monkeypatch.setenv("BL_TRACEBACK", "1")
        with pytest.raises(SystemExit) as caught:
            main(["train", *write(model_init_kwargs={"nosuch": 1})])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "error: TypeError: " in error
        assert "'nosuch' (BL_TRACEBACK=1 shows where)" in error
        assert ("Traceback" in error) is traceback


def test_old_names_are_read_with_one_warning(write, capsys):
    """The line names each; the recipe is recorded by its new names."""
    old = {"max_seq_length": 64, "warmup_ratio": 0.1, "torch_dtype": "float32", "evaluation_strategy": "no"}
    old = {key: value for key, value in old.items() if key not in KEYS}
    recipe = Recipe.read([*write(**old), "--preprocessing-num-workers", "2"])
    assert recipe.training.max_length == 64
    assert recipe.training.dataset_num_proc == 2
    assert recipe.given.keys() >= {RENAMED[key] for key in old} | {"dataset_num_proc"}
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert all(f"`{key}` is now `{RENAMED[key]}`" in line for key in [*old, "preprocessing_num_workers"])


MANY = {
    "model_name_or_path": "./nowhere", "dataset_name": "./nothing.jsonl", "lerning_rate": 1e-4, "packing": 2, "max_length": 1,
    "lora_r": 8, "report_to": ["wandb", "tensorbord"], "load_in_4bit": True, "eval_strategy": "stepz", "alpha": 2,
    "chat_template": "{{ messages }}", "chat_template_path": "none.jinja", "overwrite_output_dir": True,
    "use_liger_kernel": True,
}  # fmt: skip


def test_all_mistakes_are_told_at_once_and_before_torch_loads(write, tmp_path):
    """In a process of its own, in which nothing else imports torch."""
    changes = {key: value for key, value in MANY.items() if key not in REPLACED or key not in KEYS}
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("wandb", "bitsandbytes", "liger_kernel") else found(name)
from bl_trainer.cli import main
try:
    main(["train", *{write(**changes)!r}, "--logging_strategy", "epochs", "--seed=x"])
finally:
    print(*({{"torch", "trl", "transformers", "datasets", "pyarrow", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == []
    start, *lines = done.stderr.splitlines()
    assert start == f"error: There are {len(lines) - 1} mistakes in {tmp_path / 'recipe.yaml'}:"
    assert lines[-1].startswith("`bl-trainer convert ")
    starts = [
        "`chat_template` is not a recipe key any more. Write `chat_template_path: template.jinja` instead.",
        "`overwrite_output_dir` is not", "Unknown recipe key 'alpha'. It belongs to the objective",
        "`packing: 2` is of the wrong type.",
        "Unknown recipe key 'lerning_rate'. Did you mean 'learning_rate'?", "`eval_strategy: stepz` is not allowed.",
        "`logging_strategy: epochs` is not allowed. Did you mean 'epoch'?", "`seed: x` is of the wrong type.",
        "`model_name_or_path: ./nowhere` is not a folder.", "Cannot load `dataset_name: ./nothing.jsonl`: there is no such",
        "`chat_template_path: none.jinja` can't be read", "`lora_r` does nothing without `use_peft`.",
        "`max_length: 1` must be at least 2.", "`load_in_4bit`: such a model can't be trained as it is.",
        "Cannot use `load_in_4bit: true`: bitsandbytes is not installed. Run `pip install bitsandbytes`",
        "Cannot use `use_liger_kernel: true`: liger-kernel is not installed.",
        "Cannot report to `report_to: wandb`: wandb is not installed. Run `pip install wandb`",
        "Cannot report to `report_to: tensorbord`: it is unknown. Did you mean 'tensorboard'?",
    ]  # fmt: skip
    starts = [start for start in starts if start.split("`")[1:2] not in [[key] for key in REPLACED.keys() & KEYS]]
    for start in starts:
        assert any(line.startswith(f"  - {start}") for line in lines), start
    assert len(lines) - 1 == len(starts)


def test_an_adapter_without_a_readable_configuration(write, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"has an adapter_config\.json that can't be read"):
        Recipe.read(write(model_name_or_path=str(tmp_path / "adapter")))


def test_a_wrong_objective_is_told_with_the_wrong_keys(write):
    with pytest.raises(RecipeError) as caught:
        Recipe.read([*write(lerning_rate=1, threshold=2), "--objective", "negp"])
    assert "There are 3 mistakes" in str(caught.value)
    for said in (
        "Unknown recipe key 'lerning_rate'",
        "`objective`: Unknown objective 'negp'. Did you",
        "`threshold` `above` must be",
    ):
        assert f"  - {said}" in str(caught.value)


def test_an_objective_is_wrong_before_trl_loads(write):
    """In `read_keys`, which needs torch alone; a user's function is left to the trainer, which tries it once."""
    with pytest.raises(RecipeError) as caught:
        read_keys(write(objective="negp", threshold=2), tries=True)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("There are 2 mistakes in ")
    for line, start in zip(lines, ["`objective`: Unknown objective 'negp'.", "`threshold` `above` must be"], strict=True):
        assert line.startswith(f"  - {start}")
    read_keys(write(objective={"name": "nowhere:to_be_found"}), tries=True)


def test_what_the_libraries_find_is_told_at_once_too(write):
    wrong = {"optim": "adamw_torch_xla", "lr_scheduler_kwargs": {"speed": 1}, "metric_for_best_model": "eval_nlll"}
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write(**wrong))
    assert str(caught.value).startswith("There are 3 mistakes in the recipe:\n  - `optim: adamw_torch_xla` can't be had")
    assert "\n  - `metric_for_best_model: eval_nlll` is not reported." in str(caught.value)


def test_mistakes_of_the_configuration_are_told_at_once(write):
    starts = ["`loss_type: dft`", "`label_smoothing_factor: 0.1`"]
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write(loss_type="dft", label_smoothing_factor=0.1))
    first, *lines = str(caught.value).splitlines()
    assert first == "There are 2 mistakes in the configuration:"
    for line, start in zip(lines, starts, strict=True):
        assert start in line


def test_the_launcher_is_told_what_went_wrong(write, tmp_path, monkeypatch, capsys):
    """torchrun's report ends with it; of the processes the first alone writes it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        main(["train", *write(lerning_rate=1)])
    assert "error" not in capsys.readouterr().err
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["message"].startswith("Unknown recipe key 'lerning_rate'. Did you mean 'learning_rate'?")


def kinds_of(hint):
    """The classes that a type hint allows; of an enumeration and of `Literal`, those of their values."""
    if get_origin(hint) in (list, dict):
        return {get_origin(hint)}
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_args(hint):
        return set().union(*map(kinds_of, get_args(hint)))
    return {str} if isinstance(hint, type) and issubclass(hint, Enum) else {hint}


def test_fields_are_those_of_the_dataclasses():
    """Names, classes, choices and defaults, as the installed versions' parser has them."""
    actions = {action.dest: action for action in reversed(Parser(DATACLASSES)._actions) if action.dest != "help"}
    hints = {key: hint for each in DATACLASSES for key, hint in get_type_hints(each).items()}
    assert actions.keys() == recipe_fields().keys()
    for key, field in recipe_fields().items():
        assert {kind if kind in KINDS.values() else object for kind in kinds_of(hints[key])} == field.kinds, key
        assert tuple(actions[key].choices or ()) == field.choices, key
        assert " ".join(str(actions[key].help or "").split()) == " ".join(field.text.split()), key
        item = str if isinstance(actions[key].type, type) and issubclass(actions[key].type, Enum) else actions[key].type
        assert list not in field.kinds or key == "datasets" or {item} == field.items, key
    for each in (each for cls in DATACLASSES for each in fields(cls) if each.init):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        assert recipe_fields()[each.name].default in (getattr(default, "value", default), None), each.name
    parameters = {name for function in OBJECTIVES.values() for name in signature(function).parameters}
    assert objective_parameters() == parameters
    assert TRACKERS.keys() >= INTEGRATION_TO_CALLBACK.keys()  # an older version lacks some


def test_options_are_those_of_the_dataclasses():
    pytest.importorskip("optuna")
    from bl_trainer.sweep.verb import SweepArguments

    verbs = (
        DiagnoseArguments,
        TrainArguments,
        SweepArguments,
        EvaluateArguments,
        MergeArguments,
        PrepareArguments,
        ScoreArguments,
    )
    assert {cls.__name__ for cls in (*verbs, ConvertArguments)} == {*OPTIONS.values()}
    for cls in (DatasetConfig, ConvertArguments, *verbs):
        texts = {f.name: f.metadata.get("help", "") for f in fields(cls) if f.init}
        assert texts == {name: field.text for name, field in fields_of(cls.__name__).items()}


def test_sources_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setitem(SOURCES, "DatasetConfig", ("trl", "nowhere.py"))
    with pytest.raises(DependencyError, match=r"Cannot read recipe keys: trl has no nowhere\.py"):
        fields_of.__wrapped__("DatasetConfig")
    monkeypatch.setitem(SOURCES, "DatasetConfig", ("trl", "__init__.py"))
    with pytest.raises(DependencyError, match=r"__init__\.py has no DatasetConfig"):
        fields_of.__wrapped__("DatasetConfig")


def test_tables_of_keys_are_true():
    for key, line in {**REPLACED, **RENAMED}.items():
        if key in KEYS:  # an older version's, which obeys it
            continue
        for word in (line or "").replace("{value}", "").replace("{{", "").split(":")[:1]:
            first = word.split(",")[0].split(" ")[0]
            assert not first or first in KEYS, f"{key}: {first} is not a recipe key"
    for key, (other, _) in NEEDS.items():
        assert {key, other} <= KEYS
