"""Recipes: TRL's SFT recipe keys and ours, from a YAML file and the command line, read strictly."""

import os
import sys
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import yaml
from accelerate.utils import gather_object, is_bnb_available
from datasets.exceptions import DatasetsError
from peft import PeftConfig
from transformers import BitsAndBytesConfig, set_seed
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.scripts.utils import DatasetConfig

from .objectives import _nearest
from .statistics import MeasurementError
from .trainer import METRICS, BLConfig, refuse_lm_head_adapter, refuse_other_recipe


class RecipeError(ValueError):
    """A mistake in a recipe or in what it points to; the message is one sentence for the user."""


# Keys of older recipes and what to write instead: the fields of TRL 0.8 to 1.15's and transformers 4.30 to 5.3's
# dataclasses that are gone, and those of the alignment handbook. Read only for keys that the installed versions lack.
REPLACED = {
    "max_seq_length": "max_length: {value}",
    "torch_dtype": "dtype: {value}",
    "use_liger": "use_liger_kernel: {value}",
    "dataset_batch_size": None,
    "num_of_sequences": None,
    "chars_per_token": None,
    "gradient_checkpointing_use_reentrant": "gradient_checkpointing_kwargs: {{use_reentrant: {value}}}",
    "response_template": "assistant_only_loss: true, or prompt-completion data with completion_only_loss: true",
    "instruction_template": "assistant_only_loss: true, or prompt-completion data with completion_only_loss: true",
    "dataset_mixer": "datasets: [{{path: ..., split: train, fraction: ...}}]",
    "dataset_mixture": "datasets: [{{path: ..., split: train, fraction: ...}}], and test_split_size",
    "dataset_splits": "dataset_train_split and dataset_test_split",
    "dataset_configs": "dataset_config: ...",
    "text_column": "dataset_text_field: {value}",
    "preprocessing_num_workers": "dataset_num_proc: {value}",
    "chat_template": "chat_template_path: template.jinja",
    "tokenizer_name_or_path": "chat_template_path: {value}, if it was for the chat template",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "evaluation_strategy": "eval_strategy: {value}",
    "warmup_ratio": "warmup_steps: {value}  (a value below 1 is a share of all steps)",
    "overwrite_output_dir": None,
    "group_by_length": "train_sampling_strategy: group_by_length",
    "adafactor": "optim: adafactor",
    "no_cuda": "use_cpu: {value}",
    "use_mps_device": None,
    "use_ipex": None,
    "jit_mode_eval": None,
    "past_index": None,
    "mp_parameters": None,
    "tpu_num_cores": None,
    "tpu_metrics_debug": None,
    "ray_scope": None,
    "save_safetensors": None,
    "use_legacy_prediction_loop": None,
    "logging_dir": "report_to: tensorboard, with the folder in the environment variable TENSORBOARD_LOGGING_DIR",
    "include_inputs_for_metrics": "include_for_metrics: [inputs]",
    "include_tokens_per_second": "include_num_input_tokens_seen: true",
    "per_gpu_train_batch_size": "per_device_train_batch_size: {value}",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size: {value}",
    "push_to_hub_model_id": "hub_model_id: {value}",
    "push_to_hub_organization": "hub_model_id: {value}/MODEL",
    "push_to_hub_token": "hub_token: ...",
    "fp16_backend": None,
    "half_precision_backend": None,
    "fp16_opt_level": None,
    "sharded_ddp": "fsdp: full_shard",
    "fsdp_min_num_params": "fsdp_config: {{min_num_params: {value}}}",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config: {{transformer_layer_cls_to_wrap: [{value}]}}",
    "dispatch_batches": "accelerator_config: {{dispatch_batches: {value}}}",
    "split_batches": "accelerator_config: {{split_batches: {value}}}",
    "torchdynamo": "torch_compile_backend: {value}",
    "xpu_backend": "ddp_backend: {value}",
}

# Keys that do nothing unless another is set: key -> (the other key, what to write). Naming the other key, even to switch
# it off, is taken for a decision.
NEEDS = {
    **dict.fromkeys(
        (f.name for f in fields(ModelConfig) if f.name.startswith("lora_") or f.name in ("use_rslora", "use_dora")),
        ("use_peft", "use_peft: true"),
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        ("load_in_4bit", "load_in_4bit: true"),
    ),
    **dict.fromkeys(("streaming", "test_split_size"), ("datasets", "datasets: [{path: ...}]")),
    **dict.fromkeys(
        ("dataset_config", "dataset_streaming"),
        ("dataset_name", "dataset_name: ..., or name and streaming of a `datasets` mixture"),
    ),
    "packing_strategy": ("packing", "packing: true"),
    **dict.fromkeys(("eval_steps", "dataset_test_split", "eval_packing"), ("eval_strategy", "eval_strategy: steps")),
    "liger_kernel_config": ("use_liger_kernel", "use_liger_kernel: true"),
}

POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length")

# What a run writes to `output_dir`, so that none of it may be there already
WRITTEN = ("checkpoint-*", "*.safetensors", "*.bin", "*.json", "*.jinja", "README.md")

DATACLASSES: Any = (ScriptArguments, BLConfig, ModelConfig, DatasetMixtureConfig)
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass
class Recipe:
    """A recipe, checked as far as it can be without loading data or model.

    `script`, `model`, `mixture`: TRL's own dataclasses; `training`: a `BLConfig`; `options`: the verb's own, if it has any.
    """

    script: ScriptArguments
    training: BLConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    options: Any = None

    @classmethod
    def read(cls, argv: list[str], verb: str = "train", options: type | None = None) -> "Recipe":
        """Read `--config recipe.yaml --any_key value ...`; the command line wins. Raises RecipeError.

        `options`: a dataclass of what the verb takes on the command line besides recipe keys.
        """
        argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        own = {f.name for f in fields(options)} if options else set()
        parser = _Parser(DATACLASSES + ((options,) if options else ()), prog=f"bl_trainer {verb}", allow_abbrev=False)
        config: dict[str, Any] = {}
        if "--config" in argv:
            index = argv.index("--config")
            config = _load_yaml(argv[index + 1 : index + 2])
            argv = argv[:index] + argv[index + 2 :]
        if not config and not parser.is_given("model_name_or_path", argv) and not {"-h", "--help"} & set(argv):
            raise RecipeError(f"No recipe is given. Write `{verb} --config recipe.yaml`.")
        for key in sorted(own & config.keys()):
            raise RecipeError(f"`{key}` is not a recipe key. Give it on the command line: `--{key} ...`.")
        parser.check(config, argv)
        os.environ.update({key: str(value) for key, value in config.pop("env", {}).items()})
        try:
            parser.set_defaults_with_config(**config)
            script, training, model, mixture, *rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        except (ValueError, TypeError, KeyError, OSError) as error:
            on_cpu = " On a machine without a GPU write `use_cpu: true`." if "bf16/gpu" in str(error) else ""
            raise RecipeError(_sentence(error) + on_cpu) from error
        recipe = cls(script, training, model, mixture, *rest)
        recipe._check(given={key for key in parser.known if key in config or parser.is_given(key, argv)})
        return recipe

    @property
    def peft_config(self) -> PeftConfig | None:
        """TRL's LoRA configuration, None without `use_peft`."""
        return get_peft_config(self.model)

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """TRL's bitsandbytes configuration, None without `load_in_4bit` or `load_in_8bit`."""
        return get_quantization_config(self.model)

    def model_init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `AutoModelForCausalLM.from_pretrained`, as TRL's own script puts them together."""
        kwargs = {
            "revision": self.model.model_revision,
            "attn_implementation": self.model.attn_implementation,
            "dtype": self.model.dtype,
        }
        return {**kwargs, **(self.training.model_init_kwargs or {})}  # type: ignore[dict-item]

    def load_datasets(self) -> tuple[Any, Any]:
        """Return the training set, and the evaluation set or None. Raises RecipeError if one can't be had."""
        set_seed(self.training.seed)  # `test_split_size` splits by NumPy's generator: every process must split alike
        script, training = self.script, self.training
        try:
            loaded = get_dataset(self.mixture) if self.mixture.datasets else load_dataset(script)
        except (ValueError, OSError, DatasetsError, StopIteration) as error:
            source = script.dataset_name or [entry.path for entry in self.mixture.datasets]
            why = "a file is empty" if isinstance(error, StopIteration) else _sentence(error)
            raise RecipeError(f"Can't load the data set {source}: {why}") from error
        wanted = {"dataset_train_split": script.dataset_train_split}
        if training.eval_strategy != "no":
            wanted["dataset_test_split"] = script.dataset_test_split
        for key, split in wanted.items():
            if split not in loaded:
                other = ", or `eval_strategy: no`, or `test_split_size` for a mixture"
                instead = other if key == "dataset_test_split" else ""
                raise RecipeError(
                    f"The data set has no split {split!r}, only {', '.join(map(repr, loaded))}. Write `{key}: "
                    f"{next(iter(loaded))}`{instead}."
                )
        found = [loaded[split] for split in wanted.values()]
        for split, dataset in zip(wanted.values(), found, strict=True):
            if next(iter(dataset), None) is None:
                raise RecipeError(f"The {split} set is empty.")
            self.check_columns(split, dataset)
        return found[0], found[1] if len(found) > 1 else None

    def check_columns(self, split: str, dataset: Any) -> None:
        """Raise RecipeError if TRL can't make a training text of the data set's columns."""
        text = self.training.dataset_text_field
        columns = set(dataset.column_names or next(iter(dataset)))
        usable = columns & {text, "messages", "conversations", "input_ids"} or {"prompt", "completion"} <= columns
        options: Any = self.training.dataset_kwargs or {}
        if not usable and not options.get("skip_prepare_dataset"):
            raise RecipeError(
                f"The {split} set has the columns {', '.join(sorted(columns))}, of which TRL can't make a training text. "
                f"Rename them to prompt and completion, to messages or to text, or write `dataset_text_field: ...`."
            )
        first = next(iter(dataset))
        for column in (text, "prompt", "completion"):
            if first.get(column) is not None and not isinstance(first[column], (str, list)):
                raise RecipeError(
                    f"The column {column!r} of the {split} set must hold texts or messages; it begins with {first[column]!r}."
                )

    def checkpoint(self) -> str | None:
        """Return the checkpoint to resume from, or None for a new run.

        `resume_from_checkpoint: true` takes the last one in `output_dir`, and starts anew where there is none, so that the
        same command serves the first start and every restart. Raises RecipeError rather than overwrite an earlier run, and if
        the machines see different ones.
        """
        own = self._own_checkpoint()
        names = sorted({Path(path).name if path else "none" for path in gather_object([own])})
        if len(names) > 1:
            raise RecipeError(
                f"`resume_from_checkpoint` finds {' on one machine, '.join(names)} on another. Put `output_dir` where all "
                "machines see it, or copy the checkpoint to each."
            )
        return own

    def _own_checkpoint(self) -> str | None:
        resume, folder = str(self.training.resume_from_checkpoint or False), Path(self.training.output_dir or ".")
        whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]  # a killed run may leave a part
        last = max(whole, key=lambda path: int(path.name.split("-")[-1]), default=None)
        chosen = last if resume.lower() == "true" else None
        if resume.lower() not in ("true", "false"):
            chosen = Path(resume)
            if not chosen.is_dir():
                raise RecipeError(
                    f"`resume_from_checkpoint: {resume}` is not a folder. Write a checkpoint's path, or `true` for the last "
                    "one in `output_dir`."
                )
        if chosen:
            try:
                refuse_other_recipe(str(chosen), self.training)
            except ValueError as error:
                raise RecipeError(_sentence(error)) from error
            if chosen.resolve().parent == folder.resolve():
                return str(chosen)
        present = sorted(path.name for pattern in WRITTEN for path in folder.glob(pattern))
        if present:
            go_on = "`resume_from_checkpoint: true` to go on with it, or " if last and not chosen else ""
            raise RecipeError(
                f"`output_dir: {folder}` holds {present[0]}, of an earlier run or your own, which would be overwritten. Write "
                f"{go_on}another `output_dir`."
            )
        return str(chosen) if chosen else None

    def _check(self, given: set[str]) -> None:
        for key in sorted(given & NEEDS.keys()):
            other, line = NEEDS[key]
            if other not in given and not (key == "packing_strategy" and self.training.eval_packing):
                raise RecipeError(f"`{key}` does nothing without `{other}`. Write `{line}`, or remove `{key}`.")
        if "ignore_bias_buffers" in given:
            raise RecipeError("`ignore_bias_buffers` does nothing in SFT. Remove it.")
        for key in ("model_init_kwargs", "dataset_kwargs"):
            value = getattr(self.training, key)
            if value is not None and not isinstance(value, dict):
                raise RecipeError(f"`{key}` must be a mapping, got {value!r}.")
        self._check_training()
        self._check_data()
        self._check_model(given)

    def _check_training(self) -> None:
        training = self.training
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and training.world_size == 1:
            raise RecipeError(
                f"{launched} processes were launched, and each would train alone. On CPUs write `use_cpu: true`; on GPUs "
                "launch no more processes than there are."
            )
        if training.packing and training.max_length is None:
            raise RecipeError("`packing: true` needs `max_length`, the length of a packed row; the recipe says null.")
        for key in POSITIVE:
            if getattr(training, key) is not None and getattr(training, key) <= 0:
                raise RecipeError(f"`{key}: {getattr(training, key)}` must be above 0.")
        if training.learning_rate < 0:
            raise RecipeError(f"`learning_rate: {training.learning_rate}` must not be negative.")
        if training.eval_on_start and training.eval_strategy == "no":
            raise RecipeError("`eval_on_start` needs an evaluation set. Write `eval_strategy: steps` or `epoch`.")
        reported = [*METRICS, "loss", "perplexity", "aux_loss", "num_tokens", "runtime"]
        best = training.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in reported:
            near = _nearest(best, [f"eval_{name}" for name in reported])
            raise RecipeError(f"`metric_for_best_model: {best}` is not reported.{near} Allowed: {', '.join(reported)}.")

    def _check_data(self) -> None:
        script, mixture = self.script, self.mixture
        if bool(mixture.datasets) == bool(script.dataset_name):
            both = "names both `dataset_name` and `datasets`" if script.dataset_name else "names no data set"
            raise RecipeError(f"The recipe {both}. Write one of `dataset_name: ...` and `datasets: [{{path: ...}}]`.")
        if (script.dataset_streaming or mixture.streaming) and self.training.max_steps <= 0:
            raise RecipeError("A streamed data set has no length. Write `max_steps: ...`, the number of training steps.")
        if mixture.streaming and mixture.test_split_size is not None:
            raise RecipeError("`test_split_size` can't split a streamed mixture. Remove it, or `streaming: true`.")

    def _check_model(self, given: set[str]) -> None:
        model = self.model
        if not model.model_name_or_path:
            raise RecipeError("The recipe names no model. Write `model_name_or_path: ...`, a folder or a Hub id.")
        if _is_path(model.model_name_or_path) and not Path(model.model_name_or_path).is_dir():
            raise RecipeError(f"`model_name_or_path: {model.model_name_or_path}` is not a folder.")
        for key, top in (("dtype", "dtype"), ("revision", "model_revision"), ("attn_implementation", "attn_implementation")):
            if top in given and key in (self.training.model_init_kwargs or {}):
                raise RecipeError(f"`{top}` and `{key}` in `model_init_kwargs` say the same thing. Keep one of them.")
        quantised = model.load_in_4bit or model.load_in_8bit
        if quantised and not model.use_peft:
            raise RecipeError("A model in 4 or 8 bits can't be trained as it is. Write `use_peft: true` for QLoRA.")
        if quantised and not is_bnb_available():
            raise RecipeError("`load_in_4bit` and `load_in_8bit` need bitsandbytes. Run `pip install bitsandbytes`.")
        try:
            refuse_lm_head_adapter(self.peft_config)
        except ValueError as error:
            raise RecipeError(_sentence(error)) from error


