"""What the diagnose verb takes: a recipe, or a model and its data; and its options."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._util.process import is_first
from ..errors import RecipeError
from ..recipe.recipe import Recipe
from ..training.guards import missing_folders
from .score_files import refuse_other_files

NAMED = {"model": "model_name_or_path", "data": "dataset_name"}  # options in place of a recipe -> its keys

REPORT_FILES = (
    "report.json",
    "examples.json",
    "report.html",
    "compare.csv",
    "probe.csv",
    "sweep.yaml",
    "rows.html",
    "rows.parquet",
    "figures",
)


@dataclass
class DiagnoseArguments:
    """Options of the diagnose verb; on the command line only, so that the recipe stays the one to train."""

    model: str | None = field(
        default=None,
        metadata={"help": "Model folder or Hub name; with --data in place of a recipe, for users of other trainers."},
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Data file (JSONL, JSON, Parquet, CSV, text), folder or Hub name, instead of a recipe."},
    )
    report: str | None = field(default=None, metadata={"help": "Folder for the report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a report that is there already."})
    max_tokens: int = field(default=500_000, metadata={"help": "Target tokens to measure, as a random sample. 0 measures all."})
    by: str | None = field(default=None, metadata={"help": "Column of the data set to break the figures down by."})
    percentiles: list[float] = field(
        default_factory=list, metadata={"help": "Percentiles of p to report besides 1 to 99, e.g. 2.5 99.5."}
    )
    compare: str | None = field(
        default=None, metadata={"help": "Checkpoint or adapter, to be compared with the recipe's model on the same tokens."}
    )
    probe: str | None = field(
        default=None, metadata={"help": "Data set that was not trained on, for --compare to show forgetting."}
    )
    probe_steps: int = field(
        default=0,
        metadata={"help": "Steps of a LoRA adapter on half of the data, to tell knowledge from noise by the other half."},
    )

    scores: str | None = field(
        default=None, metadata={"help": "Folder for a score of every row of the training set, as Parquet files."}
    )
    tokens: bool = field(default=False, metadata={"help": "With --scores, log p of every target token as well."})
    tokens_dtype: str = field(default="float32", metadata={"help": "Precision of --tokens: float32 or float16."})
    noise_steps: int = field(
        default=0,
        metadata={
            "help": "With --scores, steps of two LoRA adapters, one on each half of the rows, to tell by the other half which "
            "rows are probably wrong. 80 is a good number."
        },
    )
    draw: bool = field(default=True, metadata={"help": "Write report.html and its figures; a sweep's runs leave them out."})

    def check(self) -> None:
        """Raise RecipeError on a wrong value or a folder that can't be written to."""
        if not self.report and not self.scores:
            raise RecipeError("`--report` is missing: the folder for the report. Write `--report out/diagnosis`.")
        if not self.draw and not self.report:
            raise RecipeError("`--draw` does nothing without `--report`. Remove it.")
        if self.max_tokens < 0:
            raise RecipeError(f"`--max_tokens {self.max_tokens}` must not be negative; 0 measures the whole data set.")
        for rank in self.percentiles:
            if not 0 <= rank <= 100:
                raise RecipeError(f"`--percentiles {rank:g}` must be between 0 and 100.")
        if self.compare and not Path(self.compare).is_dir():
            raise RecipeError(f"`--compare {self.compare}` is not a folder. Give a checkpoint's or an adapter's.")
        if self.probe and not self.compare:
            raise RecipeError("`--probe` does nothing without `--compare`. Give a checkpoint or an adapter to compare.")
        if self.probe_steps < 0:
            raise RecipeError(f"`--probe_steps {self.probe_steps}` must not be negative; 0 leaves the learnability probe out.")
        if self.probe_steps and self.compare:
            raise RecipeError("`--probe_steps` asks about the recipe's own model. Run it without `--compare`.")
        self._check_scores()
        if self.report:
            folder = Path(self.report)
            present = [name for name in REPORT_FILES if (folder / name).exists()]
            if present and not self.overwrite:
                raise RecipeError(
                    f"`--report {folder}` holds {present[0]} already. Write another folder, or add `--overwrite`."
                )
            _refuse_unwritable("report", folder)

    def _check_scores(self) -> None:
        """Raise RecipeError on what `--scores` does not go with, or a folder of something else."""
        if not self.scores:
            for option in ("tokens", "tokens_dtype", "noise_steps"):
                if getattr(self, option) != getattr(DiagnoseArguments, option):
                    raise RecipeError(f"`--{option}` does nothing without `--scores`. Name the folder for the scores.")
            return
        if self.noise_steps < 0:
            raise RecipeError(f"`--noise_steps {self.noise_steps}` must not be negative; 0 leaves the noise score out.")
        if self.noise_steps and self.probe_steps:
            raise RecipeError("Cannot run `--noise_steps` with `--probe_steps`: both train the adapter. Run them one by one.")
        if self.tokens_dtype not in ("float32", "float16"):
            raise RecipeError(f"`--tokens_dtype {self.tokens_dtype}` must be float32 or float16.")
        if self.tokens_dtype != "float32" and not self.tokens:
            raise RecipeError("`--tokens_dtype` does nothing without `--tokens`. Add `--tokens`.")
        if self.compare:
            raise RecipeError("`--scores` are those of the recipe's own model. Run it without `--compare`.")
        folder = Path(self.scores)
        if self.report and Path(self.report).resolve() == folder.resolve():
            raise RecipeError("`--scores` and `--report` name the same folder. Write two; the files of scores load together.")
        if self.report and folder.resolve() in Path(self.report).resolve().parents:
            raise RecipeError(
                f"`--report {self.report}` is within `--scores {folder}`, whose files load together. Write another folder."
            )
        refuse_other_files(folder)
        _refuse_unwritable("scores", folder)


