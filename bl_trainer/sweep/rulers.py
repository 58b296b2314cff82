"""The metrics that runs are compared by: one entry for each in `RULERS`, and one made of the results for a task's metric."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import RecipeError
from ..evaluation.exploration import bounds_of, has_direction

SHARE = (0.0, 1.0)


class Measured(Protocol):
    """What is known of a run: metric -> value, and which of those that aren't in `RULERS` are better lower."""

    @property
    def rulers(self) -> Mapping[str, float]: ...

    @property
    def lower_is_better(self) -> Iterable[str]: ...


@dataclass(frozen=True)
class Ruler:
    """A metric of a run.

    `better`: which way, None if neither is. `bounds`: the values that it can have. `column`: of compare.csv, where it is a mean
    over target tokens.
    `logged`: the name under which a run logs it while it trains. `log`: the metric whose exp it is. `favours`: the objective
    that optimises it.
    """

    name: str
    better: Literal["higher", "lower"] | None = "higher"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    description: str = ""
    column: str | None = None
    logged: str | None = None
    log: str | None = None
    favours: str | None = None

    @property
    def sign(self) -> int:
        """-1 if lower is better, else 1."""
        return -1 if self.better == "lower" else 1

    @property
    def explanation(self) -> str:
        """What the metric is, and which way it is better, in a sentence."""
        return f"{self.name}: {self.description}; {self.better} is better."

    def is_in(self, measured: Mapping[str, float]) -> bool:
        """Whether the measured values give this metric."""
        return (self.log or self.name) in measured

    def of(self, measured: Mapping[str, float]) -> float:
        """Return its value among measured ones. Raises RecipeError if they don't give it."""
        if not self.is_in(measured):
            raise RecipeError(f"`rank_by: {self.name}` is not among what was measured: {', '.join(measured)}.")
        value = measured[self.log or self.name]
        if self.log is None:
            return value
        return math.exp(value) if value < 700 else math.inf  # beyond which exp overflows


RULERS = {
    ruler.name: ruler
    for ruler in (
        Ruler("accuracy", "higher", SHARE, "share of test target tokens that are the model's most probable one", "top1"),
        Ruler(
            "nll", "lower", (0.0, math.inf), "mean -log p of test target tokens, which `nll` itself minimises",
            column="nll", logged="eval_nll", favours="nll",
        ),
        Ruler("perplexity", "lower", (1.0, math.inf), "exp of nll", logged="eval_perplexity", log="nll", favours="nll"),
        Ruler(
            "target_prob", "higher", SHARE, "mean p of test target tokens, which `neg_p` itself maximises",
            column="prob", logged="eval_target_prob", favours="neg_p",
        ),
        Ruler("calibration_error", "lower", SHARE, "expected calibration error of the most probable token"),
        Ruler(
            "drift", "lower", (0.0, math.inf),
            "KL(base, tuned), nats per target token of the probe set, or of the test set without one", column="kl",
        ),
        Ruler(
            "forgetting", "lower", (-1.0, 1.0),
            "accuracy lost since the base model on the probe set, or by the metric that `retain` names; `max_drift` limits it",
        ),
    )
}  # fmt: skip

LOGGED = [ruler.name for ruler in RULERS.values() if ruler.logged]


AT = r"@T([\d.e+-]+)"  # a temperature in a metric's name
BEST = "@best"  # of a task's metric: at the temperature of `evaluate`'s `temperatures` at which the run is best


def temperatures_of(name: str, measured: Iterable[str]) -> dict[str, float]:
    """Return the metrics whose best is METRIC@best, each with its temperature; none of another metric."""
    start, best, rest = map(re.escape, name.partition(BEST))
    parts = {other: re.fullmatch(rf"{start}{AT}{rest}", other) for other in (measured if best else ())}
    return {other: float(part[1]) for other, part in parts.items() if part}


def with_best(scores: Mapping[str, float], lower_is_better: Iterable[str] = ()) -> dict[str, float]:
    """Return scores of tasks, with METRIC@best for those that were measured at several temperatures and can be better."""
    lower, found = {*lower_is_better}, dict(scores)
    for name in scores:
        best = re.sub(AT, BEST, name)
        if best != name and has_direction(name):
            better = min if name in lower else max
            found[best] = better(found.get(best, scores[name]), scores[name])
    return found


def show(value: float) -> str:
    """Return a metric's value as readers see it."""
    return f"{value:.4g}"


def ruler_named(name: str, results: Iterable[Measured]) -> Ruler:
    """Return the ruler of a name.

    A task's metric is better as its results say, and how answers differ is neither. Unless lower is better, it is a share if
    all its values could be shares; an entropy is none.
    """
    if name in RULERS:
        return RULERS[name]
    results = list(results)
    if any(name in result.lower_is_better for result in results):
        return Ruler(name, "lower")
    every = [result.rulers[name] for result in results if name in result.rulers]
    return Ruler(name, "higher" if has_direction(name) else None, bounds_of(name, every) or (-math.inf, math.inf))


def rulers_in(results: Iterable[Measured]) -> list[Ruler]:
    """Return the rulers of some results: those of ours that all give, in their order, then those of the first one's tasks."""
    results = list(results)
    measured = results[0].rulers if results else {}
    own = [ruler for ruler in RULERS.values() if results and all(ruler.is_in(result.rulers) for result in results)]
    return own + [ruler_named(name, results) for name in measured if name not in RULERS]


def study_direction(name: str) -> Literal["minimize", "maximize"]:
    """Return which way a study goes; up for a task's metric, as long as nobody knows before the first result."""
    return "minimize" if name in RULERS and RULERS[name].sign < 0 else "maximize"


def study_value(name: str, result: Measured) -> float:
    """Return a result's value for the study, so that `study_direction` is the better way."""
    ruler = ruler_named(name, [result])
    value = ruler.of(result.rulers)
    return value if name in RULERS else ruler.sign * value


def measured_by(compared: Mapping[str, Any], is_base: bool) -> dict[str, float]:
    """Return the metrics of the tuned model, or of its base, from the `compare` of report.json. Raises KeyError."""
    part, prefix = compared["train"], "base_" if is_base else ""
    columns = {ruler.name: ruler.column for ruler in RULERS.values() if ruler.column and ruler.name != "drift"}
    return {
        **{name: part[f"{prefix}{column}"] for name, column in columns.items()},
        "calibration_error": part["calibration"]["base" if is_base else "tuned"]["error"],
        "drift": 0.0 if is_base else compared.get("probe", part)["kl"],
        **({"forgetting": 0.0 if is_base else _lost(compared["probe"])} if "probe" in compared else {}),
    }


def _lost(probe: Mapping[str, Any]) -> float:
    return probe["base_top1"] - probe["top1"]
