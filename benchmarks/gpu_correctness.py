"""Whether the loss head computes on this device what full logits in float64 say.

All objectives, kinds of heads, types and thresholds; vocabularies and numbers of tokens at which kernels have tails; one large
shape. Thresholds lie where no token is near, so that rounding moves none across.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers.utils import is_triton_available

from bl_trainer.head.blocks import Blocks
from bl_trainer.head.lm_head import Head
from bl_trainer.head.ops import objective_head, score
from bl_trainer.objectives.contract import STATISTICS
from bl_trainer.objectives.objective import OBJECTIVES, Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold
from gpu_check import Reporter, Setting

PARAMETERS = {"alpha": 10.0, "tau": 0.3, "mean_p": 0.6}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.7},
    "softcap": {"bias": True, "scale": 1.3, "softcap": 5.0},
}
# Largest relative errors of gradients: a few roundings of a number
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
LOGP_BOUND = 1e-4  # logits are float32 whatever the type
PROGRESS = 0.5


class Case(NamedTuple):
    """What a head is tried on."""

    spec: Any
    kind: str
    dtype: torch.dtype
    threshold: str = "all"
    tokens: int = 53
    vocabulary: int = 1029
    size: int = 48


class Errors(NamedTuple):
    """`logp`: largest absolute error of log p and entropy. `gradients`: relative errors in hidden states, weight, bias."""

    logp: float
    gradients: list[float]
    other: tuple[str, ...]  # what should be equal and isn't

    def wrong(self, dtype: torch.dtype) -> bool:
        """Return whether that is more than rounding; NaN is."""
        return bool(self.other) or not self.logp <= LOGP_BOUND or not max(self.gradients) <= BOUNDS[dtype]


def specs() -> list[Any]:
    """Return every objective, with its required parameters, and one composed of several."""
    found: list[Any] = []
    for name, function in OBJECTIVES.items():
        parameters = inspect.signature(function).parameters.values()
        required = [each.name for each in parameters if each.default is each.empty and each.name not in ("logp", *STATISTICS)]
        found.append({"name": name, **{key: PARAMETERS[key] for key in required}})
    return [*found, {"name": "neg_p", "floor": 0.1, "mix": {"nll": 0.2, "mile": 0.1}}]


def cases(small: bool) -> Iterator[Case]:
    """Yield all cases, or a few of them."""
    dtypes = list(BOUNDS)
    for dtype in dtypes:
        for kind in HEADS:
            chosen = specs() if not small or (dtype, kind) == (torch.float32, "softcap") else ["neg_p", "mile"]
            yield from (Case(spec, kind, dtype) for spec in chosen)
        for threshold in ("above", "below", "none"):
            yield Case("nll", "softcap", dtype, threshold)
            yield Case("mile", "plain", dtype, threshold)
    for vocabulary in (17, 1003) if small else (17, 1000, 1003, 1024, 2048, 4096, 5003, 50257):
        for tokens in (0, 1, 53) if small else (0, 1, 7, 300):
            for dtype in (torch.float32,) if small else dtypes:
                yield Case("nll", "bias", dtype, "all", tokens, vocabulary)
                yield Case("mile", "plain", dtype, "above", tokens, vocabulary)


def make(case: Case, device: str) -> tuple[Tensor, Head, Tensor]:
    """Return hidden states, a head and targets. Half of the targets are the most probable tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int, spread: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device)
        return (made * spread).to(case.dtype)

    options = HEADS[case.kind]
    bias = new(case.vocabulary).requires_grad_() if options.get("bias") else None
    hidden = new(case.tokens, case.size).requires_grad_()
    weight = new(case.vocabulary, case.size, spread=3 * case.size**-0.5).requires_grad_()
    target = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    target[::2] = (hidden @ weight.t()).argmax(-1)[::2]
    return hidden, Head(weight, bias, options.get("scale", 1.0), options.get("softcap")), target


