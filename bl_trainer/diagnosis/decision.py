"""The decision that a report leads to, in one sentence, and how sure it is: pure functions of the report."""

from .report import Report

FIRST = {
    "knowledge": "Keep `nll`, and try `anneal` against it.",
    "both": "Try `anneal`, with `nll` as the control.",
    "noise": "Try `neg_p` first, with `nll` as the control.",
    "weak": "Keep `nll`, and try `anneal` against it.",
    "strong": "Try `neg_p` first, with `nll` as the control.",
}
OPEN = "No objective is the clear first choice: run the sweep."
BY_PROBE = "The learnability probe decides here. Its cuts come from small synthetic tasks, so confirm the choice by a sweep."
BY_PLACEMENT = (
    "The placement is sure, the winner is not: mean p alone does not settle the choice. "
    "`--probe_steps 80` estimates how much of the improbable part is noise."
)
UNDECIDED = "The measurement does not decide. Measure more examples, add `--probe_steps 80`, or sweep."


def decide(report: Report) -> tuple[str, str]:
    """Return what to try first, and how sure that is."""
    verdict = report.learnability.verdict if report.learnability else None
    if verdict in FIRST:
        return FIRST[verdict], BY_PROBE
    placement = report.placement
    if not placement.decided:
        return OPEN, UNDECIDED
    confidence = BY_PROBE if verdict == "little" else BY_PLACEMENT
    return FIRST.get(placement.region, OPEN), confidence
