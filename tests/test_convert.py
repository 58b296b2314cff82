"""`bl-trainer convert`: public recipes, and what becomes of each key."""

import json
import re
from pathlib import Path

import pytest
import yaml

from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.recipe import Recipe
from bl_trainer.recipe.axolotl import AXOLOTL
from bl_trainer.recipe.convert import ConvertArguments, convert
from bl_trainer.recipe.dialects import TRL
from bl_trainer.recipe.fields import recipe_fields
from bl_trainer.recipe.keys import RENAMED, REPLACED
from bl_trainer.recipe.llama_factory import LLAMA_FACTORY
from bl_trainer.recipe.reading import faults_of

OLD = Path(__file__).parents[1] / "examples/recipes/old"
NAMES = sorted(path.stem for path in OLD.glob("*.yaml"))
PUBLIC = [name for name in NAMES if not name.startswith(("axolotl", "llamafactory"))]
# What a machine without a GPU, the Hub and the packages that the recipes name can't do
HERE = {
    "use_cpu": True, "bf16": False, "dtype": "float32", "attn_implementation": "sdpa", "report_to": "none",
    "push_to_hub": False,
    "load_in_4bit": False, "load_in_8bit": False, "use_liger_kernel": False, "dataset_num_proc": None, "eos_token": None,
    "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_length": 64,
    "log_level": "warning",
}  # fmt: skip


@pytest.fixture
def rewrite(tmp_path):
    """Convert a recipe, given as a file or as keys, and return what the new one says."""

    def rewrite(old, *, name="new.yaml"):
        if isinstance(old, dict):
            (tmp_path / "old.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
            old = tmp_path / "old.yaml"
        said, changed = convert(ConvertArguments.read([str(old), "-o", str(tmp_path / name)]))
        assert str(tmp_path / name) in said
        return yaml.safe_load((tmp_path / name).read_text()), changed

    return rewrite


def stand_in(new, folder, checkpoint):
    """Put a tiny model and data in the places of a recipe's own, each of the columns that it reads."""
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    is_text = new.get("dataset_name") == "stanfordnlp/imdb"
    row = {"text": "abba"} if is_text else {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(60)))
    new = {**new, "model_name_or_path": str(checkpoint), "output_dir": str(folder / "out")}
    new.pop("model_revision", None)
    for entry in new.get("datasets", []):
        split = entry["split"].partition("[")[0]
        entry.pop("name", None)
        entry.update(path="json", data_files={split: str(folder / "rows.jsonl")})
    if new.get("dataset_name"):
        (folder / "data").mkdir()
        for key, split in (("dataset_train_split", "train"), ("dataset_test_split", "test")):
            (folder / "data" / f"{new.get(key, split)}.jsonl").write_text((folder / "rows.jsonl").read_text())
        new["dataset_name"] = str(folder / "data")
        new.pop("dataset_config", None)
    if "test_split_size" in new:
        new["test_split_size"] = 4
    return {**new, **{key: value for key, value in HERE.items() if key in new or value not in (None, False)}}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_recipe_trains_at_its_first_launch(name, rewrite, checkpoint, tmp_path):
    new, _ = rewrite(OLD / f"{name}.yaml")
    (tmp_path / "stand_in.yaml").write_text(yaml.safe_dump(stand_in(new, tmp_path, checkpoint), sort_keys=False))
    main(["train", "--config", str(tmp_path / "stand_in.yaml")])
    assert (tmp_path / "out/model.safetensors").exists() or (tmp_path / "out/adapter_model.safetensors").exists()


