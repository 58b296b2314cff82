"""The model-capability continuum: where a measurement stands on it, and what to try there.

Source: Li et al., https://arxiv.org/abs/2510.00526: mean p of the target tokens under the base model (Eq. 5), the pull of a
token on its own logit W(p) = -f'(p) p (1 - p) (Lemma 3.1), the three regions and what worked in each (Tab. 1 to 5).
"""

import itertools
import json
import math
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import yaml
from torch import Tensor

from .composition import spell
from .objectives import Objective, Threshold, spell_probability
from .recipe import Recipe
from .statistics import (
    CONFLICT_ENTROPY,
    CONFLICT_PROB,
    EDGE,
    KINDS,
    OTHER,
    PERCENTILE_ERROR,
    RELATIVE,
    VALUES,
    Comparison,
    Measurement,
    ProbabilityHistogram,
)

SCHEMA = 1

# Mean p of the base models that the paper measured (its Tab. 5), and the middles of the gaps between the groups
ANCHORS = {
    "weak": [("figlet fonts", "LLaMA-3.2-3B", 0.01), ("figlet fonts", "LLaMA-3.1-8B", 0.01),
             ("figlet fonts", "Qwen2.5-1.5B", 0.01), ("figlet fonts", "Qwen2.5-7B", 0.07)],
    "intermediate": [("medical", "LLaMA-3.2-3B", 0.50), ("medical", "LLaMA-3.1-8B", 0.53),
                     ("medical", "Qwen2.5-1.5B", 0.56), ("medical", "Qwen2.5-Math-7B", 0.59)],
    "strong": [("math", "DeepSeekMath-7B", 0.76), ("math", "LLaMA-3.1-8B", 0.80),
               ("math", "Qwen2.5-Math-1.5B", 0.80), ("math", "Qwen2.5-Math-7B", 0.81)],
}  # fmt: skip
REGIONS = tuple(ANCHORS)
CUTS = tuple(
    (max(p for *_, p in ANCHORS[low]) + min(p for *_, p in ANCHORS[high])) / 2 for low, high in itertools.pairwise(REGIONS)
)
ADVICE = {
    "weak": "the model knows little of this: in the paper only NLL learnt such data (Tab. 3), so keep `nll`",
    "intermediate": "the paper found no winner here (Tab. 2): run a small sweep",
    "strong": "the model knows this well: in the paper prior-leaning objectives won here (Tab. 1)",
}
SWEPT: dict[str, list[dict[str, Any]]] = {
    "weak": [{"objective": "nll"}, {"objective": {"name": "power", "alpha": 0.5}}],
    "intermediate": [{"objective": "nll"}, {"objective": {"name": "power", "alpha": 0.5}}, {"objective": "neg_p"}],
    "strong": [{"objective": "nll"}, {"objective": "neg_p"}, {"objective": {"name": "power", "alpha": 10}}],
}
# From these shares of the content's tokens on, what is improbable and can be foretold is too much to forgo, and what can't be
# too much to learn: both lie in the gaps between the miniature's cells of different winners (docs/continuum.md)
LEARNABLE, NOISE = 0.2, 0.1
DOUBTFUL = 0.1  # of what can be foretold, from which a verdict of noise was wrong on one of the miniature's models
RISING = LEARNABLE / 10  # growth of the former over the probe's second half, from which it is not done
MOVED = 0.01  # mean rise of log p, in nats, below which the probe's training has done nothing
SWEPT_PERCENTILE = 10  # of the threshold that is swept with NLL; dropping the bottom 5 to 30 % was best in the paper's Fig. 5
SHIFTED = 0.05  # difference between mean p with and without tokens that aren't content, from which it is said
RARE = 0.1  # mean p below which a kind of token is called unlearnt
NOISY = 0.01  # share of confident conflicts from which label noise is suspected
BUCKETS = 10


