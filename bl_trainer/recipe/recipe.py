"""Recipes: TRL's SFT recipe keys and ours, from a YAML file and the command line, read strictly."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from peft import PeftConfig
from transformers import AutoProcessor, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.data_utils import is_conversational

from .._util.hub import why_unavailable
from .._util.text import sentence, without_secrets
from ..errors import RecipeError
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..tokens.columns import check_columns
from ..tokens.idle import check_labels
from ..tokens.labels import columns_of
from ..tokens.layouts import CHATS, RowError, arrange, check_stream
from ..tokens.reference import reference_source, refuse_lost_context
from ..tokens.rendering import RenderedRow, refuse_unmarked
from ..training.config import BLConfig
from ..training.resume import Given, ResumePlan, plan_resume, say
from .checks import RULES, TRAINING_RULES, check
from .datasets import load_dataset, load_mixture
from .keys import ROWS_RENDERED
from .local_files import find_fault, local_files, unreadable_name
from .model_checks import model_is_known, model_knows_the_end
from .output import refuse_disagreement, refuse_overwriting, refuse_unwritable
from .parser import DATACLASSES, Parser
from .reading import as_given, meant, read_keys


@dataclass
class Recipe:
    """A recipe, checked as far as it can be without loading data or model.

    `script`, `model`, `mixture`: TRL's own dataclasses; `training`: a `BLConfig`; `options`: the verb's own, if it has any.
    `given`: the keys of file and command line, with what their values mean, without secrets, to be recorded.
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
        parser = Parser(DATACLASSES + ((options,) if options else ()), prog=f"bl-trainer {verb}", allow_abbrev=False)
        keys = read_keys(argv, verb, [each.name for each in fields(options)] if options else ())
        given = {key: meant(key, value) for key, value in keys.config.items()}
        os.environ.update({key: str(value) for key, value in keys.config.pop("env", {}).items()})
        script, training, model, mixture, *rest = parser.parse(keys.config, keys.argv)
        recipe = cls(script, training, model, mixture, *rest)
        for part in (script, training, model, mixture):
            given |= {key: _as_given(value) for key, value in vars(part).items() if parser.is_given(key, keys.argv)}
        recipe.given = without_secrets(given)
        try:
            check(recipe, RULES + (TRAINING_RULES if verb == "train" else ()))
        except RecipeError as error:
            raise RecipeError(as_given(str(error), keys.renamed)) from error
        if keys.renamed:
            names = ", ".join(f"`{old}` is now `{new}`" for old, new in keys.renamed.items())
            say([f"The recipe has keys of older versions, which were read by their new names: {names}."])
        return recipe

    @property
    def objective(self) -> Objective:
        """The recipe's objective, as its configuration has parsed it."""
        return self.training.parsed_objective

    @property
    def threshold(self) -> Threshold:
        """The recipe's threshold, as its configuration has parsed it."""
        return self.training.parsed_threshold

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
        check(self, [model_is_known, model_knows_the_end])
        set_seed(self.training.seed)  # `test_split_size` splits by NumPy's generator: every process must split alike
        try:
            how = self.training.dataset_text_field, self.training.dataset_num_proc
            loaded = load_mixture(self.mixture, *how) if self.mixture.datasets else load_dataset(self.script)
            return self._splits(loaded)
        except RowError as error:
            raise RecipeError(self.located(error)) from error
        except RecipeError:
            raise
        except Exception as error:  # the libraries raise many kinds for a broken file
            paths = ", ".join(entry.path for entry in self.mixture.datasets)
            source = f"`datasets` ({paths})" if paths else f"`dataset_name: {self.script.dataset_name}`"
            why = "a file is empty" if isinstance(error, StopIteration) else sentence(error)
            fault = find_fault(self.local_files()) or self.data_fault() or unreadable_name(self.local_files())
            raise RecipeError(f"Can't load the data set: {fault}" if fault else f"Cannot load {source}: {why}") from error

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
        if reference_source(self.objective, self.peft_config, columns, collates=False) == "column":
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
            how = self.training.dataset_text_field, self.training.dataset_num_proc
            dataset = arrange(dataset, f"the {split} set", *how)
        try:
            check_columns(dataset, split, self.objective.special_tokens is not None)
        except ValueError as error:
            raise RecipeError(sentence(error)) from error
        self._check_messages(split, dataset)
        return dataset

    def _check_messages(self, split: str, dataset: Any) -> None:
        """Raise RowError if one of the first rows loses a message in the chat template; the trainer checks all of them."""
        first, path = next(iter(dataset)), self.training.chat_template_path
        if "input_ids" in first or {"image", "images"} & {*first} or not is_conversational(first):
            return
        processing_class, template = self.pretrained(AutoProcessor, "tokenizer"), None
        if path and Path(path).suffix in (".jinja", ".j2"):
            template = Path(path).read_text(encoding="utf-8")
        elif path:
            template = AutoTokenizer.from_pretrained(path).chat_template
        if self.training.assistant_only_loss:
            processing_class.chat_template = template or processing_class.chat_template
            refuse_unmarked(processing_class)
        check = RenderedRow(processing_class, template, f"the {split} set", self.training.assistant_only_loss)
        if isinstance(dataset, IterableDataset):
            dataset = check_stream(dataset, f"the {split} set", self.training.dataset_text_field)
        for row, example in enumerate(islice(dataset, ROWS_RENDERED)):
            check(example, row)

    def plan_resume(self) -> ResumePlan:
        """Return what to resume from, and say what will differ from an uninterrupted run.

        `resume_from_checkpoint: true` takes the latest complete one in `output_dir`, and starts anew where there is none. So
        the same command serves the first start and every restart. Raises RecipeError, on all processes, rather than overwrite
        an earlier run, or resume another one. Also where `output_dir` can't be written, or machines would resume from different
        checkpoints.
        """
        plan, problem = ResumePlan(), None
        try:
            plan = self._own_plan()
        except RecipeError as error:
            problem = error
        refuse_disagreement(plan, problem)
        return plan

    def _own_plan(self) -> ResumePlan:
        training = self.training
        requested, folder = training.resume_from_checkpoint, Path(training.output_dir or ".")
        refuse_unwritable(folder)
        defaults = {f.name: f.default for part in DATACLASSES for f in fields(part)}
        given = Given(self.given, defaults, str(self.model.model_name_or_path), self.model.use_peft, meant)
        try:
            plan = plan_resume(training, requested, processes=training.world_size, given=given)
        except ValueError as error:
            raise RecipeError(sentence(error)) from error
        plan.say_skipped()
        say(plan.warnings)
        refuse_overwriting(folder, plan, takes_last=str(requested).lower() == "true")
        return plan

    def pretrained(self, loader: Any, what: str) -> Any:
        """Return what an Auto class of transformers makes of the model's name. Raises RecipeError if that fails."""
        name, revision = self.model.model_name_or_path, self.model_init_kwargs()["revision"]
        where = "" if Path(str(name)).is_dir() else "is not a folder here, and "
        said = f"`model_name_or_path: {name}` {where}has no {what} that can be loaded"
        if fault := why_unavailable(str(name), revision):
            raise RecipeError(f"{said}: {fault}. Correct the name, or download the model.")
        try:
            return loader.from_pretrained(name, revision=revision, trust_remote_code=self.training.trust_remote_code)
        except Exception as error:  # it can be told in many ways that there is no such model
            raise RecipeError(f"{said}: {sentence(error)}") from error


def _as_given(value: Any) -> Any:
    """Return a value from the command line as a file would give it."""
    return value.value if isinstance(value, Enum) else value
