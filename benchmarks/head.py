"""Time and peak memory of loss heads, forward and backward: ours, TRL's, full logits, torch's, and the bare products.

`python benchmarks/head.py --help`. All heads get the same random hidden states, weight and targets. Times are interleaved in
one process, a CPU's memory is taken in a process for each; reported are medians, and medians of each round's ratios to the bare
products, which any exact gradient needs: three of (tokens, vocabulary, hidden size), two with a frozen head.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.utils import _ChunkedLogProbFunction

from bl_trainer.head.lm_head import Head
from bl_trainer.head.ops import objective_head
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold
from common import Figures, interleave, peak_memory, ratio, set_up

SLOW = 5  # times the bare products: a head that takes longer gets one round
SHAPES = {
    "smollm2-135m": (49152, 576),
    "qwen2.5-0.5b": (151936, 896),
    "qwen2.5-1.5b": (151936, 1536),
    "qwen3-8b": (151936, 4096),
    "llama-3.1-8b": (128256, 4096),
    "tiny": (1003, 32),
}
# what is trained, share of targets that are ignored, threshold
CASES = {
    "full": (True, 0.0, Threshold()),
    "full, half ignored": (True, 0.5, Threshold()),
    "full, half kept": (True, 0.0, None),
    "frozen head": (False, 0.0, Threshold()),
    "frozen head, half ignored": (False, 0.5, Threshold()),
    "frozen head, half kept": (False, 0.0, None),
}


def products(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """The matrix products that an exact gradient needs at least, on all targets."""
    hidden, table = hidden.detach()[target != -100], weight.detach()
    logits = hidden @ table.t()
    torch.mm(logits, table)
    if weight.requires_grad:
        torch.mm(logits.t(), hidden)


def ours(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """`objective_head` with `neg_p`."""
    rows = (target != -100).nonzero()[:, 0]
    objective = Objective.parse("neg_p")
    head = Head(weight, None, 1.0, None)
    outputs = objective_head(hidden[rows], head, target[rows], lambda statistics: price(objective, threshold, statistics))
    outputs.cost.sum().backward()


def trl(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """TRL's head with `neg_p` on top, as bl_trainer uses it under `loss_head: trl`; compacted, as TRL does on a GPU."""
    is_target = target != -100
    asked = ("log_probs", "entropy", "is_top1")
    logp, *_ = _ChunkedLogProbFunction.apply(hidden[is_target], weight, None, target[is_target], 1.0, 32768, None, 1.0, asked)
    torch.where(threshold.keep(logp), -torch.expm1(logp), 0.0).sum().backward()


