"""Find wording that readers must read twice: `python tools/prose.py [FILE ...]`, by default all that a person reads.

It looks at README.md, docs/, the pages' templates, the notebook, and bl_trainer/: every string, and the docstrings of public
names. It prints file, line and a better wording, and exits with 1 if it finds anything.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = 28  # in a sentence; the rule of thumb is 22
TELL_TALES = {
    r"\bof which\b": "start a new sentence",
    r"\bso many\b": "a number",
    r"\bis (?:said|told)\b": "the program says",
    r"\b(?:go|goes|going|gone|went) on\b": "resume, or continue",
    r"\b(?:let|lets|letting) go\b": "discard",
    r"\bunless told\b": "by default",
    r"\bstands? for\b": "is, or means",
    r"\bcut short\b": "truncated",
    r"\b(?:passes|passed) over\b": "skip",
    r"\bforetold\b": "predictable",
    r"\bheld-out\b": "test, or validation",
    r"\bmean of means\b": "average",
    r"\brulers?\b": "metric",
}
OF_CODE = {r"\bheld-out\b", r"\brulers?\b"}  # that docstrings have for `held_out` and `Ruler`
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a paragraph, and of a text of several lines each line's."""
    yield from re.split(r"(?<=[.:;!?])(?:\*\*)?\s+|\n+", text)


def faults(text: str, allowed: Iterable[str] = ()) -> Iterator[str]:
    """Yield what is wrong with a paragraph, but for what is code in it; a name or a pattern is all code.

    `allowed`: keys of `TELL_TALES` to pass.
    """
    if " " not in text or "(?" in text:
        return
    text = re.sub(r"`[^`]*`|\[([^\]]*)\]\([^)]*\)", lambda found: found[1] or "X", text)
    for pattern, better in TELL_TALES.items():
        for found in () if pattern in allowed else re.findall(pattern, text, re.IGNORECASE):
            yield f"{found!r}: write {better}"
    for sentence in sentences(text):
        count = len(re.findall(r"[A-Za-z][\w'-]*", sentence))
        if count > WORDS:
            yield f"{count} words in a sentence, at most {WORDS}: {sentence[:60]!r} ..."


def paragraphs(markdown: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each paragraph, list item and table cell, without code blocks and headings."""
    start = 1
    lines: list[str] = []
    fenced = False
    for number, line in enumerate([*markdown.splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        begins = re.match(r"\s*(?:[-*>]|\d+\.)\s", line)
        ends = (
            fenced or not line.strip() or begins or line.lstrip().startswith(("|", "#", "```", "<!--", "--8<--", ":::", "!["))
        )
        if ends and lines:
            yield start, " ".join(lines)
            lines = []
        if fenced or line.lstrip().startswith(("```", "#", "<!--", "--8<--", ":::", "![")) or line.startswith("    "):
            continue
        if line.startswith("|"):
            yield from ((number, cell.strip()) for cell in line.strip("|").split("|"))
        elif line.strip():
            start = start if lines else number
            lines.append(re.sub(r"^\s*(?:[-*>]|\d+\.)\s+", "", line).strip())


def template_texts(template: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each element of a Jinja2 template, without scripts."""
    script = False
    for number, line in enumerate(template.splitlines(), 1):
        script = ("<script" in line or script) and "</script" not in line
        if not script:
            plain = re.sub(r"{{.*?}}", "X", re.sub(r"{[%#].*?[%#]}", "", line))
            for part in re.split(r"</?(?:p|h\d|li|ul|section|header|div|t[dhr]|nav)\b[^>]*>", plain):
                yield number, re.sub(r"<[^>]*>", "", part)


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every string that is no docstring: messages and help texts among them."""
    tree = ast.parse(source)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and node.body]
    docstrings = {id(first.value) for first in firsts if isinstance(first, ast.Expr)}
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
        if isinstance(node, (ast.JoinedStr, ast.Constant)) and id(node) not in docstrings | parts:
            yield node.lineno, _text(node)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each paragraph, or item of a list, in the docstrings of public names; formulas are none."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef):
            waiting += [
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, DOCUMENTED) and not getattr(child, "name", "").startswith("_")
            ]
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        for block in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
            if not block.startswith("    "):
                for item in re.split(r"\n    (?=\S)", block):
                    yield getattr(node, "lineno", 1), " ".join(item.split())


def cells(source: str) -> Iterator[tuple[int, str]]:
    """Yield cell number and text of each paragraph of a notebook's prose."""
    for number, cell in enumerate(json.loads(source)["cells"], 1):
        if cell["cell_type"] == "markdown":
            yield from ((number, text) for _, text in paragraphs("".join(cell["source"])))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else "X" for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


READERS = {".py": strings, ".j2": template_texts, ".md": paragraphs, ".ipynb": cells}


def faults_of(path: Path) -> set[tuple[int, str]]:
    """Return the line and the wording of every fault in a file."""
    text = path.read_text(encoding="utf-8")
    found = {(line, fault) for line, part in READERS[path.suffix](text) for fault in faults(part)}
    if path.suffix == ".py":
        found |= {(line, fault) for line, part in docstrings(text) for fault in faults(part, OF_CODE)}
    return found


def main(paths: list[Path]) -> int:
    """Print every fault in the files, and return how many there are."""
    count = 0
    for path in paths:
        found = faults_of(path)
        for line, fault in sorted(found):
            print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}: {fault}")
        count += len(found)
    return count


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]]
    everything = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    everything += [*sorted((ROOT / "bl_trainer").rglob("*.j2")), *sorted((ROOT / "bl_trainer").rglob("*.py"))]
    everything += sorted((ROOT / "examples").glob("*.*"))
    sys.exit(1 if main(given or everything) else 0)
