"""How many rows of a stream do not train, which is known once it has been read."""

from dataclasses import replace
from typing import Any

from datasets import IterableDataset

from .._util.logs import warn_once
from .labels import handed_on, plain, targets_of, why_untrained
from .prepare import Rows
from .spans import weighing_of


class StreamCount:
    """Counts the rows that training reads of a stream, and those of them with a target. Of packed ones nothing is counted."""

    def __init__(self) -> None:
        self.read = self.trained = 0
        self.masks = False  # whether weights of 0 may mask

    def restart(self) -> None:
        """Forget what has been read."""
        self.read = self.trained = 0

    def before(self, rows: Rows) -> Rows:
        """Return the same rows, counted as they are read."""

        def count(example: dict[str, Any]) -> dict[str, Any]:
            self.read += 1
            return {}

        if not _counts(rows):
            return rows
        self.masks = weighing_of(rows.dataset).masks
        return replace(rows, dataset=handed_on(rows.dataset, plain(rows.dataset).map(count)))  # a format would last in `map`

    def after(self, rows: Rows, prepared: Any) -> Any:
        """Return the same rows as TRL has prepared them, counted where they have a target."""

        def count(example: dict[str, Any]) -> dict[str, Any]:
            self.trained += bool(targets_of(example))
            return {}

        return handed_on(prepared, prepared.map(count)) if _counts(rows) else prepared

    def tell(self, args: Any) -> None:
        """Warn with the number of rows that were read and do not train, if there are any."""
        if self.read > self.trained > 0:
            warn_once(
                f"{self.read - self.trained} of {self.read} rows that were read of the train stream do not train: "
                f"{why_untrained(args.max_length, self.masks)}. Raise `max_length`, or correct the rows."
            )


def _counts(rows: Rows) -> bool:
    return rows.name == "train" and isinstance(rows.dataset, IterableDataset) and not rows.packing
