"""What a diagnosis found."""

import math
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..measurement.histogram import PERCENTILE_ERROR, ProbabilityHistogram
from ..measurement.means import VALUES
from ..measurement.reader import CONFLICT_ENTROPY, CONFLICT_PROB
from ..measurement.results import EDGE, KINDS, OTHER, RELATIVE, Comparison, Measurement
from ..objectives.composition import spell
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from ..recipe.recipe import Recipe
from .advice import SWEPT_PERCENTILE, judge, recommend
from .continuum import place

SCHEMA = 1

BUCKETS = 10


def gradient_mass(histogram: ProbabilityHistogram, objective: Objective, threshold: Threshold) -> dict[str, Any]:
    """Say where an objective's gradient comes from, on tokens counted in the rows `KINDS` of `histogram`.

    A token's pull on its own logit is W = -f'(p) p (1 - p), 0 outside the threshold. `buckets`: share of the sum of W by tenth
    of p; `kinds`: share by kind of token; `effective_tokens`: (sum W)^2 / sum W^2; `scale`: sum W relative to NLL's;
    `gradient_weight`: mean of -f'(p) p, as training reports it. Exact to the histogram's resolution, in float64.
    """
    log_p, log_rest = histogram.values()
    used = histogram.counts[0] > 0
    log_p, rest = log_p[used].clamp(min=-104.0), log_rest[used].exp()  # -104: the least float32
    counts = histogram.counts[:, used].double()
    weight = torch.where(threshold.keep(log_p), objective.gradient_weight(log_p), 0.0)
    pull = weight * rest
    total = (counts[0] * pull).sum()
    bucket = (log_p.exp() * BUCKETS).long().clamp(max=BUCKETS - 1)
    buckets = torch.zeros(BUCKETS, dtype=torch.float64).index_add_(0, bucket, counts[0] * pull)
    squares = (counts[0] * pull**2).sum()
    return {
        "objective": objective.to_dict(),
        "threshold": threshold.to_dict(),
        "buckets": (buckets / total).nan_to_num().tolist(),
        "kinds": dict(zip(KINDS, ((counts * pull).sum(1) / total).nan_to_num().tolist(), strict=True)),
        "effective_tokens": (total**2 / squares).nan_to_num().item(),
        "scale": (total / (counts[0] * rest).sum()).nan_to_num().item(),
        "gradient_weight": ((counts[0] * weight).sum() / counts[0].sum()).item(),
        "kept": (counts[0][threshold.keep(log_p)].sum() / counts[0].sum()).item(),
    }


def summarise(
    measurement: Measurement, recipe: Recipe, percentiles: list[float], learnability: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the report of a measurement, all but the examples; a mapping fit for JSON. `learnability`: the probe's."""
    total, histogram = measurement.total, measurement.histogram
    mean, interval = total.mean("prob"), total.interval("prob")
    ranks = sorted({*map(float, range(1, 100)), *percentiles})
    m, first, second = measurement.spread.tolist()
    spread = math.sqrt(max(0.0, second / m - (first / m) ** 2) * m / (m - 1)) if m > 1 else 0.0
    kinds = {
        kind: {"tokens": int(row[0]), **{name: row[i + 1].item() / row[0].item() for i, name in enumerate(VALUES)}}
        for kind, row in zip(KINDS, measurement.kinds, strict=True)
        if row[0]
    }
    quantiles = dict(zip([f"{rank:.10g}" for rank in ranks], histogram.percentiles(ranks), strict=True))
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in ("bl_trainer", "trl", "transformers", "datasets", "torch")},
        "model": recipe.model.model_name_or_path,
        "data": recipe.script.dataset_name or [entry.path for entry in recipe.mixture.datasets],
        "recipe": {
            "objective": recipe.training.objective,
            "threshold": recipe.training.threshold,
            "learning_rate": recipe.training.learning_rate,
            "chooses_by_loss": (recipe.training.metric_for_best_model or "").endswith("loss"),
        },
        "total": total.summary(),
        "placement": place(mean, interval),
        "percentiles": quantiles,
        "percentile_error": PERCENTILE_ERROR,
        "examples": {
            "mean": first / m,
            "deviation": spread,
            "percentiles": dict(zip(("10", "50", "90"), measurement.examples.percentiles([10, 50, 90]), strict=True)),
            "histogram": measurement.examples.buckets(20).tolist(),
        },
        "histogram": histogram.buckets(50).tolist(),
        "kinds": kinds,
        "positions": _positions(measurement.positions),
        "calibration": {"error": measurement.calibration.error(), "curve": measurement.calibration.curve()},
        "conflicts": {"entropy": CONFLICT_ENTROPY, "prob": CONFLICT_PROB, "share": total.mean("conflicts")},
        "groups": {name: means.summary() for name, means in measurement.groups.items()},
        "groups_cut": OTHER in measurement.groups,
        "has_prompts": bool(measurement.responses[1] > measurement.responses[0] / 2),
    }
    if learnability is not None:
        verdict, why = judge(learnability)
        report["learnability"] = {**learnability, "verdict": verdict, "why": why}
    cut, own = Threshold(above=histogram.cut(SWEPT_PERCENTILE)), _own(recipe, histogram)
    report["objectives"] = _candidates(histogram, own, cut)
    report["recommendation"] = recommend(report, cut)
    if not _depends_on_p_alone(own[0]):
        others = [name for name in own[0].statistics if name not in ("progress", "is_special")]
        others += ["which tokens are special"] if "is_special" in own[0].statistics else []
        others += ["training progress"] if "progress" in own[0].at(0).statistics else []
        report["recommendation"]["warnings"].append(
            f"Where the gradient of {spell(own[0].to_dict())} comes from is not shown: it depends on more than p "
            f"({', '.join(others)})."
        )
    if measurement.unmarked:
        report["recommendation"]["warnings"].append(
            f"In {measurement.unmarked.item() / total.num_tokens:.1%} of the tokens the chat template's own could not be told "
            "from content: messages hold more than text (tool calls, reasoning), the template changes them, or the tokenizer "
            "is a slow one."
        )
    return report


