"""What a report advises: pure functions of the report."""

import json
import math
from typing import Any

import yaml

from ..measurement.reader import CONFLICT_ENTROPY, CONFLICT_PROB
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold
from .continuum import CUTS, objective_name, place

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
