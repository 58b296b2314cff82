"""The percentiles of p that thresholds ask for."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from huggingface_hub.constants import HF_HOME

from .._util.files import write_text
from .._util.logs import get_logger
from ..errors import MeasurementError
from ..objectives.threshold import spell_probability
from .fingerprint import fingerprint
from .forward import count_targets, measure, score_batch, without_targets
from .histogram import PERCENTILE_ERROR, ProbabilityHistogram

logger = get_logger(__name__)

PERCENTILE_TOKENS = 100_000  # target tokens that a percentile threshold is measured on

CACHE = Path(HF_HOME) / "bl_trainer" / "probabilities"


def resolve_percentile(trainer: Any, percentile: float) -> float:
    """Return this percentile of p over the first `PERCENTILE_TOKENS` target tokens of the shuffled training set.

    The probabilities measured are kept in `CACHE` under a fingerprint of the model and of the sampled batches, and taken from
    there the next time. Raises MeasurementError if there are no target tokens, or on NaN.
    """
    sample = _sample(trainer)
    if not sample:
        raise MeasurementError("There is no example with a target token. Raise `max_length`, if it cuts all answers off.")
    path, is_main = CACHE / f"{_key(trainer, sample)}.json", trainer.accelerator.is_main_process
    found = [_read(path) if is_main else None]
    broadcast_object_list(found)
    if found[0] is None:
        histogram, source = _measured(trainer, sample), "measured now"
        if is_main:
            _write(path, histogram)
    else:
        histogram, source = ProbabilityHistogram.from_state(found[0]), f"from {path}"
    value = histogram.cut(percentile)
    trainer.accelerator.print(
        f"The threshold is p >= {spell_probability(value, 6)}: percentile {percentile:g} of {int(histogram.counts.sum())} "
        f"target tokens under the starting model ({source}), off by at most {PERCENTILE_ERROR:.2%} of min(p, 1 - p)."
    )
    return value


def _measured(trainer: Any, sample: list[dict[str, Any]]) -> ProbabilityHistogram:
    """Return the probabilities of the sample's target tokens, of all processes; each measures its share."""
    accelerator, histogram = trainer.accelerator, ProbabilityHistogram()
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = sample[rank::world] or [without_targets(sample[0])]

    def observe(model: Any, batch: dict[str, Any]) -> None:
        histogram.add(score_batch(trainer, model, batch).logp)

    expected = sum(int(count_targets(batch)) for batch in sample)
    tokens, _ = measure(trainer, mine, observe, name="Measuring probabilities", expected=expected)
    if not tokens:
        raise MeasurementError("No example of the training set has a target token, so `above_percentile` has no meaning.")
    if world > 1:
        histogram.counts.copy_(accelerator.reduce(histogram.counts.to(accelerator.device), reduction="sum").cpu())
    return histogram


def _sample(trainer: Any) -> list[dict[str, Any]]:
    """Return collated batches with `PERCENTILE_TOKENS` target tokens, or all there are; the same in every process."""
    dataset: Any = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    if not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        rows: Iterator[Any] = (dataset[i] for i in order)
    else:
        rows = iter(dataset.shuffle(seed=0, buffer_size=1000))  # packed rows come longest first
    batches, tokens = [], 0
    while tokens < PERCENTILE_TOKENS:
        examples = list(itertools.islice(rows, size))
        if not examples:
            break
        batches.append(trainer.data_collator(examples))
        tokens += int(count_targets(batches[-1]))
    return batches


def _key(trainer: Any, sample: list[dict[str, Any]]) -> str:
    own = fingerprint(trainer, sample)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    digests = gather_object([own]) if is_sharded else [own]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"Cannot read {path} ({error}): the probabilities are measured anew.")
        return None


def _write(path: Path, histogram: ProbabilityHistogram) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(histogram.state()))
    except OSError as error:
        logger.warning(f"Can't keep the measured probabilities in {path} ({error}): the next run measures them anew.")
