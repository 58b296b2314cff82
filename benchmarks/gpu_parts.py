"""The parts of `gpu_check.py` that measure: each takes a `Setting` and a `Reporter`, and reports rows as they come."""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTTrainer

import accuracy as accuracies
import diagnosis as diagnoses
import head as heads
import step
from bl_trainer import BLTrainer
from bl_trainer.head import blocks, gradients
from common import interleave, peak_memory, ratio, set_up
from gpu_check import Reporter, Setting

kernels = getattr(blocks, "kernels", None)  # which need Triton
CASES = ("full", "full, half kept", "frozen head", "frozen head, half kept")
BAR_SHAPE, BAR_RATIO, BAR_MB = "qwen3-8b", 1.15, round(6 * 2**30 / 1e6)  # of the whole head, trained, 8192 tokens
TILES, FLUSHES = (512, 1024, 2048, 4096), (1280, 3072, 6144)
STEP_ARMS = ("TRL nll", "nll", "neg_p", "nll, p >= 0.2", "full logits, 1 - p")


def options_of(setting: Setting, shape: str, **others: Any) -> argparse.Namespace:
    """Return the options of the benchmarks that the parts are made of, after setting up the process."""
    options = argparse.Namespace(device=setting.device, dtype="bfloat16", rounds=setting.rounds, **others)
    options.shape = "tiny" if setting.small else shape
    set_up(options)
    if setting.small:
        torch.set_num_threads(1)
    return options


def head(setting: Setting, reporter: Reporter) -> None:
    """Ours beside the bare products and other heads: time relative to the products, peak memory beyond the inputs."""
    reporter.note("Time relative to the bare products, peak memory beyond the inputs. `nll` heads have no other objective.")
    absent = {"torch nll", "Liger nll"} - heads.ARMS.keys()
    if absent:
        reporter.note(f"Absent in this torch, or not installed: {', '.join(sorted(absent))}.")
    for shape in ("qwen3-8b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-1.5b"):
        for case in CASES:
            _head(setting, reporter, shape, case, heads.ARMS)


def others(setting: Setting, reporter: Reporter) -> None:
    """Heads whose kernels take minutes to compile, where they are installed."""
    found = [heads.OTHERS[package] for package in heads.OTHERS if find_spec(package) is not None]
    if not found:
        reporter.note("Neither QuACK nor CCE is installed.")
    for name, function in found:
        for shape in ("qwen3-8b", "qwen2.5-0.5b"):
            _head(setting, reporter, shape, "full", {"products": heads.products, "ours": heads.ours, name: function})


def _head(setting: Setting, reporter: Reporter, shape: str, case: str, arms: Mapping[str, Callable[..., None]]) -> None:
    """Report a row of heads on one shape."""
    options = options_of(setting, shape, tokens=64 if setting.small else 8192)
    vocabulary, size = heads.SHAPES[options.shape]
    figures, errors = heads.measure(options.shape, case, options, arms)
    release(setting)
    for arm, reason in errors.items():
        reporter.note(f"{arm} fails for {vocabulary} x {size}, {case}: {reason}")
    seconds = statistics.median(figures["products"]["seconds"])
    operations = 2 * options.tokens * vocabulary * size * (3 if case.startswith("full") else 2)
    cells: dict[str, Any] = {"products": {"ms": 1e3 * seconds, "TFLOP/s": operations / seconds / 1e12}}
    for arm in list(figures)[1:]:
        cells[arm] = {"x": ratio(figures, arm, "products"), "MB": round(statistics.median(figures[arm]["megabytes"]))}
    if (options.shape, case) == (BAR_SHAPE, "full"):
        is_met = cells["ours"]["x"] <= BAR_RATIO and cells["ours"]["MB"] <= BAR_MB
        cells["bar for ours"] = f"{BAR_RATIO} x, {BAR_MB} MB: {'met' if is_met else 'missed'}"
    reporter.row(f"{options.tokens} x {vocabulary} x {size}, {case}", raw=figures, **cells)


