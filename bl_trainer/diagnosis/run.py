"""The diagnose verb: one pass of a recipe's model over the target tokens of its training set, exactly as it would train."""

import copy
import math
import os
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.utils.data import DataLoader
from trl import pack_dataset

from .._util.transformers import is_deepspeed_zero3_enabled
from ..errors import RecipeError
from ..measurement.forward import count_targets, measure, score_batch
from ..measurement.results import Comparison, Measurement
from ..recipe.datasets import load_dataset
from ..recipe.recipe import Recipe
from ..tokens.annotation import Annotation, group_name, token_batch
from ..tokens.collators import Collator
from ..tokens.labels import columns_of
from ..tokens.names import REFERENCE, WEIGHT
from ..tokens.prepare import Rows
from ..tokens.vocabulary import end_ids, special_ids, token_texts, tokenizer_of
from ..training.scoring import ScoringTrainer
from ..training.trainer import BLTrainer
from .learnability import Probe, halves, probe_adapter
from .options import DiagnoseArguments
from .pair import Pair
from .report import Compare, ComparedElsewhere, Report
from .summary import summarise, summarise_comparison

logger = get_logger(__name__)


class Diagnoser(BLTrainer):
    """A trainer that only measures; it keeps track of the row that each token comes from, also through packing.

    `by`: column of the groups. `limit`: target tokens that this process takes of a data set that is packed, chosen before they
    are, since packed rows come longest first; `is_cut`: whether that left any out; `packs`: whether it packs at all.
    """

    args: Any

    def __init__(self, by: str | None, limit: int | None, **kwargs: Any):
        self.by, self.limit, self.is_cut, self.packs = by, limit, False, False
        super().__init__(**kwargs)

    def heads_in_use(self) -> set[str]:
        return super().heads_in_use() | {"own"}

    def prepare_rows(self, rows: Rows) -> Any:
        dataset, args, by, self.packs = rows.dataset, rows.args, self.by, rows.packing
        if by is not None:  # before TRL adds an end token to texts
            dataset = dataset.map(lambda example: {"bl_group": group_name(example[by])})
        rows = replace(rows, dataset=dataset)
        whole = rows.untruncated() if self.packs else rows  # packing cuts to length by itself
        prepared = ScoringTrainer.prepare_rows(self, whole)  # one process's share of the rows may have no target
        prepared = prepared.map(Annotation(tokenizer_of(rows.processing_class), self.chat_template, self.packs))
        if not self.packs:
            return prepared
        columns = ["input_ids", "labels", "bl_row", "bl_group", "bl_template", "bl_position", "bl_length"]
        return pack_dataset(
            self._take(prepared, args.max_length if args.packing_strategy == "bfd" else None).select_columns(columns),
            args.max_length,
            args.packing_strategy,
        )

    def _take(self, prepared: Any, length: int | None) -> Any:
        """Return the first examples, which are in random order, with `limit` target tokens within their first `length`."""
        if self.limit is None:
            return prepared
        tokens, count = 0, 0
        for example in prepared:
            if tokens >= self.limit:
                self.is_cut = True
                return prepared.take(count)
            count += 1
            tokens += sum(label != -100 for label in example["labels"][1:length])
        return prepared


