"""The grammar of `drop_rows`: which file of scores, which column of it, and from which number on."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError

SIGNS: dict[str, Callable[[Any, Any], Any]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

SPELLED = re.compile(r"(?P<path>\S.*?)\s+(?P<column>\w+)\s*(?P<sign><=|>=|<|>)\s*(?P<number>\S+)")


@dataclass(frozen=True)
class RowCut:
    """Rows whose `column` in the scores at `path` compares by `sign` with `number`: those are dropped."""

    path: Path
    column: str
    sign: str
    number: float

    @classmethod
    def parse(cls, text: Any) -> "RowCut":
        """Return the cut that `FOLDER_OR_FILE COLUMN SIGN NUMBER` spells. Raises RecipeError on anything else."""
        found = SPELLED.fullmatch(text.strip()) if isinstance(text, str) else None
        number = _number(found["number"]) if found else math.nan
        if found is None or not math.isfinite(number):
            raise RecipeError(
                f"Cannot read `drop_rows: {text}`: it is not SCORES COLUMN SIGN NUMBER. Write such as "
                '`drop_rows: "out/scores noise_score > 4"`; signs are <, <=, > and >=.'
            )
        return cls(Path(found["path"]).expanduser(), found["column"], found["sign"], number)

    def drops(self, value: Any) -> Any:
        """Return whether a row of this score is dropped, of one number or of an array of them."""
        return SIGNS[self.sign](value, self.number)

    def __str__(self) -> str:
        return f"{self.path} {self.column} {self.sign} {self.number:g}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
