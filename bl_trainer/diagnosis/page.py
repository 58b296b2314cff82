"""What a person sees of a diagnosis in files: the plots, the tables, and one self-contained HTML page."""

import csv
import io
import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .._util.files import write_bytes, write_text
from ..measurement.results import Comparison
from ..pages.figures import render
from ..pages.html import fill, script, script_json, to_json
from .advice import CONTRADICTED, LEARNABLE, NOISE, SOME, SWEPT_PERCENTILE, UNSEEN, sweep_cost, sweep_yaml, swept_threshold
from .figures import ALT_TEXTS, figure, figure_size, figures
from .report import Learnability, Report
from .rows_page import ScoredRows, write_rows
from .wording import (
    KIND_NAMES,
    arm_name,
    asked_percentiles,
    interval_text,
    kinds_shown,
    placement_text,
    sample_text,
    temperature_text,
)

SHOWN_PERCENTILES = ("1", "2", "5", "10", "20", "30", "40", "50", "60", "70", "80", "90", "95", "99")
IN_A_ROW = 7  # percentiles


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]


def write_report(report: Report, folder: str | None, scored: ScoredRows | None = None, draw: bool = True) -> None:
    """Write report.json, examples.json, sweep.yaml and, of a comparison, its rows into `folder`.

    With `draw` report.html and figures/*.png besides, with `scored` rows.html and rows.parquet. Each file is written in one go.
    """
    target = Path(folder or ".")
    (target / "figures" if draw else target).mkdir(parents=True, exist_ok=True)
    for path in (
        *(f"figures/{name}.png" for name in ALT_TEXTS),
        *(() if draw else ("report.html",)),
        "compare.csv",
        "probe.csv",
        "rows.html",
        "rows.parquet",
    ):  # of an earlier report
        (target / path).unlink(missing_ok=True)
    for name, drawing in figures(report).items() if draw else ():
        write_bytes(target / "figures" / f"{name}.png", render(partial(drawing, report), figure_size(name), "light", "png"))
    texts = {
        **{f"{name}.csv": _rows_csv(rows) for name, rows in report.rows.items()},
        "report.json": json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n",
        "examples.json": to_json(report.reader) + "\n",
        "sweep.yaml": sweep_yaml(report),
    }
    if draw:
        texts["report.html"] = page(report, target, has_rows=scored is not None)
    for name, text in texts.items():
        write_text(target / name, text)
    if scored is not None:
        write_rows(scored, target, f"{report.model} on {report.data}")


