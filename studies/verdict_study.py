"""Judge the learnability probe's verdict on cells whose noise and knowledge are known: `python studies/verdict_study.py`.

Each pretrained model of the cells trains by nll on one half of a cell's questions, and is asked about the other half. The
probe's own functions make the figures and the verdict of it. In place of `diagnose`'s LoRA adapter all weights train, since
the models are a stack without modules. It takes about two minutes of one core, and writes docs/results/verdict.json.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bl_trainer.cells.cells import CELLS, Cell, known, of_items, right
from bl_trainer.cells.pretraining import SIZES, Model, models_of, pretrained
from bl_trainer.cells.scores import encode, stacked
from bl_trainer.cells.training import Arm, Course, train
from bl_trainer.cells.transformer import Shape, logits, unpack
from bl_trainer.cells.vocabulary import ASK, EITHER, END, LETTERS
from bl_trainer.cells.world import Tokens, World, text
from bl_trainer.diagnosis.advice import judge
from bl_trainer.diagnosis.evidence import BELOW, contexts, evidence, foretold, matched, shares, summed
from bl_trainer.diagnosis.report import Foretold, Learnability, Trained
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.threshold import Threshold

HALF, BATCH, RATE, ASKED, CANDIDATES = 40, 32, 1.5e-3, 512, 64
OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "verdict.json"


def new_rule(world: World) -> Cell:
    """A rule that pretraining never showed: the letters in reverse."""

    def item(rng: random.Random) -> Any:
        letters = text(rng)
        return right((EITHER, *letters, ASK), letters[::-1])

    return of_items(item, world)


def clean_mixture(world: World) -> Cell:
    """As many rows each of well-known, half-known and new facts."""
    parts = [known(group)(world) for group in ("strong", "half", "new")]
    return Cell(lambda rng: rng.choice(parts).row(rng), [], [])


# What the answers are before noise, and the share of them whose letters are then drawn at random
JUDGED: dict[str, tuple[Callable[[World], Cell], float]] = {
    **{name: (CELLS[name], 0.0) for name in ("plain", "new-clean", "confusions", "two-even", "two-uneven", "prefix", "suffix")},
    **{f"{group}-clean": (known(group), 0.0) for group in ("strong", "half", "weak")},
    "new-rule": (new_rule, 0.0),
    "mixture-clean": (clean_mixture, 0.0),
    **{f"{group}-noise": (known(group), 0.3) for group in ("strong", "half", "weak", "new")},
    **{f"{name}-noise": (CELLS[name], 0.3) for name in ("plain", "prefix", "suffix")},
    "new-rule-noise": (new_rule, 0.3),
}


class Row(NamedTuple):
    """A training row, and whether its letters are random."""

    prompt: Tokens
    answer: Tokens
    is_noise: bool


@dataclass(frozen=True)
class Halves:
    """Rows of a cell: `first` to train on, and `second`, of other questions, to ask about."""

    first: list[Row]
    second: list[Row]


def halves(name: str, world: World, half: int = HALF) -> Halves:
    """Draw a cell's rows; a question is of one half. `half`: half of the steps."""
    make, noise = JUDGED[name]
    cell, rng = make(world), random.Random(f"verdict {name} {world.seed}")
    side: dict[Tokens, int] = {}
    parts: tuple[list[Row], list[Row]] = [], []
    sizes = 2 * half * BATCH, ASKED
    while any(len(part) < size for part, size in zip(parts, sizes, strict=True)):
        prompt, answer = cell.row(rng)
        is_noise = rng.random() < noise
        if is_noise:
            answer = tuple(rng.choice(LETTERS) if token in LETTERS else token for token in answer)
        half = side.setdefault(prompt, rng.randrange(2))
        if len(parts[half]) < sizes[half]:
            parts[half].append(Row(prompt, answer, is_noise))
    return Halves(*parts)


class Constant(Course):
    """A course at a constant rate after its warmup, as the probe's."""

    def factor(self, step: int) -> float:
        return min((step + 1) / self.warmup, 1.0)


def probabilities(shape: Shape, stack: Tensor, sets: list[list[Row]]) -> list[Tensor]:
    """Return log p of every next token, (rows, length, vocabulary), for each model of a stack on its rows."""
    tokens = stacked([[(row.prompt, row.answer) for row in rows] for rows in sets]).tokens
    weights = unpack(shape, stack)
    found = []
    with torch.no_grad():
        for i in range(len(stack)):
            own = {name: each[i : i + 1] for name, each in weights.items()}
            found.append(logits(shape, own, tokens[i : i + 1, :, :-1])[0].double().log_softmax(-1))
    return found


