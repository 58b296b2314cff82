"""Twelve cells: what a model is fine-tuned on, and what the right answers are."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .vocabulary import ASK, BANG, CLOSE, COPY, EITHER, HASH, OPEN, ROTATE, SWAP
from .world import FACTS, RULES, Tokens, World, fact_prompt, rule_row, text, value

NOISE = 0.3  # share of answers that are random
UNEVEN = 0.7  # of the first of two valid answers
ITEMS = 64  # of a split
VERSION = 1  # of what the cells hold


class Item(NamedTuple):
    """A question and its right answers, each with its share; `format`: which tokens of an answer are its format's."""

    prompt: Tokens
    answers: tuple[tuple[Tokens, float], ...]
    format: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A cell of one world. `row`: draws a training row, which may be wrong; `validation`, `test`: questions not in common.

    `rule`: the token of the known rule that it is about, 0 if none.
    """

    row: Callable[[random.Random], tuple[Tokens, Tokens]]
    validation: list[Item]
    test: list[Item]
    rule: int = 0


def known(group: str, noise: float = 0.0) -> Callable[[World], Cell]:
    """Return the cell of a group of facts, whose answers are random with probability `noise`."""

    def cell(world: World) -> Cell:
        facts = world.facts[group]

        def row(rng: random.Random) -> tuple[Tokens, Tokens]:
            entity = rng.choice(list(facts))
            return fact_prompt(entity), value(rng) if rng.random() < noise else facts[entity]

        return Cell(row, *halves([right(fact_prompt(entity), answer) for entity, answer in facts.items()]))

    return cell


def confusions(group: str) -> Callable[[World], Cell]:
    """Return the cell of a group of facts. Three in ten always train with the same wrong value; the true value is right."""

    def cell(world: World) -> Cell:
        facts, rng = world.facts[group], random.Random(f"confusions {world.seed}")
        wrong = {entity: value(rng) for entity in facts if rng.random() < NOISE}
        shown = {**facts, **wrong}

        def row(rng: random.Random) -> tuple[Tokens, Tokens]:
            entity = rng.choice(list(facts))
            return fact_prompt(entity), shown[entity]

        return Cell(row, *halves([right(fact_prompt(entity), answer) for entity, answer in facts.items()]))

    return cell


def two_even(world: World) -> Cell:
    """A new question that either of two known rules answers, as often."""

    def item(rng: random.Random) -> Item:
        letters = text(rng)
        while letters[0] == letters[1]:  # the first token shows which rule it is
            letters = text(rng)
        return Item((EITHER, *letters, ASK), ((letters, 0.5), (RULES[ROTATE](letters), 0.5)))

    return of_items(item, world)


def two_uneven(world: World) -> Cell:
    """New facts with two values, the first in seven of ten rows."""
    items = two_values(world, UNEVEN)
    return Cell(lambda rng: answered(rng.choice(items), rng), *halves(items))


def prefix(world: World) -> Cell:
    """A known rule, whose answers begin with two tokens that the model never wrote."""

    def item(rng: random.Random) -> Item:
        prompt, answer = rule_row(ROTATE, text(rng))
        return Item(prompt, (((OPEN, HASH, *answer), 1.0),), (0, 1))

    return of_items(item, world, ROTATE)


def suffix(world: World) -> Cell:
    """Well-known facts, whose answers end with two tokens that the model never wrote."""
    items = [
        Item(fact_prompt(entity), (((*answer, CLOSE, BANG), 1.0),), (2, 3)) for entity, answer in world.facts["strong"].items()
    ]
    return Cell(lambda rng: answered(rng.choice(items), rng), *halves(items))


def plain(world: World) -> Cell:
    """A known rule as it is known: nothing to learn."""
    return of_items(lambda rng: right(*rule_row(SWAP, text(rng))), world, SWAP)


def mixture(*parts: Callable[[World], Cell]) -> Callable[[World], Cell]:
    """Return the cell of several others, as many rows of each."""

    def cell(world: World) -> Cell:
        made = [part(world) for part in parts]
        validation, test = ([item for part in made for item in getattr(part, split)] for split in ("validation", "test"))
        return Cell(lambda rng: rng.choice(made).row(rng), validation, test)

    return cell


CELLS: dict[str, Callable[[World], Cell]] = {
    "plain": plain,
    "strong-noise": known("strong", NOISE),
    "half-noise": known("half", NOISE),
    "weak-noise": known("weak", NOISE),
    "new-noise": known("new", NOISE),
    "new-clean": known("new"),
    "confusions": confusions("strong"),
    "two-even": two_even,
    "two-uneven": two_uneven,
    "prefix": prefix,
    "suffix": suffix,
    "mixture": mixture(known("strong", NOISE), known("half"), known("new")),
}


def right(prompt: Tokens, answer: Tokens) -> Item:
    """Return a question with one right answer."""
    return Item(prompt, ((answer, 1.0),))


def answered(item: Item, rng: random.Random) -> tuple[Tokens, Tokens]:
    """Return a training row of a question, its answer drawn by the shares."""
    answers, shares = zip(*item.answers, strict=True)
    return item.prompt, rng.choices(answers, shares)[0]


def two_values(world: World, first_share: float) -> list[Item]:
    """Return questions for new facts, each with two values that differ in their first letter."""
    rng = random.Random(f"uneven {world.seed}")
    items = []
    for entity, first in world.facts["other"].items():
        second = value(rng)
        while second[0] == first[0]:
            second = value(rng)
        items.append(Item(fact_prompt(entity), ((first, first_share), (second, 1 - first_share))))
    return items


def halves(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Return every other item, for validation, and the rest."""
    return items[::2], items[1::2]


def of_items(item: Callable[[random.Random], Item], world: World, rule: int = 0) -> Cell:
    """Return the cell of an endless supply of questions. No question of a split is trained on."""
    rng = random.Random(f"items {world.seed}")
    items = list({each.prompt: each for each in (item(rng) for _ in range(2 * ITEMS + FACTS))}.values())[: 2 * ITEMS]
    held = {each.prompt for each in items}

    def row(rng: random.Random) -> tuple[Tokens, Tokens]:
        drawn = item(rng)
        while drawn.prompt in held:
            drawn = item(rng)
        return answered(drawn, rng)

    return Cell(row, *halves(items), rule)


def old_items(world: World, without: int) -> list[list[Item]]:
    """Return what the model knew before, task by task: the facts that no cell has, and each rule but `without`."""
    facts = [right(fact_prompt(entity), answer) for entity, answer in world.facts["old"].items()]
    rng = random.Random(f"old {world.seed}")
    rules = {rule: [right(*rule_row(rule, text(rng))) for _ in range(ITEMS // 2)] for rule in (COPY, ROTATE, SWAP)}
    return [facts, *(items for rule, items in rules.items() if rule != without)]
