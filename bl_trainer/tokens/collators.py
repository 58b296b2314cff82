"""Collators that carry what is known of each token along with it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .._util.trl import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling
from ..errors import RecipeError
from ..head.targets import IGNORED
from .aligned import LENGTHS
from .annotation import group_name
from .labels import check_example, refuse_shifted
from .names import EXAMPLE_LENGTHS, EXAMPLES, FILLS, GROUP, JOINED, LENGTH, OWNER, POSITION, REFERENCE, ROW, TEMPLATE, WEIGHT
from .template import segments


class RowCollator:
    """A collator that adds to the batch the rows that its examples come from: (batch, most rows of one), filled up with -1."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{key: value for key, value in each.items() if key != ROW} for each in features])
        if ROW in features[0]:
            rows = [each[ROW] if isinstance(each[ROW], list) else [each[ROW]] for each in features]
            distinct = [torch.tensor(sorted(set(each))) for each in rows]
            batch[ROW] = torch.nn.utils.rnn.pad_sequence(distinct, batch_first=True, padding_value=-1)
        return batch


def lay_out(features: list[dict[str, Any]], batch: dict[str, Any]) -> None:
    """Add to a collated batch the columns that its examples have: (batch, length) tensors, right-padded, as the labels are."""
    height, width = batch["labels"].shape
    for key, fill in FILLS.items():
        if any(key in each for each in features):
            rows = [_row(key, each) for each in features]
            rows = [torch.cat(rows)] if height < len(rows) else rows  # padding-free: one row
            laid_out = pad_sequence(rows, batch_first=True, padding_value=fill)
            batch[key] = pad(laid_out, (0, width - laid_out.shape[1]), value=fill)


def _row(key: str, example: dict[str, Any]) -> Tensor:
    """Return a column of an example, a number for each token. Raises RecipeError on what only an unprepared set may hold."""
    size, value = len(example["input_ids"]), example.get(key)
    if value is not None and hasattr(value, "tolist"):  # of a set `with_format`
        value = value.tolist()
    if isinstance(value, list) and len(value) != size:
        raise RecipeError(f"`{key}` has {len(value)} numbers for {size} tokens. Give one for each.")
    try:
        row = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError):
        raise RecipeError(f"`{key}` of an example is {value!r}. Give every example a number, or one for each token.") from None
    wrong = row[~(row.isfinite() & (row >= 0))]
    if key == WEIGHT and len(wrong):
        raise RecipeError(f"`{key}` of an example is {wrong[0]:g}: it must be a finite number, 0 or above.")
    return row.expand(size)


