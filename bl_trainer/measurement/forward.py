"""One pass of a trainer's model over target tokens, without gradient; and the percentiles that thresholds ask for.

The pass goes through transformers' evaluation loop, so that the model is placed, wrapped, sharded and cast as in training.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from tqdm.auto import tqdm

from .head import score
from .interruption import NOT_FOR_THE_MODEL, local
from .objectives import spell_probability
from .statistics import PERCENTILE_ERROR, MeasurementError, ProbabilityHistogram

logger = get_logger(__name__)

PERCENTILE_TOKENS = 100_000  # target tokens that a percentile threshold is measured on
CACHE = Path(HF_HOME) / "bl_trainer" / "probabilities"


def measure(
    trainer: Any,
    batches: Iterable[dict[str, Any]],
    observe: Callable[..., None],
    max_tokens: int | None = None,
    name: str = "",
    expected: int | None = None,
) -> tuple[int, bool]:
    """Call `observe(model, batch)` on each of this process's batches; `name` and `expected` tokens are for the progress bar.

    Returns the number of target tokens of all processes, and whether `max_tokens` left some out.

    `batches`: collated, with `labels`. Stops after the batch with which `max_tokens` target tokens are reached over all
    processes. A process that runs out of batches gets its last one again with no target in it, so that all processes make
    as many forward passes, as sharded models need. Raises MeasurementError if a process gets no batch at all.
    """
    hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    with tqdm(total=expected or max_tokens, desc=name, unit=" tokens", unit_scale=True, disable=hidden) as bar:
        dealt = _Lockstep(batches, trainer.accelerator, max_tokens, bar)
        trainer.observe_instead(observe, dealt)
    return dealt.num_tokens, dealt.is_cut


class _Lockstep:
    """Deals a process's batches out in step with all other processes; has no length."""

    def __init__(self, batches: Iterable[dict[str, Any]], accelerator: Any, max_tokens: int | None, bar: Any):
        self.batches, self.accelerator, self.max_tokens, self.bar = batches, accelerator, max_tokens, bar
        self.num_tokens, self.is_cut = 0, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last: Any = None
        for batch in itertools.chain(self.batches, itertools.repeat(None)):
            if batch is None and last is None:
                one = self.accelerator.num_processes == 1
                raise MeasurementError(
                    f"{'There is' if one else f'Process {self.accelerator.process_index} got'} no example with a target "
                    f"token. Raise `max_length`, if it cuts all answers off{'' if one else ', or launch fewer processes'}."
                )
            own = 0 if batch is None else int(count_targets(batch))
            tokens, busy = self._sum(own, batch is not None)
            self.is_cut = bool(busy) and self.max_tokens is not None and self.num_tokens >= self.max_tokens
            if not busy or self.is_cut:
                return
            last = last if batch is None else batch
            self.num_tokens += tokens
            yield dict(last) if batch is not None else without_targets(last)
            self.bar.update(tokens)

    def _sum(self, tokens: int, busy: bool) -> tuple[int, int]:
        if self.accelerator.num_processes == 1:
            return tokens, int(busy)
        counts = torch.tensor([tokens, int(busy)], device=self.accelerator.device)
        first, second = self.accelerator.reduce(counts, reduction="sum").tolist()
        return first, second


def count_targets(batch: dict[str, Any]) -> Tensor:
    """Return the number of target tokens of a collated batch: labels that are not -100, the first column apart."""
    return (batch["labels"][:, 1:] != -100).sum()


def without_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with nothing to measure in it."""
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def score_batch(trainer: Any, model: Any, batch: dict[str, Any], use: Callable[..., Any] = score) -> Any:
    """Return `use(hidden, head, target)` of a batch's target tokens."""
    inputs = trainer._prepare_inputs({key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL})
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return model(**inputs, use=use)[0]


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
        part = path.with_suffix(".part")
        part.write_text(json.dumps(histogram.state()))
        part.replace(path)
    except OSError as error:
        logger.warning(f"Can't keep the measured probabilities in {path} ({error}): the next run measures them anew.")
