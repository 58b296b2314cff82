"""End and special tokens, and tokens as text."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import ProcessorMixin

from .._util.logs import warn_once


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer, also that of a multimodal processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def end_ids(trainer: Any) -> set[int]:
    """Return the ids of the tokens that end a generation."""
    more = getattr(trainer.model.generation_config, "eos_token_id", None)
    return {tokenizer_of(trainer.processing_class).eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


def warn_of_two_starts(prepared: Any, tokenizer: Any, name: str) -> None:
    """Warn if a prepared data set begins with the start token twice: its text has one, and the tokenizer adds one."""
    start = tokenizer.bos_token_id
    if start is None or not isinstance(prepared, Dataset) or not len(prepared):
        return
    if list(prepared[0]["input_ids"][:2]) == [start, start]:
        warn_once(
            f"Rows of the {name} set begin with {tokenizer.bos_token} twice: their text has it, and the tokenizer adds it. "
            "Leave it out of the text, as a chat template's output has it, or give messages."
        )


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def content_free_ids(trainer: Any) -> Tensor:
    """Return the sorted ids of end and special tokens, (number,)."""
    return torch.tensor(sorted(end_ids(trainer) | special_ids(tokenizer_of(trainer.processing_class))))


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text that each token adds; of the tokens that make up one character, the last has it, the others a dot."""
    texts, start, done = [], 0, 0
    for i in range(len(ids)):
        before, after = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start : i + 1])
        if after.endswith("\ufffd") and i + 1 < len(ids) and i - done < 8:
            texts.append("·")
            continue
        texts.append(after[len(before) :])
        start, done = done, i + 1
    return texts
