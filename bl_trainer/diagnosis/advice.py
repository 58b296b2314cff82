"""What a report advises: pure functions of the report."""

import json
import math
from typing import Any

import yaml

from ..measurement.histogram import TINY
from .continuum import CUTS, record_of
from .decision import decide
from .presets import RATE_FACTORS, SEEDS, cost_text
from .report import Advice, Learnability, Report
from .warnings import warnings

ADVICE = {
    "weak": "the model knows little of this: in the paper only NLL learnt such data (Tab. 3), so keep `nll`",
    "intermediate": "the paper found no winner here (Tab. 2): run a small sweep",
    "strong": "the model knows this well: in the paper prior-leaning objectives won here (Tab. 1)",
}

SWEPT: dict[str, list[dict[str, Any]]] = {
    "weak": [{"objective": "nll"}, {"objective": "anneal"}],
    "intermediate": [{"objective": "nll"}, {"objective": "anneal"}, {"objective": "neg_p"}],
    "strong": [{"objective": "nll"}, {"objective": "neg_p"}, {"objective": {"name": "power", "alpha": 10}}],
}

# From these shares of the content's tokens on, what is improbable and predictable is too much to forgo, and the rest too
# much to learn: both lie in the gaps between the miniature's cells of different winners (docs/results/continuum.md)
LEARNABLE, NOISE = 0.2, 0.1

SOME = 0.1  # of what is predictable, from which objectives differ, if less clearly

CONTRADICTED = 0.05  # of what other rows of the same context contradict, from which there is noise for certain

RISING = LEARNABLE / 10  # growth of the former over the probe's second half, from which it is not done

MOVED = 0.01  # mean rise of log p, in nats, below which the probe's training has done nothing

SWEPT_PERCENTILE = 10  # of the threshold that is swept with NLL; dropping the bottom 5 to 30 % was best in the paper's Fig. 5


VERDICTS = {
    "knowledge": "knowledge that the model lacks. Keep an objective that learns improbable tokens",
    "both": "knowledge that the model lacks, and noise. nll learns both. Objectives that sharpen discard some of the "
    "noise, as a lower temperature does (docs/results/claims.md)",
    "noise": "mostly noise to this model. Prior-leaning objectives discard that, and forgo little that they could not learn",
    "little": "too little of either for objectives to differ much",
}
UNSEEN = (
    "The probe can't tell consistent errors from knowledge. It can't tell a rare valid answer, or a fact that one row alone "
    "states, from noise. There may be more noise than is not predictable (docs/results/verdict.md)."
)


def judge(probe: Learnability) -> tuple[str, str]:
    """Return what the probe says of a data set's improbable targets, and, if it can't tell, why.

    There is knowledge where the predictable share reaches `LEARNABLE`, and none below `SOME`. There is noise where rows of the
    same context contradict a share of `CONTRADICTED`. There is little where the share that is not predictable is below `NOISE`.
    That share estimates the improbable noise, and is no bound: some random labels gain more than their controls.
    `knowledge`, `noise`, `both`, or `little` of either; `undecided` in between, where an interval crosses a cut, or where
    training has not ended what it can predict. Improbable targets without a control may be either.
    """
    found, lost = probe.found, probe.without_control
    if found.learnable_interval is None or found.noise_interval is None or found.contradicted_interval is None:
        return "undecided", "there are too few examples for an interval: measure more"
    low, high = found.learnable_interval
    is_noisy, is_clean = found.contradicted_interval[0] >= CONTRADICTED, found.noise_interval[1] < NOISE
    rest = f"about {found.noise:.3f} is not predictable: it may be noise, or need more steps or other rows"
    if low >= LEARNABLE:
        if is_noisy or is_clean:
            return ("both" if is_noisy else "knowledge"), ""
        return "undecided", f"there is knowledge, and {rest}"
    high += lost / found.tokens if lost else 0.0
    rise = math.inf if probe.half_way is None else found.learnable - probe.half_way.learnable
    if abs(found.gain) < MOVED:
        return "undecided", "training has hardly moved the model: give more `--probe_steps`, or a higher `--learning_rate`"
    if rise > max(RISING, (high - low) / 2) and found.low >= LEARNABLE:
        return "undecided", "the predictable share was still rising: give more `--probe_steps`"
    if high >= SOME:
        either = ", and targets without a control may be either" if lost else ""
        reached = (
            f"{found.learnable:.3f} is not sure to reach the cut {LEARNABLE:g}, but may be enough for objectives to differ"
        )
        return "undecided", reached + either
    if is_noisy or is_clean:
        return ("noise" if is_noisy else "little"), ""
    return "undecided", rest


def recommend(report: Report) -> Advice:
    """Say what to sweep and why, and what to beware of."""
    regions = _regions(report)
    headline, confidence = decide(report)
    return Advice(
        headline=headline,
        confidence=confidence,
        arms=_arms(report, regions),
        learning_rate=[float(f"{report.recipe.learning_rate * factor:.2g}") for factor in RATE_FACTORS],
        seed=[*SEEDS["full"]],
        reasons=_reasons(report, regions),
        warnings=warnings(report),
    )


