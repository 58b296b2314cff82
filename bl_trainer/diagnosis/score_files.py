"""The folder of `--scores`: Parquet files of consecutive rows, what each says it is of, and what it is refused for.

A file is written in one go once all its rows are scored, so that whatever is there is complete. Which rows a file holds follows
from the number of rows of the data set alone: a run on another number of processes resumes the same files.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from .._util.files import replacing
from .._util.text import sentence
from ..errors import RecipeError
from ..recipe.recipe import Recipe
from ..tokens.messages import short
from ..tokens.row_hash import hashed_columns, hashes_of
from .learnability import probe_adapter, probe_learning_rate

SCHEMA = 1  # raised if a column changes its meaning; a folder of another one is refused

HASHES = ("weights", "adapters")  # known only once the model is there

KEY = b"bl_trainer.scores"  # of the schema metadata: JSON, what the file is of

NAME = re.compile(r"scores-(\d{9})-(\d{9})\.parquet")

FEWEST, MOST, FILES = 64, 4096, 64  # rows of a file, and about how many files there are where these allow it

ADAPTERS = ".adapters"  # of cross-fitting, until all rows are scored; `datasets` passes over hidden folders

FITTED = ("fitted_mean_logp", "noise_score")  # with `--noise_steps`; null without targets

# Of the recipe, beside batches: what the adapters of cross-fitting train by. `probe_arguments` sets schedule and warmup
TRAINS = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "router_aux_loss_coef",
    "train_sampling_strategy",
    "shuffle_dataset",
    "data_seed",
)

UNLIKE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")  # of an adapter, which trains without them

FIGURES = ("mean_p", "mean_logp", "improbable_share", "conflict_share", "entropy", "first_p", "end_p")  # null without targets


AGAIN = "Remove this file; the same command writes it again."


class Shard(NamedTuple):
    """The rows of one file: from `start` to before `stop`."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its file's."""
        return f"scores-{self.start:09}-{self.stop:09}.parquet"

    @property
    def rows(self) -> range:
        """The numbers of its rows."""
        return range(self.start, self.stop)


def fields(logp: pa.DataType | None, is_fitted: bool = False) -> list[pa.Field]:
    """Return the columns of a file. `logp`: type of a log p, None without `--tokens`. `is_fitted`: with `--noise_steps`."""
    found = [pa.field("row", pa.int64()), pa.field("row_hash", pa.string()), pa.field("targets", pa.int32())]
    found += [pa.field(name, pa.float64()) for name in FIGURES] + [pa.field("truncated", pa.bool_())]
    found += [pa.field(name, pa.float64()) for name in FITTED if is_fitted]
    if logp is None:
        return found
    lists = [pa.field(name, pa.list_(logp)) for name in ("logp", "fitted_logp")[: 1 + is_fitted]]
    return [*found, *lists, *(pa.field(name, pa.list_(pa.int32())) for name in ("input_ids", "labels"))]


