"""The diagnose verb: one pass of a recipe's model over the target tokens of its training set, exactly as it would train."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, ProcessorMixin
from trl import pack_dataset
from trl.data_utils import is_conversational, is_conversational_from_value

from .continuum import summarise, summarise_comparison
from .head import Head, TokenDivergences, TokenScores, add_scoring, compare, score
from .measurement import count_targets, measure, score_batch
from .recipe import Recipe, RecipeError, load_dataset
from .statistics import Comparison, Measurement, TokenBatch
from .trainer import BLTrainer

REPORT_FILES = ("report.json", "examples.json", "report.html", "sweep.yaml", "figures")


@dataclass
class DiagnoseArguments:
    """Options of the diagnose verb; on the command line only, so that the recipe stays the one to train."""

    report: str | None = field(default=None, metadata={"help": "Folder for the report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a report that is there already."})
    max_tokens: int = field(
        default=500_000, metadata={"help": "Measure a random sample of about so many target tokens; 0 for all."}
    )
    by: str | None = field(default=None, metadata={"help": "Column of the data set to break the figures down by."})
    percentiles: list[float] = field(
        default_factory=list, metadata={"help": "Percentiles of p to report besides 1 to 99, e.g. 2.5 99.5."}
    )
    compare: str | None = field(
        default=None, metadata={"help": "Checkpoint or adapter, to be compared with the recipe's model on the same tokens."}
    )
    probe: str | None = field(
        default=None, metadata={"help": "Data set that was not trained on, for --compare to show forgetting."}
    )

    def check(self) -> None:
        """Raise RecipeError on a wrong value or a report folder that can't be written to."""
        if not self.report:
            raise RecipeError("`--report` is missing: the folder for the report. Write `--report out/diagnosis`.")
        if self.max_tokens < 0:
            raise RecipeError(f"`--max_tokens {self.max_tokens}` must not be negative; 0 measures the whole data set.")
        for rank in self.percentiles:
            if not 0 <= rank <= 100:
                raise RecipeError(f"`--percentiles {rank:g}` must be between 0 and 100.")
        if self.compare and not Path(self.compare).is_dir():
            raise RecipeError(f"`--compare {self.compare}` is not a folder. Give a checkpoint's or an adapter's.")
        if self.probe and not self.compare:
            raise RecipeError("`--probe` does nothing without `--compare`. Give a checkpoint or an adapter to compare.")
        folder = Path(self.report)
        present = [name for name in REPORT_FILES if (folder / name).exists()]
        if present and not self.overwrite:
            raise RecipeError(f"`--report {folder}` holds {present[0]} already. Write another folder, or add `--overwrite`.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise RecipeError(f"Can't write to `--report {folder}`: {error.strerror}.") from error


class _Diagnoser(BLTrainer):
    """A trainer that only measures; it keeps track of the row that each token comes from, also through packing."""

    args: Any

    def __init__(self, by: str | None, **kwargs: Any):
        self.by = by
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if not packing:
            return super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        length, args.max_length = args.max_length, None  # packing cuts to length by itself
        try:
            prepared = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        finally:
            args.max_length = length
        by = self.by

        def per_token(example: Any) -> dict[str, Any]:
            group = "" if by is None else str(example[by])
            size = len(example["input_ids"])
            return {"bl_row": [example["bl_row"]] * size, "bl_group": [group] * size}

        columns = ["input_ids", "labels", "bl_row", "bl_group"]
        return pack_dataset(prepared.map(per_token).select_columns(columns), length, args.packing_strategy)


class _Collator:
    """A trainer's own collator, which also says which example each token belongs to."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], by: str | None, pieces: list[list[int]]):
        self.collator, self.by, self.pieces = collator, by, pieces

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        examples: list[dict[str, Any]] = []
        lines: list[Tensor] = []
        for feature in features:
            line = []
            for start, stop in _segments(feature):
                row, group = feature["bl_row"], None
                if isinstance(row, list):  # packed
                    row, group = row[start], feature["bl_group"][start]
                elif self.by is not None:
                    group = str(feature[self.by])
                ids = feature["input_ids"][start:stop]
                line.append(torch.full((len(ids),), len(examples)))
                examples.append({"row": row, "group": group if self.by is not None else None, "input_ids": ids})
            lines.append(torch.cat(line))
        batch = self.collator(features)
        ids = batch["input_ids"]
        if len(ids) < len(lines):  # padding-free: one row
            lines = [torch.cat(lines)]
        owner = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)
        owner = torch.nn.functional.pad(owner, (0, ids.shape[1] - owner.shape[1]), value=-1)
        batch["bl_owner"], batch["bl_template"], batch["bl_examples"] = owner, _find(ids, self.pieces), examples
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


def _find(ids: Tensor, pieces: list[list[int]]) -> Tensor:
    """Return which tokens of `ids`, (rows, length), lie in an occurrence of one of `pieces`; bool."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for piece in pieces:
        if len(piece) > ids.shape[1]:
            continue
        starts = (ids.unfold(1, len(piece), 1) == torch.tensor(piece)).all(dim=2)
        for offset in range(len(piece)):
            found[:, offset : offset + starts.shape[1]] |= starts
    return found


def template_pieces(tokenizer: Any, chat_template: str | None) -> list[list[int]]:
    """Return the token sequences that the chat template puts around contents, each with a special token in it."""
    marks = [f"mark{i}kram" for i in range(5)]
    system, turns = {"role": "system", "content": marks[0]}, []
    for i, role in enumerate(("user", "assistant", "user", "assistant")):
        turns.append({"role": role, "content": marks[i + 1]})
    pieces: set[tuple[int, ...]] = set()
    for messages in ([system, *turns], turns):
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
        except TemplateError:  # a template may refuse a system message; what it makes without is found all the same
            continue
        for mark in marks:
            text = text.replace(mark, marks[0])
        pieces |= {tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in text.split(marks[0]) if part}
    special = special_ids(tokenizer)
    return [list(piece) for piece in sorted(pieces) if special & set(piece)]


def _tokenizer(trainer: Any) -> Any:
    made = trainer.processing_class
    return made.tokenizer if isinstance(made, ProcessorMixin) else made


def end_ids(trainer: Any) -> set[int]:
    """Return the ids of the tokens that end a generation."""
    more = getattr(trainer.model.generation_config, "eos_token_id", None)
    return {_tokenizer(trainer).eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def token_batch(batch: dict[str, Any]) -> TokenBatch:
    """Take what `_Collator` added out of a batch, and return its target tokens."""
    owner, template, examples = batch.pop("bl_owner"), batch.pop("bl_template"), batch.pop("bl_examples")
    is_target = batch["labels"][:, 1:] != -100
    row, column = is_target.nonzero(as_tuple=True)
    example = owner[:, 1:][is_target]
    flat = (owner >= 0).nonzero()
    first = torch.full((len(examples),), owner.shape[1])
    first.scatter_reduce_(0, owner[owner >= 0], flat[:, 1], "amin")
    new = torch.ones_like(column, dtype=torch.bool)
    new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1) | (example[1:] != example[:-1])
    run = new.cumsum(0) - 1
    starts = new.nonzero().flatten()
    position = torch.arange(len(run)) - starts[run]
    length = torch.bincount(run)[run] if len(run) else run
    return TokenBatch(
        token=batch["input_ids"][:, 1:][is_target],
        example=example,
        place=column + 1 - first[example],
        position=position,
        length=length,
        is_template=template[:, 1:][is_target],
        examples=examples,
    )


class Diagnosis:
    """A recipe's model and data, ready to be measured. Raises RecipeError or ValueError on what can't be."""

    def __init__(self, recipe: Recipe):
        options: DiagnoseArguments = recipe.options
        self.recipe, self.options = recipe, options
        dataset, _ = recipe.load_datasets()
        self.first = first = next(iter(dataset))
        if options.by is not None and options.by not in first:
            raise RecipeError(f"`--by {options.by}`: the data set has no such column, only {', '.join(sorted(first))}.")
        args = recipe.training
        if getattr(args, "parallelism_config", None) is not None:
            raise RecipeError("Diagnosis runs data-parallel. Launch it without a `parallelism_config`.")
        args.max_steps, args.eval_strategy, args.save_strategy, args.push_to_hub, args.report_to = 1, "no", "no", False, []
        args.load_best_model_at_end, args.output_dir, args.threshold = False, str(options.report), None
        args.model_init_kwargs = recipe.model_init_kwargs()
        self.trainer = _Diagnoser(
            options.by,
            model=recipe.model.model_name_or_path,
            args=args,
            train_dataset=_deal(dataset, args),
            quantization_config=recipe.quantization_config,
            peft_config=recipe.peft_config if recipe.quantization_config else None,  # an adapter that does nothing yet
        )
        if self.trainer._is_vision_dataset:
            raise RecipeError("Diagnosis reads text; this data set has images.")
        self.loader = self._load(self.trainer.train_dataset, first)
        batch = next(iter(self.loader), None)  # rows are tokenised as they are read: what is wrong with all of them shows here
        self.expected = options.max_tokens or None
        if batch is not None and isinstance(dataset, Dataset):
            tokens = int(count_targets(batch)) * len(dataset) // len(batch["bl_examples"])
            self.expected = min(tokens, options.max_tokens or tokens)
        self.pair = _Pair(self.trainer, recipe, options.compare) if options.compare else None
        self.probe = self._load_probe(options.probe) if options.probe else None

    def run(self) -> dict[str, Any]:
        """Measure, and return the report: a mapping fit for JSON, the same in every process."""
        tokenizer, accelerator = _tokenizer(self.trainer), self.trainer.accelerator
        measurement = Measurement(sorted(end_ids(self.trainer)), sorted(special_ids(tokenizer)))
        comparison, limit = Comparison(), self.options.max_tokens or None

        def observe(model: Any, batch: dict[str, Any]) -> None:
            tokens = token_batch(batch)
            if self.pair is None:
                measurement.add(tokens, score_batch(self.trainer, model, batch).cpu())
            else:
                base, tuned, divergences = self.pair(batch)
                measurement.add(tokens, base)
                comparison.add(tokens, base, tuned, divergences)

        found, is_sample = measure(self.trainer, self.loader, observe, limit, "Measuring", self.expected)
        if not found:
            raise RecipeError("No example of the training set has a target token: all labels are -100.")
        measurement.reduce(accelerator)
        report = summarise(measurement, self.recipe, self.options.percentiles)
        report["sampled"] = is_sample
        if _is_chat(self.first) and "template" not in report["kinds"]:
            report["recommendation"]["warnings"].append("No token of the chat template was found among the targets.")
        report["reader"] = _read_aloud(measurement, tokenizer)
        if self.pair is not None:
            comparison.reduce(accelerator)
            report["compare"] = {"checkpoint": self.options.compare, "train": summarise_comparison(comparison)}
        if self.probe is not None:
            report["compare"]["probe"] = self._run_probe(limit)
        return report

    def _load(self, prepared: Any, first: dict[str, Any]) -> DataLoader:
        trainer, pieces = self.trainer, []
        if _is_chat(first):
            pieces = template_pieces(_tokenizer(trainer), trainer.chat_template)
        return DataLoader(
            prepared,
            batch_size=trainer.args.per_device_train_batch_size,
            collate_fn=_Collator(trainer.data_collator, trainer.by, pieces),
            num_workers=min(trainer.args.dataloader_num_workers, prepared.num_shards),
        )

    def _load_probe(self, name: str) -> tuple[str, DataLoader]:
        """Prepare a data set that was not trained on as the recipe prepares its own; its test split, if it has one."""
        trainer, script = self.trainer, self.recipe.script
        script.dataset_name, script.dataset_config = name, None
        try:
            loaded = load_dataset(script)
        except Exception as error:
            raise RecipeError(f"Can't load `--probe {name}`: {' '.join(str(error).split())}") from error
        split = next(s for s in (script.dataset_test_split, script.dataset_train_split, *loaded) if s in loaded)
        first = next(iter(loaded[split]), None)
        if first is None:
            raise RecipeError(f"`--probe {name}`: the {split} set is empty.")
        self.recipe.check_columns(split, loaded[split])
        trainer.by = None
        if trainer.args.completion_only_loss is None:
            trainer.completion_only_loss = "prompt" in first
        prepared = trainer._prepare_dataset(
            _deal(loaded[split], trainer.args), trainer.processing_class, trainer.args, trainer.args.packing, None, "probe"
        )
        return split, self._load(prepared, first)

    def _run_probe(self, limit: int | None) -> dict[str, Any]:
        assert self.pair is not None
        assert self.probe is not None
        pair, (split, loader), comparison = self.pair, self.probe, Comparison()

        def observe(model: Any, batch: dict[str, Any]) -> None:
            tokens = token_batch(batch)
            comparison.add(tokens, *pair(batch))

        if not measure(self.trainer, loader, observe, limit, "Probing")[0]:
            raise RecipeError(f"`--probe {self.options.probe}`: no example has a target token.")
        comparison.reduce(self.trainer.accelerator)
        return {"data": self.options.probe, "split": split, **summarise_comparison(comparison)}


def _is_chat(example: dict[str, Any]) -> bool:
    return is_conversational(example) or is_conversational_from_value(example)


def _deal(dataset: Any, args: Any) -> IterableDataset:
    """Return this process's part of the data set in random order, prepared as it is read, each row with its number."""
    rank, world = args.process_index, args.world_size
    if isinstance(dataset, Dataset):
        if len(dataset) < world:
            raise RecipeError(f"The data set has {len(dataset)} examples for {world} processes. Launch fewer.")
        numbered = dataset.add_column("bl_row", list(range(len(dataset)))).shuffle(seed=args.seed)
        own = numbered.shard(world, rank, contiguous=False)
        return own.to_iterable_dataset(num_shards=min(len(own), max(1, args.dataloader_num_workers)))
    numbered = dataset.map(lambda example, i: {"bl_row": i}, with_indices=True)
    return split_dataset_by_node(numbered.shuffle(seed=args.seed, buffer_size=1000), rank, world)


class _Pair:
    """The recipe's model and a tuned one, both scored on a batch."""

    def __init__(self, trainer: _Diagnoser, recipe: Recipe, path: str):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RecipeError("`--compare` needs a whole model on each device. Launch it without FSDP and DeepSpeed.")
        self.trainer = trainer
        self.adapter = (Path(path) / "adapter_config.json").is_file()
        if self.adapter and isinstance(trainer.model, PeftModel):
            trainer.model.load_adapter(path, "tuned")
            trainer.model.set_adapter("tuned")
        elif self.adapter:
            trainer.model = PeftModel.from_pretrained(trainer.model, path, adapter_name="tuned")
        else:
            kwargs = trainer.args.model_init_kwargs or {}
            kwargs = {**kwargs, "revision": None, "quantization_config": recipe.quantization_config}
            self.tuned = AutoModelForCausalLM.from_pretrained(path, **kwargs).to(trainer.model.device).eval()
            add_scoring(self.tuned)

    def __call__(self, batch: dict[str, Any]) -> tuple[TokenScores, TokenScores, TokenDivergences]:
        trainer = self.trainer
        model = trainer.model

        def keep(hidden: Tensor, head: Head, target: Tensor) -> Any:
            return hidden, head, score(hidden, head, target)

        with trainer.accelerator.autocast():
            if self.adapter:
                with model.disable_adapter():
                    hidden, head, base = score_batch(trainer, model, batch, keep)
                own, own_head, tuned = score_batch(trainer, model, batch, keep)
            else:
                hidden, head, base = score_batch(trainer, model, batch, keep)
                own, own_head, tuned = score_batch(trainer, self.tuned, batch, keep)
            with torch.no_grad():
                divergences = compare(own, own_head, hidden, head)
        return base.cpu(), tuned.cpu(), divergences.cpu()


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


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text that each token adds; a character of several tokens goes to the last of them."""
    texts, start, done = [], 0, 0
    for i in range(len(ids)):
        before, after = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start : i + 1])
        if after.endswith("\ufffd") and i + 1 < len(ids) and i - done < 8:
            texts.append("")
            continue
        texts.append(after[len(before) :])
        start, done = done, i + 1
    return texts