class Diagnosis:
    """A recipe's model and data, ready to be measured. Raises RecipeError or ValueError on what can't be."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.options: DiagnoseArguments = recipe.options
        dataset, _ = recipe.load_datasets()
        self.num_rows = len(dataset) if isinstance(dataset, Dataset) else None
        self.is_weighed = WEIGHT in columns_of(dataset)
        self._check(next(iter(dataset)))
        options = self.options
        self.scratch = tempfile.TemporaryDirectory(prefix="bl_trainer")
        args = self._arguments()
        self.trainer = self._make_trainer(dataset, args)
        prepared: Any = self.trainer.train_dataset
        dataset_kwargs: Any = args.dataset_kwargs or {}
        if dataset_kwargs.get("skip_prepare_dataset"):
            prepared = prepared.map(Annotation(None, None, False))
        self.loader, self.is_cut = self._load(prepared), self.trainer.is_cut
        self.pair = Pair(self.trainer, recipe, options.compare) if options.compare else None
        self.probe = self._load_probe(options.probe) if options.probe else None
        self.learnability = self._make_learnability(dataset, options.probe_steps) if options.probe_steps else None

    def _check(self, row: dict[str, Any]) -> None:
        """Raise RecipeError on what neither this row of the data set nor the launch allows."""
        by = self.options.by
        if by is not None and by not in row:
            raise RecipeError(f"`--by {by}`: the data set has no such column, only {', '.join(sorted(row))}.")
        if by is not None and isinstance(row[by], (list, dict)):
            raise RecipeError(f"`--by {by}` is a column of lists or mappings. Name one of words or numbers.")
        if (
            getattr(self.recipe.training, "parallelism_config", None) is not None
            or os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
        ):
            raise RecipeError("Diagnosis runs data-parallel. Launch it without tensor, context and sequence parallelism.")

    def _arguments(self) -> Any:
        """Return a copy of the recipe's arguments without what belongs to training alone; the report names the recipe's own."""
        args = copy.copy(self.recipe.training)
        args.bf16_full_eval = args.fp16_full_eval = False  # training doesn't compute in these
        args.max_steps, args.eval_strategy, args.save_strategy, args.push_to_hub, args.report_to = 1, "no", "no", False, []
        args.load_best_model_at_end, args.output_dir = False, self.scratch.name
        args.stop_on_nan = False
        args.threshold = None  # nothing is dropped from a measurement
        args.objective = "nll"  # the recipe's own would add columns
        args.model_init_kwargs = self.recipe.model_init_kwargs()
        return args

    def _make_trainer(self, dataset: Any, args: Any) -> Diagnoser:
        recipe, options = self.recipe, self.options
        trainer = Diagnoser(
            options.by,
            math.ceil(options.max_tokens / args.world_size) if options.max_tokens else None,
            model=recipe.model.model_name_or_path,
            args=args,
            train_dataset=_deal(dataset, args),
            quantization_config=recipe.quantization_config,
            peft_config=self._adapter(),
        )
        if trainer._is_vision_dataset:
            raise RecipeError("Diagnosis reads text; this data set has images.")
        if trainer.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            raise RecipeError("DeepSpeed evaluates under ZeRO-3 only. Launch diagnosis without DeepSpeed, or with ZeRO-3.")
        return trainer

    def run(self) -> Report:
        """Measure, and return the report, the same in every process."""
        measurement, comparison, is_sample = self._measure()
        learnability = None
        if self.learnability is not None:
            self.trainer.accelerator.print(self.learnability.cost())
            learnability = self.learnability.run()
        compare, rows = self._compared(comparison)
        return summarise(
            measurement,
            self.recipe,
            self.options.percentiles,
            sampled=is_sample,
            streamed=self.num_rows is None,
            is_weighed=self.is_weighed,
            learnability=learnability,
            compare=compare,
            rows=rows,
            reader=_read_aloud(measurement, tokenizer_of(self.trainer.processing_class)),
        )

    def _measure(self) -> tuple[Measurement, Comparison, bool]:
        """Measure the training set, and tell whether only a sample of it."""
        trainer, limit, comparison = self.trainer, self.options.max_tokens or None, Comparison()
        specials = special_ids(tokenizer_of(trainer.processing_class))
        measurement = Measurement(sorted(end_ids(trainer)), sorted(specials))

        def observe(model: Any, batch: dict[str, Any]) -> None:
            tokens = token_batch(batch)
            if self.pair is None:
                measurement.add(tokens, score_batch(trainer, model, batch).cpu())
            else:
                base, tuned, divergences = self.pair(batch)
                measurement.add(tokens, base)
                comparison.add(tokens, base, tuned, divergences)

        expected = self._expected(limit)
        found, is_sample = measure(trainer, self.loader, observe, self._stop(limit), "Measuring", expected)
        is_sample = any(gather_object([is_sample or self.is_cut]))  # a process knows of its own rows only
        if not found:
            raise RecipeError("No example of the training set has a target token: all labels are -100.")
        measurement.reduce(trainer.accelerator)
        return measurement, comparison, is_sample

    def _expected(self, limit: int | None) -> int | None:
        """Return about how many target tokens there are, by the first batch, for the progress bar."""
        batch = next(iter(self.loader), None)
        if batch is None or self.num_rows is None:
            return limit
        tokens = int(count_targets(batch)) * self.num_rows // len(batch["bl_examples"])
        return min(tokens, limit or tokens)

    def _compared(self, comparison: Comparison) -> tuple[Compare | None, dict[str, list[Any]]]:
        """Return what `--compare` and `--probe` found, and the rows of their files; `comparison`: on the training set."""
        if self.pair is None:
            return None, {}
        comparison.reduce(self.trainer.accelerator)
        found = Compare(str(self.options.compare), summarise_comparison(comparison))
        if self.probe is None:
            return found, {"compare": comparison.examples}
        elsewhere, rows = self._run_probe(*self.probe, self.options.max_tokens or None)
        return replace(found, probe=elsewhere), {"compare": comparison.examples, "probe": rows}

    def _adapter(self) -> PeftConfig | None:
        """Return an adapter that does nothing yet: for the probe to train, or as quantised models are trained with one."""
        recipe = self.recipe
        return probe_adapter(recipe) if self.options.probe_steps else recipe.peft_config if recipe.quantization_config else None

    def _make_learnability(self, dataset: Any, steps: int) -> Probe:
        trainer, args = self.trainer, self.trainer.args
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RecipeError("`--probe_steps` needs a whole model on each device. Launch it without FSDP and DeepSpeed.")
        present = [name for name in (WEIGHT, REFERENCE) if name in columns_of(dataset)]
        dataset = dataset.remove_columns(present) if present else dataset  # the probe asks how plain NLL learns
        rows = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

        def make(count: int, packing: bool) -> tuple[Dataset, Dataset]:
            first, second = halves(dataset, args.seed, count, args.dataset_text_field)
            rows = Rows(first, trainer.processing_class, args, packing, None, "train")
            return ScoringTrainer.prepare_rows(trainer, rows), second

        train_dataset, second = make(rows, False)
        if args.packing and len(train_dataset):
            length = sum(map(len, train_dataset["input_ids"])) / len(train_dataset)
            train_dataset, second = make(math.ceil(rows * args.max_length / length), True)
        packs, trainer.packs, trainer.by = trainer.packs, False, None
        prepared = trainer.prepare_rows(Rows(_deal(second, args), trainer.processing_class, args, False, None, "probe"))
        loader = self._load(prepared)
        trainer.packs, trainer.by = packs, self.options.by
        return Probe(trainer, self.recipe, train_dataset, loader, steps, self.options.max_tokens)

    def _stop(self, limit: int | None) -> int | None:
        """What packed data are to stop at: nothing, since they are a sample by themselves."""
        return None if self.trainer.packs else limit

    def _load(self, prepared: Any) -> DataLoader:
        trainer = self.trainer
        cuts = trainer.packs and trainer.args.packing_strategy != "bfd"
        return DataLoader(
            prepared,
            batch_size=trainer.args.per_device_train_batch_size,
            collate_fn=Collator(trainer.data_collator, trainer.by, cuts),
            num_workers=min(trainer.args.dataloader_num_workers, prepared.num_shards),
        )

    def _load_probe(self, name: str) -> tuple[str, DataLoader]:
        """Prepare a data set that was not trained on as the recipe prepares its own; its test split, if it has one."""
        trainer, script = self.trainer, replace(self.recipe.script, dataset_name=name, dataset_config=None)
        try:
            loaded = load_dataset(script)
        except Exception as error:
            raise RecipeError(f"Can't load `--probe {name}`: {' '.join(str(error).split())}") from error
        split = next(s for s in (script.dataset_test_split, script.dataset_train_split, *loaded) if s in loaded)
        try:
            dataset = self.recipe.arranged(split, loaded[split])
        except RecipeError as error:
            raise RecipeError(f"Cannot use `--probe {name}`: {error}") from error
        trainer.by = None
        if trainer.args.completion_only_loss is None:
            trainer.completion_only_loss = "prompt" in columns_of(dataset)
        rows = _deal(dataset, trainer.args)
        prepared = trainer.prepare_rows(Rows(rows, trainer.processing_class, trainer.args, trainer.args.packing, None, "probe"))
        return split, self._load(prepared)

    def _run_probe(self, split: str, loader: DataLoader, limit: int | None) -> tuple[ComparedElsewhere, list[Any]]:
        pair, comparison = self.pair, Comparison()
        assert pair is not None

        def observe(model: Any, batch: dict[str, Any]) -> None:
            tokens = token_batch(batch)
            comparison.add(tokens, *pair(batch))

        if not measure(self.trainer, loader, observe, self._stop(limit), "Probing")[0]:
            raise RecipeError(f"`--probe {self.options.probe}`: no example has a target token.")
        comparison.reduce(self.trainer.accelerator)
        found = ComparedElsewhere(str(self.options.probe), split, summarise_comparison(comparison))
        return found, comparison.examples


def _deal(dataset: Any, args: Any) -> IterableDataset:
    """Return this process's part of the data set, to be prepared as it is read.

    In random order, each row with its number; a stream as it comes, but for a buffer that is shuffled.
    """
    rank, world = args.process_index, args.world_size
    if isinstance(dataset, Dataset):
        if len(dataset) < world:
            raise RecipeError(f"The data set has {len(dataset)} examples for {world} processes. Launch fewer.")
        numbered = dataset.add_column("bl_row", np.arange(len(dataset))).shuffle(seed=args.seed)
        own = numbered.shard(world, rank, contiguous=False)
        return own.to_iterable_dataset(num_shards=min(len(own), max(1, args.dataloader_num_workers)))
    numbered = dataset.shuffle(seed=args.seed, buffer_size=1000).map(lambda example, i: {"bl_index": i}, with_indices=True)
    return numbered.filter(lambda example: example["bl_index"] % world == rank)


def _read_aloud(measurement: Measurement, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the examples for the reader, token ids turned into text."""
    cache: dict[int, str] = {}

    def single(token: int) -> str:
        if token not in cache:
            cache[token] = tokenizer.decode([token])
        return cache[token]

    lists = measurement.reader.chosen()
    done: dict[int, dict[str, Any]] = {}
    for records in lists.values():
        for i, record in enumerate(records):
            if id(record) not in done:
                ids = record.pop("input_ids")
                expected = [single(token) for token in record.pop("top1")]
                rounded = {name: [float(f"{x:.3g}") for x in record[name]] for name in ("p", "top1_p", "entropy")}
                done[id(record)] = {**record, **rounded, "text": token_texts(tokenizer, ids), "expected": expected}
            records[i] = done[id(record)]
    return lists
