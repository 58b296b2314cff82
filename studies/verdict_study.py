"""Judge the learnability probe's verdict on cells whose noise and knowledge are known: `python studies/verdict_study.py`.

Each pretrained model of the cells trains by nll on one half of a cell's questions, and is asked about the other half. The
probe's own functions make the figures and the verdict of it. In place of `diagnose`'s LoRA adapter all weights train, since
the models are a stack without modules. The cells of `JUDGED` run on the models of seeds 0 to 7, those of `NEW` on the models of
seeds 100 to 107. Nothing was chosen on the second part: its cells were written down before its first run. It takes about
four minutes of one core, and writes docs/results/verdict.json.
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

from bl_trainer.cells import judging
from bl_trainer.cells.cells import (
    CELLS,
    Cell,
    Item,
    answered,
    confusions,
    halves,
    known,
    mixture,
    of_items,
    right,
    two_uneven,
    two_values,
)
from bl_trainer.cells.pretraining import SIZES, Model, models_of, pretrained
from bl_trainer.cells.scores import encode, stacked
from bl_trainer.cells.training import Arm, Course, train
from bl_trainer.cells.transformer import Shape, logits, unpack
from bl_trainer.cells.vocabulary import ASK, CLOSE, EITHER, END, LETTERS, OPEN, ROTATE
from bl_trainer.cells.world import Tokens, World, rule_row, text, value
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


class Row(NamedTuple):
    """A training row, and which tokens of its answer are noise."""

    prompt: Tokens
    answer: Tokens
    is_noise: tuple[bool, ...]


Draw = Callable[[random.Random], Row]


def noisy(make: Callable[[World], Cell], share: float = 0.0) -> Callable[[World], Draw]:
    """Return a cell's rows. The letters of an answer are drawn at random with probability `share`."""

    def rows(world: World) -> Draw:
        cell = make(world)

        def row(rng: random.Random) -> Row:
            prompt, answer = cell.row(rng)
            if rng.random() >= share:
                return Row(prompt, answer, (False,) * len(answer))
            drawn = tuple(rng.choice(LETTERS) if token in LETTERS else token for token in answer)
            return Row(prompt, drawn, tuple(token in LETTERS for token in answer))

        return row

    return rows


# Each pretrained model of seeds 0 to 7
JUDGED: dict[str, Callable[[World], Draw]] = {
    **{name: noisy(CELLS[name]) for name in ("plain", "new-clean", "confusions", "two-even", "two-uneven", "prefix", "suffix")},
    **{f"{group}-clean": noisy(known(group)) for group in ("strong", "half", "weak")},
    "new-rule": noisy(new_rule),
    "mixture-clean": noisy(clean_mixture),
    **{f"{group}-noise": noisy(known(group), 0.3) for group in ("strong", "half", "weak", "new")},
    **{f"{name}-noise": noisy(CELLS[name], 0.3) for name in ("plain", "prefix", "suffix")},
    "new-rule-noise": noisy(new_rule, 0.3),
}


def noisy_letters(make: Callable[[World], Cell], share: float) -> Callable[[World], Draw]:
    """Return a cell's rows. Each letter of an answer is drawn at random with probability `share`."""

    def rows(world: World) -> Draw:
        cell = make(world)

        def row(rng: random.Random) -> Row:
            prompt, answer = cell.row(rng)
            is_noise = tuple(rng.random() < share for _ in answer)
            return Row(
                prompt,
                tuple(rng.choice(LETTERS) if each else token for token, each in zip(answer, is_noise, strict=True)),
                is_noise,
            )

        return row

    return rows


def same_wrong(make: Callable[[World], Cell], share: float) -> Callable[[World], Draw]:
    """Return the rows of a cell of facts. With probability `share` the value is a wrong one, the same for all facts."""

    def rows(world: World) -> Draw:
        cell, wrong = make(world), value(random.Random(f"same {world.seed}"))

        def row(rng: random.Random) -> Row:
            prompt, answer = cell.row(rng)
            is_noise = rng.random() < share
            return Row(prompt, wrong if is_noise else answer, (is_noise,) * 2)

        return row

    return rows


def known_rule(world: World) -> Cell:
    """A known rule, another than that of `plain`."""
    return of_items(lambda rng: right(*rule_row(ROTATE, text(rng))), world, ROTATE)


def wrapped_rule(world: World) -> Cell:
    """The same, whose answers stand between two tokens that the model never wrote."""

    def item(rng: random.Random) -> Item:
        prompt, answer = rule_row(ROTATE, text(rng))
        return right(prompt, (OPEN, *answer, CLOSE))

    return of_items(item, world, ROTATE)