class _Parser(TrlParser):
    """TRL's parser, made to reject what it would ignore and to end in one sentence."""

    def error(self, message: str) -> Any:
        raise RecipeError(message[:1].upper() + message[1:] + ".")

    @property
    def known(self) -> list[str]:
        """All recipe keys."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def is_given(self, key: str, argv: list[str]) -> bool:
        """Whether the command line sets `key`."""
        options = {o for action in self._actions if action.dest == key for o in action.option_strings}
        return any(arg.split("=", 1)[0] in options for arg in argv)

    def check(self, config: dict[str, Any], argv: list[str]) -> None:
        """Raise RecipeError on a key that does not exist or a value that argparse takes from a file unseen."""
        known = self.known
        for key, value in config.items():
            if key not in known and key != "env":
                raise RecipeError(_unknown(str(key), value, known, self.prog))
        options = self._option_string_actions
        for i, arg in enumerate(argv):
            option, _, value = arg.partition("=")
            if option.startswith("--") and option not in options:
                value = value or (argv[i + 1] if i + 1 < len(argv) else "")
                raise RecipeError(_unknown(option[2:].replace("-", "_"), value, known, self.prog))
        for action in self._actions:
            if action.dest in config and config[action.dest] is not None:
                _check_yaml_value(action.dest, action, config[action.dest])


def _check_yaml_value(key: str, action: Any, value: Any) -> None:
    is_flag = getattr(action, "const", None) is True
    wrong_type = (
        (action.type is int and (isinstance(value, (bool, list, dict)) or (isinstance(value, float) and value % 1)))
        or (action.type is float and isinstance(value, (bool, list, dict)))
        or (is_flag and not isinstance(value, (bool, str)))
    )
    if wrong_type:
        wanted = "true or false" if is_flag else {int: "a whole number", float: "a number"}[action.type]
        raise RecipeError(f"`{key}: {value}` is of the wrong type. Write {wanted}.")
    if action.choices and value not in action.choices:
        near = _nearest(value, map(str, action.choices))
        raise RecipeError(f"`{key}: {value}` is not allowed.{near} Allowed: {', '.join(map(str, action.choices))}.")


class _UniqueKeys(yaml.SafeLoader):
    """YAML, except that a key given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"The recipe gives {key!r} twice (line {key_node.start_mark.line + 1}). Keep one of them.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _load_yaml(paths: list[str]) -> dict[str, Any]:
    if not paths:
        raise RecipeError("`--config` needs the path of a recipe. Write `--config recipe.yaml`.")
    path = Path(paths[0])
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Can't read the recipe {path}: {_sentence(error)}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"The recipe {path} must be a YAML mapping of keys to values, got {type(config).__name__}.")
    if not isinstance(config.get("env", {}), dict):
        raise RecipeError(f"`env` must be a mapping of environment variables to values, got {config['env']!r}.")
    for key in config:
        if str(key).endswith("_strategy") and config[key] is False:
            config[key] = "no"  # what YAML makes of an unquoted no
    entries = config.get("datasets") or []
    if not isinstance(entries, list):
        raise RecipeError(f"`datasets` must be a list of mappings with `path`, got {entries!r}.")
    for entry in entries:
        allowed = [f.name for f in fields(DatasetConfig)]
        if not isinstance(entry, dict) or "path" not in entry:
            raise RecipeError(f"Each of `datasets` must be a mapping with `path`, got {entry!r}.")
        for key in entry:
            if key not in allowed:
                raise RecipeError(f"Unknown key {key!r} in `datasets`.{_nearest(key, allowed)} Allowed: {', '.join(allowed)}.")
    return config