def naive(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """All logits in float32."""
    logp = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
    torch.where(threshold.keep(logp) & (target != -100), -torch.expm1(logp), 0.0).sum().backward()


def torchs(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """torch's linear_cross_entropy, which is -log p on all targets whatever the objective."""
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options).backward()


def liger(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """Liger's fused linear cross entropy, which is -log p on all targets too."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    liger_fused_linear_cross_entropy(hidden, weight, target, reduction="sum").backward()


def quack(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """QuACK's chunked linear cross entropy, which is -log p on all targets too."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    chunked_linear_cross_entropy(hidden, weight, target, reduction="sum").backward()


def cce(hidden: Tensor, weight: Tensor, target: Tensor, threshold: Threshold) -> None:
    """Apple's cut cross entropy, which is -log p on all targets too."""
    from cut_cross_entropy import linear_cross_entropy

    linear_cross_entropy(hidden, weight, target, reduction="sum").backward()


ARMS: dict[str, Callable[..., None]] = {"products": products, "ours": ours, "TRL": trl, "full logits": naive}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
    ARMS["torch nll"] = torchs
if torch.cuda.is_available() and find_spec("liger_kernel") is not None:
    ARMS["Liger nll"] = liger
# Heads that compile for minutes, by their packages
OTHERS = {"quack": ("QuACK nll", quack), "cut_cross_entropy": ("CCE nll", cce)}


def make(shape: str, case: str, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Threshold]:
    """Return hidden states, weight, targets and the threshold of a case."""
    vocabulary, size = SHAPES[shape]
    trains_head, ignored, threshold = CASES[case]
    generator = torch.Generator(options.device).manual_seed(0)
    new = {"generator": generator, "device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden = torch.randn(options.tokens, size, **new).requires_grad_()
    weight = (torch.randn(vocabulary, size, **new) * size**-0.5).requires_grad_(trains_head)
    target = torch.randint(vocabulary, (options.tokens,), generator=generator, device=options.device)
    target[torch.rand(options.tokens, generator=generator, device=options.device) < ignored] = -100
    if threshold is None:
        with torch.no_grad():
            logits = hidden[:256].float() @ weight.float().t()
            logp = logits.log_softmax(-1).gather(-1, target[:256, None])
        threshold = Threshold(above=logp.median().exp().item())
    return hidden, weight, target, threshold


def measure(
    shape: str, case: str, options: argparse.Namespace, arms: Mapping[str, Callable[..., None]] = ARMS
) -> tuple[Figures, dict[str, str]]:
    """Return figures of the arms that run, memory being what is allocated beyond the inputs, and why others don't."""
    inputs = make(shape, case, options)
    before, errors = peak_memory(options.device, reset=True), {}
    runs = {arm: partial(function, *inputs) for arm, function in arms.items()}
    for arm in runs.keys() - {"products", "ours"}:
        try:
            runs[arm]()
        except Exception as error:  # of others' code, which may not suit the device
            errors[arm] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            runs.pop(arm)
    figures = interleave(runs, options.rounds, options.device, lambda arm: clear(inputs), slow=SLOW)
    for found in figures.values():
        found["megabytes"] = [megabytes - before for megabytes in found["megabytes"]]
    return figures, errors


def clear(inputs: tuple[Any, ...]) -> None:
    """Drop the gradients of the last run."""
    for tensor in inputs[:2]:
        tensor.grad = None


def peak(arm: str, case: str, options: argparse.Namespace, result: Any) -> None:
    """Put the peak of one run beyond the inputs, in MB, into the queue `result`."""
    set_up(options)
    inputs = make(options.shape, case, options)
    before = peak_memory(options.device, reset=True)
    ARMS[arm](*inputs)
    result.put(peak_memory(options.device) - before)


def memory(arm: str, case: str, options: argparse.Namespace) -> float:
    """Return the peak of one run beyond the inputs in MB, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trl.trainer.utils", "bl_trainer.head"])
    result = context.SimpleQueue()
    process = context.Process(target=peak, args=(arm, case, options, result))
    process.start()
    megabytes = result.get()
    process.join()
    return megabytes


def main() -> None:
    """Run the benchmark, print Markdown tables, and write them with their figures to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--output", type=Path, help="a folder for head-SHAPE-DEVICE-DTYPE.json and .md")
    options = parser.parse_args()
    set_up(options)
    results: dict[str, Figures] = {}
    for case in options.case or CASES:
        results[case], errors = measure(options.shape, case, options)
        for arm, reason in errors.items():
            print(f"{case}, {arm}: {reason}")
        if options.device == "cpu":
            for arm, found in results[case].items():
                found["megabytes"] = [memory(arm, case, options)]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    vocabulary, size = SHAPES[options.shape]
    lines = [
        f"{options.shape}'s head (vocabulary {vocabulary}, hidden size {size}), {options.tokens} tokens, {options.dtype}, "
        f"{options.device} ({where}), median of {options.rounds} interleaved rounds, but one for a head that takes "
        f"more than {SLOW} times the products; torch {version('torch')}, trl {version('trl')}, Python "
        f"{platform.python_version()}. In each cell: time relative to the bare products, MB beyond the inputs.",
        "",
        "| case | products: s | " + " | ".join(list(ARMS)[1:]) + " |",
        "|---|---" + "|---" * (len(ARMS) - 1) + "|",
    ]
    for case, result in results.items():
        cells = [f"{statistics.median(result['products']['seconds']):.2f}"]
        for arm in list(ARMS)[1:]:
            known = arm in result
            megabytes = statistics.median(result[arm]["megabytes"]) if known else 0
            cells.append(f"{ratio(result, arm, 'products'):.2f}, {megabytes:.0f} MB" if known else "-")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"head-{options.shape}-{options.device}-{options.dtype}"
        (options.output / f"{name}.md").write_text("\n".join(lines) + "\n")
        settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
        record = {"options": settings, "results": results}
        (options.output / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
