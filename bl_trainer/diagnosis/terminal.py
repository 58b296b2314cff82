"""A report in the terminal."""

from collections.abc import Iterator
from pathlib import Path

from .advice import sweep_cost
from .report import Compared, Report
from .wording import (
    KIND_NAMES,
    arm_name,
    asked_percentiles,
    clipped,
    interval_text,
    kinds_shown,
    placement_text,
    sample_text,
    short_name,
)


def terminal_summary(report: Report, folder: str | None, drawn: bool = True) -> str:
    """Return the report in at most 25 lines; `drawn`: whether there is a page of it."""
    advice, target = report.recommendation, Path(folder or ".")
    lines = [*_measured(report), f"Placement: {placement_text(report.placement)}", *_groups(report), *_compared(report)]
    lines += [f"  {clipped(reason, 400)}" for reason in advice.reasons[: 3 if report.learnability else 2]]
    lines += [f"  ! {clipped(warning)}" for warning in advice.warnings[:6]]
    lines.append(f"Advice: {advice.headline}")
    lines.append("Sweep: " + "; ".join(arm_name(arm) for arm in advice.arms) + f" ({sweep_cost(report)})")
    lines.append(f"Report: {target / ('report.html' if drawn else 'report.json')}   sweep file: {target / 'sweep.yaml'}")
    return "\n".join(lines[:25])


def _measured(report: Report) -> Iterator[str]:
    total, examples = report.total, report.examples
    ranks = ["5", "10", "25", "50", "75", *asked_percentiles(report.percentiles)][:12]
    sample = f" ({sample_text(report)})" if report.sampled else ""
    yield (
        f"{short_name(report.model)} on {short_name(str(report.data))}: {total.tokens:,} target tokens of "
        f"{total.examples:,} examples{sample}"
    )
    yield (
        f"  mean p {interval_text(total.prob, total.prob_interval)}   nll {total.nll:.3f}   top-1 {total.top1:.3f}"
        f"   entropy {total.entropy:.2f}   p > 0.55: {total.above_paper:.1%}"
    )
    yield "  percentiles of p:  " + "   ".join(f"{rank}%: {report.percentiles[rank]:.3g}" for rank in ranks)
    yield (
        f"  calibration error {report.calibration.error:.3f}   confident conflicts {total.conflicts:.2%}   mean p of "
        f"an example {examples.mean:.3f} (standard deviation {examples.deviation:.3f})"
    )
    kinds = {name: kind for name, kind in kinds_shown(report).items() if name != "all"}
    yield "  mean p of " + ", ".join(f"{KIND_NAMES[name]} {kind.prob:.3g}" for name, kind in kinds.items())


def _groups(report: Report) -> Iterator[str]:
    """Yield the largest groups, if there are any."""
    groups = sorted(report.groups.items(), key=lambda item: -item[1].tokens)[:3]
    if groups:
        yield "  by group: " + ", ".join(f"{short_name(name)} {group.prob:.3f}" for name, group in groups)


def _compared(report: Report) -> Iterator[str]:
    compare = report.compare
    if compare:
        yield _against(compare.checkpoint, "training data", compare.train)
    if compare and compare.probe:
        yield _against(compare.checkpoint, "probe", compare.probe.found)


def _against(checkpoint: str, name: str, part: Compared) -> str:
    return (
        f"  against {short_name(checkpoint)} on {name}: mean p {part.base_prob:.3f} -> {part.prob:.3f}, nll "
        f"{part.base_nll:.3f} -> {part.nll:.3f}, KL {part.kl:.4f}"
    )
