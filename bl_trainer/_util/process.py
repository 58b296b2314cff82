"""Which of the launched processes this is, by the variables that torchrun and accelerate set."""

import json
import os
import time
from pathlib import Path


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


def tell_launcher(message: str) -> None:
    """Give torchrun the message that its report of a failed process ends with, where it asks for one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and Path(path).parent.is_dir():
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")
