"""`Diagnoser`: a trainer that only measures, and the share of a data set that each process measures."""

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from ..errors import RecipeError
from ..tokens.annotation import Annotation, group_name
from ..tokens.labels import targets_of
from ..tokens.names import GROUP, INDEX, LENGTH, POSITION, ROW, TEMPLATE
from ..tokens.prepare import Rows
from ..tokens.vocabulary import tokenizer_of
from ..training.scoring import ScoringTrainer


class Diagnoser(ScoringTrainer):
    """
    A trainer that only measures. It keeps track of the row that each token comes from, also through packing.

    `by`: column of the training set to group its rows by. `limit`: target tokens that this process takes of a data set that is
    packed, chosen before it is, since packed rows come longest first. `is_cut`: whether that left out any of the last one.
    """

    args: Any

    def __init__(self, by: str | None, limit: int | None, **arguments: Any):
        self.by, self.limit, self.is_cut = by, limit, False
        super().__init__(**arguments)

    def heads_in_use(self) -> set[str]:
        return super().heads_in_use() | {"own"}

    def make_ready(self, rows: Rows) -> Any:
        dataset, args, by = rows.dataset, rows.args, self.by if rows.name == "train" else None
        if by is not None:  # before TRL adds an end token to texts
            dataset = dataset.map(lambda example: {GROUP: group_name(example[by])})
        rows = replace(rows, dataset=dataset)
        prepared = super().make_ready(rows.untruncated() if rows.packing else rows)  # packing cuts to length by itself
        prepared = prepared.map(Annotation(tokenizer_of(rows.processing_class), self.chat_template, rows.packing))
        if not rows.packing:
            return prepared
        taken = self._take(prepared, args.max_length if args.packing_strategy == "bfd" else None)
        taken = taken.select_columns(["input_ids", "labels", ROW, GROUP, TEMPLATE, POSITION, LENGTH])
        return pack_dataset(taken, args.max_length, args.packing_strategy)

    def _take(self, prepared: Any, length: int | None) -> Any:
        """Return the first examples, which are in random order, with `limit` target tokens within their first `length`."""
        self.is_cut = False
        if self.limit is None:
            return prepared
        tokens, count = 0, 0
        for example in prepared:
            if tokens >= self.limit:
                self.is_cut = True
                return prepared.take(count)
            count += 1
            tokens += sum(length is None or place < length for place in targets_of(example))
        return prepared

    def training_rows(self, dataset: Dataset, *, packing: bool) -> Dataset:
        """Return rows as they train: token ids and labels alone."""
        rows = Rows(dataset, self.processing_class, self.args, packing, None, "train")
        prepared = super().make_ready(rows)
        kept = ("input_ids", "labels", "seq_lengths")
        return prepared.select_columns([name for name in prepared.column_names if name in kept])

    def rows_to_score(self, dataset: IterableDataset) -> Any:
        """Return a stream's rows as token ids and labels, whole, one to a row and in order, prepared as they are read."""
        rows = Rows(dataset, self.processing_class, self.args, False, None, "train").untruncated()
        rows.args.shuffle_dataset = False  # of its own copy
        return super().make_ready(rows)


def deal(dataset: Any, args: Any) -> IterableDataset:
    """Return this process's part of the data set, to be prepared as it is read.

    In random order, each row with its number; a stream as it comes, but for a buffer that is shuffled. Raises RecipeError if
    there are fewer rows than processes.
    """
    rank, world = args.process_index, args.world_size
    if isinstance(dataset, Dataset):
        if len(dataset) < world:
            raise RecipeError(f"The data set has {len(dataset)} examples for {world} processes. Launch fewer.")
        numbered = dataset.add_column(ROW, np.arange(len(dataset))).shuffle(seed=args.seed)
        own = numbered.shard(world, rank, contiguous=False)
        return own.to_iterable_dataset(num_shards=min(len(own), max(1, args.dataloader_num_workers)))
    numbered = dataset.shuffle(seed=args.seed, buffer_size=1000).map(lambda example, i: {INDEX: i}, with_indices=True)
    return numbered.filter(lambda example: example[INDEX] % world == rank)