def _positions(sums: Tensor) -> dict[str, Any]:
    tokens, prob = sums
    mean = torch.where(tokens > 0, prob / tokens.clamp(min=1), torch.nan)
    parts = {"first": slice(0, EDGE), "last": slice(EDGE, 2 * EDGE), "relative": slice(2 * EDGE, 2 * EDGE + RELATIVE)}
    return {
        name: [[int(n), None if n == 0 else p] for n, p in zip(tokens[part].tolist(), mean[part].tolist(), strict=True)]
        for name, part in parts.items()
    }


def _own(recipe: Recipe, histogram: ProbabilityHistogram) -> tuple[Objective, Threshold]:
    """Return the recipe's objective and threshold, a percentile being taken from the tokens measured."""
    threshold = Threshold.parse(recipe.training.threshold)
    if not threshold.resolved:
        cut = histogram.cut(float(threshold.above_percentile or 0))
        above = min(cut, threshold.below)  # training refuses what exceeds `below`
        threshold = replace(threshold, above=above, above_percentile=None)
    return Objective.parse(recipe.training.objective or "nll"), threshold


def _candidates(histogram: ProbabilityHistogram, own: tuple[Objective, Threshold], cut: Threshold) -> list[dict[str, Any]]:
    specs: list[Any] = ["nll", {"name": "power", "alpha": 0.5}, "neg_p", {"name": "power", "alpha": 10}]
    candidates = [(Objective.parse(spec), Threshold()) for spec in specs] + [(Objective.parse("nll"), cut)]
    if _depends_on_p_alone(own[0]):  # a scheduled one is shown as it begins and as it ends
        for progress in (0, 1) if "progress" in own[0].statistics else (0,):
            mine = _plain_nll(own[0].at(progress)), own[1]
            candidates += [mine] if mine not in candidates else []
    return [gradient_mass(histogram, objective, threshold) for objective, threshold in candidates]


def _plain_nll(objective: Objective) -> Objective:
    """Return `nll` for a power of 0, as which a schedule may begin."""
    return Objective("nll") if objective == Objective("power", {"alpha": 0}) else objective


def _depends_on_p_alone(objective: Objective) -> bool:
    """Whether a token's weight at a given time depends on nothing but its p."""
    return not objective.at(0).statistics


def summarise_comparison(comparison: Comparison) -> dict[str, Any]:
    """Return the report of a comparison; a mapping fit for JSON."""
    total = comparison.total
    return {
        **total.summary(),
        "intervals": {name: total.interval(name) for name in total.names},
        "calibration": {
            name: {"error": calibration.error(), "curve": calibration.curve()}
            for name, calibration in comparison.calibration.items()
        },
        "moved": comparison.moved.tolist(),
    }
