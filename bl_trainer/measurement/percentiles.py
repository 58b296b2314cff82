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
from torch import Tensor

from .._util.files import write_text
from .._util.tensors import local
from ..errors import MeasurementError
from ..objectives.threshold import spell_probability
from ..tokens.names import NOT_FOR_THE_MODEL
from .forward import count_targets, logger, measure, score_batch, without_targets
from .histogram import PERCENTILE_ERROR, ProbabilityHistogram

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
    digests = gather_object([_fingerprint(trainer, sample)]) if _is_sharded(trainer) else [_fingerprint(trainer, sample)]
    key = hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
    path = CACHE / f"{key}.json"
    found = [_read(path) if trainer.accelerator.is_main_process else None]
    broadcast_object_list(found)
    if found[0] is None:
        histogram = ProbabilityHistogram()
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        mine = sample[rank::world] or sample[:1]
        if rank >= len(sample):
            mine = [without_targets(mine[0])]

        def observe(model: Any, batch: dict[str, Any]) -> None:
            histogram.add(score_batch(trainer, model, batch).logp)

        expected = sum(int(count_targets(batch)) for batch in sample)
        tokens, _ = measure(trainer, mine, observe, name="Measuring probabilities", expected=expected)
        if not tokens:
            raise MeasurementError("No example of the training set has a target token, so `above_percentile` has no meaning.")
        if world > 1:
            counts = trainer.accelerator.reduce(histogram.counts.to(trainer.accelerator.device), reduction="sum")
            histogram.counts.copy_(counts.cpu())
        if trainer.accelerator.is_main_process:
            _write(path, histogram)
        source = "measured now"
    else:
        histogram, source = ProbabilityHistogram.from_state(found[0]), f"from {path}"
    value = histogram.cut(percentile)
    trainer.accelerator.print(
        f"The threshold is p >= {spell_probability(value, 6)}: percentile {percentile:g} of {int(histogram.counts.sum())} "
        f"target tokens under the starting model ({source}), off by at most {PERCENTILE_ERROR:.2%} of min(p, 1 - p)."
    )
    return value


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


def _fingerprint(trainer: Any, sample: list[dict[str, Any]]) -> str:
    """Return a hash of the model (its configuration, precision, a sample of each tensor and its sum) and of the batches.

    Tensors are parameters, buffers, and what quantised layers store beside them. A LoRA adapter that does nothing yet is left
    out, so that runs of other rank or seed share the measurement.
    """
    config = {k: v for k, v in trainer.model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    setting = [3, trainer.args.bf16, trainer.args.fp16, json.dumps(config, sort_keys=True, default=str)]
    digest = hashlib.sha256(repr(setting).encode())
    tensors = _tensors(trainer.model)
    for name, tensor in tensors.items():
        pair = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if pair in tensors and "lora_" in name and not tensors[pair].any():
            continue
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_digest(tensor))
    for batch in sample:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor) and name not in NOT_FOR_THE_MODEL:
                digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return by name all that the model computes with, of sharded tensors this process's part."""
    found: dict[str, Tensor] = dict(model.named_buffers())  # among them those that aren't saved
    for prefix, module in model.named_modules():
        # One module at a time, since the state of a sharded model is gathered
        module._save_to_state_dict(found, f"{prefix}." if prefix else "", True)
    return {name: local(tensor) for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _digest(tensor: Tensor) -> bytes:
    """Return a sample of a tensor and its sum."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    step = max(1, tensor.numel() // 1024)
    wide = torch.float32 if tensor.is_floating_point() else torch.int64  # whose sum is exact
    return torch.cat([tensor.flatten()[::step].to(wide), tensor.sum(dtype=wide)[None]]).cpu().numpy().tobytes()


def _is_sharded(trainer: Any) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"Can't read {path} ({error}): the probabilities are measured anew.")
        return None


def _write(path: Path, histogram: ProbabilityHistogram) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(histogram.state()))
    except OSError as error:
        logger.warning(f"Can't keep the measured probabilities in {path} ({error}): the next run measures them anew.")
