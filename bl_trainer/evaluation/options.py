"""Options of the evaluate verb, and the checkpoints and data that they name."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .._util.text import from_json, is_number, sentence
from ..errors import RecipeError
from ..recipe.datasets import find_fault
from ..recipe.local_files import unreadable_name
from ..recipe.parser import Parser
from ..recipe.paths import format_of, is_path
from ..training.checkpoints import QUANTIZATION, quantization_of, read_record
from .task_files import task_files

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("hf", "vllm")
ALLOWED = {"bnb_4bit_quant_type": ("nf4", "fp4")}
EXAMPLE = '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}'

# What tells whether a checkpoint is still the one that was evaluated
READ = (
    "*.safetensors", "*.bin", "*config.json", "*.index.json", "tokenizer*", "vocab*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json", "*.jinja", "*.py",
)  # fmt: skip


@dataclass
class Checkpoint:
    """A model, and an adapter over it or None.

    `name`: how the user calls it. `asked`: bitsandbytes' configuration for a model that no run has recorded, or empty.
    """

    name: str
    model: str
    adapter: str | None
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, as that of a folder; with a part of its hash where another name could give the same."""
        label = self.name.replace("/", "__").replace("..", "__")
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return label if label.replace("__", "/") == self.name else f"{label}-{digest}"

    @property
    def quantization(self) -> dict[str, Any]:
        """Bitsandbytes' configuration of the model, as the adapter's run has recorded it; empty if it is not quantised."""
        record = read_record(self.adapter) if self.adapter else {}
        return quantization_of(record) if record else self.asked

    def fingerprint(self) -> str:
        """Return a hash of the checkpoint's files, whole: some ways of training change a few bytes in a gigabyte."""
        digest = hashlib.sha256(str(self.quantization or "").encode())
        for folder in filter(None, (self.model, self.adapter)):
            for path in sorted({path for pattern in READ for path in Path(folder).glob(pattern) if path.is_file()}):
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                with path.open("rb") as file:
                    while part := file.read(2**20):
                        digest.update(part)
        return digest.hexdigest()[:16]