def sweep(setting: Setting, reporter: Reporter) -> None:
    """Ours by how many columns a kernel works on at a time, and how many rows are multiplied at a time."""
    options = options_of(setting, "qwen3-8b", tokens=64 if setting.small else 8192)
    inputs = heads.make(options.shape, "full", options)
    before = peak_memory(setting.device, reset=True)
    choices = {f"{tile} columns, {rows} rows": (tile, rows) for tile in TILES for rows in FLUSHES}

    def prepare(arm: str) -> None:
        heads.clear(inputs)
        tile, gradients.FLUSH_ROWS = choices.get(arm, choices[arms[0]])
        if kernels is not None:
            kernels.TILE = tile

    arms = list(choices)
    runs = {"products": partial(heads.products, *inputs)} | {arm: partial(heads.ours, *inputs) for arm in arms}
    with ExitStack() as changed:  # and put back at its end
        changed.enter_context(mock.patch.object(gradients, "FLUSH_ROWS", FLUSHES[0]))
        if kernels is not None:
            changed.enter_context(mock.patch.object(kernels, "TILE", TILES[0]))
        figures = interleave(runs, setting.rounds, setting.device, prepare)
    for arm in choices:
        megabytes = round(statistics.median(figures[arm]["megabytes"]) - before)
        reporter.row(arm, raw=figures[arm], **{"x products": ratio(figures, arm, "products"), "MB": megabytes})


