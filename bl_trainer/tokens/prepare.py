"""A data set made ready to train: TRL's preparation, and the columns that go with the tokens through cutting and packing."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from trl import SFTTrainer, pack_dataset

from .._util.cached import Cached
from .columns import check_columns, for_each_token, number_rows
from .labels import columns_of, first_row, refuse_without_target
from .messages import are_mappings
from .names import REFERENCE, ROW, TEMPLATE, TOKEN_WEIGHT, WEIGHT
from .reference import check_reference, has_target, truncated
from .spans import CHATS, SpanWeights, weighing_of
from .template import TemplateMark
from .vocabulary import tokenizer_of


@dataclass(frozen=True)
class Rows:
    """
    A data set to be prepared, and how: what `SFTTrainer._prepare_dataset` takes. `name`: of the set, as errors call it.

    `completion_only`: whether prompts are left out; None for what the trainer does with its own training set.
    """

    dataset: Any
    processing_class: Any
    args: Any
    packing: bool
    formatting_func: Any
    name: str
    completion_only: bool | None = None

    def untruncated(self) -> "Rows":
        """Return the same rows, to be prepared whole, one to a row."""
        args = copy.copy(self.args)
        args.max_length = None
        return replace(self, args=args, packing=False)


@dataclass(frozen=True)
class Wanted:
    """Columns that rows are to get or keep.

    `numbers`: each row's number. `marks`: which tokens the chat template made. `refers`: log p under a reference model.
    `weighs`: weights within rows; without, they mask alone.
    """

    numbers: bool = False
    marks: bool = False
    refers: bool = False
    weighs: bool = False


def tokenize(trainer: SFTTrainer, rows: Rows) -> Any:
    """Return the rows as TRL prepares them: token ids with labels, truncated and packed as `rows` says."""
    with _completion_only(trainer, rows.completion_only):
        return SFTTrainer._prepare_dataset(
            trainer, rows.dataset, rows.processing_class, rows.args, rows.packing, rows.formatting_func, rows.name
        )


@contextmanager
def _completion_only(trainer: Any, wanted: bool | None) -> Iterator[None]:
    """Let TRL, which reads it from the trainer, prepare a set with prompts left out or not; None for as it is."""
    own = trainer.completion_only_loss
    trainer.completion_only_loss = own if wanted is None else wanted
    try:
        yield
    finally:
        trainer.completion_only_loss = own


def prepare(trainer: SFTTrainer, rows: Rows, wanted: Wanted) -> Any:
    """Return the rows as TRL prepares them, with the columns `wanted` and `objective_weight`.

    Raises RecipeError on columns that are wrong.
    """
    dataset, args, present = rows.dataset, rows.args, columns_of(rows.dataset)
    dataset = check_columns(dataset, rows.name, wanted.marks)
    refers = wanted.refers and REFERENCE in present
    if REFERENCE in present and not refers:
        dataset = dataset.remove_columns(REFERENCE)  # which nothing would cut along with the tokens
    weighing = weighing_of(dataset)
    spans = any(weighing) or (isinstance(dataset, IterableDataset) and _is_chat(dataset))  # whose later rows may have weights
    weighs = WEIGHT in present or (weighing.multiplies and wanted.weighs)
    asked = {ROW: wanted.numbers, WEIGHT: weighs, TEMPLATE: wanted.marks, REFERENCE: refers}
    columns = [key for key, holds in asked.items() if holds]
    if not (columns or spans):
        return tokenize(trainer, replace(rows, dataset=dataset))
    if (any(weighing) or {*columns} - {WEIGHT}) and ROW not in present:
        dataset = number_rows(dataset)
    rows, length = replace(rows, dataset=dataset), args.max_length
    cuts = not rows.packing and length is not None and (refers or any(weighing) or {WEIGHT, "input_ids"} <= {*present})
    # What is per token is cut with the tokens
    prepared = tokenize(trainer, rows.untruncated() if rows.packing or cuts else rows)
    how = {"num_proc": args.dataset_num_proc} if isinstance(prepared, Dataset) else {}
    with PartialState().local_main_process_first():
        if refers:
            prepared = prepared.map(Cached(check_reference), fn_kwargs={"name": rows.name}, **how)
        if spans:
            prepared = prepared.map(_span_weights(trainer, rows, weighing.multiplies, not wanted.weighs), **how)
            prepared = prepared.remove_columns(TOKEN_WEIGHT) if TOKEN_WEIGHT in present else prepared
        if cuts:
            kept = slice(length) if args.truncation_mode == "keep_start" else slice(-length, None)
            prepared = prepared.map(Cached(truncated), fn_kwargs={"kept": kept}, **how)
        if cuts or (spans and length is not None and not rows.packing):
            prepared = prepared.filter(Cached(has_target), **how)
        if wanted.marks and TEMPLATE not in present:
            mark = TemplateMark(tokenizer_of(rows.processing_class), trainer.chat_template, rows.name)
            prepared = prepared.map(Cached(mark), **how)
        return _packed(prepared, args, columns, how) if rows.packing else prepared


def training_parts(example: dict[str, Any], args: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield what trains of an example that was prepared whole, and whether `max_length` cuts off the rest.

    Packing by `bfd` keeps the beginning. Its other strategies train all of an example: here in parts of `max_length` that
    begin with it, though `wrapped` cuts where its neighbors make it.
    """
    size, length = len(example["input_ids"]), args.max_length
    if length is None or size <= length:
        yield example, False
        return
    splits = args.packing and args.packing_strategy != "bfd"
    begin = size - length if not args.packing and args.truncation_mode == "keep_end" else 0
    for start in range(0, size, length) if splits else [begin]:
        yield {**example, **truncated(example, slice(start, start + length))}, not splits


def _is_chat(dataset: Any) -> bool:
    first = first_row(dataset) or {}
    return "input_ids" not in first and any(are_mappings(first.get(column)) for column in CHATS)


def _span_weights(trainer: Any, rows: Rows, multiplies: bool, ignores: bool) -> Cached:
    only = trainer.completion_only_loss if rows.completion_only is None else rows.completion_only
    alone = (rows.args.assistant_only_loss, bool(only))
    return Cached(
        SpanWeights(tokenizer_of(rows.processing_class), trainer.chat_template, rows.name, multiplies, ignores, alone)
    )


def _packed(prepared: Any, args: Any, columns: list[str], how: dict[str, Any]) -> Any:
    prepared = prepared.map(Cached(for_each_token(columns)), **how).select_columns(["input_ids", "labels", *columns])
    packed = pack_dataset(prepared, args.max_length, args.packing_strategy, how)
    return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed


def refuse_untargeted(prepared: Any, name: str, args: Any, untruncated: Callable[[], Any] = tuple) -> None:
    """Raise RecipeError if a prepared set has no target, in what is used of it, and say if truncation took it.

    `untruncated`: gives the same rows whole.
    """
    used = None
    if isinstance(prepared, IterableDataset) and name == "train" and args.max_steps > 0:
        used = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
    refuse_without_target(islice(prepared, used), name, args, lambda: islice(untruncated(), used))
