"""Warnings of one process that are said once, and others' messages that a user can do nothing about."""

import functools
import logging
import warnings

from .process import is_first


@functools.cache
def warn_once(message: str) -> None:
    """Warn with a message, once and from the first process alone; also before accelerate knows of processes."""
    if is_first():
        logging.getLogger("bl_trainer").warning(message)


def get_logger(name: str) -> logging.Logger:
    """Return a logger that writes in the first process alone; accelerate's puts a rank before each message."""
    logger = logging.getLogger(name)
    logger.addFilter(lambda record: is_first())
    return logger


def quieten() -> None:
    """Keep back three messages that tell a user nothing, and that another package causes.

    transformers deprecates a name that PEFT and TRL still read. torch notes that memory isn't pinned, in every run without an
    accelerator. bitsandbytes looks for a kernel of CPUs whenever it is imported, also by runs without a quantised model.
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
