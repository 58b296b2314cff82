"""A report in the terminal."""

from pathlib import Path
from typing import Any

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


def terminal_summary(report: dict[str, Any], folder: str | None) -> str:
    """Return the report in at most 25 lines."""
    total, placement, advice = report["total"], report["placement"], report["recommendation"]
    percentiles = report["percentiles"]
    ranks = ["5", "10", "25", "50", "75", *asked_percentiles(percentiles)][:12]
    lines = [
        f"{short_name(report['model'])} on {short_name(str(report['data']))}: {total['tokens']:,} target tokens of "
        f"{total['examples']:,} examples" + (f" ({sample_text(report)})" if report["sampled"] else ""),
        f"  mean p {interval_text(total['prob'], total['prob_interval'])}   nll {total['nll']:.3f}   top-1 {total['top1']:.3f}"
        f"   entropy {total['entropy']:.2f}   p > 0.55: {total['above_paper']:.1%}",
        "  percentiles of p:  " + "   ".join(f"{rank}%: {percentiles[rank]:.3g}" for rank in ranks),
        f"  calibration error {report['calibration']['error']:.3f}   confident conflicts {total['conflicts']:.2%}   mean p of "
        f"an example {report['examples']['mean']:.3f} (standard deviation {report['examples']['deviation']:.3f})",
        "  mean p of " + ", ".join(f"{KIND_NAMES[k]} {v['prob']:.3g}" for k, v in kinds_shown(report).items() if k != "all"),
        f"Placement: {placement_text(placement)}",
    ]
    groups = sorted(report["groups"].items(), key=lambda item: -item[1]["tokens"])[:3]
    if groups:
        lines.append("  by group: " + ", ".join(f"{short_name(name)} {group['prob']:.3f}" for name, group in groups))
    if "compare" in report:
        for name, part in (("training data", report["compare"]["train"]), ("probe", report["compare"].get("probe"))):
            if part:
                lines.append(
                    f"  against {short_name(report['compare']['checkpoint'])} on {name}: mean p {part['base_prob']:.3f} -> "
                    f"{part['prob']:.3f}, nll {part['base_nll']:.3f} -> {part['nll']:.3f}, KL {part['kl']:.4f}"
                )
    lines += [f"  {clipped(reason, 400)}" for reason in advice["reasons"][: 3 if "learnability" in report else 2]]
    lines += [f"  ! {clipped(warning)}" for warning in advice["warnings"][:6]]
    lines.append("Try: " + "; ".join(arm_name(arm) for arm in advice["arms"]))
    lines.append(f"Report: {Path(folder or '.') / 'report.html'}   arms: {Path(folder or '.') / 'sweep.yaml'}")
    return "\n".join(lines[:25])
