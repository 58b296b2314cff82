"""Functions whose results `datasets` caches."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

VERSIONS = {name: version(name) for name in ("bl_trainer", "transformers", "trl")}


class Cached:
    """A function for `Dataset.map` or `filter` whose cached results other versions of the packages don't take for theirs.

    `datasets` knows a function of a module by its name alone.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.versions = function, VERSIONS

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