def two_facts(first_share: float) -> Callable[[World], Cell]:
    """Return the cell of new facts with two values, the first of this share."""

    def cell(world: World) -> Cell:
        items = two_values(world, first_share)
        return Cell(lambda rng: answered(rng.choice(items), rng), *halves(items))

    return cell


valid = mixture(known("new"), two_uneven, known("weak"))

# Each pretrained model of seeds 100 to 107. They were written down before their first run, and nothing was chosen on them.
# Letters that are the same wrong value in three of ten rows count as noise. Values that are wrong in all rows of a question
# don't, as above. Cells whose name ends in `noise` are noisy, the others clean. Verdicts are counted as above: right, undecided
# or wrong by `is_wrong` of tools/verdict_page.py. The noise that a verdict's figure should hold is all of it, and, beside that,
# the improbable part: `low` less `knowledge`.
NEW: dict[str, Callable[[World], Draw]] = {
    "new-halves": noisy(judging.new_rule),
    "three-even": noisy(judging.three_even),
    "two-facts": noisy(two_facts(0.5)),
    "two-rare": noisy(two_facts(0.9)),
    "wrapped": noisy(judging.wrapped),
    "wrapped-rule": noisy(wrapped_rule),
    "confusions-half": noisy(confusions("half")),
    "confusions-new": noisy(confusions("new")),
    "mixture-valid": noisy(valid),
    "mixture-format": noisy(mixture(judging.wrapped, judging.new_rule)),
    "letters-noise": noisy_letters(known_rule, 0.1),
    "rule-noise": noisy(known_rule, 0.15),
    "same-noise": same_wrong(known("half"), 0.3),
    "heavy-noise": noisy(known("weak"), 0.5),
    "confusions-noise": noisy(confusions("half"), 0.3),
    "three-noise": noisy(judging.three_even, 0.3),
    "two-noise": noisy(two_facts(0.5), 0.3),
    "wrapped-noise": noisy(judging.wrapped, 0.3),
    "mixture-noise": noisy(valid, 0.15),
    "halves-noise": noisy(judging.new_rule, 0.15),
}


@dataclass(frozen=True)
class Halves:
    """Rows of a cell: `first` to train on, and `second`, of other questions, to ask about."""

    first: list[Row]
    second: list[Row]


def split(name: str, world: World, half: int = HALF) -> Halves:
    """Draw a cell's rows; a question is of one half. `half`: half of the steps."""
    draw, rng = {**JUDGED, **NEW}[name](world), random.Random(f"verdict {name} {world.seed}")
    side: dict[Tokens, int] = {}
    parts: tuple[list[Row], list[Row]] = [], []
    sizes = 2 * half * BATCH, ASKED
    while any(len(part) < size for part, size in zip(parts, sizes, strict=True)):
        row = draw(rng)
        half = side.setdefault(row.prompt, rng.randrange(2))
        if len(parts[half]) < sizes[half]:
            parts[half].append(row)
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
        flags = [(False,) * len(row.prompt) + row.is_noise + (False,) * length for row in rows]
        self.is_noise = torch.tensor([flags[i][j + 1] for i, j in zip(self.row.tolist(), self.place.tolist(), strict=True)])

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


def run(models: list[Model], cells: Sequence[str], folder: Path, rate: float = RATE) -> list[dict[str, Any]]:
    """Return the verdict on each cell of each model, with the truth: shares of the content's tokens."""
    rows = []
    for size, shape in SIZES.items():
        own = [model for model in models if model.size == size]
        if own:
            rows += judged(own, shape, pretrained(own, folder / "models"), rate, cells)
    return rows


def judged(
    models: list[Model], shape: Shape, weights: Tensor, rate: float, cells: Sequence[str], half: int = HALF
) -> list[dict[str, Any]]:
    """Return the same of models of one shape, with `weights`, (models, count)."""
    jobs = [(k, name) for k in range(len(models)) for name in cells]
    parts = [split(name, World(models[k].seed), half) for k, name in jobs]
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
        if last.noise_interval is not None:
            figures["noise_high"] = last.noise_interval[1]
        rows.append({"model": models[k].name, "cell": name, "verdict": verdict, **figures, "true": true})
    return rows


def main() -> None:
    """Judge the cells of both parts, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cells"), help="where pretrained models are kept")
    parser.add_argument("--models", type=int, default=8, help="of each part")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would gain nothing
    torch.set_flush_denormal(True)
    parts = {"chosen": (0, JUDGED), "new": (100, NEW)}  # first seed, cells
    rows = {
        part: _rounded(run(models_of(range(seed, seed + options.models)), tuple(cells), options.folder))
        for part, (seed, cells) in parts.items()
    }
    text = json.dumps(rows, separators=(",", ":")).replace('{"model"', '\n{"model"')
    options.output.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
