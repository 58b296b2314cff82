"""What to beware of: each warning is a function of the report, which returns None where there is no cause for it."""

from collections.abc import Callable

from ..measurement.reader import CONFLICT_ENTROPY, CONFLICT_PROB
from ..objectives.composition import spell
from ..objectives.objective import Objective
from ..objectives.temperature import effective_temperature
from ..objectives.threshold import Threshold
from ..tokens.names import WEIGHT
from .continuum import region_of
from .report import Report
from .wording import temperature_text

SHIFTED = 0.05  # difference between mean p with and without tokens that aren't content, from which it is said
RARE = 0.1  # mean p below which a kind of token is called unlearnt
NOISY = 0.01  # share of confident conflicts from which label noise is suspected
MISCALIBRATED = 0.1  # calibration error above which p is said to mislead
OPENING = 0.3  # mean p of a response's first token below which, and below half of all tokens', the format is suspected

KINDS_OF_OWN = {"eos": "End tokens", "special": "Special tokens", "template": "The chat template's own tokens"}


def beginning_of_stream(report: Report) -> str | None:
    if not (report.sampled and report.streamed):
        return None
    return "Only the beginning of the stream was measured: if the data are in some order, the rest may differ."


def weights_left_out(report: Report) -> str | None:
    if not report.is_weighed:
        return None
    return (
        f"Weights (`{WEIGHT}`, and those of messages and tokens) are left out here: every target token counts once, where "
        "training multiplies its cost."
    )


def no_end_token(report: Report) -> str | None:
    if "eos" in report.kinds:
        return None
    return "No target is an end token: training does not teach the model to stop."


def content_differs(report: Report) -> str | None:
    total, content = report.total.prob, report.kinds.get("content", report.total).prob
    if abs(content - total) < SHIFTED:
        return None
    return (
        f"Without end, special and template tokens mean p is {content:.3f} (model-{region_of(content)}), with them "
        f"{total:.3f}: the content is what is to be learnt."
    )


def improbable_end_tokens(report: Report) -> str | None:
    return _improbable(report, "eos")


def improbable_special_tokens(report: Report) -> str | None:
    return _improbable(report, "special")


def improbable_template(report: Report) -> str | None:
    return _improbable(report, "template")


def _improbable(report: Report, name: str) -> str | None:
    kind, ends = report.kinds.get(name), report.kinds.get("eos")
    if kind is None or kind.prob >= RARE or (name != "eos" and kind == ends):  # the end tokens again
        return None
    nll, neg_p = (_share(report, objective, name) for objective in ("nll", "neg_p"))
    spares = _objective(report).special_tokens is not None
    return (
        f"{KINDS_OF_OWN[name]} are improbable (mean p {kind.prob:.3g}): they get {nll:.1%} of the gradient under nll, "
        f"{neg_p:.1%} under neg_p. A prior-leaning objective may never teach them, "
        f"{'if not by the `special_tokens` that the recipe has' if spares else 'unless by `special_tokens: nll`'}."
    )


def _share(report: Report, objective: str, kind: str) -> float:
    """Return the share of a kind of tokens in the gradient of a plain objective."""
    return next(item.kinds[kind] for item in report.objectives if item.name == objective)


def confident_conflicts(report: Report) -> str | None:
    if report.total.conflicts < NOISY:
        return None
    return (
        f"{report.total.conflicts:.1%} of the tokens are confident conflicts (entropy <= {CONFLICT_ENTROPY} nats, p <= "
        f"{CONFLICT_PROB}): wrong labels, or knowledge that the model lacks. Read them in the report."
    )


def miscalibrated(report: Report) -> str | None:
    error, total = report.calibration.error, report.total
    if error <= MISCALIBRATED:
        return None
    confidence = sum(item.tokens * item.confidence for item in report.calibration.curve) / total.tokens
    side = "more" if confidence > total.top1 else "less"
    return f"The model is {side} confident than right (calibration error {error:.2f}), so p says less of what it knows."


def groups_differ(report: Report) -> str | None:
    regions = {region_of(group.prob) for group in report.groups.values()}
    if len(regions) < 2:
        return None
    return f"The groups lie in different regions ({', '.join(sorted(regions))}): one objective may not fit them all."


def improbable_opening(report: Report) -> str | None:
    _, first = report.positions.first[0]
    if not report.has_prompts or first is None or first >= min(OPENING, report.total.prob / 2):
        return None
    return f"The first token of a response has mean p {first:.3g}: the model would begin otherwise, as with another format."


def scales_differ(report: Report) -> str:
    scales = ", ".join(f"{item.name}: {item.scale:.2g}" for item in report.objectives[1:4])
    return (
        f"The sum of the pulls, relative to nll's, is {scales}. AdamW makes up for a constant factor, gradient clipping "
        "doesn't: sweep the learning rate."
    )


def gradient_not_shown(report: Report) -> str | None:
    objective = _objective(report)
    if depends_on_p_alone(objective):
        return None
    others = [name for name in objective.statistics if name not in ("progress", "is_special")]
    others += ["which tokens are special"] if "is_special" in objective.statistics else []
    others += ["training progress"] if "progress" in objective.at(0).statistics else []
    limits = Threshold.parse(report.recipe.threshold)
    rests = effective_temperature(objective, limits if limits.resolved else None).rests
    return (
        f"Where the gradient of {spell(objective.to_dict())} comes from is not shown: it depends on more than p "
        f"({', '.join(others)}). Its effective temperature: {temperature_text([rest.temperature for rest in rests])}."
    )


def template_not_told(report: Report) -> str | None:
    if not report.unmarked:
        return None
    return (
        f"In {report.unmarked:.1%} of the tokens the chat template's own could not be told from content: messages hold more "
        "than text (tool calls, reasoning), the template changes them, or the tokenizer is a slow one."
    )


WARNINGS: tuple[Callable[[Report], str | None], ...] = (
    beginning_of_stream,
    weights_left_out,
    no_end_token,
    content_differs,
    improbable_end_tokens,
    improbable_special_tokens,
    improbable_template,
    confident_conflicts,
    miscalibrated,
    groups_differ,
    improbable_opening,
    scales_differ,
    gradient_not_shown,
    template_not_told,
)


def warnings(report: Report) -> list[str]:
    """Return the warnings that the report gives cause for."""
    return [said for warn in WARNINGS if (said := warn(report)) is not None]


def _objective(report: Report) -> Objective:
    return Objective.read(report.recipe.objective or "nll")


def depends_on_p_alone(objective: Objective) -> bool:
    """Whether a token's weight at a given time depends on nothing but its p."""
    return not objective.at(0).statistics
