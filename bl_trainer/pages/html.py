"""What all pages have in common: templates that escape, plots, tables, and one self-contained HTML file.

A page is a Jinja2 template that extends `base.html.j2`. Templates escape all text from data. In a page's JSON `<` is an escape;
plots take `$` literally.
"""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .figures import Draw, render

HOME = Path(__file__).parent


class Picture(NamedTuple):
    """A plot in both colour schemes, as SVG in base64, and what it shows in words."""

    light: str
    dark: str
    alt: str


def drawn(draw: Draw, size: tuple[float, float], alt: str) -> Picture:
    """Draw a plot of `size`, in inches, for the macro `picture` of `parts.html.j2`."""
    light, dark = (base64.b64encode(render(draw, size, theme, "svg")).decode() for theme in ("light", "dark"))
    return Picture(light, dark, alt)


def fill(template: Path, **values: Any) -> str:
    """Return the page of a template, which finds those of this folder by name; `values`: its variables, `title` among them."""
    style = Markup((HOME / "page.css").read_text(encoding="utf-8"))
    return _environment(template.parent).get_template(template.name).render(style=style, **values)


def script(code: Path) -> Markup:
    """Return a page's script behind `text.js`, which makes elements and shows text from data."""
    return Markup("".join(path.read_text(encoding="utf-8") for path in (HOME / "text.js", code)))


@cache
def _environment(folder: Path) -> Environment:
    loader = FileSystemLoader([folder, HOME])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    return environment


def _code(text: str) -> Markup:
    """Return a sentence with what stands between backticks as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def script_json(value: Any) -> Markup:
    """Return JSON for a script element, which no text in it can end."""
    return Markup(to_json(value).replace("<", "\\u003c"))


def to_json(value: Any) -> str:
    """Return JSON in the least space."""
    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """Return the same with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