def refuse_other_files(folder: Path) -> None:
    """Raise RecipeError if a folder holds anything but files of scores, which would load together with them."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = re.sub(r"\.\w{8}\.part$", "", path.name)  # a kill leaves the file behind that it was writing
        if name != ADAPTERS and not NAME.fullmatch(name):
            raise RecipeError(f"`--scores {folder}` holds {path.name}, which is no file of scores. Write another folder.")


@dataclass(frozen=True)
class ScoreFolder:
    """
    A folder of scores of a data set's rows. `columns`: those that are hashed. `logp`: type of a log p, None without `--tokens`.

    `settings`: what the scores depend on and can be told before a model loads, to be recorded in every file.
    """

    path: Path
    dataset: Dataset
    columns: list[str]
    logp: pa.DataType | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe, dataset: Any) -> "ScoreFolder":
        """Return the checked folder of a recipe's `--scores`. Raises RecipeError, in all processes, if it holds others."""
        if not isinstance(dataset, Dataset):
            raise RecipeError(
                "`--scores` numbers the rows of a data set, and a stream has no end. Write `dataset_streaming: false`."
            )
        options, columns = recipe.options, hashed_columns(dataset, recipe.training.dataset_text_field)
        logp = {"float32": pa.float32(), "float16": pa.float16()}[options.tokens_dtype] if options.tokens else None
        found = cls(Path(options.scores), dataset, columns, logp, _settings(recipe, len(dataset)))
        present = [shard for shard in found.shards() if (found.path / shard.name).exists()]
        state = PartialState()
        found._agree(lambda: found._check(present[state.process_index :: state.num_processes]))
        return found

    @property
    def rows_per_file(self) -> int:
        """How many rows a file holds, but for the last."""
        return min(MOST, max(FEWEST, -(-len(self.dataset) // FILES)))

    def shards(self) -> list[Shard]:
        """Return all the files that the data set makes."""
        size, rows = self.rows_per_file, len(self.dataset)
        return [Shard(start, min(start + size, rows)) for start in range(0, rows, size)]

    def hashes(self, shard: Shard) -> list[str]:
        """Return the hash of each of a file's rows."""
        return hashes_of(self.dataset.select(shard.rows), self.columns)

    def hash_of_rows(self) -> str:
        """Return a hash of the hashes of all rows."""
        return hashlib.sha256("".join(hashes_of(self.dataset, self.columns)).encode()).hexdigest()[:32]

    @property
    def is_fitted(self) -> bool:
        """Whether rows are also scored by adapters that have not seen them."""
        return self.settings["noise"] is not None

    def missing(self, hashes: dict[str, str | None]) -> list[Shard]:
        """Return the files that are yet to be written, the same in all processes. `hashes`: of the model's weights.

        Raises RecipeError if those that are there are of other weights. Removes what a kill has left of unfinished ones.
        """
        present = [shard for shard in self.shards() if (self.path / shard.name).exists()]
        self._agree(lambda: self._compare(present, hashes))
        done = set(gather_object(present))
        if PartialState().is_local_main_process:
            for path in self.path.glob("*.part"):
                path.unlink()
        PartialState().wait_for_everyone()
        return [shard for shard in self.shards() if shard not in done]

    def write(self, shard: Shard, columns: dict[str, Any], hashes: dict[str, str | None]) -> None:
        """Write a file in one go. `columns`: all but `row` and `row_hash`. `hashes`: of the weights, to be recorded."""
        recorded = json.dumps({"schema": SCHEMA, **self.settings, **hashes}, sort_keys=True)
        schema = pa.schema(fields(self.logp, self.is_fitted), metadata={KEY: recorded.encode()})
        columns = {"row": pa.array(shard.rows, pa.int64()), "row_hash": self.hashes(shard), **columns}
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.path / shard.name) as part:
            pq.write_table(pa.table([columns[name] for name in schema.names], schema=schema), part)

    def _check(self, present: list[Shard]) -> None:
        """Raise RecipeError if files of these rows are of another data set, recipe or version."""
        planned = {shard.name for shard in self.shards()}
        for path in sorted(self.path.glob("*.parquet")) if self.path.is_dir() else ():
            if path.name not in planned:
                self._compare_file(path, {"schema": SCHEMA, **self.settings})
                raise RecipeError(f"{self._cannot} {path.name} is no file of this data set. {self._instead}")
        self._compare(present, {"schema": SCHEMA, **self.settings})
        for shard in present:
            path = self.path / shard.name
            found = _read(path, lambda path: pq.read_table(path, columns=["row_hash"]))["row_hash"]
            if len(found) != len(shard.rows):
                raise RecipeError(f"{self._cannot} {path.name} holds {len(found)} of {len(shard.rows)} rows. {AGAIN}")
            for row, own, theirs in zip(shard.rows, self.hashes(shard), found.to_pylist(), strict=True):
                if own != theirs:
                    raise RecipeError(f"{self._cannot} row {row} is another one in {shard.name}. {self._instead}")

    def _compare(self, present: list[Shard], wanted: dict[str, Any]) -> None:
        for shard in present:
            self._compare_file(self.path / shard.name, wanted)

    def _compare_file(self, path: Path, wanted: dict[str, Any]) -> None:
        schema = _read(path, pq.read_schema)
        recorded = (schema.metadata or {}).get(KEY)
        if recorded is None:
            raise RecipeError(f"{self._cannot} {path.name} does not say what it is of. {self._instead}")
        found = json.loads(recorded)
        for name, value in wanted.items():
            if other := _other(name, found.get(name), value):
                raise RecipeError(f"{self._cannot} {path.name} was written with another {other}. {self._instead}")
        for column in (field.name for field in fields(self.logp, self.is_fitted)):
            if column not in schema.names:
                raise RecipeError(f"{self._cannot} {path.name} has no column `{column}`. {AGAIN}")

    @property
    def _cannot(self) -> str:
        return f"Cannot resume `--scores {self.path}`:"

    def finish(self) -> None:
        """Remove what only a resumed run would need."""
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(self.path / ADAPTERS, ignore_errors=True)

    _instead = "Write another folder, or remove this one."

    def _agree(self, check: Callable[[], None]) -> None:
        """Run a check that processes may answer differently. Raises its RecipeError in all of them."""
        problem: list[str] = []
        try:
            check()
        except RecipeError as error:
            problem = [str(error)]
        for message in gather_object(problem):
            raise RecipeError(message)


def _read(path: Path, how: Callable[[Path], Any]) -> Any:
    try:
        return how(path)
    except (OSError, pa.ArrowException) as error:
        why = sentence(error)
        raise RecipeError(f"Cannot read {path}: {why}. {AGAIN}") from error


def _other(name: str, then: Any, now: Any) -> str | None:
    """Return the first thing that two records have otherwise, by its name and with both values; None if there is none."""
    if isinstance(then, dict) and isinstance(now, dict):
        return next(filter(None, (_other(f"{name}.{key}", then.get(key), now.get(key)) for key in {**now, **then})), None)
    if then == now:
        return None
    values = [short(each) if isinstance(each, dict) else each for each in (then, now)]
    return f"`{name}`" if name in HASHES else f"`{name}` ({values[0]}, now {values[1]})"


def _noise(recipe: Recipe) -> dict[str, Any]:
    """Return what the adapters of cross-fitting depend on besides."""
    adapter, training = probe_adapter(recipe), recipe.training
    config = {key: value for key, value in adapter.to_dict().items() if value and key not in UNLIKE}
    found = {
        "steps": recipe.options.noise_steps,
        "learning_rate": probe_learning_rate(recipe),
        "rank": getattr(adapter, "r", None),
        "seed": training.seed,
        "batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        **{key: getattr(training, key, None) for key in TRAINS},
        "adapter": config,
    }
    return json.loads(json.dumps(found, sort_keys=True, default=_as_json))


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _settings(recipe: Recipe, rows: int) -> dict[str, Any]:
    """Return what scores depend on, besides the rows and the weights."""
    training, model, options = recipe.training, recipe.model, recipe.options
    kwargs = {key: value for key, value in recipe.model_init_kwargs().items() if key != "attn_implementation"}
    return {
        "rows": rows,
        "model_name_or_path": str(model.model_name_or_path),
        "model_init_kwargs": {key: str(value) for key, value in sorted(kwargs.items())},
        "load_in_bits": 4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        "bf16": training.bf16,
        "fp16": training.fp16,
        "max_length": training.max_length,
        "packing": training.packing_strategy if training.packing else None,
        "truncation_mode": None if training.packing else training.truncation_mode,
        "dataset_text_field": training.dataset_text_field,
        "completion_only_loss": training.completion_only_loss,
        "assistant_only_loss": training.assistant_only_loss,
        "chat_template_path": training.chat_template_path,
        "eos_token": training.eos_token,
        "tokens": options.tokens_dtype if options.tokens else None,
        "noise": _noise(recipe) if options.noise_steps else None,
    }
