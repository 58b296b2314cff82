"""What a person sees of a diagnosis: the terminal summary, the figures, and one self-contained HTML page."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .continuum import ANCHORS, BUCKETS, LEARNABLE, NOISE, SWEPT_PERCENTILE, objective_name, sweep_yaml
from .objectives import Objective, Threshold
from .pages import document, escape, finite, picture, render, table, to_json
from .statistics import Comparison

ALT_TEXTS = {
    "continuum": "Mean p on the continuum from model-weak to model-strong, with the paper's base models",
    "histogram": "Share of target tokens by their probability p",
    "gradient": "Share of the gradient from each tenth of p, for each objective",
    "reliability": "How often the most probable token is the target, by its probability; larger dots stand for more tokens",
    "positions": "Mean p by position: from the start, along, and from the end of a response",
    "examples": "How many examples have which mean p",
    "moved": "Where the probability of target tokens moved: p under the base model against p after tuning",
}
KIND_NAMES = {
    "all": "all",
    "content": "content",
    "eos": "end of sequence",
    "special": "special tokens",
    "template": "chat template",
}


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
        (target / "figures" / f"{name}.png").write_bytes(render(partial(draw, report), _size(name), "light", "png"))
    figures_only = {key: value for key, value in finite(report).items() if key not in ("reader", "rows")}
    (target / "report.json").write_text(json.dumps(figures_only, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (target / "examples.json").write_text(to_json(report["reader"]) + "\n", encoding="utf-8")
    (target / "sweep.yaml").write_text(sweep_yaml(report), encoding="utf-8")
    (target / "report.html").write_text(page(report), encoding="utf-8")


def terminal_summary(report: dict[str, Any], folder: str | None) -> str:
    """Return the report in at most 25 lines."""
    total, placement, advice = report["total"], report["placement"], report["recommendation"]
    percentiles = report["percentiles"]
    ranks = ["5", "10", "25", "50", "75", *_asked(percentiles)][:12]
    lines = [
        f"{_short(report['model'])} on {_short(str(report['data']))}: {total['tokens']:,} target tokens of "
        f"{total['examples']:,} examples" + (f" ({_sample(report)})" if report["sampled"] else ""),
        f"  mean p {_interval(total['prob'], total['prob_interval'])}   nll {total['nll']:.3f}   top-1 {total['top1']:.3f}   "
        f"entropy {total['entropy']:.2f}   p > 0.55: {total['above_paper']:.1%}",
        "  percentiles of p:  " + "   ".join(f"{rank}%: {percentiles[rank]:.3g}" for rank in ranks),
        f"  calibration error {report['calibration']['error']:.3f}   confident conflicts {total['conflicts']:.2%}   mean p of "
        f"an example {report['examples']['mean']:.3f} (standard deviation {report['examples']['deviation']:.3f})",
        "  mean p of " + ", ".join(f"{KIND_NAMES[k]} {v['prob']:.3g}" for k, v in _kinds_shown(report).items() if k != "all"),
        f"Placement: {_placement(placement)}",
    ]
    groups = sorted(report["groups"].items(), key=lambda item: -item[1]["tokens"])[:3]
    if groups:
        lines.append("  by group: " + ", ".join(f"{_short(name)} {group['prob']:.3f}" for name, group in groups))
    if "compare" in report:
        for name, part in (("training data", report["compare"]["train"]), ("probe", report["compare"].get("probe"))):
            if part:
                lines.append(
                    f"  against {_short(report['compare']['checkpoint'])} on {name}: mean p {part['base_prob']:.3f} -> "
                    f"{part['prob']:.3f}, nll {part['base_nll']:.3f} -> {part['nll']:.3f}, KL {part['kl']:.4f}"
                )
    lines += [f"  {_clip(reason, 400)}" for reason in advice["reasons"][: 3 if "learnability" in report else 2]]
    lines += [f"  ! {_clip(warning)}" for warning in advice["warnings"][:6]]
    lines.append("Try: " + "; ".join(_arm(arm) for arm in advice["arms"]))
    lines.append(f"Report: {Path(folder or '.') / 'report.html'}   arms: {Path(folder or '.') / 'sweep.yaml'}")
    return "\n".join(lines[:25])


def figures(report: dict[str, Any]) -> dict[str, Callable[[dict[str, Any], Figure, Any], None]]:
    """Return the drawing functions of the figures that this report has, by name."""
    drawn: dict[str, Any] = {
        "continuum": _draw_continuum,
        "histogram": _draw_histogram,
        "gradient": _draw_gradient,
        "reliability": _draw_reliability,
        "positions": _draw_positions,
        "examples": _draw_examples,
    }
    if "compare" in report:
        drawn["moved"] = _draw_moved
    return drawn


def _size(name: str) -> tuple[float, float]:
    return 7.2, 1.9 if name == "continuum" else 2.9


def _figure(name: str, report: dict[str, Any]) -> str:
    return picture(partial(figures(report)[name], report), _size(name), ALT_TEXTS[name])


def _draw_continuum(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    text, muted, _, colours = theme
    axes, placement, total = figure.subplots(), report["placement"], report["total"]
    edges = [0, *placement["cuts"], 1]
    for i, region in enumerate(ANCHORS):
        axes.axvspan(edges[i], edges[i + 1], color=colours[i], alpha=0.12, lw=0)
        axes.text((edges[i] + edges[i + 1]) / 2, 0.93, f"model-{region}", ha="center", va="top", color=muted)
        points = [p for *_, p in ANCHORS[region]]
        axes.plot(points, [0.3] * len(points), "o", color=colours[i], ms=5, alpha=0.8)
        label = f"{ANCHORS[region][0][0]} {min(points):.2f}-{max(points):.2f}"
        axes.text(max(sum(points) / len(points), 0.005), 0.12, label, ha="left" if i == 0 else "center", va="center", size=8)
    low, high = total["prob_interval"] or (total["prob"], total["prob"])
    axes.plot([low, high], [0.56, 0.56], "-", color=text, lw=2)
    axes.plot([total["prob"]], [0.56], "D", color=text, ms=7)
    side = "right" if total["prob"] > 0.7 else "left"
    axes.annotate(f"here: {total['prob']:.3f}", (total["prob"], 0.56), (10 if side == "left" else -10, 7),
                  textcoords="offset points", ha=side, weight="bold")  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xlabel="mean p of the target tokens (dots: base models in the paper, Tab. 5)")
    axes.spines["left"].set_visible(False)


def _draw_histogram(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    axes, counts = figure.subplots(), report["histogram"]
    width, total = 1 / len(counts), sum(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], [c / total for c in counts], width * 0.92, color=theme[3][0])
    for rank in ("10", "50"):
        axes.axvline(report["percentiles"][rank], color=theme[1], lw=1, ls="--")
        axes.annotate(
            f" {rank}%", (report["percentiles"][rank], 0.9), xycoords=("data", "axes fraction"), color=theme[1], size=8
        )
    axes.set(xlim=(0, 1), xlabel="p of the target token (dashed: percentiles)", ylabel="share of tokens")


def _draw_gradient(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    shown = report["objectives"][:6]
    width = 0.85 / len(shown)
    for k, item in enumerate(shown):
        where = [b + 0.075 + (k + 0.5) * width for b in range(BUCKETS)]
        label = f"{objective_name(item)}  (scale {item['scale']:.2g})"
        axes.bar(where, item["buckets"], width * 0.95, label=label, color=theme[3][k])
    axes.set(xticks=range(BUCKETS + 1), xticklabels=[f"{b / BUCKETS:.1f}" for b in range(BUCKETS + 1)], xlim=(0, BUCKETS))
    axes.set(xlabel="p of the target token", ylabel="share of the gradient")
    axes.legend(fontsize=7.5)


def _draw_reliability(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color=theme[1], lw=1)
    curves = {"": report["calibration"]}
    if "compare" in report:
        curves = {
            f"{name} (error {part['error']:.3f})": part for name, part in report["compare"]["train"]["calibration"].items()
        }
    for k, (name, part) in enumerate(curves.items()):
        most = max(item["tokens"] for item in part["curve"])
        axes.scatter(
            [item["confidence"] for item in part["curve"]],
            [item["accuracy"] for item in part["curve"]],
            [4 + 60 * item["tokens"] / most for item in part["curve"]],
            color=theme[3][k], alpha=0.8, label=name, clip_on=False,
        )  # fmt: skip
    if len(curves) > 1:
        axes.legend(fontsize=8)
    axes.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="probability of the most probable token", ylabel="share in which it is the target"
    )


def _draw_positions(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    parts = {"first": "tokens from the start", "relative": "position in the response", "last": "tokens from the end"}
    for axes, (part, label) in zip(figure.subplots(1, 3, sharey=True), parts.items(), strict=True):
        curve = [float("nan") if p is None else p for _, p in report["positions"][part]]
        count = len(curve)
        x = [(i + 0.5) / count for i in range(count)] if part == "relative" else list(range(count))
        axes.plot(x, curve, "o-", color=theme[3][0], ms=3, clip_on=False)
        if part == "last":
            axes.invert_xaxis()
        axes.set(xlabel=label, ylim=(0, 1))
        if part == "first":
            axes.set_ylabel("mean p")


def _draw_examples(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    axes, counts = figure.subplots(), report["examples"]["histogram"]
    width = 1 / len(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], counts, width * 0.92, color=theme[3][0])
    axes.set(xlim=(0, 1), xlabel="mean p of an example", ylabel="examples")


def _draw_moved(report: dict[str, Any], figure: Figure, theme: Any) -> None:
    moved = report["compare"]["train"]["moved"]
    shares = [[count / max(1, sum(row)) for count in row] for row in moved]
    axes = figure.subplots()
    image = axes.imshow(shares, origin="lower", extent=(0, 1, 0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label="share of the row")
    axes.set(xlabel="p after tuning", ylabel="p under the base model")


def page(report: dict[str, Any]) -> str:
    """Return the HTML page of a report."""
    total, placement, advice = report["total"], report["placement"], report["recommendation"]
    sample = f", {_sample(report)}" if report["sampled"] else ""
    sections = [
        f"<header><h1>{escape(report['model'])}</h1><p>on {escape(str(report['data']))}: {total['tokens']:,} target tokens of "
        f"{total['examples']:,} examples{sample}. bl_trainer {escape(report['versions']['bl_trainer'])}.</p></header>",
        f"<section><h2>{escape(_placement(placement))}</h2>{_figure('continuum', report)}"
        + "".join(f"<p>{escape(reason)}</p>" for reason in advice["reasons"])
        + "<p>Try: " + ", ".join(f"<code>{escape(_arm(arm))}</code>" for arm in advice["arms"])
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
        "<section><h2>Probabilities</h2>" + _figure("histogram", report) + _numbers(report) + "</section>",
        "<section><h2>Where the gradient comes from</h2><p>Share of the pull W(p) = -f'(p) p (1 - p) by tenth of p, on these "
        "tokens.</p>" + _figure("gradient", report) + _objectives(report) + "</section>",
        "<section><h2>Position and kind</h2>" + _figure("positions", report) + _kinds(report) + "</section>",
        "<section><h2>Calibration</h2><p>Expected calibration error of the most probable token: "
        f"{report['calibration']['error']:.3f}.</p>" + _figure("reliability", report) + "</section>",
        "<section><h2>From example to example</h2>" + _figure("examples", report) + _groups(report) + "</section>",
    ]  # fmt: skip
    if "learnability" in report:
        sections.insert(1, "<section><h2>Knowledge or noise</h2>" + _learnability(report["learnability"]) + "</section>")
    if "compare" in report:
        sections.insert(
            2, "<section><h2>Against the base model</h2>" + _comparison(report) + _figure("moved", report) + "</section>"
        )
    data = to_json(report["reader"]).replace("<", "\\u003c")
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    return document(
        f"{report['model']}: {_placement(placement)}",
        sections,
        f'<script type="application/json" id="data">{data}</script><script>{script}</script>',
    )


def _learnability(found: dict[str, Any]) -> str:
    parts = {f"after {found['steps']} steps": found}
    if found["half_way"] is not None:
        parts = {f"after {found['steps'] // 2} steps": found["half_way"], **parts}
    header = ["share of the content", "improbable", "foretold", "not foretold", "mean rise of log p"]
    rows = [
        [name, f"{part['low']:.4f}", _interval(part["learnable"], part["learnable_interval"]),
         _interval(part["noise"], part["noise_interval"]), f"{part['gain']:+.3f}"]
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
        ["mean p (Eq. 5), 95 % interval over examples", _interval(total["prob"], total["prob_interval"])],
        ["mean -log p, nats", f"{total['nll']:.4f}"],
        ["entropy, nats", f"{total['entropy']:.4f}"],
        ["target is the most probable token", f"{total['top1']:.4f}"],
        ["tokens with p > 0.55 (Tab. 6)", f"{total['above_paper']:.2%}"],
        ["confident conflicts", f"{total['conflicts']:.2%}"],
    ]
    shown = ["1", "2", "5", "10", "20", "30", "40", "50", "60", "70", "80", "90", "95", "99"]
    shown = sorted([*shown, *_asked(percentiles)], key=float)
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
        for kind, item in _kinds_shown(report).items()
    ]  # fmt: skip
    return table(header, rows) + "<p>The chat template's own tokens include special ones; content is all the rest.</p>"


def _groups(report: dict[str, Any]) -> str:
    if not report["groups"]:
        return ""
    header = ["group", "examples", "tokens", "mean p", "nll", "top-1", "confident conflicts"]
    rows = [
        [name, f"{group['examples']:,}", f"{group['tokens']:,}", _interval(group["prob"], group["prob_interval"]),
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
         _interval(part["kl"], part["intervals"]["kl"]), f"{part['reverse_kl']:.4f}", f"{part['js']:.4f}"]
        for name, part in parts.items()
    ]  # fmt: skip
    return f"<p>{escape(report['compare']['checkpoint'])}, in nats per target token.</p>" + table(header, rows)


def _sample(report: dict[str, Any]) -> str:
    return "the beginning of a stream" if report["streamed"] else "a random sample"


def _asked(percentiles: dict[str, float]) -> list[str]:
    """Return the percentiles that were asked for besides 1 to 99."""
    usual = set(map(str, range(1, 100)))
    return [rank for rank in percentiles if rank not in usual]


def _kinds_shown(report: dict[str, Any]) -> dict[str, Any]:
    """Return the kinds of tokens, without the special ones where those are the end tokens again."""
    kinds = report["kinds"]
    return {name: kind for name, kind in kinds.items() if name != "special" or kind != kinds.get("eos")}


def _interval(mean: float, interval: Any) -> str:
    return f"{mean:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else " (no interval: under 10 examples)")


def _placement(placement: dict[str, Any]) -> str:
    if not placement["decided"]:
        return "undecided: " + " or ".join(f"model-{region}" for region in placement["possible"])
    near = ", ".join(f"{abs(d):.3f} {'above' if d >= 0 else 'below'} the cut at {c:.3f}"
                     for d, c in zip(placement["distance_to_cuts"], placement["cuts"], strict=True))  # fmt: skip
    return f"model-{placement['region']} ({near})"


def _arm(arm: dict[str, Any]) -> str:
    objective, threshold = Objective.parse(arm["objective"]), Threshold.parse(arm.get("threshold"))
    return objective_name({"objective": objective.to_dict(), "threshold": threshold.to_dict()})


def _short(name: str, size: int = 48) -> str:
    name = " ".join(name.split())
    return name if len(name) <= size else "…" + name[1 - size :]


def _clip(line: str, size: int = 260) -> str:
    return line if len(line) <= size else line[: size - 1] + "…"