def place(mean: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    """Place a mean p among `REGIONS`, cut at `CUTS`; undecided where the interval crosses a cut, or there is none."""
    region = REGIONS[sum(mean >= cut for cut in CUTS)]
    reach = REGIONS if interval is None else [REGIONS[sum(end >= cut for cut in CUTS)] for end in interval]
    span = REGIONS[REGIONS.index(reach[0]) : REGIONS.index(reach[-1]) + 1]
    groups = {name: (min(p for *_, p in anchors), max(p for *_, p in anchors)) for name, anchors in ANCHORS.items()}
    return {
        "region": region,
        "decided": len(span) == 1,
        "possible": list(span),
        "cuts": list(CUTS),
        "distance_to_cuts": [mean - cut for cut in CUTS],
        "distance_to_anchors": {name: max(low - mean, mean - high, 0.0) for name, (low, high) in groups.items()},
        "anchors": {name: [list(anchor) for anchor in anchors] for name, anchors in ANCHORS.items()},
    }


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


def judge(found: dict[str, Any]) -> tuple[str, str]:
    """Return what the probe says of a data set's improbable targets, and, if it can't tell, why.

    `knowledge`: the foretold share reaches `LEARNABLE`; `noise`: the rest reaches `NOISE`; `both`, and `little` of either.
    `undecided` where an interval crosses its cut, or the foretold share may still rise across it. Improbable targets without a
    control may be either.
    """
    intervals, half_way = (found["learnable_interval"], found["noise_interval"]), found["half_way"]
    if None in intervals:
        return "undecided", "there are too few examples for an interval: measure more"
    (low, high), (low_noise, high_noise) = intervals
    rise = math.inf if half_way is None else found["learnable"] - half_way["learnable"]
    is_rising = rise > max(RISING, (high - low) / 2)
    lost = found.get("without_control", 0)
    unknown = lost / found["tokens"] if lost else 0.0
    high, high_noise = high + unknown, high_noise + unknown
    if low < LEARNABLE and abs(found["gain"]) < MOVED:
        return "undecided", "training has hardly moved the model: give more `--probe_steps`, or a higher `--learning_rate`"
    if low < LEARNABLE and is_rising and found["low"] >= LEARNABLE:
        return "undecided", "the foretold share was still rising: give more `--probe_steps`"
    if low < LEARNABLE < high or (low_noise < NOISE < high_noise and not is_rising):
        either = ", since targets without a control may be either" if lost else ""
        return "undecided", f"an interval crosses its cut{either}: measure more tokens by `--max_tokens`, or sweep"
    is_noisy = low_noise >= NOISE and not (low >= LEARNABLE and is_rising)  # the rest may yet be learnt
    if low >= LEARNABLE:
        return ("both" if is_noisy else "knowledge"), ""
    return ("noise" if is_noisy else "little"), ""


def _regions(report: dict[str, Any]) -> list[str]:
    """Return the regions whose objectives are worth sweeping: those of mean p, unless the probe says otherwise.

    Where the improbable targets are knowledge, only what learns them; where they are noise, only what leaves them.
    """
    possible, verdict = report["placement"]["possible"], report.get("learnability", {}).get("verdict")
    if verdict in ("knowledge", "both"):
        return ["weak"]
    if verdict == "noise":
        return [region for region in possible if region != "weak"] or ["intermediate"]
    return possible


VERDICTS = {
    "knowledge": "knowledge that the model lacks. Keep an objective that learns improbable tokens",
    "both": "knowledge that the model lacks, and noise. nll learns both; on small synthetic tasks anneal learnt the one and "
    "let go of most of the other; so did power 0.5, but it did not learn everywhere (docs/anneal.md)",
    "noise": "mostly noise to this model. Prior-leaning objectives let go of that, and forgo little that they could not learn",
    "little": "too little of either for objectives to differ much",
}


def _learnability_reason(found: dict[str, Any]) -> str:
    interval = found["learnable_interval"]
    shown = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    said = VERDICTS.get(found["verdict"], f"undecided, since {found['why']}")
    if _is_doubtful(found):
        said += ". But on one of three small models nll learnt so much, and neg_p did not: keep nll in the sweep"
    lost = found.get("without_control", 0)
    left_out = f" {lost:,} improbable targets are left out: no place serves them as a control." if lost else ""
    return (
        f"Of the content {found['low']:.3f} is improbable (p < {found['below']:g}). After {found['steps']} steps on other "
        f"examples {found['learnable']:.3f}{shown} can be foretold, {found['noise']:.3f} can't: {said}.{left_out}"
    )


def _is_doubtful(found: dict[str, Any]) -> bool:
    """Whether so much can be foretold that a verdict of noise may be wrong."""
    return found["verdict"] == "noise" and found["learnable"] >= DOUBTFUL


def _depends_on_p_alone(objective: Objective) -> bool:
    """Whether a token's weight at a given time depends on nothing but its p."""
    return not objective.at(0).statistics


def recommend(report: dict[str, Any], threshold: Threshold) -> dict[str, Any]:
    """Say what to sweep and why, and what to beware of, from the figures of a report."""
    placement, total, kinds = report["placement"], report["total"], report["kinds"]
    regions = _regions(report)
    arms: list[dict[str, Any]] = []
    for region in regions:
        arms += [arm for arm in SWEPT[region] if arm not in arms]
    probe = report.get("learnability")
    is_open = (probe is None or probe["verdict"] == "undecided") and "intermediate" in regions
    if is_open or (probe and (probe["verdict"] == "both" or _is_doubtful(probe))):
        arms.append({"objective": "anneal"})  # docs/anneal.md
    if regions != ["weak"]:
        arms.append({"objective": "nll", "threshold": threshold.above})
    recipe = report["recipe"]
    if recipe["threshold"] is not None:  # which an arm would inherit
        arms = [{"threshold": None, **arm} for arm in arms]
    if recipe["chooses_by_loss"]:  # which a threshold forbids, and which compares nothing
        arms = [{"metric_for_best_model": "eval_nll", **arm} for arm in arms]
    mine = {"objective": recipe["objective"] or "nll", "threshold": recipe["threshold"]}
    if _key(mine) not in map(_key, arms):
        arms.append({key: value for key, value in mine.items() if value is not None})
    reasons = [f"Mean p is {total['prob']:.3f}: {ADVICE[placement['region']]}."]
    if not placement["decided"]:
        why = "there are too few examples for an interval" if total["prob_interval"] is None else "the interval crosses a cut"
        reasons = [f"Undecided, {' or '.join(placement['possible'])}: {why}. Measure more examples, or sweep them all."]
    if is_open:
        reasons.append(
            "anneal is among them: on small synthetic tasks no fixed objective was near the best everywhere, greedy and by "
            "samples; it was, or nearly so (docs/anneal.md)."
        )
    if probe:
        if regions != placement["possible"]:  # the probe overrules what mean p advises
            reasons = [f"Mean p is {total['prob']:.3f}, model-{' or model-'.join(placement['possible'])}."]
        reasons.insert(0, _learnability_reason(probe))
    reasons.append(
        f"The cuts {CUTS[0]:.3f} and {CUTS[1]:.3f} are the middles of the gaps between the groups that the paper measured; it "
        "gives none itself. Two sets of equal mean p can want different objectives: read the examples, and sweep."
    )
    rate = report["recipe"]["learning_rate"]
    return {
        "arms": arms,
        "learning_rate": [float(f"{rate * factor:.2g}") for factor in (1 / 3, 1, 3)],
        "seed": [0, 1, 2],
        "reasons": reasons,
        "warnings": _warnings(report, kinds, total),
    }


def _key(arm: dict[str, Any]) -> tuple[str, str]:
    objective, threshold = Objective.parse(arm["objective"]), Threshold.parse(arm.get("threshold"))
    return json.dumps(objective.to_dict()), json.dumps(threshold.to_dict())


def _warnings(report: dict[str, Any], kinds: dict[str, Any], total: dict[str, Any]) -> list[str]:
    shares = {json.dumps(item["objective"]): item["kinds"] for item in report["objectives"][:4]}
    nll, neg_p = shares['{"name": "nll"}'], shares['{"name": "neg_p"}']
    names = {"eos": "End tokens", "special": "Special tokens", "template": "The chat template's own tokens"}
    spares = Objective.parse(report["recipe"]["objective"] or "nll").special_tokens is not None
    warnings = []
    if "eos" not in kinds:
        warnings.append("No target is an end token: training does not teach the model to stop.")
    content = kinds.get("content", total)
    if abs(content["prob"] - total["prob"]) >= SHIFTED:
        region = place(content["prob"], None)["region"]
        warnings.append(
            f"Without end, special and template tokens mean p is {content['prob']:.3f} (model-{region}), with them "
            f"{total['prob']:.3f}: the content is what is to be learnt."
        )
    for kind, name in names.items():
        is_new = kind == "eos" or kinds.get(kind) != kinds.get("eos")
        if kind in kinds and is_new and kinds[kind]["prob"] < RARE:
            warnings.append(
                f"{name} are improbable (mean p {kinds[kind]['prob']:.3g}): they get {nll[kind]:.1%} of the gradient under "
                f"nll, {neg_p[kind]:.1%} under neg_p. A prior-leaning objective may never teach them, "
                f"{'if not by the `special_tokens` that the recipe has' if spares else 'unless by `special_tokens: nll`'}."
            )
    if total["conflicts"] >= NOISY:
        warnings.append(
            f"{total['conflicts']:.1%} of the tokens are confident conflicts (entropy <= {CONFLICT_ENTROPY} nats, p <= "
            f"{CONFLICT_PROB}): wrong labels, or knowledge that the model lacks. Read them in the report."
        )
    confidence = sum(item["tokens"] * item["confidence"] for item in report["calibration"]["curve"]) / total["tokens"]
    if report["calibration"]["error"] > 0.1:
        side = "more" if confidence > total["top1"] else "less"
        warnings.append(
            f"The model is {side} confident than right (calibration error {report['calibration']['error']:.2f}), so p says "
            "less of what it knows."
        )
    regions = {place(group["prob"], None)["region"] for group in report["groups"].values()}
    if len(regions) > 1:
        warnings.append(
            f"The groups lie in different regions ({', '.join(sorted(regions))}): one objective may not fit them all."
        )
    first = report["positions"]["first"][0][1]
    if report["has_prompts"] and first is not None and first < min(0.3, total["prob"] / 2):
        warnings.append(
            f"The first token of a response has mean p {first:.3g}: the model would begin otherwise, as with another format."
        )
    scales = ", ".join(f"{objective_name(item)}: {item['scale']:.2g}" for item in report["objectives"][1:4])
    warnings.append(
        f"The sum of the pulls, relative to nll's, is {scales}. AdamW makes up for a constant factor, gradient clipping "
        "doesn't: sweep the learning rate."
    )
    return warnings


def objective_name(item: dict[str, Any]) -> str:
    """Return an objective with its parameters and threshold, for people."""
    limit = Threshold(**item["threshold"])
    kept = f", p >= {spell_probability(limit.above)}" if limit.above else ""
    kept += "" if limit.resolved else f", above percentile {limit.above_percentile:g}"
    kept += f", p <= {spell_probability(limit.below)}" if limit.below < 1 else ""
    return spell(item["objective"]) + kept


def sweep_yaml(report: dict[str, Any]) -> str:
    """Return `sweep.yaml`: each arm is to run at each learning rate and seed."""
    advice = report["recommendation"]
    head = [
        f"# {report['model']} on {report['data']}: mean p {report['total']['prob']:.3f}, "
        + " or ".join(report["placement"]["possible"])
        + (f"; improbable tokens: {report['learnability']['verdict']}" if "learnability" in report else ""),
        "# Each arm runs at each learning rate and seed: scripts/sweep.py --config RECIPE --sweep THIS FILE",
    ]
    grid = {key: advice[key] for key in ("arms", "learning_rate", "seed")}
    lines = [" ".join(line.split()) for line in head]
    return "\n".join(lines) + "\n" + yaml.safe_dump(grid, default_flow_style=None, sort_keys=False, width=1000)


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
