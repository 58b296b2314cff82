"""A score for every row of the training set: one pass in order, file by file, without gradient.

Rows are scored as they train, one row to a sequence: a packed recipe's are not packed. What of a row trains is packing's own:
`bfd` cuts it to `max_length`, and other strategies train all of it, here in parts of `max_length` that begin with the row.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import MeasurementError
from ..head.ops import score
from ..head.sums import TokenScores
from ..head.targets import IGNORED, Targets
from ..measurement.fingerprint import fingerprint
from ..measurement.forward import score_batch, without_targets
from ..measurement.reader import conflicts
from ..measurement.results import refuse_nan
from ..tokens.labels import targets_of
from ..tokens.names import EXAMPLE_LENGTHS, EXAMPLES, ROW
from ..tokens.prepare import training_parts
from ..tokens.vocabulary import end_ids, tokenizer_of
from .cross_fit import CrossFit
from .diagnoser import Diagnoser
from .score_files import FIGURES, FITTED, ScoreFolder, Shard

IMPROBABLE = 0.1  # p below which a target counts towards `improbable_share`

PREPARED_AHEAD = 64  # rows, by a `dataloader_num_workers`


class Sequence(NamedTuple):
    """A row as it is scored, or a part of it. `example`: its token ids and labels."""

    row: int
    example: dict[str, Any]
    is_truncated: bool

    def labels(self) -> list[int]:
        """Return the labels, with those left out that nothing predicts."""
        targets, labels = {*targets_of(self.example)}, self.example["labels"]
        return [label if i in targets else IGNORED for i, label in enumerate(labels)]


class TokenTable(NamedTuple):
    """Target tokens, (N,) each. `sequence`: number of the file's."""

    sequence: np.ndarray
    token: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray
    is_conflict: np.ndarray
    fitted: np.ndarray  # log p under the adapter that has not seen the row; NaN without `--noise_steps`
    gap: np.ndarray  # the lesser of model and that adapter: log p(most probable) - log p(target)

    @classmethod
    def join(cls, parts: list["TokenTable"]) -> "TokenTable":
        """Return all tokens by sequence, those of one in reading order."""
        columns = [np.concatenate([[], *column]) for column in zip(*parts, strict=True)] or [np.empty(0)] * len(cls._fields)
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))


