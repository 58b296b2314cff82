"""What lm-evaluation-harness is asked to do: load tasks, wrap a model, run one on the other."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .._util.hub import why_no_data, why_unavailable
from .._util.lm_eval import load_yaml, share_out, without_git
from .._util.text import nearest, sentence
from ..errors import RecipeError
from ..prepare.format import Format
from .data import with_data
from .generation import Generation
from .options import Checkpoint, EvaluateArguments
from .results import check_items
from .task_files import OWN

# Where the paper's evaluation stops, too (Qwen's and Llama's tokens, and those of others): a checkpoint trained with another
# end token than its base stops where its base does
ENDS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant so, such as a model that is loaded already


@dataclass
class Loaded:
    """A task as the user names it; `specs`: what the harness runs, `tasks`: each of these that has items, by name."""

    specs: list[Any]
    tasks: dict[str, Any]


class Tasks:
    """The tasks that the options name. Raises RecipeError on one that can't be run."""

    def __init__(self, options: EvaluateArguments):
        self.options = options
        self.names: dict[str, list[str]] = {}  # the harness's, in each task that is loaded
        self.manager = TaskManager(include_path=OWN, include_defaults=False)
        entries = [self.manager.task_index.get(name) for name in options.tasks if not _is_file(name)]
        if not all(entry and "group" not in (entry.cfg or {}) for entry in entries):  # a group's tasks are the harness's
            self.manager = TaskManager(include_path=OWN)  # reads thousands of files
        for name in options.files():
            if name not in options.tasks:
                raise RecipeError(f"`--data {name}=...`: `--tasks` names no such task.{nearest(name, options.tasks)}")

    def load(self, name: str) -> Loaded:
        """Load one of them, with its data."""
        path = self.options.files().get(name)
        source, config = self._source(name)
        self._refuse_unsafe(name, config.get("unsafe_code"))
        is_own = source is not None and Path(source).parent == OWN
        if is_own and path is None and config.get("dataset_path") == "json":
            raise RecipeError(f"`--tasks {name}` needs your data. Write `--data {name}=path.jsonl`.")
        if path is not None and (not source or "group" in config):
            raise RecipeError(f"`--data {name}=...`: that is a group of tasks. Name one of them.")
        data = str(config.get("dataset_path") or "")
        if path is None and data.count("/") == 1 and not Path(data).exists() and (fault := why_no_data(data)):
            raise RecipeError(
                f"The task {name!r} can't be loaded: it needs the data set {data}, but {fault}. Download it, or write `--data "
                f"{name}=path.jsonl`."
            )
        try:
            loaded = self.manager.load([name if path is None else with_data(load_yaml(source), name, path)])
        except RecipeError as error:
            if str(error).startswith("`"):
                raise
            raise RecipeError(f"{f'`--data {name}={path}`' if path else f'The task {name!r}'}: {error}") from error
        except Exception as error:  # of the task's own code, or of the data sets' libraries
            given = f"`--data {name}={path}` can't be read by the task" if path else f"The task {name!r} can't be loaded"
            raise RecipeError(f"{given}: {type(error).__name__}: {sentence(error)}") from error
        groups = [group for key, group in loaded.get("groups", {}).items() if key == name]
        for task in loaded["tasks"].values():
            self._check(name, task, path)
        self.names[name] = [*loaded["tasks"]]
        check_items(self.options, self.names)
        return Loaded(groups or [*loaded["tasks"].values()], loaded["tasks"])

    def _source(self, name: str) -> tuple[Path | str | None, dict[str, Any]]:
        """Return a task's YAML file, of which the harness's groups may have none, and what it holds."""
        known, is_file = self.manager.task_index, _is_file(name)
        if is_file and not Path(name).is_file():
            raise RecipeError(f"`--tasks {name}` is not a file.")
        if name not in known and not is_file:
            raise RecipeError(f"Unknown task {name!r}.{nearest(name, known)} `lm-eval ls tasks` lists the harness's.")
        source = known[name].yaml_path if name in known else Path(name)
        config = _configuration(source) if source else {}
        if is_file and "group" in config:
            raise RecipeError(f"`--tasks {name}` is a group of tasks. Give the files of these.")  # the harness can't load it
        return source, config

    def _refuse_unsafe(self, name: str, unsafe: Any) -> None:
        if unsafe and self.options.confirm_run_unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own flag for the same
        elif unsafe:
            raise RecipeError(
                f"The task {name!r} runs code that the model writes. Add `--confirm_run_unsafe_code`, best in a container."
            )

    def _check(self, name: str, task: Any, path: Path | None) -> None:
        """Raise RecipeError if a task, or its data, doesn't go with the options."""
        self._refuse_unsafe(name, getattr(task, "UNSAFE_CODE", False))
        shots = self.options.num_fewshot
        if shots and task.get_config("num_fewshot") == 0:
            raise RecipeError(f"`--num_fewshot {shots}`: the task {task.task_name!r} takes no examples. Leave it out.")
        if isinstance(task, Generation):
            self._check_template(name, task)
        else:
            self._check_generation(task)
        for i, doc in enumerate(task.eval_docs if path else []):
            right = task.doc_to_target(doc)
            if right in (None, "", []) or (right == "None" and None in doc.values()):
                raise RecipeError(f"`--data {name}={path}`: row {i + 1} has no gold answer.")

    def _check_template(self, name: str, task: Generation) -> None:
        if self.options.apply_chat_template is not None and task.is_chat is not None:
            if task.is_chat != self.options.apply_chat_template:
                kind = "messages, which need the" if task.is_chat else "plain text, which takes no"
                raise RecipeError(f"The data of {name!r} are {kind} chat template. Leave `--apply_chat_template` out.")

    def _check_generation(self, task: Any) -> None:
        for key in ("samples", "pass_at", "temperature", "temperatures", "format", "max_new_tokens"):
            value = getattr(self.options, key)
            if value != EvaluateArguments.__dataclass_fields__[key].default:
                shown = " ".join(map(str, value)) if isinstance(value, list) else value
                raise RecipeError(
                    f"`--{key} {shown}`: the harness's task {task.task_name!r} says itself how to answer. Leave it out, or "
                    "evaluate that task by a command of its own."
                )


