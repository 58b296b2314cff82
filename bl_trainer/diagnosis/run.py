"""The diagnose verb: one pass of a recipe's model over the target tokens of its training set, exactly as it would train."""

import math
import tempfile
from dataclasses import replace
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from torch.utils.data import DataLoader

from .._util.logs import get_logger
from .._util.process import is_parallel
from .._util.transformers import is_deepspeed_zero3_enabled
from ..errors import RecipeError
from ..measurement.forward import count_targets, score_batch
from ..measurement.results import Comparison, Measurement
from ..recipe.datasets import load_dataset
from ..recipe.recipe import Recipe
from ..tokens.annotation import Annotation, token_batch
from ..tokens.collators import Collator
from ..tokens.labels import columns_of
from ..tokens.names import EXAMPLES, REFERENCE, WEIGHT
from ..tokens.spans import weighing_of
from ..tokens.vocabulary import end_ids, special_ids, tokenizer_of
from ..training.config import BLConfig
from ..training.kept_rows import without_dropped
from .cross_fit import CrossFit, halves_of
from .diagnoser import Diagnoser, deal
from .learnability import Probe, halves, probe_adapter
from .options import DiagnoseArguments, names_as_given
from .pair import Pair
from .report import Compare, ComparedElsewhere, Report
from .row_scores import RowScorer
from .rows_page import ScoredRows
from .score_files import ScoreFolder
from .summary import read_aloud, summarise, summarise_comparison

logger = get_logger(__name__)


class Part(NamedTuple):
    """A data set in batches. `max_tokens`: target tokens to stop at; None for packed rows, which are sampled before packing."""

    loader: DataLoader
    max_tokens: int | None


