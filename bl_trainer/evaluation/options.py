"""Options of the evaluate verb, and the checkpoints and data that they name."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..local_data import LOCAL_FORMATS, find_fault, is_path
from ..parser import Parser, RecipeError

DTYPES = ("auto", "float32", "bfloat16", "float16")

# What tells whether a checkpoint is still the one that was evaluated
READ = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.jinja")


@dataclass
class Checkpoint:
    """A model, and an adapter over it or None; `name`: how the user calls it."""

    name: str
    model: str
    adapter: str | None

    @property
    def label(self) -> str:
        """The name, as that of a folder."""
        return self.name.replace("/", "__").replace("..", "__")

    def fingerprint(self) -> str:
        """Return a hash of a sample of each of the checkpoint's files."""
        digest = hashlib.sha256()
        for folder in filter(None, (self.model, self.adapter)):
            for path in sorted({path for pattern in READ for path in Path(folder).glob(pattern)}):
                size = path.stat().st_size
                digest.update(f"{path.name} {size}".encode())
                with path.open("rb") as file:
                    for start in range(0, size, max(4096, size // 256)):
                        file.seek(start)
                        digest.update(file.read(4096))
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
        metadata={"help": "Names of the harness, YAML files of further tasks, or completion; commas between."},
    )
    data: list[str] = field(
        default_factory=list, metadata={"help": "task=path.jsonl: a local file in place of that task's data set."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the results."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results that are there."})
    limit: float | None = field(default=None, metadata={"help": "Only the first so many items of a task; below 1 a share."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt, if not the task's own number."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens to generate for completion, if not a few more than the longest gold answer has."},
    )
    apply_chat_template: bool | None = field(
        default=None, metadata={"help": "Whether to put prompts into the chat template; unless told, if the tokenizer has one."}
    )
    batch_size: str = field(default="8", metadata={"help": "Items at a time on each device, or auto."})
    dtype: str = field(default="auto", metadata={"help": f"Precision: {', '.join(DTYPES)}; auto is the checkpoint's."})
    seed: int = field(default=1234, metadata={"help": "Of few-shot examples and of sampling."})
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "Run the code that the model writes, for tasks that need it."}
    )

    @classmethod
    def read(cls, argv: list[str]) -> "EvaluateArguments":
        """Read the command line. Raises RecipeError."""
        classes: Any = [cls]
        parser = Parser(classes, prog="bl_trainer evaluate", allow_abbrev=False)
        parser.kind = "option"
        parser.check({}, argv)
        return parser.parse({}, argv)[0]

    def check(self) -> None:
        """Raise RecipeError on a value that can't be; lists are taken apart."""
        self.tasks = list(dict.fromkeys(name for part in self.tasks for name in part.split(",") if name))
        self.model = list(dict.fromkeys(self.model))
        for key, example in (("model", "out/model"), ("tasks", "gsm8k"), ("output", "out/evaluation")):
            if not getattr(self, key):
                raise RecipeError(f"`--{key}` is missing. Write e.g. `--{key} {example}`.")
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit % 1)):
            raise RecipeError(f"`--limit {self.limit:g}` must be a number of items, or a share between 0 and 1.")
        for key, least in (("max_new_tokens", 1), ("num_fewshot", 0), ("seed", 0)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise RecipeError(f"`--{key} {getattr(self, key)}` must be at least {least}.")
        if self.batch_size != "auto" and (not self.batch_size.isdigit() or int(self.batch_size) < 1):
            raise RecipeError(f"`--batch_size {self.batch_size}` must be a number above 0, or auto.")
        if self.dtype not in DTYPES:
            raise RecipeError(f"`--dtype {self.dtype}` is not allowed. Allowed: {', '.join(DTYPES)}.")
        if self.adapter and len(self.model) > 1:
            raise RecipeError("`--adapter` goes with one `--model`. To compare adapters, give their folders as `--model`.")
        for part in self.data:
            task, _, path = part.partition("=")
            if not path or Path(path).suffix not in LOCAL_FORMATS or Path(path).suffix == ".txt":
                raise RecipeError(f"`--data {part}` must be task=path, of a .jsonl, .json, .parquet or .csv file.")
            if not Path(path).is_file():
                raise RecipeError(f"`--data {part}`: there is no such file.")
            fault = find_fault([Path(path)])
            if fault:
                raise RecipeError(f"`--data {task}=...`: {fault}.")

    def files(self) -> dict[str, Path]:
        """The local file of each task that has one."""
        return {task: Path(path) for task, _, path in (part.partition("=") for part in self.data)}

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints. Raises RecipeError on one that isn't there."""
        return list(self._checkpoints())

    def _checkpoints(self) -> Iterator[Checkpoint]:
        for name in self.model:
            if is_path(name) and not Path(name).is_dir():
                raise RecipeError(f"`--model {name}` is not a folder.")
            if self.adapter:
                if not is_adapter(self.adapter):
                    raise RecipeError(f"`--adapter {self.adapter}` holds no adapter_config.json. Give an adapter's folder.")
                if is_adapter(name):
                    raise RecipeError(f"`--model {name}` is an adapter too. Write its base model, or leave `--adapter` out.")
                yield Checkpoint(f"{name}+{self.adapter}", name, self.adapter)
            elif is_adapter(name):
                yield Checkpoint(name, _base(name), name)
            elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
                raise RecipeError(f"`--model {name}` holds no model: there is no config.json.")
            else:
                yield Checkpoint(name, name, None)

    def deciding(self, task: str) -> dict[str, Any]:
        """Return the options on which the results of `task` depend; files by their content."""
        keys = ("limit", "num_fewshot", "max_new_tokens", "apply_chat_template", "dtype", "seed")
        files = [path for path in (self.files().get(task), Path(task)) if path and path.is_file()]
        digests = {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
        return {**{key: getattr(self, key) for key in keys}, "files": digests}


def is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def _base(adapter: str) -> str:
    base = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    instead = f"Write `--model BASE --adapter {adapter}`."
    if not base:
        raise RecipeError(f"The adapter `--model {adapter}` names no base model. {instead}")
    if is_path(base) and not Path(base).is_dir():
        raise RecipeError(f"{base}, the base of the adapter `--model {adapter}`, is not a folder. {instead}")
    return base