def widened(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Return the same numbers in float64."""

    def wide(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return wide(hidden), Head(wide(head.weight), wide(head.bias), head.scale, head.softcap)


def full(hidden: Tensor, head: Head) -> Tensor:
    """Return the log-probabilities of all tokens from full logits."""
    logits = (hidden @ head.weight.t() + (0 if head.bias is None else head.bias)) * head.scale
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)).log_softmax(-1)


def reference(
    objective: Objective, threshold: Threshold, log_probs: Tensor, target: Tensor, ref_logp: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Return the costs, with their graph, and the statistics."""
    logp = log_probs.gather(1, target[:, None])[:, 0]
    known = {
        "logp": logp,
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).detach(),
        "is_top1": log_probs.argmax(-1) == target,
        "rank": (log_probs > logp[:, None]).sum(-1),
        "ref_logp": None if ref_logp is None else ref_logp.to(logp.dtype),
        "label": target,
        "progress": PROGRESS,
    }
    given = {name: value for name, value in known.items() if name in objective.statistics}
    return torch.where(threshold.keep(logp), objective(logp, **given), 0.0), known


def threshold_of(name: str, logp: Tensor) -> Threshold:
    """Return a threshold that keeps all, some, or none of the tokens, in the widest gap of the middle of their p."""
    if name == "all" or len(logp) < 4:
        return Threshold(above=1.0) if name == "none" else Threshold()
    p = logp.detach().exp().sort().values
    middle = p[len(p) // 4 : len(p) - len(p) // 4]
    widest = middle.diff().argmax()
    edge = ((middle[widest] + middle[widest + 1]) / 2).item()
    return {"above": Threshold(above=edge), "below": Threshold(below=edge), "none": Threshold(above=1.0)}[name]


def errors(case: Case, device: str) -> Errors:
    """Return how far the head is from the reference."""
    objective = Objective.parse(case.spec)
    hidden, head, target = make(case, device)
    wide_hidden, wide_head = widened(hidden, head)
    log_probs = full(wide_hidden, wide_head)
    ref_logp = log_probs.detach().gather(1, target[:, None])[:, 0].float() * 1.1
    threshold = threshold_of(case.threshold, log_probs.gather(1, target[:, None])[:, 0])
    cost, known = reference(objective, threshold, log_probs, target, ref_logp)
    extras = tuple({"log_sum_sq_probs"} & set(objective.statistics))
    columns = {"ref_logp": ref_logp} if "ref_logp" in objective.statistics else {}

    def priced(statistics: dict[str, Tensor]) -> Any:
        return price(objective, threshold, {**statistics, "progress": PROGRESS})

    ours = objective_head(hidden, head, target, priced, extras, columns)
    scores, kept = score(hidden, head, target), threshold.keep(known["logp"])
    leaves, wide_leaves = (
        [each for each in (h, *parts[:2]) if each is not None] for h, parts in ((hidden, head), (wide_hidden, wide_head))
    )
    found, wanted = torch.autograd.grad(0.3 * ours.cost.sum(), leaves), torch.autograd.grad(0.3 * cost.sum(), wide_leaves)
    equal = {
        "kept": torch.equal(ours.kept, kept),
        "is_top1": torch.equal(ours.is_top1, known["is_top1"]),
        "rank": scores.rank is not None and torch.equal(scores.rank, known["rank"]),
        "dropped tokens weigh nothing": not found[0][~kept].any(),
    }
    gaps = [ours.scores.logp - known["logp"], ours.scores.entropy - known["entropy"], scores.logp - known["logp"]]
    worst = max(gap.abs().max().item() for gap in gaps) if case.tokens else 0.0
    return Errors(
        worst,
        [relative(*pair) for pair in zip(found, wanted, strict=True)],
        tuple(name for name, same in equal.items() if not same),
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted|, less what the type of `found` can't hold; without wanted, whether any is found."""
    norm, step = wanted.norm().item(), torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    error = (found.double() - wanted).norm().item()
    return max(0.0, error - step * found.numel() ** 0.5) / norm if norm else float(found.any())


@contextmanager
def interpreted(device: str) -> Iterator[str]:
    """Let the kernels run on a CPU under Triton's interpreter; yields which of the two ways the head takes."""
    if device == "cuda":
        yield "kernels"
    elif not is_triton_available() or os.environ.get("TRITON_INTERPRET") != "1":
        yield "eager"
    else:
        original = Blocks.__init__

        def with_kernels(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.uses_triton = self.wide == torch.float32

        with mock.patch.object(Blocks, "__init__", with_kernels):
            yield "kernels, interpreted"


def check(setting: Setting, reporter: Reporter) -> None:
    """Try all cases. Raises AssertionError that names those that are wrong."""
    groups: dict[str, list[Case]] = {}
    for case in cases(setting.small):
        group = case.kind if case.threshold == "all" else "thresholds"
        if (case.tokens, case.vocabulary) != (53, 1029):
            group = f"vocabulary {case.vocabulary}"
        groups.setdefault(f"{str(case.dtype).removeprefix('torch.')}, {group}", []).append(case)
    wrong: list[str] = []
    with interpreted(setting.device) as way:
        for group, members in groups.items():
            found = [_tried(partial(errors, case, setting.device), case, wrong) for case in members]
            good = [each for each in found if each is not None]
            cells: dict[str, Any] = {"cases": len(members), "log p": max((each.logp for each in good), default=0.0)}
            for place, name in enumerate(("in hidden", "in weight", "in bias")):
                cells[name] = max((each.gradients[place] for each in good if len(each.gradients) > place), default="-")
            count = sum(each is None or each.wrong(case.dtype) for each, case in zip(found, members, strict=True))
            reporter.row(group, way=way, **cells, wrong=count)
        _large(setting, reporter, wrong, way)
    if wrong:
        raise AssertionError(f"{len(wrong)} cases are wrong: {'; '.join(wrong[:5])}")


def _tried(run: Callable[[], Errors], case: Case, wrong: list[str]) -> Errors | None:
    """Return the errors of a case, None where it fails; note it if it is wrong."""
    try:
        found = run()
    except Exception as error:  # a kernel that isn't compiled for one case says nothing of the others
        wrong.append(f"{tuple(case)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    if found.wrong(case.dtype):
        wrong.append(f"{tuple(case)}: {found}")
    return found


def _large(setting: Setting, reporter: Reporter, wrong: list[str], way: str) -> None:
    """Try a whole batch in bfloat16. The float64 reference takes a few rows at a time."""
    tokens, vocabulary, size = (300, 5003, 32) if setting.small else (8192, 151936, 896)
    for threshold in ("all", "above"):
        case = Case("neg_p", "plain", torch.bfloat16, threshold, tokens, vocabulary, size)
        found = _tried(partial(_errors_in_parts, case, setting.device), case, wrong)
        if found is not None:
            names = zip(("in hidden", "in weight"), found.gradients, strict=True)
            cells = {"cases": 1, "log p": found.logp, **dict(names), "wrong": int(found.wrong(case.dtype))}
            reporter.row(f"bfloat16, {tokens} x {vocabulary} x {size}, {threshold}", way=way, **cells)


def _errors_in_parts(case: Case, device: str) -> Errors:
    objective, (hidden, head, target) = Objective.parse(case.spec), make(case, device)
    wide_hidden, wide_head = widened(hidden, head)
    parts = list(zip(wide_hidden.detach().split(512), target.split(512), strict=True))
    with torch.no_grad():
        logp = torch.cat([full(rows, wide_head).gather(1, of[:, None])[:, 0] for rows, of in parts])
    threshold = threshold_of(case.threshold, logp)
    ours = objective_head(hidden, head, target, lambda statistics: price(objective, threshold, statistics))
    found, wanted = torch.autograd.grad(ours.cost.sum(), (hidden, head.weight)), []
    total = torch.zeros_like(wide_head.weight)
    for rows, of in parts:
        cost, _ = reference(objective, threshold, full(rows.requires_grad_(), wide_head), of)
        in_rows, in_weight = torch.autograd.grad(cost.sum(), (rows, wide_head.weight))
        wanted.append(in_rows)
        total += in_weight
    gap = (ours.scores.logp - logp).abs().max().item()
    same = torch.equal(ours.kept, threshold.keep(logp))
    return Errors(gap, [relative(found[0], torch.cat(wanted)), relative(found[1], total)], () if same else ("kept",))