class RowScorer:
    """Scores the rows of a folder that it lacks, each process its share of the files. `cross_fit`: for a noise score."""

    def __init__(self, trainer: Diagnoser, folder: ScoreFolder, cross_fit: CrossFit | None = None):
        self.trainer, self.folder, self.args, self.cross_fit = trainer, folder, trainer.args, cross_fit
        self.is_prepared = bool((self.args.dataset_kwargs or {}).get("skip_prepare_dataset"))
        self.ends = sorted(end_ids(trainer))
        self.hashes = {"weights": _weights(trainer)}
        self.tables: list[TokenTable] = []  # of the file under way
        self.bar: Any = None

    def run(self) -> None:
        """Write the files that are missing. Raises RecipeError as `ScoreFolder.missing`, MeasurementError on NaN."""
        missing = self.folder.missing(self.hashes)
        accelerator = self.trainer.accelerator
        if not missing:
            self.folder.finish()
            return
        if self.cross_fit is not None:
            self.hashes["adapters"] = self.cross_fit.fit(self.folder, self.hashes["weights"])
            missing = self.folder.missing(self.hashes)
        own = missing[accelerator.process_index :: accelerator.num_processes]
        rows, hidden = sum(len(shard.rows) for shard in own), self.args.disable_tqdm or not accelerator.is_main_process
        with tqdm(total=rows, desc="Scoring", unit=" rows", disable=hidden) as self.bar:
            self.trainer.observe(self._batches(own, missing[0]), self._observe)
        if self.cross_fit is not None:
            self.cross_fit.leave()
        self.folder.finish()

    # Rows

    def _batches(self, own: list[Shard], other: Shard) -> Iterator[dict[str, Any]]:
        """Yield the batches of each file, and write it as soon as the last has been observed.

        A process that has none yields one without targets, of the file `other`: sharded models need all to take part.
        """
        idle = True
        for shard, sequences in self._by_shard(own):
            numbers = [i for i, each in enumerate(sequences) if targets_of(each.example)]
            self.tables, done, batched = [], self.bar.n, 0
            for batch in self._batched(sequences, numbers):
                idle = False
                yield self._collated(sequences, batch)
                batched += len(batch)
                self.bar.update(done + batched * len(shard.rows) // len(numbers) - self.bar.n)
            self.bar.update(done + len(shard.rows) - self.bar.n)
            self.folder.write(shard, self._columns(shard, sequences), self.hashes)
        if idle:
            _, sequences = next(self._by_shard([other]))
            yield without_targets(self._collated(sequences, [0]))

    def _batched(self, sequences: list[Sequence], numbers: list[int]) -> Iterator[list[int]]:
        """Yield the numbers of sequences in batches with little padding, each of rows of one half."""
        halves = self.cross_fit.halves if self.cross_fit else np.zeros(len(self.folder.dataset))
        size = self.args.per_device_train_batch_size
        for half in (0, 1):
            own = [i for i in numbers if halves[sequences[i].row] == half]
            own.sort(key=lambda i: -len(sequences[i].example["input_ids"]))
            yield from (own[start : start + size] for start in range(0, len(own), size))

    def _by_shard(self, shards: list[Shard]) -> Iterator[tuple[Shard, list[Sequence]]]:
        """Yield each file with its sequences in order."""
        if not shards:
            return
        size = self.folder.rows_per_file
        groups = groupby(self._examples(shards), lambda example: example[ROW] // size)
        group = next(groups, None)
        for shard in shards:
            examples: list[dict[str, Any]] = []
            if group is not None and group[0] == shard.start // size:
                examples = list(group[1])
                group = next(groups, None)
            yield shard, [part for example in examples for part in self._parts(example)]
        assert group is None, "rows came out of order"

    def _examples(self, shards: list[Shard]) -> Iterator[dict[str, Any]]:
        """Yield the files' rows as token ids and labels, whole, prepared as they are read."""
        dataset: Dataset = self.folder.dataset.add_column(ROW, np.arange(len(self.folder.dataset)))
        stream = dataset.select(list(chain.from_iterable(shard.rows for shard in shards))).to_iterable_dataset()
        rows: Any = stream if self.is_prepared else self.trainer.rows_to_score(stream)
        workers = min(self.args.dataloader_num_workers, 1)  # which keeps the order
        ahead: dict[str, Any] = {"prefetch_factor": PREPARED_AHEAD} if workers else {}
        yield from DataLoader(rows, batch_size=None, collate_fn=_as_it_is, num_workers=workers, **ahead)

    def _parts(self, example: dict[str, Any]) -> Iterator[Sequence]:
        """Yield the sequences that a row trains as."""
        for part, is_cut in [(example, False)] if self.is_prepared else training_parts(example, self.args):
            kept: dict[str, Any] = {name: part[name] for name in ("input_ids", "labels", "seq_lengths") if name in part}
            yield Sequence(example[ROW], {"labels": part["input_ids"], **kept}, is_cut)

    def _collated(self, sequences: list[Sequence], numbers: list[int]) -> dict[str, Any]:
        batch = self.trainer.data_collator([sequences[i].example for i in numbers])
        return {**batch, EXAMPLES: [(i, sequences[i].row) for i in numbers]}

    # Tokens

    def _observe(self, model: Any, batch: dict[str, Any]) -> None:
        """Keep the scores of a batch's target tokens."""
        numbers, rows = torch.tensor(batch.pop(EXAMPLES)).T
        targets = Targets.of(batch["labels"])
        owner, column = targets.mask.nonzero(as_tuple=True)
        if EXAMPLE_LENGTHS in batch:  # padding-free: one row
            owner = torch.searchsorted(batch[EXAMPLE_LENGTHS].cumsum(0), column + 1, right=True)
        token = targets.ids
        scores, fitted = self._scores(model, batch, int(rows[0]))
        gap = torch.minimum(*(each.top1_logp - each.logp for each in (scores, fitted)))
        columns = scores.logp, scores.entropy, conflicts(scores), fitted.logp, gap
        found = torch.stack([each.to(scores.logp.dtype) for each in columns]).cpu().numpy()
        refuse_nan(torch.from_numpy(found[0] + found[1]), rows[owner])
        if self.cross_fit is not None and not np.isfinite(found[3]).all():
            raise MeasurementError("Cross-fitting diverged: probabilities are NaN or 0. Lower `--learning_rate`.")
        self.tables.append(TokenTable(numbers[owner].numpy(), token.cpu().numpy(), *found))

    def _scores(self, model: Any, batch: dict[str, Any], row: int) -> tuple[TokenScores, TokenScores]:
        """Return a batch's scores under the model, and under the adapter, if any, that has not seen rows such as `row`."""
        use = partial(score, extras=())
        if self.cross_fit is None:
            scores = score_batch(self.trainer, model, batch, use)
            return scores, replace(scores, logp=torch.full_like(scores.logp, torch.nan))
        with self.trainer.accelerator.unwrap_model(model).disable_adapter():
            scores = score_batch(self.trainer, model, batch, use)
        self.cross_fit.use(int(self.cross_fit.halves[row]))
        return scores, score_batch(self.trainer, model, batch, use)

    def _columns(self, shard: Shard, sequences: list[Sequence]) -> dict[str, Any]:
        """Return the columns of a file, by the tokens kept."""
        size, tokens = len(shard.rows), TokenTable.join(self.tables)
        rows = np.array([each.row - shard.start for each in sequences], dtype=np.int64)
        row = rows[tokens.sequence.astype(np.int64)]
        targets = np.bincount(row, minlength=size)
        figures = _figures(row, tokens, np.isin(tokens.token, self.ends), targets)
        truncated = np.zeros(size, dtype=bool)
        truncated[[each.row - shard.start for each in sequences if each.is_truncated]] = True
        columns = {"targets": pa.array(targets, pa.int32()), "truncated": pa.array(truncated)}
        columns |= {name: pa.array(values, mask=np.isnan(values)) for name, values in figures.items()}
        if self.folder.logp is None:
            return columns
        columns["logp"] = _lists(targets, tokens.logp, self.folder.logp)
        columns["fitted_logp"] = _lists(targets, tokens.fitted, self.folder.logp)
        joined: dict[str, list[list[int]]] = {"input_ids": [[] for _ in range(size)], "labels": [[] for _ in range(size)]}
        for each in sequences:
            joined["input_ids"][each.row - shard.start] += each.example["input_ids"]
            joined["labels"][each.row - shard.start] += each.labels()
        return {**columns, **joined}


def _figures(row: np.ndarray, tokens: TokenTable, is_end: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of each row, NaN where there is none. `row`: of each token, ascending. `targets`: of each row."""
    p, size = np.exp(tokens.logp.astype(np.float64)), len(targets)
    values = p, tokens.logp, p < IMPROBABLE, tokens.is_conflict, tokens.entropy
    with np.errstate(invalid="ignore"):  # 0 / 0 of rows without a target
        means = [np.bincount(row, weights=each, minlength=size) / targets for each in values]
    first, end = np.full(size, np.nan), np.full(size, np.nan)
    first[row[::-1]] = p[::-1]  # the last one that is assigned stays
    end[row[is_end]] = p[is_end]
    return dict(zip([*FIGURES, *FITTED], [*means, first, end, *_noise(row, tokens, targets)], strict=True))


def _noise(row: np.ndarray, tokens: TokenTable, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each row the mean log p under the adapter that has not seen it, and the noise score.

    The score is the largest gap of a row's tokens, in nats: how clearly model and adapter both expect another token.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0 of rows without a target
        fitted = np.bincount(row, weights=tokens.fitted, minlength=len(targets)) / targets
        noise = np.where(targets > 0, -np.inf, np.nan)
        np.maximum.at(noise, row, tokens.gap)
    return fitted, noise


def _lists(sizes: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(kind.to_pandas_dtype()), kind))


def _as_it_is(example: Any) -> Any:
    """Return an example as a data set gives it."""
    return example


def _weights(trainer: Diagnoser) -> str | None:
    """Return a hash of the model, its vocabulary and chat template; None of a sharded model, which no process has whole."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    tokenizer = tokenizer_of(trainer.processing_class)
    own = fingerprint(trainer, []), sorted(tokenizer.get_vocab().items()), trainer.chat_template, tokenizer.chat_template
    return hashlib.sha256(repr(own).encode()).hexdigest()[:32]
