"""The paper's data sets, prepared as TRL trains on them: prompt and completion, in Parquet, with a card."""

from .options import PrepareArguments
from .prepare import prepare

__all__ = ["PrepareArguments", "prepare"]
