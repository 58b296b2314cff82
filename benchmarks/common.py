"""What the benchmarks share: options, peak memory, and the table of medians and ratios."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, dict[str, list[float]]]  # arm -> "seconds", "megabytes" -> a figure a round
Results = dict[str, Figures]  # what was measured -> its figures


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options that every benchmark takes."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help=f"a folder for {name}-DEVICE.json and {name}-DEVICE.md")


def set_up(options: argparse.Namespace) -> None:
    """Compute as the train verb does, with all cores; collect what is made from now on only."""
    gc.freeze()
    if options.device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_flush_denormal(True)


def peak_memory(device: str, reset: bool = False) -> float:
    """Return the peak since the last reset, in MB: allocated on a GPU, resident on a CPU (Linux)."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1e3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
    prepare: Callable[[str], Any] = lambda arm: None,
    slow: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Figures:
    """Run all arms round by round, in rotating order; the first round warms up.

    `prepare(arm)` comes before each run, outside of its time. An arm that takes more than `slow` times as long as the first
    gets one round. `clock`: that which times a run, in seconds.
    """
    names = list(runs)
    figures: Figures = {name: {"seconds": [], "megabytes": []} for name in names}
    for round_ in range(rounds + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            seconds, megabytes = figures[name].values()
            if round_ > 1 and seconds[0] > slow * figures[names[0]]["seconds"][0]:
                continue
            prepare(name)
            gc.collect()
            peak_memory(device, reset=True)
            synchronize(device)
            start = clock()
            runs[name]()
            synchronize(device)
            if round_:
                seconds.append(clock() - start)
                megabytes.append(peak_memory(device))
    return figures


def ratio(figures: Figures, arm: str, base: str, unit: str = "seconds") -> float:
    """Return the median of the rounds' ratios of an arm to the arm `base`."""
    pairs = zip(figures[arm][unit], figures[base][unit], strict=False)  # a slow arm has one round
    return statistics.median(a / b for a, b in pairs)


def report(name: str, results: Results, base: str, label: str, digits: int, options: argparse.Namespace) -> None:
    """Print a table of medians and of medians of each round's ratios to the arm `base`, and write it to `options.output`."""
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [
        f"{options.shape}, random weights, {options.dtype}, {options.batch} x {options.length} tokens, {options.device} "
        f"({where}), median of {options.rounds} interleaved rounds; torch {version('torch')}, trl {version('trl')}, "
        f"transformers {version('transformers')}, Python {platform.python_version()}.",
        "",
        "| arm | " + " | ".join(f"{what}: s | x {label} | MB | x {label}" for what in results) + " |",
        "|---" * (1 + 4 * len(results)) + "|",
    ]
    for arm in next(iter(results.values())):
        cells = []
        for result in results.values():
            for unit, places in (("seconds", 2), ("megabytes", 0)):
                cells += [f"{statistics.median(result[arm][unit]):.{places}f}", f"{ratio(result, arm, base, unit):.{digits}f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}-{options.device}.md").write_text("\n".join(lines) + "\n")
        settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
        record = {"options": settings, "results": results}
        (options.output / f"{name}-{options.device}.json").write_text(json.dumps(record, indent=2) + "\n")
