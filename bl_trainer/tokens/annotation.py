"""Which example, response and kind each token belongs to: what diagnosis adds to TRL's tokenised rows and batches."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from trl.data_utils import is_conversational

from .statistics import TokenBatch


class Annotation:
    """Adds to a tokenised example what diagnosis wants to know of each token; with packing all of it token by token.

    `bl_template`: 1 for the chat template's own tokens, 0 for others, -1 where that can't be told. `bl_position`, `bl_length`:
    place in the response and its length, before packing cuts it. A row of a stream, which has no number, gets a negative one.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, packing: bool):
        self.tokenizer, self.chat_template, self.packing = tokenizer, chat_template, packing

    def __call__(self, example: Any) -> dict[str, Any]:
        ids = example["input_ids"]
        row = example.get("bl_row")
        if row is None:
            digest = hashlib.blake2b(f"{example.get('bl_index')} {ids}".encode(), digest_size=7).digest()
            row = -1 - int.from_bytes(digest)
        is_chat = is_conversational(example)
        template = template_mask(self.tokenizer, self.chat_template, example, ids) if is_chat else [0] * len(ids)
        if not self.packing:
            return {"bl_row": row, "bl_template": template}
        group = example.get("bl_group", "")
        position, length = [0] * len(ids), [1] * len(ids)
        start = None
        for i, label in enumerate([*example["labels"], -100]):
            if label != -100 and start is None:
                start = i
            elif label == -100 and start is not None:
                first = max(start, 1)  # nothing predicts the first token of all
                for k in range(start, i):
                    position[k], length[k] = max(0, k - first), max(1, i - first)
                start = None
        size = len(ids)
        return {"bl_row": [row] * size, "bl_group": [group] * size, "bl_template": template,
                "bl_position": position, "bl_length": length}  # fmt: skip


class Collator:
    """A trainer's own collator, which also says which example each token belongs to."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], by: str | None, cuts: bool):
        self.collator, self.by, self.cuts = collator, by, cuts

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        examples: list[dict[str, Any]] = []
        names = ("bl_template", "bl_position", "bl_length") if self.cuts else ("bl_template",)
        lines: dict[str, list[Tensor]] = {name: [] for name in ("bl_owner", *names)}
        for feature in features:
            line = []
            for start, stop in _segments(feature):
                row, group = feature["bl_row"], None
                if isinstance(row, list):  # packed
                    row, group = row[start], feature["bl_group"][start]
                elif self.by is not None:
                    group = feature["bl_group"] if "bl_group" in feature else group_name(feature[self.by])
                line.append(torch.full((stop - start,), len(examples)))
                examples.append(
                    {
                        "row": row,
                        "group": group if self.by is not None else None,
                        "input_ids": feature["input_ids"][start:stop],
                        "is_part": self.cuts,
                    }
                )
            lines["bl_owner"].append(torch.cat(line))
            for name in names:
                lines[name].append(torch.tensor(feature[name]))
        batch = self.collator(features)
        height, width = batch["input_ids"].shape
        for name, values in lines.items():
            values = [torch.cat(values)] if height < len(values) else values  # padding-free: one row
            padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-1)
            batch[name] = torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=-1)
        batch["bl_examples"] = examples
        return batch


def _segments(feature: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each example in a row, which packing makes of several."""
    rows, size = feature["bl_row"], len(feature["input_ids"])
    if feature.get("seq_lengths") is not None:
        starts = [0]
        for length in feature["seq_lengths"][:-1]:
            starts.append(starts[-1] + length)
    elif isinstance(rows, list):  # wrapped: an example goes on until the next one
        starts = [i for i in range(size) if i == 0 or rows[i] != rows[i - 1]]
    else:
        starts = [0]
    yield from zip(starts, [*starts[1:], size], strict=True)


def group_name(value: Any) -> str:
    """Return a value of the `--by` column as the name of a group; long texts are cut, and told apart by a checksum."""
    name = str(value)
    return name if len(name) <= 80 else f"{name[:64]}… #{zlib.crc32(name.encode()):08x}"


def template_mask(tokenizer: Any, chat_template: str | None, example: Any, ids: list[int]) -> list[int]:
    """Return for each of `ids` 1 if the chat template made it, 0 if it holds some of a message's content; all -1 if unknown.

    `example` has `messages`, or `prompt` and `completion`. The contents are found in the rendered text by rendering it again
    with marks in their place; tokens belong to them by their offsets in the text.
    """
    messages = example["prompt"] + example["completion"] if "prompt" in example else example["messages"]
    contents = [message.get("content") for message in messages]
    unknown = [-1] * len(ids)
    has_more = any(value for message in messages for key, value in message.items() if key not in ("role", "content", "name"))
    if not getattr(tokenizer, "is_fast", False) or has_more or not all(isinstance(content, str) for content in contents):
        return unknown
    tools = example.get("tools")
    options = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        "tokenize": False,
        **(example.get("chat_template_kwargs") or {}),
    }
    marks = [f"content{i}tnetnoc" for i in range(len(contents))]
    text = tokenizer.apply_chat_template(messages, **options)
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    frame = tokenizer.apply_chat_template(marked, **options)
    pieces, rest = [], frame
    for mark in marks:
        before, _, rest = rest.partition(mark)
        pieces.append(before)
    pieces.append(rest)
    spans, at = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        return unknown
    for content, after in zip(contents, pieces[1:], strict=True):
        forms = [form for form in (content, content.strip()) if text.startswith(form + after, at)]
        if not forms:
            return unknown  # the template changes contents, or leaves some out
        spans.append((at, at + len(forms[0])))
        at += len(forms[0]) + len(after)
    if at != len(text):
        return unknown
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [1] * len(encoded["input_ids"])
    for i, (start, stop) in enumerate(encoded["offset_mapping"]):
        if any(start < end and stop > begin for begin, end in spans):
            mask[i] = 0
    if ids == encoded["input_ids"][: len(ids)]:
        return mask[: len(ids)]
    return mask[-len(ids) :] if ids == encoded["input_ids"][-len(ids) :] else unknown


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer, also that of a multimodal processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def end_ids(trainer: Any) -> set[int]:
    """Return the ids of the tokens that end a generation."""
    more = getattr(trainer.model.generation_config, "eos_token_id", None)
    return {tokenizer_of(trainer.processing_class).eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def token_batch(batch: dict[str, Any]) -> TokenBatch:
    """Take what `Collator` added out of a batch, and return its target tokens."""
    owner, examples = batch.pop("bl_owner"), batch.pop("bl_examples")
    is_target = batch["labels"][:, 1:] != -100
    row, column = is_target.nonzero(as_tuple=True)
    example = owner[:, 1:][is_target]
    first = torch.full((len(examples),), owner.shape[1])
    first.scatter_reduce_(0, owner[owner >= 0], (owner >= 0).nonzero()[:, 1], "amin")
    given = {name: batch.pop(name)[:, 1:][is_target] for name in ("bl_template", "bl_position", "bl_length") if name in batch}
    if "bl_position" in given:
        position, length = given["bl_position"], given["bl_length"]
    else:
        new = torch.ones_like(column, dtype=torch.bool)
        new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1) | (example[1:] != example[:-1])
        run = new.cumsum(0) - 1
        position = torch.arange(len(run)) - new.nonzero().flatten()[run]
        length = torch.bincount(run)[run] if len(run) else run
    return TokenBatch(
        token=batch["input_ids"][:, 1:][is_target],
        example=example,
        place=column + 1 - first[example],
        position=position,
        length=length,
        is_template=given["bl_template"] == 1,
        is_unmarked=given["bl_template"] < 0,
        examples=examples,
    )


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