class Diagnosis:
    """A recipe's model and data, ready to be measured. Raises RecipeError or ValueError on what can't be."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.options: DiagnoseArguments = recipe.options
        with names_as_given(self.options.model is not None):
            dataset, _ = recipe.load_datasets()
        self.all_rows = dataset  # those that `--scores` numbers
        dataset = without_dropped(dataset, recipe.training)
        self.num_rows = len(dataset) if isinstance(dataset, Dataset) else None
        self.is_weighed = WEIGHT in columns_of(dataset) or weighing_of(dataset).multiplies
        self._check(next(iter(dataset)))
        options = self.options
        self.folder = ScoreFolder.of(recipe, self.all_rows) if options.scores else None
        halves = halves_of(self.all_rows, recipe.training.dataset_text_field) if options.noise_steps else None
        self.scratch = tempfile.TemporaryDirectory(prefix="bl_trainer")
        args = self._arguments()
        self.trainer = self._make_trainer(dataset, args)
        prepared: Any = self.trainer.train_dataset
        dataset_kwargs: Any = args.dataset_kwargs or {}
        is_prepared = dataset_kwargs.get("skip_prepare_dataset")
        if is_prepared:
            prepared = prepared.map(Annotation(None, None, False))
        self.part = self._load(prepared, options.by, packs=args.packing and not is_prepared)
        self.is_cut = self.trainer.is_cut
        self.pair = Pair(self.trainer, recipe, options.compare) if options.compare else None
        self.probe = self._load_probe(options.probe) if options.probe else None
        self.learnability = self._make_learnability(dataset, options.probe_steps) if options.probe_steps else None
        self.cross_fit = None
        if halves is not None:
            self.cross_fit = CrossFit(self.trainer, recipe, self.all_rows, halves, options.noise_steps)

    def _check(self, row: dict[str, Any]) -> None:
        """Raise RecipeError on what neither this row of the data set nor the launch allows."""
        by = self.options.by
        if by is not None and by not in row:
            raise RecipeError(f"`--by {by}`: the data set has no such column, only {', '.join(sorted(row))}.")
        if by is not None and isinstance(row[by], (list, dict)):
            raise RecipeError(f"`--by {by}` is a column of lists or mappings. Name one of words or numbers.")
        if is_parallel() or getattr(self.recipe.training, "parallelism_config", None) is not None:
            raise RecipeError("Diagnosis runs data-parallel. Launch it without tensor, context and sequence parallelism.")

    def _arguments(self) -> BLConfig:
        """Return the recipe's arguments without what belongs to training alone; the report names the recipe's own."""
        return replace(
            self.recipe.training,
            objective="nll",  # the recipe's own would add columns
            threshold=None,  # nothing is dropped from a measurement
            stop_on_nan=False,
            drop_rows=None,  # they are dropped already
            bf16_full_eval=False,  # training computes in neither
            fp16_full_eval=False,
            max_steps=1,
            lr_scheduler_type="constant",  # others need an evaluation
            lr_scheduler_kwargs=None,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            push_to_hub=False,
            report_to=[],
            output_dir=self.scratch.name,
            model_init_kwargs=self.recipe.model_init_kwargs(),
        )

    def _make_trainer(self, dataset: Any, args: Any) -> Diagnoser:
        recipe, options = self.recipe, self.options
        trainer = Diagnoser(
            options.by,
            math.ceil(options.max_tokens / args.world_size) if options.max_tokens else None,
            model=recipe.model.model_name_or_path,
            args=args,
            train_dataset=deal(dataset, args),
            quantization_config=recipe.quantization_config,
            peft_config=self._adapter(),
        )
        if trainer.sees_images:
            raise RecipeError("Diagnosis reads text; this data set has images.")
        if trainer.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            raise RecipeError("DeepSpeed evaluates under ZeRO-3 only. Launch diagnosis without DeepSpeed, or with ZeRO-3.")
        return trainer

    def score(self) -> None:
        """Score every row into the folder of `--scores`, if there is one; what it holds already stays."""
        if self.folder is not None:
            RowScorer(self.trainer, self.folder, self.cross_fit).run()
            count = len(self.folder.shards())
            rows = f"{len(self.folder.dataset):,} rows in {count} file{'s' if count > 1 else ''}"
            self.trainer.accelerator.print(f"Scores: {self.folder.path} ({rows})")

    def scored(self) -> ScoredRows | None:
        """Return the rows that a report's page of rows shows, None without a noise score and tokens."""
        if self.folder is None or self.cross_fit is None or self.folder.logp is None:
            return None
        return ScoredRows(self.folder, tokenizer_of(self.trainer.processing_class))

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
            reader=read_aloud(measurement, tokenizer_of(self.trainer.processing_class)),
        )

    def _measure(self) -> tuple[Measurement, Comparison, bool]:
        """Measure the training set, and tell whether only a sample of it."""
        trainer, comparison = self.trainer, Comparison()
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

        found = trainer.observe(
            self.part.loader, observe, max_tokens=self.part.max_tokens, label="Measuring", expected=self._expected()
        )
        is_sample = any(gather_object([found.is_cut or self.is_cut]))  # a process knows of its own rows only
        if not found.num_tokens:
            raise RecipeError("No example of the training set has a target token: all labels are -100.")
        measurement.reduce(trainer.accelerator)
        return measurement, comparison, is_sample

    def _expected(self) -> int | None:
        """Return about how many target tokens there are, by the first batch, for the progress bar."""
        batch, limit = next(iter(self.part.loader), None), self.options.max_tokens or None
        if batch is None or self.num_rows is None:
            return limit
        tokens = int(count_targets(batch)) * self.num_rows // len(batch[EXAMPLES])
        return min(tokens, limit or tokens)

    def _compared(self, comparison: Comparison) -> tuple[Compare | None, dict[str, list[Any]]]:
        """Return what `--compare` and `--probe` found, and the rows of their files; `comparison`: on the training set."""
        if self.pair is None:
            return None, {}
        comparison.reduce(self.trainer.accelerator)
        found = Compare(str(self.options.compare), summarise_comparison(comparison))
        if self.probe is None:
            return found, {"compare": comparison.examples}
        elsewhere, rows = self._run_probe(*self.probe)
        return replace(found, probe=elsewhere), {"compare": comparison.examples, "probe": rows}

    def _adapter(self) -> PeftConfig | None:
        """Return an adapter that does nothing yet: to be trained here, or as quantised models are trained with one."""
        recipe, options = self.recipe, self.options
        if options.probe_steps or options.noise_steps:
            return probe_adapter(recipe)
        return recipe.peft_config if recipe.quantization_config else None

    def _make_learnability(self, dataset: Any, steps: int) -> Probe:
        trainer, args = self.trainer, self.trainer.args
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RecipeError("`--probe_steps` needs a whole model on each device. Launch it without FSDP and DeepSpeed.")
        present = [name for name in (WEIGHT, REFERENCE) if name in columns_of(dataset)]
        dataset = dataset.remove_columns(present) if present else dataset  # the probe asks how plain NLL learns
        rows = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

        def make(count: int, packing: bool) -> tuple[Dataset, Dataset]:
            first, second = halves(dataset, args.seed, count, args.dataset_text_field)
            return trainer.training_rows(first, packing=packing), second

        train_dataset, second = make(rows, False)
        if args.packing and len(train_dataset):
            length = sum(map(len, train_dataset["input_ids"])) / len(train_dataset)
            train_dataset, second = make(math.ceil(rows * args.max_length / length), True)
        prepared = trainer.prepare_rows(deal(second, args), "probe", packing=False)
        loader = self._load(prepared, by=None, packs=False).loader
        return Probe(trainer, self.recipe, train_dataset, loader, steps, self.options.max_tokens)

    def _load(self, prepared: Any, by: str | None, *, packs: bool) -> Part:
        trainer = self.trainer
        cuts = packs and trainer.args.packing_strategy != "bfd"
        loader = DataLoader(
            prepared,
            batch_size=trainer.args.per_device_train_batch_size,
            collate_fn=Collator(trainer.data_collator, by, cuts),
            num_workers=min(trainer.args.dataloader_num_workers, prepared.num_shards),
        )
        return Part(loader, None if packs else self.options.max_tokens or None)

    def _load_probe(self, name: str) -> tuple[str, Part]:
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
        packs = trainer.args.packing
        asked = trainer.args.completion_only_loss
        completion_only = "prompt" in columns_of(dataset) if asked is None else asked
        prepared = trainer.prepare_rows(deal(dataset, trainer.args), "probe", packing=packs, completion_only=completion_only)
        return split, self._load(prepared, by=None, packs=packs)

    def _run_probe(self, split: str, part: Part) -> tuple[ComparedElsewhere, list[Any]]:
        pair, comparison = self.pair, Comparison()
        assert pair is not None

        def observe(model: Any, batch: dict[str, Any]) -> None:
            tokens = token_batch(batch)
            comparison.add(tokens, *pair(batch))

        if not self.trainer.observe(part.loader, observe, max_tokens=part.max_tokens, label="Probing").num_tokens:
            raise RecipeError(f"`--probe {self.options.probe}`: no example has a target token.")
        comparison.reduce(self.trainer.accelerator)
        found = ComparedElsewhere(str(self.options.probe), split, summarise_comparison(comparison))
        return found, comparison.examples
