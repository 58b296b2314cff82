"""What this package uses from inside accelerate, beyond its public names: a release that moves something breaks here.

tests/test_foreign.py says what each is for.
"""

from typing import Any

# Attributes of an `Accelerator` -> what then breaks
ATTRIBUTES = {"_models": "measurements of a model that FSDP2 shards, before it trains"}


def has_prepared(accelerator: Any) -> bool:
    """Whether an `Accelerator` has prepared a model."""
    return bool(accelerator._models)
