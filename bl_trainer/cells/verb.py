"""The score verb: an objective on the cells, beside the stored results of others."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._util.files import write_text
from .._util.text import nearest
from ..errors import RecipeError
from ..objectives import Objective, Threshold, spell
from ..pages.html import to_json
from .engine import MODELS, Entry, run, study_design
from .field import FIELD, entries, stored
from .page import comparison, page, temperatures, verdict
from .pretraining import is_pretrained, models_of
from .results import Results

PUBLIC_SEEDS = 1000  # seeds below it are those of the stored results, and of anybody's tuning


@dataclass
class ScoreArguments:
    """Options of the score verb; `objective`: which one."""

    objective: str = field(default="", init=False)
    output: str | None = field(default=None, metadata={"help": "Folder for the page and results.json."})
    threshold: str | None = field(default=None, metadata={"help": "Threshold on p, as in a recipe."})
    secret_seed: int | None = field(
        default=None,
        metadata={"help": "Pretrain models on facts that nobody has tuned to, and run `against` too; at least 1000."},
    )
    against: str = field(default="nll", metadata={"help": "With `secret_seed`: objectives to compare with, by comma."})
    models: int = field(
        default=MODELS, metadata={"help": "Pretrained models, half of each size; 2 to 8, or more with `secret_seed`."}
    )
    cache: str | None = field(default=None, metadata={"help": "Folder of pretrained models; in the user's cache by default."})

    @classmethod
    def read(cls, argv: list[str], parser: Any) -> "ScoreArguments":
        """Read the command line: an objective, then options. Raises RecipeError. `parser`: made for this class."""
        if not argv or argv[0].startswith("--"):
            raise RecipeError("Cannot score: no objective is named. Write `score my_losses:my_objective --output DIR`.")
        name, *argv = argv
        parser.check(argv)
        options: ScoreArguments = parser.parse({}, argv)[0]
        options.objective = name
        options.check()
        return options

    def check(self) -> None:
        """Raise RecipeError on a value that can't be."""
        if not self.output:
            raise RecipeError("Cannot score: `--output` is missing. Write e.g. `--output out/score`.")
        if self.models < 2:
            raise RecipeError(f"Cannot score with `--models {self.models}`: intervals need several. Give at least 2.")
        if self.models > MODELS and self.secret_seed is None:
            raise RecipeError(
                f"Cannot score with `--models {self.models}`: the stored results have {MODELS}. Give at most {MODELS}, or a "
                "`--secret_seed`."
            )
        if self.secret_seed is not None and self.secret_seed < PUBLIC_SEEDS:
            raise RecipeError(
                f"Cannot use `--secret_seed {self.secret_seed}`: seeds below {PUBLIC_SEEDS} are public. Choose a greater one."
            )
        for name in self.others:
            if name not in FIELD:
                raise RecipeError(
                    f"Cannot compare with {name!r}: no such name.{nearest(name, FIELD)} Names: {', '.join(FIELD)}."
                )

    @property
    def others(self) -> list[str]:
        """The names in `against`."""
        return [name.strip() for name in self.against.split(",") if name.strip()]

    @property
    def folder(self) -> Path:
        """Where pretrained models are kept."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.cache or Path(home) / "bl_trainer" / "cells")


def score(options: ScoreArguments) -> Results:
    """Score an objective, write index.html and results.json into `options.output`, and print where it stands."""
    objective, threshold = Objective.parse(options.objective), Threshold.parse(options.threshold)
    name = spell(objective.to_dict()) + ("" if options.threshold is None else f", threshold {options.threshold}")
    entry = Entry(name, objective, threshold)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain nothing on matrices of this size
    torch.set_flush_denormal(True)
    try:
        results = _beside(entry, options)
    finally:
        torch.set_num_threads(threads)
    control = next(name for name in (*options.others, *results.objectives) if name in results.objectives and name != entry.name)
    optima = temperatures([entry, *(other for other in entries() if other.name != entry.name)])
    folder = Path(str(options.output))
    folder.mkdir(parents=True, exist_ok=True)
    made = {"package": __version__, "design": study_design(), "secret_seed": options.secret_seed}
    scored = {"name": entry.name, "objective": objective.to_dict(), "threshold": threshold.to_dict()}
    write_text(folder / "results.json", to_json({**made, "scored": scored, **results.to_json()}))
    write_text(folder / "index.html", page(results, entry.name, control, optima))
    header, rows = comparison(results, optima)
    own = next(row for row in rows if row[0] == entry.name)
    print(verdict(results, entry.name, control))
    print(*(f"  {title}: {value}" for title, value in zip(header[1:], own[1:], strict=True)), sep="\n")
    print(f"Page: {folder / 'index.html'}   results: {folder / 'results.json'}")
    return results


def _beside(entry: Entry, options: ScoreArguments) -> Results:
    """Return the results of an objective beside those that it is compared with."""
    seed = options.secret_seed
    models = models_of(range(options.models) if seed is None else range(seed, seed + options.models))
    if lacking := [model for model in models if not is_pretrained(model, options.folder / "models")]:
        print(f"Pretraining {len(lacking)} models, once: about 15 seconds each. {options.folder} keeps them.", flush=True)
    others = [] if seed is None else [other for other in entries(options.others) if other.name != entry.name]
    found = run([entry, *others], options.folder, models=models, seeds=(0 if seed is None else seed,))
    return found if seed is not None else stored().of(found.models) + found