def _rows_csv(rows: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([["row", "tokens", *Comparison.VALUES], *rows])
    return text.getvalue()


def page(report: Report, folder: Path, has_rows: bool = False) -> str:
    """Return the HTML page of a report, with commands for the files in `folder`. `has_rows`: whether rows.html is beside it."""
    home = Path(__file__).parent
    return fill(
        home / "page.html.j2",
        title=f"{report.model} on {report.data}: {placement_text(report.placement)}",
        next=_next(report, folder),
        has_rows=has_rows,
        report=report,
        placement=placement_text(report.placement),
        sample=sample_text(report) if report.sampled else "",
        arms=[arm_name(arm) for arm in report.recommendation.arms],
        sweep_cost=sweep_cost(report),
        swept_percentile=SWEPT_PERCENTILE,
        sweeps_threshold=any(arm == arm | swept_threshold(report) for arm in report.recommendation.arms)
        and arm_name(swept_threshold(report)),
        learnable=LEARNABLE,
        some=SOME,
        noise=NOISE,
        contradicted=CONTRADICTED,
        unseen=UNSEEN,
        figure=partial(figure, report=report),
        halves=_halves(report.learnability) if report.learnability else None,
        numbers=_numbers(report),
        percentiles=_percentiles(report),
        objectives=_objectives(report),
        kinds=_kinds(report),
        groups=_groups(report),
        comparison=_comparison(report),
        examples=script_json(report.reader),
        code=script(home / "page.js"),
    )


def _next(report: Report, folder: Path) -> dict[str, str]:
    """Return what to do next, and the command for it."""
    sweep = shlex.quote(str(folder / "sweep.yaml"))
    lines = {
        "Compare the objectives, each at its best learning rate:": f"bl-trainer sweep --config recipe.yaml --sweep {sweep}"
    }
    if report.learnability is None:
        probe = shlex.quote(f"{folder}-probe")
        lines["Estimate how much of the improbable part is noise:"] = (
            f"accelerate launch -m bl_trainer diagnose --config recipe.yaml --probe_steps 80 --report {probe}"
        )
    return lines


def _halves(probe: Learnability) -> Table:
    parts = {f"after {probe.steps // 2} steps": probe.half_way, f"after {probe.steps} steps": probe.found}
    header = ["share of the content", "improbable", "predictable", "not predictable", "contradicted", "mean rise of log p"]
    rows = [
        [name, f"{part.low:.4f}", interval_text(part.learnable, part.learnable_interval),
         interval_text(part.noise, part.noise_interval), interval_text(part.contradicted, part.contradicted_interval),
         f"{part.gain:+.3f}"]
        for name, part in parts.items() if part
    ]  # fmt: skip
    return Table(header, rows)


def _numbers(report: Report) -> Table:
    total = report.total
    rows = [
        ["mean p (Eq. 5), 95 % interval over examples", interval_text(total.prob, total.prob_interval)],
        ["mean -log p, nats", f"{total.nll:.4f}"],
        ["entropy, nats", f"{total.entropy:.4f}"],
        ["target is the most probable token", f"{total.top1:.4f}"],
        ["tokens with p > 0.55 (Tab. 6)", f"{total.above_paper:.2%}"],
        ["confident conflicts", f"{total.conflicts:.2%}"],
    ]
    return Table(["", ""], rows)


def _percentiles(report: Report) -> list[Table]:
    shown = sorted([*SHOWN_PERCENTILES, *asked_percentiles(report.percentiles)], key=float)
    parts = [shown[i : i + IN_A_ROW] for i in range(0, len(shown), IN_A_ROW)]
    return [Table([f"{rank} %" for rank in part], [[f"{report.percentiles[rank]:.4g}" for rank in part]]) for part in parts]


def _objectives(report: Report) -> Table:
    header = [
        "objective",
        "gradient scale / nll",
        "mean weight on the NLL gradient",
        "effective tokens",
        "from p < 0.1",
        "end tokens",
        "effective temperature",
    ]
    rows = [
        [item.name, f"{item.scale:.3g}", f"{item.gradient_weight:.3g}", f"{item.effective_tokens:,.0f}",
         f"{item.buckets[0]:.1%}", f"{item.kinds['eos']:.2%}",
         temperature_text(item.temperatures)]
        for item in report.objectives
    ]  # fmt: skip
    return Table(header, rows)


def _kinds(report: Report) -> Table:
    header = ["kind of target token", "tokens", "mean p", "nll", "top-1", "confident conflicts"]
    rows = [
        [
            KIND_NAMES[name],
            f"{kind.tokens:,}",
            f"{kind.prob:.4g}",
            f"{kind.nll:.3f}",
            f"{kind.top1:.3f}",
            f"{kind.conflicts:.2%}",
        ]
        for name, kind in kinds_shown(report).items()
    ]
    return Table(header, rows)


def _groups(report: Report) -> Table | None:
    if not report.groups:
        return None
    header = ["group", "examples", "tokens", "mean p", "nll", "top-1", "confident conflicts"]
    rows = [
        [name, f"{group.examples:,}", f"{group.tokens:,}", interval_text(group.prob, group.prob_interval),
         f"{group.nll:.3f}", f"{group.top1:.3f}", f"{group.conflicts:.2%}"]
        for name, group in sorted(report.groups.items(), key=lambda item: -item[1].tokens)
    ]  # fmt: skip
    return Table(header, rows)


def _comparison(report: Report) -> Table | None:
    if report.compare is None:
        return None
    probe, parts = report.compare.probe, {"training data": report.compare.train}
    if probe:
        parts[f"probe: {probe.data}"] = probe.found
    header = ["data", "tokens", "mean p", "nll", "top-1", "calibration error", "KL(base, tuned)", "KL(tuned, base)", "JS"]
    rows = [
        [name, f"{part.tokens:,}", f"{part.base_prob:.4f} → {part.prob:.4f}", f"{part.base_nll:.4f} → {part.nll:.4f}",
         f"{part.base_top1:.4f} → {part.top1:.4f}",
         f"{part.calibration['base'].error:.4f} → {part.calibration['tuned'].error:.4f}",
         interval_text(part.kl, part.intervals["kl"]), f"{part.reverse_kl:.4f}", f"{part.js:.4f}"]
        for name, part in parts.items()
    ]  # fmt: skip
    return Table(header, rows)