def _unknown(key: str, value: Any, known: list[str], program: str) -> str:
    if key in REPLACED:
        line = REPLACED[key]
        value = str(value).lower() if isinstance(value, bool) else value
        what = f"Write `{line.format(value=value)}` instead." if line else "Remove it: it no longer has an effect."
        return f"`{key}` is not a recipe key any more. {what}"
    return f"Unknown recipe key {key!r}.{_nearest(key, known)} See `python -m {program} --help` for all keys."


def load_dataset(script: ScriptArguments) -> Any:
    """Load `dataset_name`, a local file or folder or a Hub id; a mapping of splits."""
    path = Path(script.dataset_name or "")
    if path.is_file():
        if path.suffix not in LOCAL_FORMATS:
            raise ValueError(f"{path.suffix!r} is none of {', '.join(LOCAL_FORMATS)}")
        return datasets.load_dataset(
            LOCAL_FORMATS[path.suffix],
            data_files={script.dataset_train_split: str(path)},
            streaming=script.dataset_streaming,
        )
    if _is_path(script.dataset_name or "") and not path.exists():
        raise FileNotFoundError("there is no such file or folder")
    return datasets.load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _is_path(name: str) -> bool:
    """Whether `name` can only be a local path, not a Hub id `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in LOCAL_FORMATS


def _sentence(error: BaseException) -> str:
    """An exception's message on one line."""
    cause = f": {error.__cause__}" if isinstance(error, DatasetsError) and error.__cause__ else ""
    return " ".join(f"{error}{cause}".split()) or type(error).__name__


def fail(error: Exception, anywhere: bool = False) -> None:
    """End the process with exit code 2 and one line on stderr; with BL_TRACEBACK=1 where it came from.

    Only one process a machine writes it, unless it may be that process's own (`anywhere`).
    """
    if os.environ.get("BL_TRACEBACK"):
        traceback.print_exception(error)
    if anywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        is_ours = isinstance(error, (RecipeError, MeasurementError))
        where = "" if is_ours else f"{type(error).__name__}: "
        more = "" if is_ours else " (BL_TRACEBACK=1 shows where)"
        print(f"error: {where}{_sentence(error)}{more}", file=sys.stderr)
    sys.exit(2)
