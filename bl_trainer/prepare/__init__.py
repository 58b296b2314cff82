"""The paper's data sets, prepared as TRL trains on them: prompt and completion, in Parquet, with a card."""

from .building import prepare
from .options import PrepareArguments

__all__ = ["PrepareArguments", "prepare"]
