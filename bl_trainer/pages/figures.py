"""Plots, light and dark."""

import io
from collections.abc import Callable
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

# foreground, muted, background, then the colours of the series
THEMES = {
    "light": ("#1c2024", "#80868d", "#ffffff", ("#2563b0", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")),
    "dark": ("#e7e9ec", "#8d959e", "#16191d", ("#6ea8f0", "#fb923c", "#4ade80", "#c084fc", "#facc15", "#fb7185")),
}

Draw = Callable[[Figure, Any], None]  # draws into a figure, in the colours of a theme


def render(draw: Draw, size: tuple[float, float], theme: str, kind: str) -> bytes:
    """Return a figure of `size`, in inches, as `kind`: "png" or "svg"."""
    text, muted, background, colours = THEMES[theme]
    if kind == "svg":
        background = "none"  # the page's shows through, with the shadow that says that a plot scrolls
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "bl_trainer",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.edgecolor": muted,
        "axes.facecolor": background,
        "figure.facecolor": background,
        "xtick.color": text,
        "ytick.color": text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=colours),
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, THEMES[theme])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
