"""The report of a diagnosis, as its readers take it and as report.json holds it.

A class for each mapping of report.json, a field for each key; `Report.to_json` adds no name. The schema is a contract: new keys
may come, none changes its meaning under the same `SCHEMA`.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ..pages.html import finite
from .continuum import Placement, objective_name

SCHEMA = 1

BUCKETS = 10  # parts of [0, 1] by which the gradient is shown

Interval = tuple[float, float] | None  # 95 %, over examples; None below 10 of them

# How a field stands in report.json, if not under its name
FLAT = {"json": "flat"}  # its own fields stand in its place
OPTIONAL = {"json": "optional"}  # left out where it is None
APART = {"json": "apart"}  # in other files, or in none


@dataclass(frozen=True)
class RecipeFacts:
    """What the advice needs of the recipe."""

    objective: Any
    threshold: Any
    learning_rate: float
    chooses_by_loss: bool


@dataclass(frozen=True)
class Kind:
    """Means over the target tokens of one kind, one of `KINDS`. `nll` and `entropy` in nats, the rest shares."""

    tokens: int
    prob: float
    nll: float
    entropy: float
    top1: float
    above_paper: float
    conflicts: float


@dataclass(frozen=True)
class Total:
    """Means over target tokens, of all or of a group, with the interval of the first."""

    examples: int
    tokens: int
    prob: float
    nll: float
    entropy: float
    top1: float
    above_paper: float
    conflicts: float
    prob_interval: Interval


@dataclass(frozen=True)
class Examples:
    """How the mean p of an example is spread. `histogram`: examples in 20 equal parts of [0, 1]."""

    mean: float
    deviation: float
    percentiles: dict[str, float]
    histogram: list[int]


Curve = list[tuple[int, float | None]]  # tokens and their mean p at each position


@dataclass(frozen=True)
class Positions:
    """Mean p by position in a response: from the start, from the end, and along it."""

    first: Curve
    last: Curve
    relative: Curve


@dataclass(frozen=True)
class Bin:
    """Tokens whose most probable token is about as probable, and the share in which it is the target."""

    tokens: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Expected calibration error of the most probable token, and the bins that it is the sum of."""

    error: float
    curve: list[Bin]


@dataclass(frozen=True)
class Conflicts:
    """Share of confident conflicts, and the bounds of entropy (nats) and p that make a token one."""

    entropy: float
    prob: float
    share: float


@dataclass(frozen=True)
class Gradient:
    """Where an objective's gradient comes from; see `summary.gradient_mass`."""

    objective: dict[str, Any]
    threshold: dict[str, Any]
    buckets: list[float]
    kinds: dict[str, float]
    effective_tokens: float
    scale: float
    gradient_weight: float
    kept: float
    temperatures: list[float]  # the effective one under each of `temperature.CHOICES`; in JSON null is infinity

    @property
    def name(self) -> str:
        return objective_name({"objective": self.objective, "threshold": self.threshold})


@dataclass(frozen=True)
class Trained:
    """What the learnability probe trained on."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Foretold:
    """What the learnability probe found over the second half's content; see `learnability.Probe`."""

    examples: int
    tokens: int
    learnable: float
    noise: float
    contradicted: float
    low: float
    gain: float
    learnable_interval: Interval
    noise_interval: Interval
    contradicted_interval: Interval


@dataclass(frozen=True)
class Learnability:
    """The learnability probe: how it was trained, what it found then and half-way, and what `advice.judge` makes of it."""

    steps: int
    learning_rate: float
    below: float
    without_control: int
    trained: Trained
    found: Foretold = field(metadata=FLAT)
    half_way: Foretold | None
    verdict: str = "undecided"
    why: str = ""


@dataclass(frozen=True)
class Compared:
    """Means over the target tokens on which a checkpoint is compared with the base model, in nats or as shares.

    `moved`: tokens by tenth of p under the base model, then by tenth of p after tuning.
    """

    examples: int
    tokens: int
    kl: float
    reverse_kl: float
    js: float
    base_prob: float
    prob: float
    base_nll: float
    nll: float
    base_top1: float
    top1: float
    kl_interval: Interval
    intervals: dict[str, Interval]
    calibration: dict[str, Reliability]
    moved: list[list[int]]


@dataclass(frozen=True)
class ComparedElsewhere:
    """The same on a data set that was not trained on."""

    data: str
    split: str
    found: Compared = field(metadata=FLAT)


@dataclass(frozen=True)
class Compare:
    """A checkpoint against the base model, on the training data and elsewhere."""

    checkpoint: str
    train: Compared
    probe: ComparedElsewhere | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Advice:
    """What to try first and how sure that is, what to sweep and why, and what to beware of."""

    headline: str = ""
    confidence: str = ""
    arms: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a diagnosis found. The first two of `APART` are examples.json and the rows of *.csv.

    `percentiles`: p by percentile, "1" to "99" and those asked for. `histogram`: tokens in 50 equal parts of [0, 1].
    `groups_cut`: whether some groups are counted together as the others. `is_weighed`: whether the data set has weights, which
    are not measured. `unmarked`: share of tokens that may or may not be the chat template's own: nobody knows.
    """

    schema: int
    date: str  # of the measurement, ISO 8601
    versions: dict[str, str]
    model: str
    data: str | list[str]
    recipe: RecipeFacts
    total: Total
    placement: Placement
    percentiles: dict[str, float]
    percentile_error: float
    examples: Examples
    histogram: list[int]
    kinds: dict[str, Kind]
    positions: Positions
    calibration: Reliability
    conflicts: Conflicts
    groups: dict[str, Total]
    groups_cut: bool
    has_prompts: bool
    learnability: Learnability | None = field(default=None, metadata=OPTIONAL)
    objectives: list[Gradient]
    recommendation: Advice = Advice()
    sampled: bool
    streamed: bool
    compare: Compare | None = field(default=None, metadata=OPTIONAL)
    reader: dict[str, list[dict[str, Any]]] = field(metadata=APART)
    rows: dict[str, list[tuple[float, ...]]] = field(metadata=APART)
    is_weighed: bool = field(metadata=APART)
    unmarked: float = field(metadata=APART)

    def to_json(self) -> dict[str, Any]:
        """Return what report.json holds, null for what is not finite."""
        return finite(_mapping(self))


def _mapping(value: Any) -> Any:
    """Return the same with mappings for dataclasses."""
    if isinstance(value, dict):
        return {key: _mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapping(item) for item in value]
    if not is_dataclass(value):
        return value
    made: dict[str, Any] = {}
    for each in fields(value):
        item, how = getattr(value, each.name), each.metadata
        if how == FLAT:
            made |= _mapping(item)
        elif not (how == APART or (how == OPTIONAL and item is None)):
            made[each.name] = _mapping(item)
    return made
