"""Options of the prepare-data verb."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._util.text import nearest
from ..errors import RecipeError
from ..recipe.parser import Parser
from ..recipe.paths import is_path
from .sources import SETS

SEED = 42  # the paper's


@dataclass
class PrepareArguments:
    """Options of the prepare-data verb; `name`: which data set."""

    name: str = field(default="", init=False)
    output: str | None = field(default=None, metadata={"help": "Folder for the data set."})
    model: str | None = field(
        default=None,
        metadata={"help": "The model to be trained. Its tokenizer decides between messages and text, and counts the lengths."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Leave out training rows of more tokens; by default the paper's length for the data set."},
    )
    keep_long: bool = field(default=False, metadata={"help": "Only count rows of more tokens, and keep them."})
    limit: int | None = field(default=None, metadata={"help": "Only the first N rows of each split."})
    seed: int | None = field(default=None, metadata={"help": "Of figfont, the label noise, and instruction's choice; 42."})
    label_noise: float | None = field(default=None, metadata={"help": "Share of openbookqa's training labels to be wrong."})
    source: str | None = field(
        default=None, metadata={"help": "A local file or folder with the columns of the data set on the Hub, in its place."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a data set that was prepared with other options."})

    @classmethod
    def read(cls, argv: list[str]) -> "PrepareArguments":
        """Read the command line: a name, then options. Raises RecipeError."""
        classes: Any = [cls]
        parser = Parser(classes, prog="bl-trainer prepare-data", allow_abbrev=False)
        names = ", ".join(SETS)
        if not argv or argv[0].startswith("-"):
            raise RecipeError(f"No data set is named. Write `prepare-data NAME --output DIR`; names: {names}.")
        name, *argv = argv
        if name not in SETS:
            raise RecipeError(f"Unknown data set {name!r}.{nearest(name, SETS)} Names: {names}.")
        parser.check(argv)
        options = parser.parse({}, argv)[0]
        options.name = name
        options.check()
        return options

    def check(self) -> None:
        """Raise RecipeError on a value that can't be, or that would do nothing."""
        chosen = SETS[self.name]
        if not self.output:
            raise RecipeError(f"`--output` is missing. Write e.g. `--output data/{self.name}`.")
        if Path(self.output).name in ("", ".."):
            raise RecipeError(
                f"`--output {self.output}` must name a folder of its own. Write e.g. `--output data/{self.name}`."
            )
        for key, least in (("max_length", 2), ("limit", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RecipeError(f"`--{key} {value}` must be at least {least}.")
        for key in ("seed", "label_noise"):
            if getattr(self, key) is not None and key not in chosen.takes:
                takers = " and ".join(name for name, each in SETS.items() if key in each.takes)
                raise RecipeError(f"`--{key}` does nothing for {self.name}, only for {takers}. Leave it out.")
        if self.label_noise is not None and not 0 <= self.label_noise <= 1:
            raise RecipeError(f"`--label_noise {self.label_noise:g}` must be a share from 0 to 1.")
        if self.seed is not None and self.name == "openbookqa" and not self.label_noise:
            raise RecipeError("`--seed` does nothing for openbookqa without `--label_noise`. Leave it out.")
        for key in ("source", "revision"):
            if getattr(self, key) is not None and not chosen.parts[0].hub:
                raise RecipeError(f"`--{key}` does nothing for {self.name}, which is generated. Leave it out.")
        if self.revision and self.source:
            raise RecipeError("`--revision` is of the Hub, and does nothing with `--source`. Leave one of them out.")
        if self.revision and len({part.hub for part in chosen.parts}) > 1:
            hubs = " and ".join(part.hub for part in chosen.parts)
            raise RecipeError(f"`--revision` can't name commits of both {hubs}. Leave it out, or give copies by `--source`.")
        for key, value in (("max_length", self.max_length), ("keep_long", self.keep_long or None)):
            if value is not None and self.model is None:
                raise RecipeError(f"`--{key}` needs `--model`, whose tokenizer counts the lengths.")
        if self.model and is_path(self.model) and not Path(self.model).is_dir():
            raise RecipeError(f"`--model {self.model}` is not a folder.")

    @property
    def drawn_with(self) -> int | None:
        """The seed, None if nothing is drawn."""
        draws = SETS[self.name].takes and (self.name != "openbookqa" or self.label_noise)
        return (SEED if self.seed is None else self.seed) if draws else None

    @property
    def length(self) -> int | None:
        """The greatest number of tokens, None if none are counted."""
        return None if self.model is None else self.max_length or SETS[self.name].max_length