def _refuse_unwritable(option: str, folder: Path) -> None:
    """Raise RecipeError if nothing can be written to the folder of an option. Leaves no folder behind."""
    if not is_first():
        return  # the first process writes the report
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in made:
            path.rmdir()
    except OSError as error:
        why = "it is a file, not a folder" if folder.is_file() else error.strerror
        raise RecipeError(f"Can't write to `--{option} {folder}`: {why}.") from error


def read_diagnosis(argv: list[str]) -> Recipe:
    """Read `--config recipe.yaml`, or `--model M --data D.jsonl` in its place, and any options and recipe keys.

    Without a recipe, on a machine without an accelerator, the model runs on the CPU in its own precision. Raises RecipeError.
    """
    argv = [_with_underscores(arg) for arg in argv]
    given = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    is_named = bool(given & NAMED.keys())
    if is_named:
        argv = _spelled_out(argv, given)
    with names_as_given(is_named):
        recipe = Recipe.read(argv, "diagnose", DiagnoseArguments)
    if is_named:
        recipe.options.model, recipe.options.data = recipe.model.model_name_or_path, recipe.script.dataset_name
    recipe.options.check()
    return recipe


def _with_underscores(arg: str) -> str:
    """Return `--use-cpu` as `--use_cpu`, which the parser takes too."""
    name, equals, value = arg.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if arg.startswith("--") else arg


@contextmanager
def names_as_given(is_named: bool) -> Iterator[None]:
    """Let a RecipeError say `--model` and `--data`, if these are given in place of a recipe (`is_named`)."""
    try:
        yield
    except RecipeError as error:
        if not is_named:
            raise
        said = str(error)
        for option, key in NAMED.items():
            said = said.replace(f"`{key}: ", f"`--{option} ")
        raise RecipeError(said) from error


def _spelled_out(argv: list[str], given: set[str]) -> list[str]:
    """Return the command line with the recipe keys that `--model` and `--data` mean."""
    for other in sorted(given & {"config", *NAMED.values()}):
        raise RecipeError(f"Cannot use `--{other}` with `--model` and `--data`: they take its place. Keep one or the other.")
    for name, what in (("model", "the folder or Hub name of the model"), ("data", "a data file, a folder or a Hub name")):
        if name not in given:
            raise RecipeError(f"`--{name}` is missing: {what}. Write `--model MODEL --data DATA.jsonl`.")
    keys = [re.sub(rf"^--({'|'.join(NAMED)})(?==|$)", lambda match: f"--{NAMED[match[1]]}", arg) for arg in argv]
    if not torch.accelerator.is_available() and not given & {"use_cpu", "bf16", "fp16"}:
        keys += ["--use_cpu", "true", "--bf16", "false"]
    return keys
