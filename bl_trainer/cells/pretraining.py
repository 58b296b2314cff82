"""Pretrained models of two sizes, each of a world of its own; a folder keeps them by a hash of their design."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._util.files import replacing
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from . import vocabulary
from .scores import stacked
from .training import Arm, Course, train
from .transformer import Shape, initial
from .world import FACTS, LENGTH, SHOWN, World

SIZES = {"small": Shape(48, 3, 2, vocabulary.SIZE, 14), "large": Shape(64, 4, 2, vocabulary.SIZE, 14)}
COURSE = Course(steps=600, batch=64, warmup=50)
RATE = 3e-3
VERSION = 1  # of rules, rows and initial weights


@dataclass(frozen=True)
class Model:
    """A pretrained model: its size, and the seed of its world and weights."""

    size: str
    seed: int

    @property
    def name(self) -> str:
        """Its name in results."""
        return f"{self.size}-{self.seed}"


def models_of(seeds: Sequence[int]) -> list[Model]:
    """Return the models of these seeds, half of them of each size; even places are small."""
    return [Model(list(SIZES)[i % len(SIZES)], seed) for i, seed in enumerate(seeds)]


def pretrained(models: Sequence[Model], folder: Path) -> Tensor:
    """Return the weights, (models, count), of models of one size; those that `folder` lacks are trained, and kept there."""
    (size,) = {model.size for model in models}
    lacking = [model for model in models if not is_pretrained(model, folder)]
    if lacking:
        folder.mkdir(parents=True, exist_ok=True)
        for model, weights in zip(lacking, _pretrain(size, [model.seed for model in lacking]), strict=True):
            with replacing(_path(model, folder)) as part:
                save_file({"weights": weights.clone()}, part)
    return torch.stack([load_file(_path(model, folder))["weights"] for model in models])


def is_pretrained(model: Model, folder: Path) -> bool:
    """Whether a folder keeps a model of this design."""
    return _path(model, folder).exists()


def _pretrain(size: str, seeds: Sequence[int]) -> Tensor:
    shape = SIZES[size]
    sets = []
    for seed in seeds:
        world, rng = World(seed), random.Random(f"pretraining {size} {seed}")
        sets.append(world.pretraining_rows(COURSE.steps, COURSE.batch, rng))
    start = torch.stack([initial(shape, seed) for seed in seeds])
    arms = [Arm(Objective("nll"), Threshold(), RATE, i) for i in range(len(seeds))]
    return train(shape, start, stacked(sets), arms, COURSE)


def _path(model: Model, folder: Path) -> Path:
    return folder / f"{model.name}-{design()}.safetensors"


def design() -> str:
    """Return a hash of all that pretraining depends on."""
    parts = [{size: asdict(shape) for size, shape in SIZES.items()}, asdict(COURSE), RATE, FACTS, SHOWN, LENGTH]
    return hashlib.sha256(json.dumps([*parts, VERSION]).encode()).hexdigest()[:12]
