"""Which example, response and kind each token belongs to: what diagnosis adds to TRL's tokenised rows and batches."""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import is_conversational

from ..head.targets import IGNORED, Targets, shifted
from .names import EXAMPLES, GROUP, INDEX, LENGTH, OWNER, POSITION, ROW, TEMPLATE
from .template import template_mask


@dataclass
class TokenBatch:
    """Target tokens of a batch, in reading order, and the examples that they belong to.

    All (N,), on the CPU. `token`: ids. `example`: index into `examples`. `place`: index into that example's `input_ids`.
    `position`: 0, 1, ... within a response, an unbroken run of target tokens; `length`: of that response. `is_template`:
    whether the token is the chat template's own; `is_unmarked`: whether that can't be told. `examples`: mappings with `row`,
    its number in the data set or, where it has none, a negative number of its own; `group`; `input_ids`; and `is_part`, whether
    packing has cut it up.
    """

    token: Tensor
    example: Tensor
    place: Tensor
    position: Tensor
    length: Tensor
    is_template: Tensor
    is_unmarked: Tensor
    examples: list[dict[str, Any]]


class Annotation:
    """Adds to a tokenised example what diagnosis wants to know of each token; with packing all of it token by token.

    `bl_template`: 1 for the chat template's own tokens, 0 for others, -1 where that can't be told. `bl_position`, `bl_length`:
    place in the response and its length, before packing cuts it. A row of a stream, which has no number, gets a negative one.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, packing: bool):
        self.tokenizer, self.chat_template, self.packing = tokenizer, chat_template, packing

    def __call__(self, example: Any) -> dict[str, Any]:
        ids = example["input_ids"]
        row = example.get(ROW)
        if row is None:
            digest = hashlib.blake2b(f"{example.get(INDEX)} {ids}".encode(), digest_size=7).digest()
            row = -1 - int.from_bytes(digest)
        is_chat = is_conversational(example)
        template = template_mask(self.tokenizer, self.chat_template, example, ids) if is_chat else [0] * len(ids)
        if not self.packing:
            return {ROW: row, TEMPLATE: template}
        group = example.get(GROUP, "")
        position, length = [0] * len(ids), [1] * len(ids)
        start = None
        for i, label in enumerate([*example["labels"], IGNORED]):
            if label != IGNORED and start is None:
                start = i
            elif label == IGNORED and start is not None:
                first = max(start, 1)  # nothing predicts the first token of all
                for k in range(start, i):
                    position[k], length[k] = max(0, k - first), max(1, i - first)
                start = None
        size = len(ids)
        return {ROW: [row] * size, GROUP: [group] * size, TEMPLATE: template,
                POSITION: position, LENGTH: length}  # fmt: skip


def group_name(value: Any) -> str:
    """Return a value of the `--by` column as the name of a group; long texts are cut, and told apart by a checksum."""
    name = str(value)
    return name if len(name) <= 80 else f"{name[:64]}… #{zlib.crc32(name.encode()):08x}"


def token_batch(batch: dict[str, Any]) -> TokenBatch:
    """Take what `Collator` added out of a batch, and return its target tokens."""
    owner, examples = batch.pop(OWNER), batch.pop(EXAMPLES)
    targets = Targets.of(batch["labels"])
    row, column = targets.mask.nonzero(as_tuple=True)

    def own(values: Tensor) -> Tensor:
        return targets.take(shifted(values, -1))

    example = own(owner)
    first = torch.full((len(examples),), owner.shape[1])
    first.scatter_reduce_(0, owner[owner >= 0], (owner >= 0).nonzero()[:, 1], "amin")
    given = {name: own(batch.pop(name)) for name in (TEMPLATE, POSITION, LENGTH) if name in batch}
    if POSITION in given:
        position, length = given[POSITION], given[LENGTH]
    else:
        new = torch.ones_like(column, dtype=torch.bool)
        new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1) | (example[1:] != example[:-1])
        run = new.cumsum(0) - 1
        position = torch.arange(len(run)) - new.nonzero().flatten()[run]
        length = torch.bincount(run)[run] if len(run) else run
    return TokenBatch(
        token=own(batch["input_ids"]),
        example=example,
        place=column + 1 - first[example],
        position=position,
        length=length,
        is_template=given[TEMPLATE] == 1,
        is_unmarked=given[TEMPLATE] < 0,
        examples=examples,
    )
