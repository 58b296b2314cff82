"""What is asked of the Hugging Face Hub before the libraries ask, whose retries take half a minute without a network."""

import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, get_session

TRIES = 2
TIMEOUT, PAUSE = 10, 1  # seconds


def why_unavailable(name: str, revision: str | None = None, file: str = "config.json") -> str | None:
    """Return why `file` of the model `name` can't be had: no folder, not in the cache, and no Hub to ask; None if it may be."""
    try:
        if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return None
    except HFValidationError:  # transformers says what is wrong with the name
        return None
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _why_silent()
    return f"it is not in the cache, and {reason}" if reason else None


def why_no_data(name: str) -> str | None:
    """Return why the data set `name` can't be had: not in the cache of `datasets`, and no Hub to ask; None if it may be."""
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _why_silent()
    if reason is None:
        return None
    from datasets.load import CachedDatasetModuleFactory

    try:
        CachedDatasetModuleFactory(name).get_module()
        return None
    except FileNotFoundError:
        return f"it is not in the cache, and {reason}"


def _why_silent() -> str | None:
    """Return why the Hub gives no answer, whichever, to a request; None if it does."""
    for attempt in range(TRIES):
        try:
            session: Any = get_session()
            session.head(constants.ENDPOINT, timeout=TIMEOUT)
            return None
        except Exception:  # httpx's or requests', by the version
            if attempt + 1 < TRIES:
                time.sleep(PAUSE)
    return f"{constants.ENDPOINT} can't be reached"
