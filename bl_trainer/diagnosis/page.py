"""What a person sees of a diagnosis: the terminal summary, the figures, and one self-contained HTML page."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

from ..measurement.results import Comparison
from ..pages.figures import render
from ..pages.html import document, escape, finite, table, to_json
from .advice import LEARNABLE, NOISE, SWEPT_PERCENTILE, sweep_yaml
from .continuum import objective_name
from .figures import ALT_TEXTS, figure_html, figure_size, figures
from .wording import KIND_NAMES, arm_name, asked_percentiles, interval_text, kinds_shown, placement_text, sample_text


def write_report(report: dict[str, Any], folder: str | None) -> None:
    """Write report.json, examples.json, report.html, sweep.yaml, figures/*.png and, of a comparison, its rows into `folder`."""
    target = Path(folder or ".")
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for path in (*(f"figures/{name}.png" for name in ALT_TEXTS), "compare.csv", "probe.csv"):  # of an earlier report
        (target / path).unlink(missing_ok=True)
    for name, rows in report.get("rows", {}).items():
        with (target / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["row", "tokens", *Comparison.VALUES], *rows])
    for name, draw in figures(report).items():
        (target / "figures" / f"{name}.png").write_bytes(render(partial(draw, report), figure_size(name), "light", "png"))
    figures_only = {key: value for key, value in finite(report).items() if key not in ("reader", "rows")}
    (target / "report.json").write_text(json.dumps(figures_only, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (target / "examples.json").write_text(to_json(report["reader"]) + "\n", encoding="utf-8")
    (target / "sweep.yaml").write_text(sweep_yaml(report), encoding="utf-8")
    (target / "report.html").write_text(page(report), encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """Return the HTML page of a report."""
    total, placement, advice = report["total"], report["placement"], report["recommendation"]
    sample = f", {sample_text(report)}" if report["sampled"] else ""
    sections = [
        f"<header><h1>{escape(report['model'])}</h1><p>on {escape(str(report['data']))}: {total['tokens']:,} target tokens of "
        f"{total['examples']:,} examples{sample}. bl_trainer {escape(report['versions']['bl_trainer'])}.</p></header>",
        f"<section><h2>{escape(placement_text(placement))}</h2>{figure_html('continuum', report)}"
        + "".join(f"<p>{escape(reason)}</p>" for reason in advice["reasons"])
        + "<p>Try: " + ", ".join(f"<code>{escape(arm_name(arm))}</code>" for arm in advice["arms"])
        + " (<code>sweep.yaml</code>). The threshold of an arm is the "
        + f"{SWEPT_PERCENTILE}th percentile of p, as a recipe may also say: "
        + f"<code>threshold: {{above_percentile: {SWEPT_PERCENTILE}}}</code>.</p>"
        + "<ul class=warnings>" + "".join(f"<li>{escape(warning)}</li>" for warning in advice["warnings"]) + "</ul></section>",
        "<section><h2>Read the examples</h2><p>Each target token is coloured by p, from <span class=t data-b=0>improbable"
        "</span> to <span class=t data-b=9>certain</span>; grey text is not trained on; underlined: the model is sure of "
        "something else. "
        "Are the improbable tokens noise, or what the model should learn?</p>"
        "<nav id=tabs role=tablist></nav><div id=detail aria-live=polite>Point at a token, or tap it.</div>"
        "<div id=examples></div>"
        "<noscript>The reader needs JavaScript.</noscript></section>",
        "<section><h2>Probabilities</h2>" + figure_html("histogram", report) + _numbers(report) + "</section>",
        "<section><h2>Where the gradient comes from</h2><p>Share of the pull W(p) = -f'(p) p (1 - p) by tenth of p, on these "
        "tokens.</p>" + figure_html("gradient", report) + _objectives(report) + "</section>",
        "<section><h2>Position and kind</h2>" + figure_html("positions", report) + _kinds(report) + "</section>",
        "<section><h2>Calibration</h2><p>Expected calibration error of the most probable token: "
        f"{report['calibration']['error']:.3f}.</p>" + figure_html("reliability", report) + "</section>",
        "<section><h2>From example to example</h2>" + figure_html("examples", report) + _groups(report) + "</section>",
    ]  # fmt: skip
    if "learnability" in report:
        sections.insert(1, "<section><h2>Knowledge or noise</h2>" + _learnability(report["learnability"]) + "</section>")
    if "compare" in report:
        sections.insert(
            2, "<section><h2>Against the base model</h2>" + _comparison(report) + figure_html("moved", report) + "</section>"
        )
    data = to_json(report["reader"]).replace("<", "\\u003c")
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    return document(
        f"{report['model']}: {placement_text(placement)}",
        sections,
        f'<script type="application/json" id="data">{data}</script><script>{script}</script>',
    )


def _learnability(found: dict[str, Any]) -> str:
    parts = {f"after {found['steps']} steps": found}
    if found["half_way"] is not None:
        parts = {f"after {found['steps'] // 2} steps": found["half_way"], **parts}
    header = ["share of the content", "improbable", "foretold", "not foretold", "mean rise of log p"]
    rows = [
        [name, f"{part['low']:.4f}", interval_text(part["learnable"], part["learnable_interval"]),
         interval_text(part["noise"], part["noise_interval"]), f"{part['gain']:+.3f}"]
        for name, part in parts.items()
    ]  # fmt: skip
    return (
        f"<p>An adapter trained by nll on {found['trained']['rows']:,} rows of one half of the data was asked about "
        f"{found['tokens']:,} tokens of content of {found['examples']:,} examples of the other. Improbable: p &lt; "
        f"{found['below']:g}. Foretold: the token has gained more there than at other places. From {LEARNABLE:g} on that is "
        f"too much to forgo; from {NOISE:g} on the rest, noise or what takes more steps, is too much to learn. Left out: "
        f"{found['without_control']:,} improbable tokens without a control, the same token where it is as improbable.</p>"
    ) + table(header, rows)


def _numbers(report: dict[str, Any]) -> str:
    total, percentiles = report["total"], report["percentiles"]
    rows = [
        ["mean p (Eq. 5), 95 % interval over examples", interval_text(total["prob"], total["prob_interval"])],
        ["mean -log p, nats", f"{total['nll']:.4f}"],
        ["entropy, nats", f"{total['entropy']:.4f}"],
        ["target is the most probable token", f"{total['top1']:.4f}"],
        ["tokens with p > 0.55 (Tab. 6)", f"{total['above_paper']:.2%}"],
        ["confident conflicts", f"{total['conflicts']:.2%}"],
    ]
    shown = ["1", "2", "5", "10", "20", "30", "40", "50", "60", "70", "80", "90", "95", "99"]
    shown = sorted([*shown, *asked_percentiles(percentiles)], key=float)
    parts = [shown[i : i + 7] for i in range(0, len(shown), 7)]
    ranks = "".join(table([f"{rank} %" for rank in part], [[f"{percentiles[rank]:.4g}" for rank in part]]) for part in parts)
    note = (
        f"<p>Percentiles of p, each off by at most {report['percentile_error']:.2%} of min(p, 1 - p); all in report.json:</p>"
    )
    return table(["", ""], rows) + note + ranks


def _objectives(report: dict[str, Any]) -> str:
    header = [
        "objective",
        "gradient scale / nll",
        "mean weight on the NLL gradient",
        "effective tokens",
        "from p < 0.1",
        "end tokens",
    ]
    rows = [
        [objective_name(item), f"{item['scale']:.3g}", f"{item['gradient_weight']:.3g}", f"{item['effective_tokens']:,.0f}",
         f"{item['buckets'][0]:.1%}", f"{item['kinds']['eos']:.2%}"]
        for item in report["objectives"]
    ]  # fmt: skip
    return table(header, rows)


def _kinds(report: dict[str, Any]) -> str:
    header = ["kind of target token", "tokens", "mean p", "nll", "top-1", "confident conflicts"]
    rows = [
        [KIND_NAMES[kind], f"{item['tokens']:,}", f"{item['prob']:.4g}", f"{item['nll']:.3f}", f"{item['top1']:.3f}",
         f"{item['conflicts']:.2%}"]
        for kind, item in kinds_shown(report).items()
    ]  # fmt: skip
    return table(header, rows) + "<p>The chat template's own tokens include special ones; content is all the rest.</p>"


def _groups(report: dict[str, Any]) -> str:
    if not report["groups"]:
        return ""
    header = ["group", "examples", "tokens", "mean p", "nll", "top-1", "confident conflicts"]
    rows = [
        [name, f"{group['examples']:,}", f"{group['tokens']:,}", interval_text(group["prob"], group["prob_interval"]),
         f"{group['nll']:.3f}", f"{group['top1']:.3f}", f"{group['conflicts']:.2%}"]
        for name, group in sorted(report["groups"].items(), key=lambda item: -item[1]["tokens"])
    ]  # fmt: skip
    return table(header, rows)


def _comparison(report: dict[str, Any]) -> str:
    parts = {"training data": report["compare"]["train"]}
    if "probe" in report["compare"]:
        parts[f"probe: {report['compare']['probe']['data']}"] = report["compare"]["probe"]
    header = ["data", "tokens", "mean p", "nll", "top-1", "calibration error", "KL(base, tuned)", "KL(tuned, base)", "JS"]
    rows = [
        [name, f"{part['tokens']:,}", f"{part['base_prob']:.4f} → {part['prob']:.4f}",
         f"{part['base_nll']:.4f} → {part['nll']:.4f}",
         f"{part['base_top1']:.4f} → {part['top1']:.4f}",
         f"{part['calibration']['base']['error']:.4f} → {part['calibration']['tuned']['error']:.4f}",
         interval_text(part["kl"], part["intervals"]["kl"]), f"{part['reverse_kl']:.4f}", f"{part['js']:.4f}"]
        for name, part in parts.items()
    ]  # fmt: skip
    return f"<p>{escape(report['compare']['checkpoint'])}, in nats per target token.</p>" + table(header, rows)
