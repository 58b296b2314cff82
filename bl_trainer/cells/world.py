"""What the models of a world know: three rules of strings, and facts that pretraining shows more or less often."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .vocabulary import ASK, COPY, FACT, LETTERS, LONG, ROTATE, SWAP

Tokens = tuple[int, ...]

LENGTH = 4  # letters of a string
# Each rule has a token to ask for it
RULES: dict[int, Callable[[Tokens], Tokens]] = {
    COPY: lambda text: text,
    LONG: lambda text: text,
    ROTATE: lambda text: text[1:] + text[:1],
    SWAP: lambda text: tuple(itertools.chain.from_iterable(zip(text[1::2], text[::2], strict=True))),
}
FACTS = 64  # of a group
# How often pretraining shows a fact of a group, relative to those that it knows well; `new` and `other` never
SHOWN = {"old": 1.0, "strong": 1.0, "half": 0.08, "weak": 0.03, "new": 0.0, "other": 0.0}


@dataclass(frozen=True)
class World:
    """Facts drawn by a seed: each is an entity of two letters, and a value of two."""

    seed: int

    @cached_property
    def facts(self) -> dict[str, dict[Tokens, Tokens]]:
        """Group -> entity -> value."""
        rng = random.Random(f"facts {self.seed}")
        entities = rng.sample(list(itertools.product(LETTERS, repeat=2)), FACTS * len(SHOWN))
        groups = [entities[i : i + FACTS] for i in range(0, len(entities), FACTS)]
        return {name: {entity: value(rng) for entity in group} for name, group in zip(SHOWN, groups, strict=True)}

    def pretraining_rows(self, batches: int, size: int, rng: random.Random) -> list[tuple[Tokens, Tokens]]:
        """Return prompts and completions: batches of facts and of rules, by turns."""
        return [(self._rule_row if i % 2 else self._fact_row)(rng) for i in range(batches) for _ in range(size)]

    def _fact_row(self, rng: random.Random) -> tuple[Tokens, Tokens]:
        group = rng.choices(list(SHOWN), list(SHOWN.values()))[0]
        entity = rng.choice(list(self.facts[group]))
        return fact_prompt(entity), self.facts[group][entity]

    def _rule_row(self, rng: random.Random) -> tuple[Tokens, Tokens]:
        rule = rng.choice(list(RULES))
        return rule_row(rule, text(rng, 6 if rule == LONG else LENGTH))


def text(rng: random.Random, length: int = LENGTH) -> Tokens:
    """Return random letters."""
    return tuple(rng.choices(LETTERS, k=length))


def value(rng: random.Random) -> Tokens:
    """Return a random value of a fact."""
    return text(rng, 2)


def fact_prompt(entity: Tokens) -> Tokens:
    """Return the question for a fact."""
    return (FACT, *entity, ASK)


def rule_row(rule: int, letters: Tokens) -> tuple[Tokens, Tokens]:
    """Return the question for a rule, and its answer."""
    return (rule, *letters, ASK), RULES[rule](letters)