def _configuration(path: Path | str) -> dict[str, Any]:
    try:
        return load_yaml(path, resolve_func=False)
    except Exception as error:  # of reading, of YAML, or of its shape
        raise RecipeError(f"Cannot read the task file {path}: {sentence(error)}.") from error


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def find_model(checkpoint: Checkpoint) -> None:
    """Raise RecipeError if there is no such model."""
    if fault := why_unavailable(checkpoint.model):
        of = f"its base {checkpoint.model}: " if checkpoint.adapter else ""
        raise RecipeError(f"Can't load `--model {checkpoint.name}`: {of}{fault}. Correct the name, or download the model.")
    try:
        AutoConfig.from_pretrained(checkpoint.model)
    except Exception as error:  # it can be told in many ways
        raise _cannot_load(checkpoint, error) from error


def _cannot_load(checkpoint: Checkpoint, error: Exception) -> RecipeError:
    return RecipeError(f"Can't load `--model {checkpoint.name}`: {sentence(error)}")


def load_model(checkpoint: Checkpoint, options: EvaluateArguments) -> Any:
    """Load a checkpoint for the harness, one copy for each process."""
    if options.backend == "vllm":
        return _load_vllm(checkpoint, options)
    accelerator, quantization = Accelerator(), checkpoint.quantization
    kwargs: dict[str, Any] = {}
    if quantization:
        kwargs = {"quantization_config": BitsAndBytesConfig(**quantization), "device_map": {"": accelerator.device}}
    named = checkpoint.adapter and any(Path(checkpoint.adapter).glob("tokenizer*"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.adapter if named else checkpoint.model)
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.model, dtype=options.dtype, **kwargs)
        _end_at_all_ends(model, tokenizer)
        if checkpoint.adapter:
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
            model = PeftModel.from_pretrained(model, checkpoint.adapter)
    except Exception as error:  # it can be told in many ways that there is no such model
        raise _cannot_load(checkpoint, error) from error
    # loaded here, since the harness cuts the embeddings to the tokenizer's size under an adapter, which may hold them whole
    model = model if quantization else model.to(accelerator.device)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    share_out(lm, accelerator)
    return lm


def _load_vllm(checkpoint: Checkpoint, options: EvaluateArguments) -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    lora: dict[str, Any] = {}
    if checkpoint.adapter:
        rank = json.loads((Path(checkpoint.adapter) / "adapter_config.json").read_text())["r"]
        lora = {"lora_local_path": checkpoint.adapter, "max_lora_rank": rank}
    batch_size = options.batch_size if options.batch_size == "auto" else int(options.batch_size)
    return VLLM(checkpoint.model, dtype=options.dtype, seed=options.seed, batch_size=batch_size, **lora)


def _end_at_all_ends(model: Any, tokenizer: Any) -> None:
    """Let each generation end at the tokenizer's and its template's end tokens, and at ENDS.

    The harness sees the first only once all of a batch have ended, the others not at all in its decoded texts.
    """
    config, vocabulary = model.generation_config, tokenizer.get_vocab()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [*ends, tokenizer.eos_token_id, *(vocabulary.get(end) for end in (Format(tokenizer).turn_end(), *ENDS))]
    config.eos_token_id = sorted({end for end in ends if end is not None}) or None


def run(lm: Any, loaded: Loaded, tasks: Tasks, options: EvaluateArguments) -> tuple[dict[str, Any] | None, bool]:
    """Run a task; return what the harness makes of it, None but in the first process, and whether the template was applied."""
    limit = options.limit
    own = [task for task in loaded.tasks.values() if isinstance(task, Generation)]
    chat = _is_chat(lm, own, options)
    lm.add_bos_token = False if chat else None  # as in training: a template brings its own special tokens
    for task in own:
        task.prepare(lm, options, chat)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with torch.inference_mode(), without_git():
        found = lm_eval.simple_evaluate(
            lm,
            tasks=loaded.specs,
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=int(limit) if limit and limit >= 1 else limit,
            apply_chat_template=chat,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            **dict.fromkeys(seeds, options.seed),
        )
    return found, chat


def _is_chat(lm: Any, own: list[Generation], options: EvaluateArguments) -> bool:
    """Whether prompts go into the chat template: as the data are, else as the options say, else if there is one."""
    chat = bool(lm.tokenizer.chat_template) if options.apply_chat_template is None else options.apply_chat_template
    if chat and not lm.tokenizer.chat_template:
        raise RecipeError("`--apply_chat_template true`: the tokenizer has no chat template.")
    for task in own:
        if task.is_chat is not None:
            chat = task.is_chat
    return chat
