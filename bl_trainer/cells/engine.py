"""Fine-tuning of pretrained models on cells with objectives: blocks of work, and each is kept when it is done."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._util.files import write_text
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from .cells import CELLS, VERSION, Cell, old_items
from .judging import JUDGING
from .pretraining import SIZES, Model, design, models_of, pretrained
from .results import Results
from .scores import questions, score, stacked
from .training import Arm, Course, train
from .world import World

COURSE = Course()
RATES = (5e-4, 1.5e-3, 5e-3)
MODELS = 8
SPLITS = ("validation", "test")
KEPT = 0.02  # greedy share below which a task counts as not known before


@dataclass(frozen=True)
class Entry:
    """What is compared: an objective with its threshold, and label smoothing, under a name."""

    name: str
    objective: Objective
    threshold: Threshold
    smoothing: float = 0.0

    @classmethod
    def parse(cls, name: str, spec: Any) -> "Entry":
        """Read an objective as recipes have it; a mapping may also have `threshold` and `smoothing`. Raises RecipeError."""
        own: dict[str, Any] = {}
        if isinstance(spec, Mapping):
            own = {key: spec[key] for key in ("threshold", "smoothing") if key in spec}
            spec = {key: value for key, value in spec.items() if key not in own}
        return cls(name, Objective.parse(spec), Threshold.parse(own.get("threshold")), own.get("smoothing", 0.0))


@dataclass(frozen=True)
class Block:
    """The models of one size on one cell, fine-tuned at every rate and with every seed under one entry."""

    entry: Entry
    cell: str
    models: tuple[Model, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    course: Course

    @property
    def path(self) -> Path:
        """Where it is kept, in a folder of results; it names all that the block depends on."""
        entry = self.entry
        spec: tuple[Any, ...] = (
            entry.objective.to_dict(),
            entry.threshold.to_dict(),
            self.cell,
            self.rates,
            self.seeds,
            self.course,
        )
        spec += (entry.smoothing,) if entry.smoothing else ()
        return Path(f"{digest(repr((spec, self.models, design(), VERSION)))}.json")

    @property
    def is_kept(self) -> bool:
        """Whether its results are those of the same call another day: not where a user's function prices tokens."""
        return not any(":" in part.name for _, part in self.entry.objective.walk())

    def run(self, folder: Path) -> list[dict[str, Any]]:
        """Train and score its arms; a row for each."""
        shape, weights = SIZES[self.models[0].size], pretrained(self.models, folder / "models")
        sets = [(k, seed) for k in range(len(self.models)) for seed in self.seeds]
        rows = stacked([_rows(self.cell, self.models[k].seed, seed, self.course) for k, seed in sets])
        own = [(i, rate) for i in range(len(sets)) for rate in self.rates]
        arms = [Arm(self.entry.objective, self.entry.threshold, rate, i, self.entry.smoothing) for i, rate in own]
        which = torch.tensor([sets[i][0] for i, _ in own])
        measured = measure(self.cell, self.models, train(shape, weights[which], rows, arms, self.course), which)
        before = measure(self.cell, self.models, weights, torch.arange(len(self.models)))
        return [
            {
                "objective": self.entry.name,
                "cell": self.cell,
                "model": self.models[sets[i][0]].name,
                "rate": rate,
                "seed": sets[i][1],
                **{split: {name: values[j] for name, values in measured[split].items()} for split in SPLITS},
                "kept": kept(measured["old"], before["old"], j, sets[i][0]),
            }
            for j, (i, rate) in enumerate(own)
        ]


def run(
    entries: Sequence[Entry],
    folder: Path,
    cells: Sequence[str] = tuple(CELLS),
    models: Sequence[Model] | None = None,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (0,),
    course: Course = COURSE,
    done: Callable[[int, int], None] = lambda number, count: None,
) -> Results:
    """Fine-tune models on cells under each entry, at each rate and with each seed, and return the results.

    `folder` keeps pretrained models, and each block of results once it is done: the same call resumes. Blocks of a user's own
    function run each time, since its code may change. `models`: by default eight, four of each size. `seeds`: of the training
    rows. `done` gets how many blocks are done, and how many there are. On one thread.
    """
    models = models_of(range(MODELS)) if models is None else models
    blocks = list(_blocks(entries, cells, models, tuple(rates), tuple(seeds), course))
    found: list[dict[str, Any]] = []
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for number, block in enumerate(blocks, 1):
        found += [{**row, "objective": block.entry.name} for row in _rows_of(block, folder)]
        done(number, len(blocks))
    return Results(tuple(found))


def _rows_of(block: Block, folder: Path) -> list[dict[str, Any]]:
    path = folder / "results" / block.path
    if not block.is_kept:
        return block.run(folder)
    if not path.exists():
        write_text(path, json.dumps(block.run(folder)))
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _blocks(
    entries: Sequence[Entry],
    cells: Sequence[str],
    models: Sequence[Model],
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
    course: Course,
) -> Iterator[Block]:
    for cell in cells:
        for size in SIZES:
            own = tuple(model for model in models if model.size == size)
            yield from (Block(entry, cell, own, rates, seeds, course) for entry in entries if own)


def measure(cell: str, models: Sequence[Model], stack: Tensor, which: Tensor) -> dict[str, dict[str, list[float]]]:
    """Return means over questions by split and metric, for each model of a stack; `which` of `models` each of them was.

    `old` has the greedy share of each task that was known before.
    """
    shape, made = SIZES[models[0].size], [_cell(cell, model.seed) for model in models]
    asked = {split: questions([getattr(one, split) for one in made]) for split in SPLITS}
    found = {split: score(shape, stack, type(each)(*(part[which] for part in each))) for split, each in asked.items()}
    old = [old_items(World(model.seed), one.rule) for model, one in zip(models, made, strict=True)]
    tasks = [questions([items[i] for items in old]) for i in range(len(old[0]))]
    known = [score(shape, stack, type(each)(*(part[which] for part in each)))["greedy"] for each in tasks]
    means = {split: {name: values.mean(1).tolist() for name, values in each.items()} for split, each in found.items()}
    return {**means, "old": {str(i): values.mean(1).tolist() for i, values in enumerate(known)}}


def kept(after: Mapping[str, list[float]], before: Mapping[str, list[float]], arm: int, model: int) -> float:
    """Return the mean over old tasks of the greedy share after training over that before, each at most 1."""
    ratios = [min(1.0, after[task][arm] / max(KEPT, before[task][model])) for task in before]
    return sum(ratios) / len(ratios)


@lru_cache(maxsize=64)
def _cell(cell: str, world: int) -> Cell:
    return {**CELLS, **JUDGING}[cell](World(world))


@lru_cache(maxsize=64)
def _rows(cell: str, world: int, seed: int, course: Course) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rng = random.Random(f"rows {cell} {world} {seed}")
    return [_cell(cell, world).row(rng) for _ in range(course.steps * course.batch)]


def study_design() -> str:
    """Return a hash of all that results at the usual rates and steps depend on, but for the objective and the models."""
    return digest(repr((VERSION, design(), COURSE, RATES)))


def digest(text: str) -> str:
    """Return a short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
