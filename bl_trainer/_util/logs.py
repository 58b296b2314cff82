"""Warnings of one process that are said once."""

import functools
import logging

from .process import is_first


@functools.cache
def warn_once(message: str) -> None:
    """Warn with a message, once and from the first process alone; also before accelerate knows of processes."""
    if is_first():
        logging.getLogger("bl_trainer").warning(message)
