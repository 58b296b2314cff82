"""What all pages have in common: figures drawn by matplotlib, light and dark, tables, and one self-contained HTML file.

All text from data is escaped: in HTML by `html.escape`, in a page's JSON by writing `<` as an escape, in figures by taking `$`
literally. `report.css` and `report.js` go into a page as they are.
"""

import base64
import html
import json
from pathlib import Path
from typing import Any

from .figures import Draw, render


def picture(draw: Draw, size: tuple[float, float], alt: str) -> str:
    """Return a figure as HTML that follows the reader's colour scheme."""
    light, dark = (base64.b64encode(render(draw, size, theme, "svg")).decode() for theme in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark}">'
        f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{light}"></picture>'
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table; cells are plain text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def document(title: str, sections: list[str], script: str = "") -> str:
    """Return the page: sections of HTML, and what stands after them."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main>{"".join(sections)}</main>{script}'
        "</body></html>\n"
    )


def escape(text: str) -> str:
    """Return text for HTML."""
    return html.escape(text, quote=True)


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
