"""Recipes: TRL's SFT recipe keys and ours, from a YAML file and the command line, read strictly."""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import torch
from accelerate.utils import gather_object, is_bnb_available
from datasets import IterableDataset
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as TRACKERS
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_peft_config,
    get_quantization_config,
)
from trl.data_utils import is_conversational

from .._util.text import nearest, sentence
from ..errors import RecipeError
from ..objectives.objective import Objective
from ..tokens.columns import check_columns
from ..tokens.labels import check_labels, columns_of
from ..tokens.layouts import CHATS, RowError, arrange, check_stream
from ..tokens.reference import reference_source, refuse_lost_context
from ..tokens.rendering import RenderedRow
from ..training.checkpoints import last_whole, why_broken
from ..training.config import METRICS, BLConfig
from ..training.refusals import refuse_lm_head_adapter
from ..training.resume import refuse_changed_keys, refuse_lost_epoch, refuse_other_model, refuse_other_recipe
from .datasets import find_fault, is_path, load_dataset, load_mixture, local_files, unreadable_name
from .keys import CARD_TAG, DATACLASSES, NEEDS, RANGES, ROWS_RENDERED, WRITTEN
from .parser import Parser, load_yaml, without_secrets


@dataclass
class Recipe:
    """A recipe, checked as far as it can be without loading data or model.

    `script`, `model`, `mixture`: TRL's own dataclasses; `training`: a `BLConfig`; `options`: the verb's own, if it has any.
    `given`: the keys as file and command line give them, without secrets, to be recorded.
    """

    script: ScriptArguments
    training: BLConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    options: Any = None
    given: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, argv: list[str], verb: str = "train", options: type | None = None) -> "Recipe":
        """Read `--config recipe.yaml --any_key value ...`; the command line wins. Raises RecipeError.

        `options`: a dataclass of what the verb takes on the command line besides recipe keys.
        """
        argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        own = {f.name for f in fields(options)} if options else set()
        parser = Parser(DATACLASSES + ((options,) if options else ()), prog=f"bl_trainer {verb}", allow_abbrev=False)
        config: dict[str, Any] = {}
        if "--config" in argv:
            index = argv.index("--config")
            config = load_yaml(argv[index + 1 : index + 2])
            argv = argv[:index] + argv[index + 2 :]
        if not config and not parser.is_given("model_name_or_path", argv) and not {"-h", "--help"} & set(argv):
            raise RecipeError(f"No recipe is given. Write `{verb} --config recipe.yaml`.")
        for key in sorted(own & config.keys()):
            raise RecipeError(f"`{key}` is not a recipe key. Give it on the command line: `--{key} ...`.")
        parser.check(config, argv)
        given = dict(config)
        os.environ.update({key: str(value) for key, value in config.pop("env", {}).items()})
        script, training, model, mixture, *rest = parser.parse(config, argv)
        recipe = cls(script, training, model, mixture, *rest)
        for part in (script, training, model, mixture):
            given |= {key: _as_given(value) for key, value in vars(part).items() if parser.is_given(key, argv)}
        recipe.given = without_secrets(given)
        recipe._check(given={key for key in parser.known if key in config or parser.is_given(key, argv)})
        if verb == "train":
            recipe._check_reporting()
        return recipe

    @property
    def peft_config(self) -> PeftConfig | None:
        """TRL's LoRA configuration, None without `use_peft`."""
        config: Any = get_peft_config(self.model)
        if config is not None and isinstance(config.target_modules, str) and config.target_modules.isidentifier():
            config.target_modules = {config.target_modules}  # TRL unpacks a list of one, and PEFT takes a string for a pattern
        return config

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
        """Return the training set, and the evaluation set or None. Raises RecipeError if one can't be had, or be ended."""
        self._check_end()
        set_seed(self.training.seed)  # `test_split_size` splits by NumPy's generator: every process must split alike
        try:
            text_field = self.training.dataset_text_field
            loaded = load_mixture(self.mixture, text_field) if self.mixture.datasets else load_dataset(self.script)
            return self._splits(loaded)
        except RowError as error:
            raise RecipeError(self.located(error)) from error
        except RecipeError:
            raise
        except Exception as error:  # the libraries raise many kinds for a broken file
            source = self.script.dataset_name or [entry.path for entry in self.mixture.datasets]
            why = "a file is empty" if isinstance(error, StopIteration) else sentence(error)
            fault = find_fault(self.local_files()) or self.data_fault() or unreadable_name(self.local_files())
            raise RecipeError(
                f"Can't load the data set: {fault}" if fault else f"Can't load the data set {source}: {why}"
            ) from error

    def data_fault(self) -> str | None:
        """Return which line of the recipe's local files TRL can't make a training text of, and why; None if there is none."""
        chats = [(column,) for column in CHATS]
        return find_fault(self.local_files(), [("prompt", "completion"), *chats, (self.training.dataset_text_field,)])

    def located(self, error: RowError) -> str:
        """Return an error about a row with the line of the local file that it stands in, if there is one."""
        fault = find_fault(self.local_files(), [error.columns])
        return f"Cannot train on {fault}. Correct the line, or remove it." if fault else sentence(error)

    def local_files(self) -> Iterator[Path]:
        """The recipe's local data files."""
        yield from local_files(self.script.dataset_name)
        for entry in self.mixture.datasets:
            yield from local_files(entry.data_files or entry.path)

    def _splits(self, loaded: Any) -> tuple[Any, Any]:
        script, training = self.script, self.training
        wanted = {"dataset_train_split": script.dataset_train_split}
        if training.eval_strategy != "no":
            wanted["dataset_test_split"] = script.dataset_test_split
        for key, split in wanted.items():
            if split not in loaded:
                raise RecipeError(
                    f"The data set has no split {split!r}, only {', '.join(map(repr, loaded))}. "
                    f"Write {self._advice(key, list(loaded))}."
                )
        found = [self.arranged(split, loaded[split]) for split in wanted.values()]
        check_labels(dict(zip(wanted.values(), found, strict=True)), training)
        columns = {split: columns_of(dataset) for split, dataset in zip(wanted.values(), found, strict=True)}
        objective = Objective.parse(training.objective or "nll")
        if reference_source(objective, self.peft_config, columns, collates=False) == "column":
            refuse_lost_context(training)
        return found[0], found[1] if len(found) > 1 else None

    def _advice(self, key: str, splits: list[str]) -> str:
        """Return what to write where a data set lacks the split that `key` names."""
        if key == "dataset_train_split":
            return f"`{key}: {splits[0]}`"
        others = [split for split in splits if split != self.script.dataset_train_split]
        others = [split for split in others if split.startswith(("val", "dev", "eval"))] or others
        own = [f"`{key}: {others[0]}`"] if others else []
        return ", or ".join([*own, "`eval_strategy: no`", "`test_split_size` for a mixture"])

    def arranged(self, split: str, dataset: Any) -> Any:
        """Return a split in a layout that TRL reads. Raises RecipeError if it is empty, or makes no training text."""
        if next(iter(dataset), None) is None:
            raise RecipeError(f"The {split} set is empty.")
        options: Any = self.training.dataset_kwargs or {}
        if not options.get("skip_prepare_dataset"):
            dataset = arrange(dataset, f"the {split} set", self.training.dataset_text_field)
        try:
            check_columns(dataset, split, Objective.parse(self.training.objective or "nll").special_tokens is not None)
        except ValueError as error:
            raise RecipeError(sentence(error)) from error
        self._check_messages(split, dataset)
        return dataset

    def _check_messages(self, split: str, dataset: Any) -> None:
        """Raise RowError if one of the first rows loses a message in the chat template; the trainer checks all of them."""
        first, path = next(iter(dataset)), self.training.chat_template_path
        if "input_ids" in first or {"image", "images"} & {*first} or not is_conversational(first):
            return
        processing_class, template = self._load(AutoProcessor, "tokenizer"), None
        if path and Path(path).suffix in (".jinja", ".j2"):
            template = Path(path).read_text(encoding="utf-8")
        elif path:
            template = AutoTokenizer.from_pretrained(path).chat_template
        check = RenderedRow(processing_class, template, f"the {split} set")
        if isinstance(dataset, IterableDataset):
            dataset = check_stream(dataset, f"the {split} set", self.training.dataset_text_field)
        for row, example in enumerate(islice(dataset, ROWS_RENDERED)):
            check(example, row)

    def checkpoint(self) -> str | None:
        """Return the checkpoint to resume from, or None for a new run.

        `resume_from_checkpoint: true` takes the last whole one in `output_dir`, and starts anew where there is none, so that
        the same command serves the first start and every restart. Raises RecipeError, on all processes, rather than overwrite
        an earlier run, go on with another one, train towards an `output_dir` that can't be written, or go on from different
        checkpoints on different machines.
        """
        own, problem = None, None
        try:
            own = self._own_checkpoint()
        except RecipeError as error:
            problem = error
        found = gather_object([(Path(own).name if own else "none", str(problem or ""))])
        if problem:
            raise problem
        for _, theirs in found:
            if theirs:
                raise RecipeError(f"On another machine: {theirs}")
        names = sorted({name for name, _ in found})
        if len(names) > 1:
            raise RecipeError(
                f"`resume_from_checkpoint` finds {' on one machine, '.join(names)} on another. Put `output_dir` where all "
                "machines see it, or copy the checkpoint to each."
            )
        return own

    def _own_checkpoint(self) -> str | None:
        resume, folder = str(self.training.resume_from_checkpoint or False), Path(self.training.output_dir or ".")
        _check_writable(folder)
        last, broken = last_whole(folder) if resume.lower() == "true" else (None, [])
        chosen = last if resume.lower() in ("true", "false") else Path(resume)
        if chosen:
            self._check_resumable(chosen)
            if chosen.resolve().parent == folder.resolve():
                self._check_last(chosen, folder)
                return str(chosen)
        present = {path for pattern in WRITTEN for path in folder.glob(pattern)} - set(broken)
        card = folder / "README.md"  # a run writes its model card before its first checkpoint
        if resume.lower() == "true" and card in present and CARD_TAG in card.read_text(encoding="utf-8"):
            present.remove(card)
        if present:
            go_on = "" if chosen or resume.lower() == "true" else "`resume_from_checkpoint: true` to go on with it, or "
            go_on = go_on if any(folder.glob("checkpoint-*")) else ""
            raise RecipeError(
                f"`output_dir: {folder}` holds {min(present).name}, of an earlier run or your own, which would be overwritten. "
                f"Write {go_on}another `output_dir`."
            )
        return str(chosen) if chosen else None

    def _check_last(self, checkpoint: Path, folder: Path) -> None:
        """Raise RecipeError if `folder` has later checkpoints, which going on from this one would overwrite."""
        last, _ = last_whole(folder)
        if last is not None and last.name != checkpoint.name and int(last.name[11:]) > int(checkpoint.name[11:]):
            raise RecipeError(
                f"`resume_from_checkpoint: {checkpoint}`: {last} is later, and would be overwritten. Write another "
                "`output_dir`, or move the later checkpoints away."
            )

    def _check_resumable(self, checkpoint: Path) -> None:
        if not checkpoint.is_dir():
            raise RecipeError(
                f"`resume_from_checkpoint: {checkpoint}` is not a folder. Write a checkpoint's path, or `true` for the last "
                "one in `output_dir`."
            )
        why = why_broken(checkpoint)
        if why:
            raise RecipeError(f"`resume_from_checkpoint: {checkpoint}` can't be done, since {why}. Write another checkpoint.")
        try:
            refuse_other_recipe(str(checkpoint), self.training)
            refuse_lost_epoch(str(checkpoint))
            refuse_other_model(str(checkpoint), str(self.model.model_name_or_path), self.model.use_peft)
            refuse_changed_keys(str(checkpoint), self.given, {f.name: f.default for c in DATACLASSES for f in fields(c)})
        except ValueError as error:
            raise RecipeError(sentence(error)) from error

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
            if {"token", "use_auth_token"} & set(value or {}):
                raise RecipeError(f"A token in `{key}` would be logged. Put it in the environment variable HF_TOKEN instead.")
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
        for key, (least, greatest) in RANGES.items():
            value = getattr(training, key, getattr(self.model, key, None))
            if value is not None and not least <= value <= greatest:
                bounds = f"at least {least}" if greatest == math.inf else f"from {least} to {greatest}"
                raise RecipeError(f"`{key}: {value}` must be {bounds}.")
        if training.max_steps <= 0 and training.num_train_epochs <= 0:
            raise RecipeError(f"`num_train_epochs: {training.num_train_epochs}` trains nothing. Write a number above 0.")
        if training.max_steps == 0:
            raise RecipeError("`max_steps: 0` trains nothing. Write a number above 0, or -1 to train by `num_train_epochs`.")
        if training.learning_rate == 0:
            raise RecipeError("`learning_rate: 0` trains nothing. Write a number above 0.")
        for kind in ("save", "logging", "eval"):
            steps = getattr(training, f"{kind}_steps")
            if getattr(training, f"{kind}_strategy") == "steps" and steps is not None and steps <= 0:
                raise RecipeError(f"`{kind}_steps: {steps}` must be above 0; to switch it off write `{kind}_strategy: no`.")
        self._check_optimizer()
        if training.save_only_model and str(training.resume_from_checkpoint).lower() == "true":
            raise RecipeError(
                "`save_only_model: true` leaves out of the checkpoints what `resume_from_checkpoint: true` needs to go on: the "
                "optimizer's state and the random numbers. Remove one of them."
            )
        if training.eval_on_start and training.eval_strategy == "no":
            raise RecipeError("`eval_on_start` needs an evaluation set. Write `eval_strategy: steps` or `epoch`.")
        reported = [*METRICS, "loss", "perplexity", "aux_loss", "num_tokens"]
        reported += ["runtime", "samples_per_second", "steps_per_second"]
        best = training.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in reported:
            near = nearest(best, [f"eval_{name}" for name in reported])
            raise RecipeError(f"`metric_for_best_model: {best}` is not reported.{near} Allowed: {', '.join(reported)}.")

    def _check_optimizer(self) -> None:
        """Build a tiny optimizer and schedule, since the libraries would complain only when the model is there."""
        training: Any = self.training
        try:
            Trainer.get_optimizer_cls_and_kwargs(training)
        except Exception as error:  # of whatever package the optimizer comes from
            if "model" not in str(error):  # which some need
                given = f" with `optim_args: {training.optim_args}`" if training.optim_args else ""
                raise RecipeError(f"`optim: {training.optim.value}`{given} can't be had: {sentence(error)}") from error
        try:
            get_scheduler(
                training.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
                num_warmup_steps=training.get_warmup_steps(100),
                num_training_steps=100,
                scheduler_specific_kwargs={} if training.lr_scheduler_kwargs is None else training.lr_scheduler_kwargs,
            )
        except Exception as error:
            what = f"`lr_scheduler_type: {training.lr_scheduler_type.value}`"
            kwargs = training.lr_scheduler_kwargs
            given = "" if kwargs is None else f" with `lr_scheduler_kwargs: {kwargs!r}`"
            raise RecipeError(f"{what}{given} can't be had: {sentence(error)}") from error

    def _check_data(self) -> None:
        script, mixture = self.script, self.mixture
        if bool(mixture.datasets) == bool(script.dataset_name):
            both = "names both `dataset_name` and `datasets`" if script.dataset_name else "names no data set"
            raise RecipeError(f"The recipe {both}. Write one of `dataset_name: ...` and `datasets: [{{path: ...}}]`.")
        if (script.dataset_streaming or mixture.streaming) and self.training.max_steps <= 0:
            key = "streaming" if mixture.streaming else "dataset_streaming"
            raise RecipeError(f"A streamed data set (`{key}: true`) has no length. Write `max_steps: ...`, the training steps.")
        if (script.dataset_streaming or mixture.streaming) and self.training.dataloader_drop_last:
            raise RecipeError("`dataloader_drop_last` has no effect on a streamed data set. Remove it.")
        template = self.training.chat_template_path
        if template:
            self._check_template(Path(template))
        if mixture.streaming and mixture.test_split_size is not None:
            raise RecipeError("`test_split_size` can't split a streamed mixture. Remove it, or `streaming: true`.")

    def _check_template(self, path: Path) -> None:
        what = f"`chat_template_path: {path}`"
        if path.suffix in (".jinja", ".j2"):
            try:
                jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                    re.sub(r"{%-? *(end)?generation *-?%}", "", path.read_text(encoding="utf-8"))
                )
            except OSError as error:
                raise RecipeError(f"{what} can't be read: {error.strerror}.") from error
            except jinja2.TemplateSyntaxError as error:
                raise RecipeError(f"{what}, line {error.lineno}: {error.message}") from error
            return
        try:  # a model whose template is taken
            AutoTokenizer.from_pretrained(path)
        except Exception as error:  # it can be told in many ways that there is no such model
            raise RecipeError(f"{what} has no tokenizer, and is no .jinja file: {sentence(error)}") from error

    def _check_end(self) -> None:
        """Raise RecipeError if the model doesn't know `eos_token`, which TRL says only when the model is there."""
        model, end = self.model, self.training.eos_token
        if end is None:
            return
        tokenizer = self._load(AutoTokenizer, "tokenizer")
        if end not in tokenizer.get_vocab():
            raise RecipeError(
                f"`eos_token: {end}` is not in the vocabulary of {model.model_name_or_path}. Write `--eos_token` with what "
                f"ends a turn in its chat template, or, for data without one, its own `--eos_token '{tokenizer.eos_token}'`."
            )

    def _load(self, loader: Any, what: str) -> Any:
        """Return what an Auto class of transformers makes of the model's name. Raises RecipeError if that fails."""
        name = self.model.model_name_or_path
        try:
            return loader.from_pretrained(
                name, revision=self.model_init_kwargs()["revision"], trust_remote_code=self.training.trust_remote_code
            )
        except Exception as error:  # it can be told in many ways that there is no such model
            raise RecipeError(f"`model_name_or_path: {name}` has no {what} that can be loaded: {sentence(error)}") from error

    def _check_reporting(self) -> None:
        """Raise RecipeError on a tracker that isn't installed, and on a push to the Hub without a token."""
        training: Any = self.training
        try:
            for callback in get_reporting_integration_callbacks(training.report_to):
                callback()
        except Exception as error:  # each asks for its package in its own way
            names, near = ", ".join(training.report_to), [nearest(name, TRACKERS) for name in training.report_to]
            wrong = [each for name, each in zip(training.report_to, near, strict=True) if name not in TRACKERS]
            raise RecipeError(
                f"Cannot report to `report_to: {names}`: {sentence(error)}{''.join(wrong)} "
                f"{'Correct' if wrong else 'Install'} it, or set `report_to: none`."
            ) from error
        if not training.push_to_hub:
            return
        if HF_HUB_OFFLINE:
            raise RecipeError("Cannot push to the Hub: HF_HUB_OFFLINE is set. Unset it, or set `push_to_hub: false`.")
        if not (training.hub_token or get_token()):
            raise RecipeError("Cannot push to the Hub: there is no token. Run `hf auth login`, or set HF_TOKEN.")

    def _check_attention(self) -> None:
        """Raise RecipeError on an attention implementation that the model or this machine doesn't have."""
        asked: Any = self.model_init_kwargs()["attn_implementation"]
        if not isinstance(asked, str) or asked in ("eager", "sdpa"):
            return
        config = self._load(AutoConfig, "configuration")
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(
                    config, attn_implementation=asked, trust_remote_code=self.training.trust_remote_code
                )
        except Exception as error:  # a kernel may come from the Hub
            raise RecipeError(
                f"Cannot use `attn_implementation: {asked}`: {sentence(error)} Install it, or set `attn_implementation: sdpa`."
            ) from error

    def _check_model(self, given: set[str]) -> None:
        model = self.model
        if not model.model_name_or_path:
            raise RecipeError("The recipe names no model. Write `model_name_or_path: ...`, a folder or a Hub id.")
        if is_path(model.model_name_or_path) and not Path(model.model_name_or_path).is_dir():
            raise RecipeError(f"`model_name_or_path: {model.model_name_or_path}` is not a folder.")
        adapter = Path(model.model_name_or_path) / "adapter_config.json"
        if adapter.is_file() and not (Path(model.model_name_or_path) / "config.json").is_file():
            base = json.loads(adapter.read_text()).get("base_model_name_or_path")
            raise RecipeError(
                f"`model_name_or_path: {model.model_name_or_path}` is an adapter of {base}. Write `model_name_or_path: {base}` "
                "to train a new one, `resume_from_checkpoint` besides to go on with a checkpoint, or merge the adapter first."
            )
        for key, top in (("dtype", "dtype"), ("revision", "model_revision"), ("attn_implementation", "attn_implementation")):
            if top in given and key in (self.training.model_init_kwargs or {}):
                raise RecipeError(f"`{top}` and `{key}` in `model_init_kwargs` say the same thing. Keep one of them.")
        for key, idle in (("lora_alpha", 0), ("lora_dropout", 1)):
            if model.use_peft and getattr(model, key) == idle:
                raise RecipeError(f"`{key}: {idle}` trains nothing: the adapter's part is 0. Write another number.")
        quantised = model.load_in_4bit or model.load_in_8bit
        if quantised and not model.use_peft:
            key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
            raise RecipeError(f"`{key}`: such a model can't be trained as it is. Write `use_peft: true` for QLoRA.")
        if quantised and not is_bnb_available():
            raise RecipeError("`load_in_4bit` and `load_in_8bit` need bitsandbytes. Run `pip install bitsandbytes`.")
        self._check_attention()
        try:
            refuse_lm_head_adapter(self.peft_config)
        except ValueError as error:
            raise RecipeError(sentence(error)) from error


def _as_given(value: Any) -> Any:
    """Return a value from the command line as a file would give it."""
    return value.value if isinstance(value, Enum) else value


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RecipeError(f"`output_dir: {folder}` can't be written: {error.strerror}. Write another `output_dir`.") from error