class Collator:
    """A trainer's own collator, which also says which example each token belongs to."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], by: str | None, cuts: bool):
        self.collator, self.by, self.cuts = collator, by, cuts

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        examples: list[dict[str, Any]] = []
        names = (TEMPLATE, POSITION, LENGTH) if self.cuts else (TEMPLATE,)
        lines: dict[str, list[Tensor]] = {name: [] for name in (OWNER, *names)}
        for feature in features:
            line = []
            for start, stop in segments(feature):
                row, group = feature[ROW], None
                if isinstance(row, list):  # packed
                    row, group = row[start], feature[GROUP][start]
                elif self.by is not None:
                    group = feature[GROUP] if GROUP in feature else group_name(feature[self.by])
                line.append(torch.full((stop - start,), len(examples)))
                examples.append(
                    {
                        "row": row,
                        "group": group if self.by is not None else None,
                        "input_ids": feature["input_ids"][start:stop],
                        "is_part": self.cuts,
                    }
                )
            lines[OWNER].append(torch.cat(line))
            for name in names:
                lines[name].append(torch.tensor(feature[name]))
        batch = self.collator(features)
        height, width = batch["input_ids"].shape
        for name, values in lines.items():
            values = [torch.cat(values)] if height < len(values) else values  # padding-free: one row
            padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-1)
            batch[name] = torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=-1)
        batch[EXAMPLES] = examples
        return batch


class TokenCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also lays columns out, and says where one example ends in the one row of padding-free mode."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for example in examples:
            check_example(example)
        batch = super().torch_call(examples)
        refuse_shifted(batch["input_ids"].numpy(), batch["labels"].numpy())  # arrays of the host, for which no GPU is waited
        lay_out(examples, batch)
        if self.padding_free:
            batch[EXAMPLE_LENGTHS] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch


class CheckedCollator:
    """A collator of the user's own, whose labels may mask more than the rows' own do, and not less.

    It may add one target to each row, an end token. A batch that has several examples in a row gets `JOINED`, (rows,), one
    with another number of rows than examples `EXAMPLE_LENGTHS`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        given = [each["labels"] for each in features if isinstance(each, Mapping) and each.get("labels") is not None]
        most = sum(int((torch.as_tensor(labels) != IGNORED).sum()) for labels in given)  # before a collator pads in place
        batch = self.collator(features)
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape and labels.ndim == 2:
            refuse_shifted(ids, labels)
            if given and (labels != IGNORED).sum() > most + len(given):
                raise RecipeError(
                    f"Cannot train: the `data_collator` makes {(labels != IGNORED).sum()} targets of rows whose `labels` have "
                    f"{most}, so prompts or padding would train. Leave it out, or let it keep `labels`, with -100 for padding."
                )
            if len(ids) != len(features):
                sizes = [len(each["input_ids"]) for each in features if isinstance(each, Mapping) and "input_ids" in each]
                is_known = len(ids) == 1 and len(sizes) == len(features) and sum(sizes) == ids.shape[1]
                batch[EXAMPLE_LENGTHS] = torch.tensor(sizes if is_known else [], dtype=torch.long)
            if _are_joined(features, batch):
                batch[JOINED] = torch.ones(len(ids), dtype=torch.bool)
        return batch


def _are_joined(features: list[Any], batch: dict[str, Any]) -> bool:
    """Whether a row of a batch holds several examples, which the model has to keep apart by what the batch says of them."""
    labels: Tensor = batch["labels"]
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    packed = [each[LENGTHS] for each in features if isinstance(each, Mapping) and each.get(LENGTHS) is not None]
    ends = batch.get("cu_seq_lens_q")
    examples = len(features) - len(packed) + sum(map(len, packed)), 0 if ends is None else torch.as_tensor(ends).numel() - 1
    if max(examples) > len(labels):
        return True
    if not isinstance(positions, Tensor) or positions.shape != labels.shape:
        return False
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == labels.shape:  # padding in front has positions too
        restarts = restarts & mask[:, :-1].bool()
    trains_later = (labels[:, 1:] != IGNORED).flip(1).cumsum(1).flip(1) > 0  # behind the last target is padding
    return bool((restarts & trains_later).any())


class ImageCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, whose labels leave out `placeholders`, ids in whose place the model puts an image's features."""

    placeholders: Tensor

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["labels"] = batch["labels"].masked_fill(torch.isin(batch["input_ids"], self.placeholders), IGNORED)
        return batch


def _placeholders(trainer: Any) -> Tensor:
    """Return the ids of images, videos and sound among tokens, by the model's configuration and the processor."""
    keys = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    found = {getattr(each, key, None) for each in (trainer.model.config, trainer.processing_class) for key in keys}
    return torch.tensor(sorted(each for each in found if isinstance(each, int)), dtype=torch.long)


def collator_of(trainer: Any) -> Any:
    """Return a trainer's collator, made to carry our columns. Raises RecipeError where it would lose `ref_logprobs`."""
    collator = trainer.data_collator
    if type(collator) is DataCollatorForLanguageModeling:
        collator = TokenCollator(**vars(collator))
    elif type(collator) is DataCollatorForVisionLanguageModeling:
        collator = ImageCollator(**vars(collator))
        collator.placeholders = _placeholders(trainer)
    elif not trainer.sees_images:
        collator = CheckedCollator(collator)
    carries = isinstance(collator, TokenCollator) and not trainer.is_shared_out("cp", "sp")
    if trainer.reference == "column" and not carries:
        raise RecipeError(
            f"The column `{REFERENCE}` goes with text, and with whole sequences on each device: not with images, nor "
            "with context parallelism. Train an adapter without it: its base model is the reference then."
        )
    return RowCollator(collator) if getattr(trainer.args, "stop_on_nan", False) else collator