@dataclass
class EvaluateArguments:
    """Options of the evaluate verb."""

    model: list[str] = field(
        default_factory=list, metadata={"help": "Checkpoints, folders or Hub ids; an adapter's folder is taken over its base."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder of an adapter, over the one --model."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of tasks, ours or the harness's, or YAML files of further ones; commas between."},
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "task=path.jsonl: a local file in place of that task's data set."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the results."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of these tasks and models that are there."})
    limit: float | None = field(default=None, metadata={"help": "Only the first N items of each task; below 1 a share."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt, if not the task's own number."})
    samples: int = field(
        default=1,
        metadata={"help": "Answers to each item, whose mean counts (Avg@k), sampled if above 1. The paper: 16."},
    )
    pass_at: list[int] | None = field(
        default=None,
        metadata={"help": "k of pass@k, at most `samples`; by default 2, 4, 8 and so on below `samples`, and `samples`."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Of sampling; by default 1 with several samples, as in the paper, else 0 (greedy)."}
    )
    temperatures: list[float] | None = field(
        default=None,
        metadata={"help": "Besides greedy answers, sample `samples` at each of these, e.g. 1 0.5 0.25; as METRIC@T0.5."},
    )
    format: str | None = field(
        default=None,
        metadata={"help": "Regular expression of a whole answer; `format` is then the share of answers that it matches."},
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Tokens to generate, if not the task's own number."})
    apply_chat_template: bool | None = field(
        default=None, metadata={"help": "Whether to put prompts into the chat template; by default, if the tokenizer has one."}
    )
    backend: str = field(default="hf", metadata={"help": "What generates: hf, vllm."})
    batch_size: str = field(default="8", metadata={"help": "Items at a time on each device, or auto."})
    dtype: str = field(
        default="auto", metadata={"help": "Precision: auto, float32, bfloat16, float16; auto is the checkpoint's."}
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Quantise models that no run has recorded, to compare QLoRA runs with their base: bitsandbytes' settings, "
            "as JSON."
        },
    )
    seed: int = field(default=1234, metadata={"help": "Of few-shot examples and of sampling."})
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "Run the code that the model writes, for tasks that need it."}
    )

    @property
    def ks(self) -> list[int]:
        """The k of the pass@k that are computed; none for single answers, but those that are asked for."""
        if self.pass_at is not None:
            return self.pass_at
        powers = [2**i for i in range(1, self.samples.bit_length()) if 2**i < self.samples]
        return [*powers, self.samples] if self.samples > 1 else []

    @property
    def sampling_temperature(self) -> float:
        """The temperature at which answers are sampled, 0 if greedy."""
        return (1.0 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature

    def decodings(self) -> list[tuple[float | None, "EvaluateArguments"]]:
        """Return the temperature after which metrics are named, None if they aren't, with the options of each way to answer."""
        if self.temperatures is None:
            return [(None, self)]
        greedy = replace(self, temperatures=None, samples=1, pass_at=None)
        return [(None, greedy), *((each, replace(self, temperatures=None, temperature=each)) for each in self.temperatures)]

    @property
    def is_sampled(self) -> bool:
        """Whether answers are sampled."""
        return self.sampling_temperature > 0

    @classmethod
    def read(cls, argv: list[str]) -> "EvaluateArguments":
        """Read the command line. Raises RecipeError."""
        classes: Any = [cls]
        parser = Parser(classes, prog="bl-trainer evaluate", allow_abbrev=False)
        parser.check(argv)
        return parser.parse({}, argv)[0]

    def check(self) -> None:
        """Raise RecipeError on a value that can't be, or if the harness is not installed; lists are taken apart."""
        if not find_spec("lm_eval"):
            raise RecipeError("Evaluation needs lm-evaluation-harness. Run `pip install '.[evaluation]'`.")
        self.tasks = list(dict.fromkeys(name for part in self.tasks for name in part.split(",") if name))
        self.model = list(dict.fromkeys(self.model))
        for key, example in (("model", "out/model"), ("tasks", "gsm8k"), ("output", "out/evaluation")):
            if not getattr(self, key):
                raise RecipeError(f"`--{key}` is missing. Write e.g. `--{key} {example}`.")
        self._check_numbers()
        self._check_pass_at()
        self._check_choices()
        if self.adapter and len(self.model) > 1:
            raise RecipeError("`--adapter` goes with one `--model`. To compare adapters, give their folders as `--model`.")
        for part in self.data:
            self._check_data(part)

    def _check_numbers(self) -> None:
        if self.limit is not None and not (self.limit > 0 and (self.limit <= 1 or self.limit % 1 == 0)):
            raise RecipeError(f"`--limit {self.limit:g}` must be a number of items, or a share between 0 and 1.")
        for key, least in (("samples", 1), ("temperature", 0), ("max_new_tokens", 1), ("num_fewshot", 0), ("seed", 0)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise RecipeError(f"`--{key} {getattr(self, key)}` must be at least {least}.")
        if self.seed >= 2**32:
            raise RecipeError(f"`--seed {self.seed}` must be below {2**32}.")
        if not math.isfinite(self.sampling_temperature):
            raise RecipeError(f"`--temperature {self.temperature}` must be a number.")
        if self.temperatures is not None:
            self._check_temperatures()
        elif self.samples > 1 and not self.is_sampled:
            raise RecipeError(f"`--temperature 0` gives {self.samples} equal answers. Write a higher one, or `--samples 1`.")

    def _check_temperatures(self) -> None:
        given = self.temperatures or []
        shown = " ".join(f"{each:g}" for each in given)
        if not given or not all(0 < each < math.inf for each in given) or len({*given}) < len(given):
            raise RecipeError(f"`--temperatures {shown}` must be different numbers above 0, e.g. `--temperatures 1 0.5 0.25`.")
        if self.temperature is not None:
            raise RecipeError("`--temperatures` has greedy answers beside it. Remove `--temperature`, or add it to the list.")

    def _check_pass_at(self) -> None:
        if self.pass_at is None:
            return
        if not self.pass_at or min(self.pass_at) < 1:
            raise RecipeError(f"`--pass_at {' '.join(map(str, self.pass_at))}` must be numbers of answers, each at least 1.")
        most = max(self.pass_at)
        if most > self.samples:
            raise RecipeError(
                f"Cannot compute pass@{most} from {self.samples} answer{'s' if self.samples > 1 else ''} to each item. Write "
                f"`--samples {most}` or more, or a lower `--pass_at`."
            )
        self.pass_at = sorted({*self.pass_at})

    def _check_choices(self) -> None:
        try:
            re.compile(self.format or "")
        except re.error as error:
            raise RecipeError(f"`--format {self.format}` is not a regular expression: {sentence(error)}.") from error
        if self.backend not in BACKENDS:
            raise RecipeError(f"`--backend {self.backend}` is not allowed. Allowed: {', '.join(BACKENDS)}.")
        if self.backend == "vllm" and not find_spec("vllm"):
            raise RecipeError("`--backend vllm` needs vLLM, which isn't installed. Run `pip install '.[vllm]'`, or write `hf`.")
        if self.batch_size != "auto" and (not self.batch_size.isdigit() or int(self.batch_size) < 1):
            raise RecipeError(f"`--batch_size {self.batch_size}` must be a number above 0, or auto.")
        if self.dtype not in DTYPES:
            raise RecipeError(f"`--dtype {self.dtype}` is not allowed. Allowed: {', '.join(DTYPES)}.")

    def _check_data(self, part: str) -> None:
        task, _, path = part.partition("=")
        if not path or format_of(Path(path)) in (None, "text"):
            raise RecipeError(f"`--data {part}` must be task=path, of a .jsonl, .json, .parquet or .csv file.")
        if not Path(path).is_file():
            raise RecipeError(f"`--data {part}`: there is no such file.")
        if [each.partition("=")[0] for each in self.data].count(task) > 1:
            raise RecipeError(f"`--data {task}=...` is given more than once. Put the rows into one file.")
        fault = unreadable_name([Path(path)]) or find_fault([Path(path)])
        if fault:
            raise RecipeError(f"`--data {task}=...`: {fault}.")

    def asked_quantization(self) -> dict[str, Any]:
        """Return the settings of `--quantization`. Raises RecipeError if they are none of bitsandbytes' that are recorded."""
        found = from_json("quantization", self.quantization or "{}", EXAMPLE)
        if not isinstance(found, dict) or not {*found} <= {*QUANTIZATION} or (self.quantization and not _bits_in(found)):
            raise RecipeError(
                f"Cannot quantise as `--quantization {self.quantization}`: it must be a mapping with `load_in_4bit` or "
                f"`load_in_8bit`. Write e.g. --quantization '{EXAMPLE}'; allowed: {', '.join(QUANTIZATION)}."
            )
        if fault := next(_faults_of(found), None):
            raise RecipeError(f"Cannot quantise as `--quantization {self.quantization}`: {fault}. E.g. '{EXAMPLE}'.")
        return found

    def files(self) -> dict[str, Path]:
        """The local file of each task that has one."""
        return {task: Path(path) for task, _, path in (part.partition("=") for part in self.data)}

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints. Raises RecipeError on one that isn't there, or that vLLM can't load as it was trained."""
        found = list(self._checkpoints(self.asked_quantization()))
        if self.quantization and not any(each.quantization is each.asked for each in found):
            raise RecipeError("`--quantization` does nothing: each run is evaluated as it has recorded its base. Remove it.")
        for each in found if self.backend == "vllm" else ():
            if each.quantization and each.adapter is None:
                raise RecipeError("`--quantization` is not supported with vLLM. Remove it, or write `--backend hf`.")
            if each.quantization:
                raise RecipeError(
                    f"Cannot evaluate `--model {each.name}` with vLLM: its base was quantised for training. Run `bl-trainer "
                    f"merge {each.adapter} --output DIR`, and evaluate DIR."
                )
        return found

    def _checkpoints(self, asked: dict[str, Any]) -> Iterator[Checkpoint]:
        for name in self.model:
            if is_path(name) and not Path(name).is_dir():
                raise RecipeError(f"`--model {name}` is not a folder.")
            if self.adapter:
                if not is_adapter(self.adapter):
                    raise RecipeError(f"`--adapter {self.adapter}` holds no adapter_config.json. Give an adapter's folder.")
                if is_adapter(name):
                    raise RecipeError(f"`--model {name}` is an adapter too. Write its base model, or leave `--adapter` out.")
                yield Checkpoint(f"{name}+{self.adapter}", name, self.adapter, asked)
            elif is_adapter(name):
                yield Checkpoint(name, _base(name), name, asked)
            elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
                raise RecipeError(f"`--model {name}` holds no model: there is no config.json.")
            else:
                yield Checkpoint(name, name, None, asked)

    def deciding(self, task: str) -> dict[str, Any]:
        """Return the options on which the results of `task` depend; files by their content."""
        keys = ("limit", "num_fewshot", "samples", "pass_at", "temperature", "temperatures", "format",
                "max_new_tokens", "apply_chat_template", "backend")  # fmt: skip
        own = self.files().get(task)
        files = [*([own] if own else []), *(task_files(Path(task)) if Path(task).is_file() else ())]
        digests = {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
        return {**{key: getattr(self, key) for key in (*keys, "dtype", "seed")}, "files": digests}


def _faults_of(quantization: dict[str, Any]) -> Iterator[str]:
    """Yield what bitsandbytes can't do of its settings, which it says only when a model loads."""
    for key, value in quantization.items():
        is_truth = key.startswith("load_in") or key == "bnb_4bit_use_double_quant"
        allowed = (True, False) if is_truth else ALLOWED.get(key, (value,))
        if value not in allowed or (is_truth and not isinstance(value, bool)):
            yield f"`{key}` is {value!r}. Write one of {', '.join(str(each).lower() for each in allowed)}"
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        yield "`load_in_4bit` and `load_in_8bit` are both true. Write one of them"
    if not isinstance(getattr(torch, str(quantization.get("bnb_4bit_compute_dtype", "float32")), None), torch.dtype):
        yield "`bnb_4bit_compute_dtype` is no type of torch's. Write e.g. bfloat16"
    if not is_number(quantization.get("llm_int8_threshold", 0)):
        yield "`llm_int8_threshold` is not a number. Correct it"
    modules = quantization.get("llm_int8_skip_modules") or []
    if not (isinstance(modules, list) and all(isinstance(each, str) for each in modules)):
        yield "`llm_int8_skip_modules` is not a list of names. Correct it"


def _bits_in(quantization: dict[str, Any]) -> bool:
    return any(quantization.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))


def is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def _base(adapter: str) -> str:
    try:
        base = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"The adapter_config.json of `--model {adapter}` can't be read: {sentence(error)}") from error
    instead = f"Write `--model BASE --adapter {adapter}`."
    if not base or not isinstance(base, str):
        raise RecipeError(f"The adapter `--model {adapter}` names no base model. {instead}")
    if is_path(base) and not Path(base).is_dir():
        raise RecipeError(f"{base}, the base of the adapter `--model {adapter}`, is not a folder. {instead}")
    return base
