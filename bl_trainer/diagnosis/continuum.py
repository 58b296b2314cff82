"""The model-capability continuum: where a measurement stands on it, and what to try there.

Source: Li et al., https://arxiv.org/abs/2510.00526: mean p of the target tokens under the base model (Eq. 5), the pull of a
token on its own logit W(p) = -f'(p) p (1 - p) (Lemma 3.1), the three regions and what worked in each (Tab. 1 to 5).
"""

import itertools
from dataclasses import dataclass
from typing import Any

from ..objectives.composition import spell
from ..objectives.objective import Objective
from ..objectives.threshold import Threshold, spell_probability

# Mean p of the base models that the paper measured (its Tab. 5), and the middles of the gaps between the groups
ANCHORS: dict[str, list[tuple[str, str, float]]] = {
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


@dataclass(frozen=True)
class Placement:
    """Where a mean p stands. `possible`: the regions that its interval reaches; it is decided if that is one.

    `anchors`: for each region the paper's data sets, base models and their mean p.
    """

    region: str
    decided: bool
    possible: list[str]
    cuts: list[float]
    distance_to_cuts: list[float]
    distance_to_anchors: dict[str, float]
    anchors: dict[str, list[tuple[str, str, float]]]


def place(mean: float, interval: tuple[float, float] | None) -> Placement:
    """Place a mean p among `REGIONS`, cut at `CUTS`; undecided where the interval crosses a cut, or there is none."""
    reach = REGIONS if interval is None else [region_of(end) for end in interval]
    span = REGIONS[REGIONS.index(reach[0]) : REGIONS.index(reach[-1]) + 1]
    groups = {name: [p for *_, p in anchors] for name, anchors in ANCHORS.items()}
    return Placement(
        region=region_of(mean),
        decided=len(span) == 1,
        possible=list(span),
        cuts=list(CUTS),
        distance_to_cuts=[mean - cut for cut in CUTS],
        distance_to_anchors={name: max(min(group) - mean, mean - max(group), 0.0) for name, group in groups.items()},
        anchors=ANCHORS,
    )


def region_of(mean: float) -> str:
    """Return the region that a mean p lies in."""
    return REGIONS[sum(mean >= cut for cut in CUTS)]


def record_of(arm: dict[str, Any]) -> dict[str, Any]:
    """Return the objective and threshold of an arm of a sweep, written out as a report has them."""
    objective, threshold = Objective.read(arm["objective"]), Threshold.parse(arm.get("threshold"))
    return {"objective": objective.to_dict(), "threshold": threshold.to_dict()}


def objective_name(item: dict[str, Any]) -> str:
    """Return an objective with its parameters and threshold, for people."""
    limit = Threshold(**item["threshold"])
    kept = f", p >= {spell_probability(limit.above)}" if limit.above else ""
    kept += "" if limit.resolved else f", above percentile {limit.above_percentile:g}"
    kept += f", p <= {spell_probability(limit.below)}" if limit.below < 1 else ""
    return spell(item["objective"]) + kept
