"""Which of the launched processes this is, by the variables that torchrun and accelerate set."""

import os


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "WORLD_SIZE" in os.environ


def processes() -> int:
    """Return the number of processes that were launched; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_parallel() -> bool:
    """Whether the launcher shares the model or its sequences out: tensor, context and sequence parallelism."""
    return os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"


def is_first() -> bool:
    """Whether this is the first of all processes."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this is the first process on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