class Content:
    """The content targets of a half, all answers' tokens but the end."""

    def __init__(self, rows: list[Row], length: int):
        tokens, is_target = encode([(row.prompt, row.answer) for row in rows], length)
        self.row, self.place = is_target.nonzero(as_tuple=True)
        self.token = tokens[self.row, self.place + 1]
        self.found = evidence(self.token, self.row, contexts(tokens.tolist(), self.row, self.place + 1))
        self.is_content = self.token != END
        is_letter = (self.token >= LETTERS[0]) & (self.token <= LETTERS[-1])
        self.is_noise = torch.tensor([row.is_noise for row in rows])[self.row] & is_letter

    def of(self, logp: Tensor, at: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        """Return log p at targets `at` of `token`, by default of their own."""
        at = torch.arange(len(self.row)) if at is None else at
        return logp[self.row[at], self.place[at], self.token[at] if token is None else token]


def asked(content: Content, base: Tensor, after: Tensor, rng: torch.Generator) -> Foretold:
    """Return the probe's figures of a half, from log p before and after training."""
    here = content.is_content.nonzero().flatten()
    before = content.of(base, here)
    low = here[before < math.log(BELOW)]
    drawn = here[torch.randint(len(here), (len(low), CANDIDATES), generator=rng)]
    places = torch.cat([low[:, None], drawn], 1)
    token = content.token[low][:, None].expand_as(places)
    logp = content.of(base, places.flatten(), token.flatten()).view(places.shape)
    at, control = matched(drawn, logp, content.token[drawn] == content.token[low][:, None])
    rise = content.of(after, at, content.token[low]) - control
    found = type(content.found)(*(each[here] for each in content.found))
    values = shares(before, content.of(after, here) - before, rise, found)
    return foretold(summed(values, content.row[here], ASKED))


def run(models: list[Model], folder: Path, rate: float = RATE) -> list[dict[str, Any]]:
    """Return the verdict on each cell of each model, with the truth: shares of the content's tokens."""
    rows = []
    for size, shape in SIZES.items():
        own = [model for model in models if model.size == size]
        if own:
            rows += judged(own, shape, pretrained(own, folder / "models"), rate)
    return rows


def judged(
    models: list[Model], shape: Shape, weights: Tensor, rate: float, cells: Sequence[str] = tuple(JUDGED), half: int = HALF
) -> list[dict[str, Any]]:
    """Return the same of models of one shape, with `weights`, (models, count)."""
    jobs = [(k, name) for k in range(len(models)) for name in cells]
    parts = [halves(name, World(models[k].seed), half) for k, name in jobs]
    start = weights[torch.tensor([k for k, _ in jobs])]
    arms = [Arm(Objective("nll"), Threshold(), rate, i) for i in range(len(jobs))]
    first = [[(row.prompt, row.answer) for row in part.first] for part in parts]
    course = Constant(half, BATCH)
    middle = train(shape, start, stacked([rows[: half * BATCH] for rows in first]), arms, course)
    end = train(shape, middle, stacked([rows[half * BATCH :] for rows in first]), arms, course)
    seconds = [part.second for part in parts]
    found = [probabilities(shape, stack, seconds) for stack in (start, middle, end)]
    rows = []
    for i, (k, name) in enumerate(jobs):
        content = Content(seconds[i], found[0][i].shape[1])
        middling, last = (asked(content, found[0][i], each[i], torch.Generator().manual_seed(0)) for each in found[1:])
        probe = Learnability(2 * half, rate, BELOW, 0, Trained(2 * half * BATCH, 0), last, middling)
        verdict, _ = judge(probe)
        is_low = content.of(found[0][i]) < math.log(BELOW)
        content_noise = content.is_noise & content.is_content
        true = {
            "noise": (content_noise.sum() / content.is_content.sum()).item(),
            "knowledge": ((is_low & content.is_content & ~content.is_noise).sum() / content.is_content.sum()).item(),
        }
        figures = {key: getattr(last, key) for key in ("learnable", "noise", "contradicted", "low")}
        rows.append({"model": models[k].name, "cell": name, "verdict": verdict, **figures, "true": true})
    return rows


def main() -> None:
    """Judge all cells of all models, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cells"), help="where pretrained models are kept")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would gain nothing
    torch.set_flush_denormal(True)
    rows = run(models_of(range(options.models)), options.folder)
    rounded = [{**row, **{key: _rounded(value) for key, value in row.items()}} for row in rows]
    text = json.dumps(rounded, separators=(",", ":")).replace('},{"model"', '},\n{"model"')
    options.output.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