def profile(setting: Setting, reporter: Reporter) -> None:
    """What one call of `objective_head` with its backward runs on the device: kernels by time, launches, and waits."""
    options = options_of(setting, "qwen3-8b", tokens=64 if setting.small else 8192)
    on_gpu = setting.device == "cuda"
    for case in ("full", "full, half kept"):
        inputs = heads.make(options.shape, case, options)
        for _ in range(2):
            heads.ours(*inputs)
            heads.clear(inputs)
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        ) as profiler:
            heads.ours(*inputs)
            if on_gpu:
                torch.cuda.synchronize()
        events = profiler.key_averages()
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        waits = {
            event.key: event.count for event in events if "Synchronize" in event.key or event.key == "aten::_local_scalar_dense"
        }
        if on_gpu:
            reporter.note(f"{case}: {launches} launches; waits: {waits} (one synchronization is the benchmark's own).")
        unit = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        rows = [event for event in events if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
        whole = sum(getattr(event, unit) for event in rows)
        for event in sorted(rows, key=lambda event: -getattr(event, unit))[:12]:
            spent = getattr(event, unit)
            reporter.row(
                f"{case}: {event.key[:80]}", calls=event.count, ms=spent / 1e3, **{"%": 100 * spent / max(whole, 1e-9)}
            )


def steps(setting: Setting, reporter: Reporter) -> None:
    """Forward and backward of a whole model, beside TRL's."""
    options = options_of(setting, "qwen2.5-1.5b", batch=2, length=32 if setting.small else 2048)
    for mode in ("LoRA", "full"):
        figures = step.measure(options.shape, mode == "LoRA", options, STEP_ARMS)
        for arm, found in figures.items():
            seconds = statistics.median(found["seconds"])
            cells = {
                "s": seconds,
                "x TRL nll": ratio(figures, arm, "TRL nll"),
                "tokens/s": round(options.batch * options.length / seconds),
            }
            megabytes = {
                "MB": round(statistics.median(found["megabytes"])),
                "MB x TRL nll": ratio(figures, arm, "TRL nll", "megabytes"),
            }
            reporter.row(f"{options.shape}, {options.batch} x {options.length}, {mode}: {arm}", raw=found, **cells, **megabytes)
        release(setting)


def accuracy(setting: Setting, reporter: Reporter) -> None:
    """Gradients in bfloat16 and float32 against float64, on a checkpoint's hidden states, or on those of random weights."""
    options_of(setting, "qwen2.5-0.5b")
    tokens, (vocabulary, size) = (64, (1003, 32)) if setting.small else (512, heads.SHAPES["qwen2.5-0.5b"])
    for dtype in (torch.bfloat16, torch.float32):
        if setting.checkpoint:
            ids = accuracies.read_ids(setting.checkpoint, Path(__file__).parents[1] / "README.md", tokens, setting.device)
            inputs: tuple[torch.Tensor, ...] = accuracies.states(setting.checkpoint, ids, dtype)
        else:
            inputs = plausible(tokens, vocabulary, size, dtype, setting.device)
        for objective, found in accuracies.measure(*inputs).items():
            cells = {arm: {"in hidden": each[0], "in weight": each[1], "wrong side": each[2]} for arm, each in found.items()}
            reporter.row(f"{str(dtype).removeprefix('torch.')}, {objective}", **cells)
    reporter.note(
        f"Hidden states of {Path(setting.checkpoint).name if setting.checkpoint else 'random weights'}, {tokens} tokens."
    )


def plausible(tokens: int, vocabulary: int, size: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Return random hidden states and a weight whose probabilities spread as a model's do, and targets drawn by them."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator, device=device).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator, device=device) * 4 * size**-0.5).to(dtype)
    logits = hidden.float() @ weight.float().t()
    return hidden, weight, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def diagnosis(setting: Setting, reporter: Reporter) -> None:
    """Diagnosis of a batch beside a bare forward pass with its logits, and a training step."""
    options = options_of(setting, "qwen2.5-1.5b", batch=4, length=32 if setting.small else 1024)
    for name, share in (("all tokens train", 1.0), ("half of them", 0.5)):
        figures = diagnoses.measure(share, options)
        for arm, found in figures.items():
            cells = {"s": statistics.median(found["seconds"]), "x forward pass": ratio(figures, arm, diagnoses.ARMS[0])}
            memory = {"MB": round(statistics.median(found["megabytes"]))}
            reporter.row(f"{options.shape}, {options.batch} x {options.length}, {name}: {arm}", raw=found, **cells, **memory)
        release(setting)


def release(setting: Setting) -> None:
    """Free the memory of a model that is gone."""
    if setting.device == "cuda":
        torch.cuda.empty_cache()


def chain(rows: int, length: int, kinds: int) -> Dataset:
    """Return rows in which two tokens can follow each token. Their NLL can fall to log 2."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(kinds, (rows, length), generator=generator)
    coin = torch.randint(2, (rows, length), generator=generator)
    for column in range(1, length):
        ids[:, column] = (3 * ids[:, column - 1] + 7 + coin[:, column]) % kinds
    listed = (ids + 10).tolist()
    return Dataset.from_dict({"input_ids": listed, "labels": listed})


def train(
    trainer_class: type[SFTTrainer], model: Any, setting: Setting, steps: int, rate: float, peft: Any = None, **keys: Any
) -> list[float]:
    """Train, and return the NLL of each step. Raises AssertionError if one of them, or a gradient, is not finite."""
    batch, length = (2, 32) if setting.small else (8, 256)
    settings = {
        "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": rate, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "bf16": setting.device == "cuda", **keys,
    }  # fmt: skip
    data = chain(64, length, 16 if setting.small else 200)
    with tempfile.TemporaryDirectory() as folder:
        trainer = step.make_trainer(trainer_class, model, data, folder, setting.device, settings, peft)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    values = [entry.get("nll", entry["loss"]) for entry in logs]
    finite = torch.tensor(
        [[entry["loss"], entry["grad_norm"], value] for entry, value in zip(logs, values, strict=True)]
    ).isfinite()
    assert finite.all(), (
        f"not finite: {(~finite.all(1)).sum()} of {len(logs)} steps, the first being {finite.all(1).int().argmin() + 1}"
    )
    return values


def ends(values: list[float]) -> dict[str, float]:
    """Return the means of the first and of the last tenth. Raises AssertionError if the loss doesn't fall."""
    tenth = max(1, len(values) // 10)
    first, last = statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])
    assert last < first, f"the NLL rises from {first:.3f} to {last:.3f}"
    return {"first": first, "last": last}


def qlora(setting: Setting, reporter: Reporter) -> None:
    """A few steps of LoRA on a model in 4 bits."""
    options = options_of(setting, "smollm2-135m")
    compute = torch.bfloat16 if setting.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        step.make_model(options.shape, setting.device, "bfloat16").save_pretrained(folder)
        for name, trainer_class, keys in (
            ("nll", BLTrainer, {}),
            ("neg_p", BLTrainer, {"objective": "neg_p"}),
            ("TRL nll", SFTTrainer, {}),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=compute,
                device_map={"": setting.device},
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
                ),
            )
            lora = LoraConfig(r=16, target_modules="all-linear")
            values = train(trainer_class, model, setting, 10 if setting.small else 30, 3e-3, lora, **keys)
            reporter.row(name, raw=values, steps=len(values), **ends(values))


def run(setting: Setting, reporter: Reporter) -> None:
    """Runs from random weights, in which nothing may be NaN."""
    options = options_of(setting, "smollm2-135m")
    arms: dict[str, tuple[type[SFTTrainer], dict[str, Any]]] = {
        "TRL nll": (SFTTrainer, {}),
        "nll": (BLTrainer, {}),
        "power 0.1": (BLTrainer, {"objective": {"name": "power", "alpha": 0.1}}),
    }
    for name, (trainer_class, keys) in arms.items():
        model = step.make_model(options.shape, setting.device, "float32")
        values = train(trainer_class, model, setting, 20 if setting.small else 200, 1e-3, **keys)
        reporter.row(name, raw=values, steps=len(values), **ends(values))
        release(setting)
