"""`train --show N`: the first training rows as the model sees them, before the first step."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from ..errors import RecipeError
from ..tokens.labels import targets_of
from ..tokens.names import EXAMPLE_LENGTHS, FILLS, JOINED, ROW
from ..tokens.prepare import Rows, training_parts
from ..tokens.vocabulary import token_texts, tokenizer_of
from .loss import TokenLoss, progress_of
from .scoring import ScoringTrainer
from .trainer import BLTrainer

CONTEXT = 200  # characters shown of tokens that do not train


@dataclass
class TrainArguments:
    """Options of the train verb; on the command line only, since they change nothing of the run."""

    show: int = field(
        default=0, metadata={"help": "Print this many training rows with p and weight of every token, then train."}
    )

    def check(self) -> None:
        """Raise RecipeError on a wrong value."""
        if self.show < 0:
            raise RecipeError(f"`--show {self.show}` must not be negative; 0 prints no row.")


def preview(trainer: BLTrainer, dataset: Any, count: int) -> str:
    """Return the first rows of a training set, a block each: its tokens, which train, with p and weight, and whether it is cut.

    `dataset`: as the trainer was given it; the rows that `drop_rows` drops are left out here. p is that of the model that
    training starts from; a packed recipe's rows are shown one by one. All processes must call it. Raises RecipeError on
    images and on a sharded model.
    """
    if trainer.sees_images:
        raise RecipeError("`--show` prints text, and this data set has images. Leave it out.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError("`--show` needs a whole model on each device. Leave it out under FSDP and DeepSpeed.")
    trainer.resolve_threshold()
    parts = list(_first_parts(trainer, dataset, count))
    losses: list[TokenLoss] = []

    def observe(model: Any, batch: dict[str, Any]) -> None:
        inputs = {key: value for key, value in batch.items() if key not in (EXAMPLE_LENGTHS, JOINED, ROW)}
        inputs = send_to_device({**inputs, "use_cache": False}, trainer.accelerator.device)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses.append(trainer.objective_loss(model, inputs, progress_of(trainer.state)))

    kept = ("input_ids", "labels", "seq_lengths", *FILLS)
    batches = [trainer.data_collator([{key: part[key] for key in kept if key in part}]) for _, part, _ in parts]
    trainer.observe(batches, observe)
    return "\n\n".join(_block(trainer, *part, loss) for part, loss in zip(parts, losses, strict=True))


def _first_parts(trainer: BLTrainer, dataset: Any, count: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield the first rows as they train: the name of each, the example, and how many tokens are cut off it."""
    kept = trainer.kept_rows.numbers[:count] if trainer.kept_rows else range(count)
    numbers = [number for number in kept if number < len(dataset)] if isinstance(dataset, Dataset) else range(count)
    first = dataset.select(numbers) if isinstance(dataset, Dataset) else dataset.take(count)
    rows, options = Rows(first, trainer.processing_class, trainer.args, False, None, "train").untruncated(), trainer.args
    rows.args.shuffle_dataset = False  # of its own copy
    is_prepared = (getattr(options, "dataset_kwargs", None) or {}).get("skip_prepare_dataset")
    examples = first if is_prepared else ScoringTrainer.make_ready(trainer, rows)
    for number, example in zip(numbers, examples, strict=False):  # a stream may have fewer
        parts = [(example, False)] if is_prepared else list(training_parts(example, options))
        for place, (part, is_cut) in enumerate(parts):
            name = f"Row {number}" + (f", part {place + 1} of {len(parts)}" if len(parts) > 1 else "")
            yield name, part, len(example["input_ids"]) - len(part["input_ids"]) if is_cut else 0


def _block(trainer: BLTrainer, name: str, part: dict[str, Any], cut: int, loss: TokenLoss) -> str:
    """Return what there is to read of a row."""
    ids, targets = part["input_ids"], targets_of(part)
    places = [i - len(ids) for i in targets]  # from the end: prompt-learning PEFT puts virtual tokens in front
    p, weight, kept = (values[0].cpu()[places].tolist() for values in (loss.logp.exp(), loss.weight, loss.kept))
    head = f"{name}: {len(ids):,} tokens, {len(targets):,} targets, {sum(kept):,} train"
    if targets:
        head += f"; mean p {sum(p) / len(p):.3f}, mean weight {sum(weight) / len(p):.3f}"
    head += f"; `max_length` cuts {cut:,} tokens off" if cut else ""
    figures = dict(zip(targets, zip(p, weight, kept, strict=True), strict=True))
    return "\n".join([head, *_lines(token_texts(tokenizer_of(trainer.processing_class), ids), figures)])


def _lines(texts: list[str], figures: dict[int, tuple[float, float, bool]]) -> Iterator[str]:
    """Yield a line for each target, and one for the tokens between them. `figures`: p, weight and whether it trains."""
    context = ""
    for i, text in enumerate(texts):
        if i not in figures:
            context += text
            continue
        if context:
            yield _context(context)
        context = ""
        p, weight, trains = figures[i]
        yield f"  p {p:.3f}  {f'weight {weight:.3f}' if trains else 'dropped     '}  {json.dumps(text, ensure_ascii=False)}"
    if context:
        yield _context(context)


def _context(text: str) -> str:
    shown = text if len(text) <= CONTEXT else f"…{text[-CONTEXT:]}"
    return f"  no target              {json.dumps(shown, ensure_ascii=False)}"
