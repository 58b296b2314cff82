"""What is made of a measurement: the report, and where each objective's gradient comes from."""

import math
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..measurement.histogram import PERCENTILE_ERROR, ProbabilityHistogram
from ..measurement.means import VALUES
from ..measurement.reader import CONFLICT_ENTROPY, CONFLICT_PROB
from ..measurement.results import EDGE, KINDS, OTHER, RELATIVE, Calibration, Comparison, Measurement
from ..objectives.objective import Objective
from ..objectives.temperature import effective_temperature
from ..objectives.threshold import Threshold
from ..recipe.recipe import Recipe
from ..tokens.vocabulary import token_texts
from .advice import SWEPT_PERCENTILE, recommend
from .continuum import place
from .report import (
    BUCKETS,
    SCHEMA,
    Bin,
    Compared,
    Conflicts,
    Curve,
    Examples,
    Gradient,
    Kind,
    Positions,
    RecipeFacts,
    Reliability,
    Report,
    Total,
)
from .warnings import depends_on_p_alone


def gradient_mass(histogram: ProbabilityHistogram, objective: Objective, threshold: Threshold) -> Gradient:
    """Say where an objective's gradient comes from, on tokens counted in the rows `KINDS` of `histogram`.

    A token's pull on its own logit is W = -f'(p) p (1 - p), 0 outside the threshold. `buckets`: share of the sum of W by tenth
    of p; `kinds`: share by kind of token; `effective_tokens`: (sum W)^2 / sum W^2; `scale`: sum W relative to NLL's;
    `gradient_weight`: mean of -f'(p) p, as training reports it. These are exact to the histogram's resolution, in float64.
    `temperatures`: the effective ones, of the objective alone.
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
    return Gradient(
        objective=objective.to_dict(),
        threshold=threshold.to_dict(),
        buckets=(buckets / total).nan_to_num().tolist(),
        kinds=dict(zip(KINDS, ((counts * pull).sum(1) / total).nan_to_num().tolist(), strict=True)),
        effective_tokens=(total**2 / squares).nan_to_num().item(),
        scale=(total / (counts[0] * rest).sum()).nan_to_num().item(),
        gradient_weight=((counts[0] * weight).sum() / counts[0].sum()).item(),
        kept=(counts[0][threshold.keep(log_p)].sum() / counts[0].sum()).item(),
        temperatures=[rest.temperature for rest in effective_temperature(objective, threshold).rests],
    )


def summarise(measurement: Measurement, recipe: Recipe, percentiles: list[float], **found: Any) -> Report:
    """Return the report of a measurement, with its advice.

    `percentiles`: of p, besides 1 to 99. `found`: the fields of `Report` that a measurement doesn't know, which are `sampled`,
    `streamed`, `is_weighed`, `reader`, `rows`, and `compare` or `learnability` if there is one.
    """
    total, histogram = measurement.total, measurement.histogram
    ranks = sorted({*map(float, range(1, 100)), *percentiles})
    report = Report(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).date().isoformat(),
        versions={name: version(name) for name in ("bl_trainer", "trl", "transformers", "datasets", "torch")},
        model=str(recipe.model.model_name_or_path),
        data=recipe.script.dataset_name or [entry.path for entry in recipe.mixture.datasets],
        recipe=_facts(recipe.training),
        total=Total(**total.summary()),
        placement=place(total.mean("prob"), total.interval("prob")),
        percentiles=dict(zip([f"{rank:.10g}" for rank in ranks], histogram.percentiles(ranks), strict=True)),
        percentile_error=PERCENTILE_ERROR,
        examples=_examples(measurement),
        histogram=histogram.buckets(50).tolist(),
        kinds=_kinds(measurement.kinds),
        positions=_positions(measurement.positions),
        calibration=_reliability(measurement.calibration),
        conflicts=Conflicts(CONFLICT_ENTROPY, CONFLICT_PROB, total.mean("conflicts")),
        groups={name: Total(**means.summary()) for name, means in measurement.groups.items()},
        groups_cut=OTHER in measurement.groups,
        has_prompts=bool(measurement.responses[1] > measurement.responses[0] / 2),
        objectives=_candidates(histogram, *_own(recipe, histogram)),
        unmarked=measurement.unmarked.item() / total.num_tokens,
        **found,
    )
    return replace(report, recommendation=recommend(report))


def summarise_comparison(comparison: Comparison) -> Compared:
    """Return the report of a comparison."""
    total = comparison.total
    return Compared(
        **total.summary(),
        intervals={name: total.interval(name) for name in total.names},
        calibration={name: _reliability(calibration) for name, calibration in comparison.calibration.items()},
        moved=comparison.moved.tolist(),
    )


def _facts(training: Any) -> RecipeFacts:
    by_loss = (training.metric_for_best_model or "").endswith("loss")
    return RecipeFacts(training.objective, training.threshold, training.learning_rate, by_loss)


def _examples(measurement: Measurement) -> Examples:
    m, first, second = measurement.spread.tolist()
    deviation = math.sqrt(max(0.0, second / m - (first / m) ** 2) * m / (m - 1)) if m > 1 else 0.0
    percentiles = dict(zip(("10", "50", "90"), measurement.examples.percentiles([10, 50, 90]), strict=True))
    return Examples(first / m, deviation, percentiles, measurement.examples.buckets(20).tolist())


def _kinds(sums: Tensor) -> dict[str, Kind]:
    return {
        kind: Kind(int(row[0]), **{name: row[i + 1].item() / row[0].item() for i, name in enumerate(VALUES)})
        for kind, row in zip(KINDS, sums, strict=True)
        if row[0]
    }


def _positions(sums: Tensor) -> Positions:
    def curve(part: slice) -> Curve:
        return [(int(n), p / n if n else None) for n, p in sums[:, part].T.tolist()]

    return Positions(
        first=curve(slice(0, EDGE)),
        last=curve(slice(EDGE, 2 * EDGE)),
        relative=curve(slice(2 * EDGE, 2 * EDGE + RELATIVE)),
    )


def _reliability(calibration: Calibration) -> Reliability:
    return Reliability(calibration.error(), [Bin(**item) for item in calibration.curve()])  # type: ignore[arg-type]


def _own(recipe: Recipe, histogram: ProbabilityHistogram) -> tuple[Objective, Threshold]:
    """Return the recipe's objective and threshold, a percentile being taken from the tokens measured."""
    threshold = recipe.threshold
    if not threshold.resolved:
        cut = histogram.cut(float(threshold.above_percentile or 0))
        above = min(cut, threshold.below)  # training refuses what exceeds `below`
        threshold = replace(threshold, above=above, above_percentile=None)
    return recipe.objective, threshold


def _candidates(histogram: ProbabilityHistogram, objective: Objective, threshold: Threshold) -> list[Gradient]:
    """Return the gradients of some objectives, of NLL with the threshold that is swept, and of the recipe's own."""
    specs: list[Any] = ["nll", {"name": "power", "alpha": 0.5}, "neg_p", {"name": "power", "alpha": 10}]
    candidates = [(Objective.parse(spec), Threshold()) for spec in specs]
    candidates.append((Objective.parse("nll"), Threshold(above=histogram.cut(SWEPT_PERCENTILE))))
    if depends_on_p_alone(objective):  # a scheduled one is shown as it begins and as it ends
        for progress in (0, 1) if "progress" in objective.statistics else (0,):
            mine = _plain_nll(objective.at(progress)), threshold
            candidates += [mine] if mine not in candidates else []
    return [gradient_mass(histogram, *candidate) for candidate in candidates]


def _plain_nll(objective: Objective) -> Objective:
    """Return `nll` for a power of 0, as which a schedule may begin."""
    return Objective("nll") if objective == Objective("power", {"alpha": 0}) else objective


def read_aloud(measurement: Measurement, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
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
