"""What this package uses from inside accelerate, beyond its public names: a release that moves something breaks here.

tests/test_foreign.py says what each is for.
"""

import sys
from collections.abc import Callable
from typing import Any

from accelerate.commands import launch
from accelerate.utils import prepare_simple_launcher_cmd_env

__all__ = ["ATTRIBUTES", "NAMES", "has_prepared", "launch_here"]

# Names -> what breaks without them
NAMES = {"launch": "a sweep's runs, which fork after the imports"}

# Attributes of an `Accelerator` -> what then breaks
ATTRIBUTES = {"_models": "measurements of a model that FSDP2 shards, before it trains"}


def has_prepared(accelerator: Any) -> bool:
    """Whether an `Accelerator` has prepared a model."""
    return bool(accelerator._models)


def launch_here(argv: list[str], run: Callable[[list[str], dict[str, str]], None]) -> None:
    """Launch as `accelerate launch` does, but let `run(command, environment)` do a single process's part."""
    new_process = launch.simple_launcher

    def here(args: Any) -> None:
        command, environment = prepare_simple_launcher_cmd_env(args)
        if command[0] == sys.executable:
            run(command, environment)
        else:  # of MPI
            new_process(args)

    launch.simple_launcher = here
    sys.argv = argv
    launch.main()
