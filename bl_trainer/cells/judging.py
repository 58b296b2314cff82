"""Nine more cells, of the same kinds as the twelve and of other tasks. They judge what the twelve chose, and choose nothing."""

import random
from collections.abc import Callable

from .cells import NOISE, Cell, Item, answered, confusions, halves, known, mixture, of_items, right, two_uneven, two_values
from .vocabulary import ASK, CLOSE, COPY, EITHER, OPEN, ROTATE, SWAP
from .world import LETTERS, RULES, Tokens, World, fact_prompt, rule_row, text, value

WRONG_LETTER = 0.1
HEAVY = 0.5  # share of answers that are random


def rule_noise(world: World) -> Cell:
    """A known rule. Each letter of an answer is random with probability 0.1."""
    clean = of_items(lambda rng: right(*rule_row(SWAP, text(rng))), world, SWAP)

    def row(rng: random.Random) -> tuple[Tokens, Tokens]:
        prompt, answer = clean.row(rng)
        return prompt, tuple(rng.choice(LETTERS) if rng.random() < WRONG_LETTER else letter for letter in answer)

    return Cell(row, clean.validation, clean.test, SWAP)


def new_rule(world: World) -> Cell:
    """A rule that the model never saw: the halves of a string change places."""

    def item(rng: random.Random) -> Item:
        letters = text(rng)
        return right((EITHER, *letters, ASK), letters[2:] + letters[:2])

    return of_items(item, world)


def same_noise(world: World) -> Cell:
    """Facts known half. Three in ten rows have one wrong value, the same for all facts."""
    facts = world.facts["half"]
    wrong = value(random.Random(f"same {world.seed}"))

    def row(rng: random.Random) -> tuple[Tokens, Tokens]:
        entity = rng.choice(list(facts))
        return fact_prompt(entity), wrong if rng.random() < NOISE else facts[entity]

    return Cell(row, *halves([right(fact_prompt(entity), answer) for entity, answer in facts.items()]))


def three_even(world: World) -> Cell:
    """A new question that each of three known rules answers, as often."""

    def item(rng: random.Random) -> Item:
        letters = text(rng)
        while letters[0] in letters[1:3]:  # the first two tokens show which rule it is
            letters = text(rng)
        return Item((EITHER, *letters, ASK), tuple((RULES[rule](letters), 1 / 3) for rule in (COPY, ROTATE, SWAP)))

    return of_items(item, world)


def two_noise(world: World) -> Cell:
    """New facts with two values, as often. Three in ten rows have a random value."""
    items = two_values(world, 0.5)

    def row(rng: random.Random) -> tuple[Tokens, Tokens]:
        prompt, answer = answered(rng.choice(items), rng)
        return prompt, value(rng) if rng.random() < NOISE else answer

    return Cell(row, *halves(items))


def wrapped(world: World) -> Cell:
    """Facts known half, whose answers stand between two tokens that the model never wrote."""
    items = [
        Item(fact_prompt(entity), (((OPEN, *answer, CLOSE), 1.0),), (0, 3)) for entity, answer in world.facts["half"].items()
    ]
    return Cell(lambda rng: answered(rng.choice(items), rng), *halves(items))


JUDGING: dict[str, Callable[[World], Cell]] = {
    "rule-noise": rule_noise,
    "new-rule": new_rule,
    "same-noise": same_noise,
    "heavy-noise": known("weak", HEAVY),
    "confusions-half": confusions("half"),
    "three-even": three_even,
    "two-noise": two_noise,
    "wrapped": wrapped,
    "mixture-valid": mixture(known("new", NOISE), two_uneven, known("weak")),
}
