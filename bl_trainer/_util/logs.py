"""Warnings of one process that are said once."""

import functools
import logging
import os


@functools.cache
def warn_once(message: str) -> None:
    """Warn with a message, once and from the first process alone; also before accelerate knows of processes."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("bl_trainer").warning(message)