def _regions(report: Report) -> list[str]:
    """Return the regions whose objectives are worth sweeping: those of mean p, unless the probe says otherwise.

    Where the improbable targets are knowledge, only what learns them; where they are noise, only what leaves them.
    """
    possible, probe = report.placement.possible, report.learnability
    if _has_knowledge(probe):
        return ["weak"]
    if probe and probe.verdict == "noise":
        return [region for region in possible if region != "weak"] or ["intermediate"]
    return possible


def _has_knowledge(probe: Learnability | None) -> bool:
    """Whether the predictable share reaches `LEARNABLE` for certain, whatever the rest is."""
    return probe is not None and probe.found.learnable_interval is not None and probe.found.learnable_interval[0] >= LEARNABLE


def _is_open(report: Report, regions: list[str]) -> bool:
    """Whether nothing says which fixed objective to take."""
    probe = report.learnability
    is_undecided = probe is None or probe.verdict == "undecided"
    return is_undecided and ("intermediate" in regions or _has_knowledge(probe))


def _arms(report: Report, regions: list[str]) -> list[dict[str, Any]]:
    """Return the settings to compare, as keys of a recipe; the recipe's own objective among them."""
    recipe = report.recipe
    arms: list[dict[str, Any]] = []
    for region in regions:
        arms += [arm for arm in SWEPT[region] if arm not in arms]
    if regions != ["weak"]:
        arms.append(swept_threshold(report))
    if recipe.threshold is not None:  # which an arm would inherit
        arms = [{"threshold": None, **arm} for arm in arms]
    if recipe.chooses_by_loss:  # which a threshold forbids, and which compares nothing
        arms = [{"metric_for_best_model": "eval_nll", **arm} for arm in arms]
    mine = {"objective": recipe.objective or "nll", "threshold": recipe.threshold}
    if _key(mine) not in map(_key, arms):
        arms.append({key: value for key, value in mine.items() if value is not None})
    return arms


def swept_threshold(report: Report) -> dict[str, Any]:
    """Return the arm of NLL on tokens above the percentile that is swept."""
    return {"objective": "nll", "threshold": max(report.percentiles[str(SWEPT_PERCENTILE)], TINY)}


def _key(arm: dict[str, Any]) -> tuple[str, str]:
    record = record_of(arm)
    return json.dumps(record["objective"]), json.dumps(record["threshold"])


def _reasons(report: Report, regions: list[str]) -> list[str]:
    probe, possible = report.learnability, report.placement.possible
    reasons = [_placement_reason(report)]
    if probe and regions != possible:  # the probe overrules what mean p advises
        reasons = [f"Mean p is {report.total.prob:.3f}, model-{' or model-'.join(possible)}."]
    if probe:
        reasons.insert(0, _learnability_reason(probe))
    if _is_open(report, regions):
        reasons.append(
            "The sweep tries `anneal` too: on small synthetic tasks its samples at temperature 1 were right more often than "
            "nll's, and hardly more often with each at its best temperature (docs/results/claims.md)."
        )
    reasons.append(
        f"The cuts {CUTS[0]:.3f} and {CUTS[1]:.3f} are the middles of the gaps between the groups that the paper measured; it "
        "gives none itself. Two sets of equal mean p can want different objectives: read the examples, and sweep."
    )
    return reasons


def _placement_reason(report: Report) -> str:
    total, placement = report.total, report.placement
    if placement.decided:
        return f"Mean p is {total.prob:.3f}: {ADVICE[placement.region]}."
    why = "there are too few examples for an interval" if total.prob_interval is None else "the interval crosses a cut"
    return f"Undecided, {' or '.join(placement.possible)}: {why}. Measure more examples, or sweep them all."


def _learnability_reason(probe: Learnability) -> str:
    found, interval, lost = probe.found, probe.found.learnable_interval, probe.without_control
    shown = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    said = VERDICTS.get(probe.verdict, f"undecided, since {probe.why}")
    left_out = f" {lost:,} improbable targets are left out: no place serves them as a control." if lost else ""
    return (
        f"Of the content {found.low:.3f} is improbable (p < {probe.below:g}). After {probe.steps} steps on other "
        f"examples {found.learnable:.3f}{shown} are predictable, and {found.noise:.3f} are not. Rows of the same context "
        f"contradict {found.contradicted:.3f}. It is {said}.{left_out} {UNSEEN}"
    )


def sweep_cost(report: Report) -> str:
    """Return what a sweep of what is advised costs, by each preset."""
    return cost_text(len(report.recommendation.arms), len(report.recommendation.learning_rate))


def sweep_yaml(report: Report) -> str:
    """Return `sweep.yaml`: short runs at each learning rate, then the best with more seeds."""
    advice, probe = report.recommendation, report.learnability
    head = [
        f"# {report.model} on {report.data}: mean p {report.total.prob:.3f}, {' or '.join(report.placement.possible)}"
        + (f"; improbable tokens: {probe.verdict}" if probe else ""),
        "# To run it: bl-trainer sweep --config RECIPE --sweep THIS FILE",
        f"# {sweep_cost(report)}",
    ]
    grid = {"preset": "short", "arms": advice.arms, "learning_rate": advice.learning_rate}
    lines = [" ".join(line.split()) for line in head]
    return "\n".join(lines) + "\n" + yaml.safe_dump(grid, default_flow_style=None, sort_keys=False, width=1000)
