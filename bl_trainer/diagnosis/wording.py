"""How figures of a report are said, on the page and in the terminal."""

import math
from typing import Any

from .continuum import Placement, objective_name, record_of
from .report import Interval, Kind, Report

KIND_NAMES = {
    "all": "all",
    "content": "content",
    "eos": "end of sequence",
    "special": "special tokens",
    "template": "chat template",
}


def sample_text(report: Report) -> str:
    return "the beginning of a stream" if report.streamed else "a random sample"


def asked_percentiles(percentiles: dict[str, float]) -> list[str]:
    """Return the percentiles that were asked for besides 1 to 99."""
    usual = set(map(str, range(1, 100)))
    return [rank for rank in percentiles if rank not in usual]


def kinds_shown(report: Report) -> dict[str, Kind]:
    """Return the kinds of tokens, without the special ones where those are the end tokens again."""
    kinds = report.kinds
    return {name: kind for name, kind in kinds.items() if name != "special" or kind != kinds.get("eos")}


def interval_text(mean: float, interval: Interval) -> str:
    return f"{mean:.4f}" + (
        f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else " (no interval: under 10 examples, or alike)"
    )


def placement_text(placement: Placement) -> str:
    if not placement.decided:
        return "undecided: " + " or ".join(f"model-{region}" for region in placement.possible)
    near = ", ".join(f"{abs(d):.3f} {'above' if d >= 0 else 'below'} the cut at {c:.3f}"
                     for d, c in zip(placement.distance_to_cuts, placement.cuts, strict=True))  # fmt: skip
    return f"model-{placement.region} ({near})"


def temperature_text(values: list[float]) -> str:
    """Return an effective temperature: one figure if it is fixed, else one for each distribution."""
    shown = ["infinity" if math.isinf(value) else f"{value:.2f}" for value in values]
    return shown[0] if len({*shown}) == 1 else ", ".join(shown)


def arm_name(arm: dict[str, Any]) -> str:
    return objective_name(record_of(arm))


def short_name(name: str, size: int = 48) -> str:
    name = " ".join(name.split())
    return name if len(name) <= size else "…" + name[1 - size :]


def clipped(line: str, size: int = 260) -> str:
    return line if len(line) <= size else line[: size - 1] + "…"