EXPECTED = {
    "zephyr-7b-full": {"dtype": "bfloat16", "max_length": 2048, "warmup_steps": 0.1, "test_split_size": 1000},
    "zephyr-7b-qlora": {"use_peft": True, "load_in_4bit": True, "lora_r": 16, "learning_rate": 2e-4},
    "smollm2-1.7b": {"dataset_config": "all", "eval_strategy": "epoch", "save_strategy": "no"},
    "smollm3-3b": {"packing_strategy": "bfd", "shuffle_dataset": True, "assistant_only_loss": True, "eos_token": "<|im_end|>"},
    "open-r1-demo": {"dataset_config": "all", "use_liger_kernel": True, "max_length": 32768, "warmup_steps": 0.05},
    "olympiccoder-7b": {"use_liger_kernel": True, "save_steps": 0.2, "dataset_config": "solutions_decontaminated"},
    "trl-example": {"learning_rate": 1e-4, "report_to": "none"},
    "axolotl-lora-1b": {
        "model_name_or_path": "NousResearch/Llama-3.2-1B", "use_peft": True, "max_length": 2048, "packing": True,
        "per_device_train_batch_size": 2, "optim": "adamw_8bit", "test_split_size": 0.1, "eval_strategy": "steps",
        "eval_steps": 0.25, "save_strategy": "epoch", "attn_implementation": "flash_attention_2",
        "pad_token": "<|end_of_text|>",
    },
    "axolotl-instruct-8b": {"assistant_only_loss": True, "load_in_8bit": True, "lora_target_modules": "all-linear"},
    "llamafactory-lora": {
        "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": "all-linear",
        "max_length": 2048, "dataset_num_proc": 16,
    },
}  # fmt: skip
# Keys that change training and have no counterpart -> said aloud
LOUD = {
    "smollm3-3b": ["`weight`: 0.5 of smoltalk_smollm3_smol_magpie_ultra_no_think"],
    "axolotl-lora-1b": ["`loss_watchdog_threshold`", "`datasets`: teknium/GPT4-LLM-Cleaned is of type alpaca"],
    "axolotl-instruct-8b": ["`chat_template`"],
    "llamafactory-lora": ["`dataset`: its names", "`template`", "`train_on_prompt`"],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_public_recipe_is_taken_or_spoken_of(name, rewrite, tmp_path):
    old = yaml.safe_load((OLD / f"{name}.yaml").read_text())
    new, changed = rewrite(OLD / f"{name}.yaml")
    kept = {RENAMED[key] for key in RENAMED if key in recipe_fields()}  # an older version's own names
    assert all(new[key] == value for key, value in EXPECTED[name].items() if key not in kept)
    text = (tmp_path / "new.yaml").read_text()
    for key in old:
        assert key in new or key in text, key
    for start in LOUD.get(name, []):
        assert any(each.startswith(start) for each in changed), start
        assert start[:40] in " ".join(text.split())
    if "chat_template" in old and name in PUBLIC:
        assert Path(new["chat_template_path"]).read_text() == old["chat_template"]


def test_data_sets_of_a_mixture(rewrite):
    new, changed = rewrite(OLD / "smollm3-3b.yaml")
    assert len(new["datasets"]) == 25
    assert new["datasets"][0] == {
        "path": "HuggingFaceTB/smoltalk2", "name": "SFT", "columns": ["messages", "chat_template_kwargs"],
        "split": "smoltalk_smollm3_everyday_conversations_no_think",
    }  # fmt: skip
    assert new["datasets"][-2]["split"] == "OpenThoughts3_1.2M_think[:2%]"
    assert sum("`weight`" in each for each in changed) == 5


OLDER = [
    ({"dataset_mixer": {"a/b": 1.0}, "dataset_splits": ["train_sft", "test_sft"], "evaluation_strategy": "epoch"},
     {"dataset_name": "a/b", "dataset_train_split": "train_sft", "dataset_test_split": "test_sft", "eval_strategy": "epoch"}),
    ({"dataset_mixer": {"a/b": 1.0, "c/d": 0.5}, "dataset_splits": ["train"], "dataset_configs": ["x", "y"]},
     {"datasets": [{"path": "a/b", "split": "train", "name": "x"}, {"path": "c/d", "split": "train[:50%]", "name": "y"}]}),
    ({"use_flash_attention_2": True, "group_by_length": True, "adafactor": True},
     {"attn_implementation": "flash_attention_2", "train_sampling_strategy": "group_by_length", "optim": "adafactor"}),
    ({"gradient_checkpointing_use_reentrant": False, "gradient_checkpointing_kwargs": {"a": 1}},
     {"gradient_checkpointing_kwargs": {"use_reentrant": False, "a": 1}}),
    ({"split_batches": True, "dispatch_batches": False},
     {"accelerator_config": {"split_batches": True, "dispatch_batches": False}}),
    ({"wandb_project": "mine", "hub_model_revision": "v1"}, {"env": {"WANDB_PROJECT": "mine"}, "hub_revision": "v1"}),
    ({"packing": True, "packing_strategy": "ffd"}, {"packing": True, "packing_strategy": "bfd"}),
    ({"base_model": "m", "datasets": [{"path": "d", "type": "completion"}], "train_on_inputs": True, "evals_per_epoch": 1,
      "val_set_size": 0.1},
     {"datasets": [{"path": "d"}], "completion_only_loss": False, "eval_strategy": "epoch"}),
    ({"base_model": "m", "datasets": [], "wandb_project": "p", "bf16": "full", "val_set_size": 0, "saves_per_epoch": 0.1},
     {"env": {"WANDB_PROJECT": "p"}, "bf16": True}),
    ({"stage": "sft", "finetuning_type": "full", "dataset": "a", "val_size": 0.1, "flash_attn": "fa2", "quantization_bit": 4,
      "use_peft": True, "enable_liger_kernel": True, "cutoff_len": 99},
     {"datasets": [{"path": "a", "split": "train"}], "test_split_size": 0.1, "attn_implementation": "flash_attention_2",
      "load_in_4bit": True, "use_liger_kernel": True, "max_length": 99, "learning_rate": 5e-5}),
    ({"stage": "sft", "finetuning_type": "lora", "lora_target": "q_proj, v_proj", "lora_alpha": 4, "neat_packing": True},
     {"lora_target_modules": ["q_proj", "v_proj"], "lora_alpha": 4, "packing": True}),
]  # fmt: skip


# What the other trainer does where a recipe is silent, and ours does otherwise
SILENT = [
    ({"base_model": "m", "datasets": [{"path": "d", "type": "chat_template"}]},
     {"per_device_train_batch_size": 1, "num_train_epochs": 1, "max_length": 512, "lr_scheduler_type": "cosine",
      "warmup_steps": 0.03, "dtype": "bfloat16"}),
    ({"base_model": "m", "warmup_steps": 7, "fp16": True, "adapter": "qlora", "load_in_4bit": True},
     {"warmup_steps": 7, "dtype": "float16", "use_bnb_nested_quant": True, "lora_dropout": 0.0}),
    ({"base_model": "m", "lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1, "noisy_embedding_alpha": 5},
     {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "neftune_noise_alpha": 5}),
    ({"base_model": "m", "use_dynamic_finetuning": True}, {"objective": "dft"}),
    ({"base_model": "m", "val_set_size": 0.0, "evals_per_epoch": 4}, {"eval_strategy": None}),
    ({"stage": "sft", "lora_rank": 4, "bf16": True},
     {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear", "dtype": "bfloat16"}),
    ({"stage": "sft", "finetuning_type": "full", "bf16": True, "use_dft_loss": True},
     {"use_peft": None, "lora_alpha": None, "dtype": None, "objective": "dft"}),
    ({"stage": "sft", "finetuning_type": "full", "pure_bf16": True}, {"dtype": "bfloat16", "bf16": True}),
    ({"stage": "sft", "finetuning_type": "full"}, {"bf16": False}),
    ({"stage": "sft", "quantization_bit": 4, "additional_target": "embed_tokens,lm_head"},
     {"use_bnb_nested_quant": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]}),
    ({"dataset_mixer": {"a/b": 1.0}, "packing": True}, {"packing": True, "packing_strategy": "wrapped"}),
    ({"max_seq_length": 64}, {"max_length": 64, "bf16": False}),
    ({"max_seq_length": 64, "fp16": True}, {"fp16": True, "bf16": None}),
    ({"max_length": 64}, {"bf16": None}),
    ({"loss_type": "dft"}, {"objective": "dft", "loss_type": None}),
    ({"dataset_kwargs": {"add_special_tokens": False, "skip_prepare_dataset": True}},
     {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    ({"datasets": [{"path": "d"}], "eval_strategy": "epoch"}, {"eval_strategy": None}),
    ({"dataset_mixture": {"datasets": [{"id": "d", "weight": 0.001}]}}, {"datasets": [{"path": "d", "split": "train[:1%]"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "expected"), SILENT, ids=str)
def test_a_converted_recipe_trains_as_the_other_trainer_does(old, expected, rewrite):
    new, _ = rewrite({"output_dir": "o", **old})
    assert {key: new.get(key) for key in expected} == expected


ALOUD = [
    (
        {"dataset_kwargs": {"add_special_tokens": False, "skip_prepare_dataset": True}},
        "`dataset_kwargs`: TRL no longer reads `add_special_tokens`",
    ),
    ({"base_model": "m"}, "`excess_length_strategy`: drop"),
    ({"base_model": "m", "datasets": [{"path": "d", "type": "chat_template", "shards": 10}]}, "`datasets.shards`: 10 of d"),
    ({"base_model": "m", "datasets": [{"path": "d", "type": "completion", "field": "body"}]}, "`datasets.field`: 'body' of d"),
    ({"base_model": "m", "datasets": [{"path": "d", "type": "completion"}]}, "`datasets.type`: the long texts of d"),
    ({"stage": "sft", "packing": True}, "`packing`: rows packed together"),
    ({"stage": "sft", "mask_history": True}, "`mask_history`"),
    ({"max_seq_length": 64, "packing": True}, "`packing`: TRL before 0.18"),
    ({"max_seq_length": 64}, "`completion_only_loss`: TRL before 0.17 trained on the prompts of prompt-completion data too"),
    ({"loss_type": "other"}, "`loss_type`: other has no counterpart"),
    ({"datasets": [{"path": "d"}], "eval_strategy": "epoch"}, "`eval_strategy`: a mixture holds out no rows"),
    ({"dataset_mixture": {"datasets": [{"id": "d", "weight": 0.001}]}}, "`weight`: 0.001 of train became its first 1%"),
    ({"dataset_mixture": {"datasets": [{"id": "d", "weight": 2}]}}, "`weight`: 2 of d (train) is no slice"),
]


@pytest.mark.parametrize(
    ("old", "said"),
    [(old, said) for old, said in ALOUD if not old.keys() & {"max_seq_length"} & recipe_fields().keys()],
    ids=str,
)
def test_what_trains_otherwise_is_loud(old, said, rewrite):
    _, changed = rewrite({"output_dir": "o", **old})
    assert any(each.startswith(said) for each in changed), changed


@pytest.mark.parametrize("key", [{"max_seq_length": 64, "completion_only_loss": False}, {"max_length": 64}], ids=str)
def test_prompts_are_spoken_of_only_where_an_old_recipe_leaves_them_out(key, rewrite):
    new, changed = rewrite({"output_dir": "o", **key})
    assert (new["max_length"], changed) == (64, [])


def test_what_an_axolotl_data_set_says_of_the_usual_layout_changes_nothing(rewrite):
    layout = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
    old = {
        "base_model": "m",
        "datasets": [{"path": "d", "type": "chat_template", **layout}],
        "excess_length_strategy": "truncate",
    }
    _, changed = rewrite({**old, "chat_template": "tokenizer_default"})
    assert changed == []


# An older transformers still has, and obeys, some of these keys
OLDER = [(old, expected) for old, expected in OLDER if not old.keys() & {*REPLACED, *RENAMED} & recipe_fields().keys()]


@pytest.mark.parametrize(("old", "expected"), OLDER, ids=[",".join(old) for old, _ in OLDER])
def test_keys_have_their_counterparts(old, expected, rewrite):
    new, _ = rewrite(old)
    assert new.items() >= {key: value for key, value in expected.items() if key not in old or key in new}.items()


LOST = {
    "response_template": "x", "system_prompt": "be", "tokenizer_name_or_path": "a/b", "chat_template": "chatml",
    "dataset_configs": ["a", "b"], "warmup_ratio": 1.5, "sharded_ddp": "simple", "push_to_hub_organization": "me", "nosuch": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in LOST if key not in recipe_fields()])
def test_what_has_no_counterpart_is_loud(key, rewrite, capsys, tmp_path):
    _, changed = rewrite({"model_name_or_path": "m", key: LOST[key]})
    assert [each.partition(":")[0] for each in changed] == [f"`{key}`"]
    assert "CHANGES TRAINING" in (tmp_path / "new.yaml").read_text()
    main(["convert", str(tmp_path / "old.yaml"), "--output", str(tmp_path / "again.yaml")])
    said = capsys.readouterr()
    assert said.out.startswith(f"Wrote {tmp_path / 'again.yaml'} from a recipe of TRL: ")
    assert f"warning: this changes training: `{key}`" in said.err


def test_every_replaced_key_of_older_versions_is_converted():
    """None is left to the sentence for keys that nobody knows."""
    known = {*TRL.renamed, *TRL.flags, *TRL.idle, *TRL.handlers, *recipe_fields()}
    assert {*REPLACED, *RENAMED} <= known
    for dialect in (AXOLOTL, LLAMA_FACTORY, TRL):
        ours = [*dialect.renamed.values(), *(key for key, _ in dialect.flags.values()), *(key for key, _ in dialect.values)]
        assert {*ours} <= recipe_fields().keys()
        takes = {*dialect.renamed, *dialect.flags, *dialect.handlers, *recipe_fields()}
        assert {*dialect.defaults({"adapter": "lora", "quantization_bit": 4})} <= takes


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"stage": "dpo"}, "Cannot convert `stage: dpo`: bl_trainer trains supervised objectives alone."),
        ({"finetuning_type": "freeze"}, "Cannot convert `finetuning_type: freeze`"),
        ({"base_model": "m", "rl": "dpo"}, "Cannot convert `rl: dpo`"),
        ({"base_model": "m", "adapter": "llama-adapter"}, "Cannot convert `adapter: llama-adapter`"),
        ({"dataset_mixture": ["a"]}, "a key has a value that TRL does not take."),
        ({"max_seq_length": 0, "packing": 2}, "There are 2 mistakes in its new keys:"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused(old, message, rewrite, tmp_path, capsys):
    with pytest.raises(RecipeError) as caught:
        rewrite(old)
    assert message in str(caught.value)
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "old.yaml"), "-o", str(tmp_path / "new.yaml")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("present", ["new.yaml", "new.jinja"])
def test_nothing_is_overwritten(present, rewrite, tmp_path):
    (tmp_path / present).write_text("mine")
    with pytest.raises(RecipeError, match=rf"Cannot write .*{present}: it is there already"):
        rewrite(OLD / "smollm2-1.7b.yaml")
    assert [path.name for path in tmp_path.iterdir()] == [present]
    assert (tmp_path / present).read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "The recipe is missing. Write `bl-trainer convert OLD.yaml --output NEW.yaml`."),
        (["a.yaml"], "`--output` is missing."),
        (["a.yaml", "-o", "b.yaml"], "Cannot read the recipe a.yaml"),
        (["a.yaml", "--outputt", "b.yaml"], "Unrecognized arguments: --outputt b.yaml."),
        ([str(OLD / "trl-example.yaml"), "-o", "/proc/none/new.yaml"], "Cannot write "),
    ],
    ids=str,
)
def test_a_wrong_command_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_converted_recipe_is_read_as_it_says(rewrite, checkpoint, tmp_path):
    new, _ = rewrite(OLD / "zephyr-7b-qlora.yaml")
    (tmp_path / "stand_in.yaml").write_text(yaml.safe_dump(stand_in(new, tmp_path, checkpoint)))
    recipe = Recipe.read(["--config", str(tmp_path / "stand_in.yaml")])
    assert recipe.training.lr_scheduler_type == "cosine"
    assert recipe.peft_config.r == 16


def test_the_page_is_true(tmp_path, monkeypatch):
    """The commands of docs/guide/recipes.md are read; each key of its table becomes what stands beside it."""
    page = (OLD.parents[2] / "docs/guide/recipes.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    first, second = (line.split()[2:] for line in block.splitlines())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(OLD.parents[1])
    convert(ConvertArguments.read(first))
    faults = faults_of(yaml.safe_load((tmp_path / second[1]).read_text()))
    assert not faults
    for key, ours in re.findall(r"^\| `(\w+)`.*?\|.*?`(\w+)[:`]", page, re.M):
        known = {name for each in (TRL, AXOLOTL, LLAMA_FACTORY) for name in (*each.handlers, *each.flags)}
        assert key in {*known, "packing_strategy", "weight", "packing"}, key
        assert ours in recipe_fields() or ours in ("train", "env"), ours
    for name in re.findall(r"`(\w+)`", page.split("changed their name alone")[1].split(". A warning")[0]):
        assert name in RENAMED


OF_AXOLOTL = {"base_model": "m", "micro_batch_size": 1}
LINEAR, NAMED = "lora_target_linear", "lora_target_modules"
OF_LLAMA_FACTORY = {"stage": "sft", "model_name_or_path": "m"}
TWO_KEYS = [
    ({**OF_AXOLOTL, LINEAR: True, NAMED: ["q_proj"], "adapter": "lora"}, NAMED, "all-linear"),
    ({**OF_AXOLOTL, NAMED: ["q_proj"], LINEAR: True, "adapter": "lora"}, NAMED, "all-linear"),
    ({**OF_AXOLOTL, NAMED: ["q_proj"], LINEAR: False, "adapter": "lora"}, NAMED, ["q_proj"]),
    ({**OF_LLAMA_FACTORY, "neat_packing": True, "packing": False}, "packing", True),
    ({**OF_LLAMA_FACTORY, "packing": False, "neat_packing": True}, "packing", True),
    ({**OF_LLAMA_FACTORY, "train_on_prompt": True}, "completion_only_loss", False),
    ({**OF_AXOLOTL, "wandb_project": "p"}, "report_to", "wandb"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "key", "value"), TWO_KEYS, ids=[f"{[*old][2:]}" for old, *_ in TWO_KEYS])
def test_keys_that_decide_together_mean_what_they_meant(old, key, value, rewrite):
    assert rewrite(old)[0][key] == value


def test_a_key_with_two_values_is_told(rewrite):
    new, changed = rewrite({"model_name_or_path": "m", "torch_dtype": "auto", "dtype": "float32"})
    assert new["dtype"] == "float32"
    assert changed == ["`dtype`: two keys gave it values, auto and float32; the latter is kept"]


def test_a_plugin_that_changes_training_is_told(rewrite):
    plugins = ["axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.kd.KDPlugin"]
    said = [each for each in rewrite({**OF_AXOLOTL, "plugins": plugins})[1] if "plugins" in each]
    assert said == ["`plugins`: bl_trainer has no axolotl.integrations.kd.KDPlugin"]


@pytest.mark.parametrize(
    ("old", "gone"),
    [
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "warmup_steps"),
        ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"min_lr": 0}}, "lr_scheduler_kwargs"),
        ({"eval_strategy": "epoch", "eval_steps": 10}, "eval_steps"),
        ({"do_train": False}, "do_train"),
        ({"do_eval": True}, "do_eval"),
        ({"do_predict": True}, "do_predict"),
    ],
    ids=str,
)
def test_what_had_no_effect_is_left_out(old, gone, rewrite, tmp_path):
    new, changed = rewrite({"model_name_or_path": "m", "dataset_name": "d", **old})
    assert gone not in new
    assert changed == []
    assert f"`{gone}`" in (tmp_path / "new.yaml").read_text()
