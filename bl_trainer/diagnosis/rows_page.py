"""The page of rows by noise score, beside a report: their text, a cut to choose, and the commands that use it."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .._util.files import replacing, write_text
from ..head.targets import IGNORED
from ..pages.html import fill, script, script_json
from ..tokens.vocabulary import token_texts
from .score_files import FITTED, ScoreFolder

FIGURES = ("row", "row_hash", "targets", "mean_p", "mean_logp", *FITTED)  # columns of rows.parquet

SHOWN = 10_000  # rows on the page, of the highest scores

WINDOW, CONTEXT = 100, 40  # tokens of a row that are shown, and how many of them come before its first target

CUTS = 501  # of the slider, which drops from 0 to half of the rows in steps of a tenth of a percent

WEIGHTED = """from bl_trainer.recipe.recipe import Recipe
from datasets import load_dataset

data, _ = Recipe.read(["--config", "recipe.yaml"]).load_datasets()
scores = load_dataset("parquet", data_files={rows}, split="train")["noise_score"]
weights = [0.1 if score is not None and score > CUT else 1.0 for score in scores]
data.add_column("objective_weight", weights).to_json("weighted.jsonl")
"""


class ScoredRows(NamedTuple):
    """A folder of scores with `--tokens` and `--noise_steps`, all written, and the tokenizer that reads their tokens."""

    folder: ScoreFolder
    tokenizer: Any


class Cut(NamedTuple):
    """A number of the noise score: rows above it, and the target tokens of these."""

    number: float
    rows: int
    tokens: int


def write_rows(scored: ScoredRows, target: Path, title: str) -> None:
    """Write rows.parquet, the figures of all rows, and rows.html, to read those of the highest scores, into `target`."""
    table = pa.concat_tables(pq.read_table(path, columns=[*FIGURES]) for path in _files(scored.folder))
    with replacing(target / "rows.parquet") as part:
        pq.write_table(table.replace_schema_metadata(None), part)
    write_text(target / "rows.html", rows_page(scored, table, target / "rows.parquet", title))


def rows_page(scored: ScoredRows, table: pa.Table, file: Path, title: str) -> str:
    """Return the HTML page. `table`: the figures of all rows; `file`: where they are written, for the commands."""
    home, scores, targets = Path(__file__).parent, _scores(table), table["targets"].to_numpy()
    order = np.lexsort((np.arange(len(scores)), -scores))[: int(np.isfinite(scores).sum())]
    shown = order[:SHOWN]
    texts = {row["row"]: row for row in _texts(scored, {*shown.tolist()})}
    cuts = cuts_of(scores[order], targets[order])
    total = {"size": len(scores), "tokens": int(targets.sum())}
    data = {"rows": [texts[row] for row in shown.tolist()], "cuts": cuts, **total}
    drop = f"bl-trainer train --config recipe.yaml --drop_rows {shlex.quote(f'{file} noise_score > CUT')}"
    return fill(
        home / "rows.html.j2",
        title=f"{title}: rows by noise score",
        total=total,
        scored=len(order),
        shown=len(shown),
        drop=drop,
        weighted=WEIGHTED.format(rows=json.dumps(str(file))),
        data=script_json(data),
        code=script(home / "rows.js"),
    )


def cuts_of(scores: np.ndarray, targets: np.ndarray) -> list[Cut]:
    """Return the cuts of the slider. Both (rows,), of rows with a target, the highest score first."""
    tokens = np.concatenate([[0], np.cumsum(targets)])
    cuts = []
    for step in range(CUTS):
        count = len(scores) * step // (2 * (CUTS - 1))
        number = _between(scores[count], scores[count - 1] if count else scores[0] + 1)
        above = int((scores > number).sum())
        cuts.append(Cut(number, above, int(tokens[above])))
    return cuts


def _between(low: float, high: float) -> float:
    """Return the shortest number from `low` on to before `high`; `low` itself if they are equal."""
    for digits in range(2, 17):
        number = float(f"{(low + high) / 2:.{digits}g}")
        if low <= number < high:
            return number
    return float(low)


def _scores(table: pa.Table) -> np.ndarray:
    return table["noise_score"].to_numpy().astype(np.float64)


def _files(folder: ScoreFolder) -> Iterator[Path]:
    for shard in folder.shards():
        yield folder.path / shard.name


def _texts(scored: ScoredRows, wanted: set[int]) -> Iterator[dict[str, Any]]:
    """Yield what the page shows of each wanted row, one file in memory at a time."""
    for shard, path in zip(scored.folder.shards(), _files(scored.folder), strict=True):
        numbers = [row - shard.start for row in shard.rows if row in wanted]
        if numbers:
            for row in pq.read_table(path).take(numbers).to_pylist():
                yield _text(row, scored.tokenizer)


def _text(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return a row's figures, and its text around the target that is the least probable after cross-fitting.

    `pieces`: a text for each target, and one for what stands between targets. `p`: of a target before and after in
    thousandths, null for what does not train.
    """
    ids, labels = row["input_ids"], row["labels"]
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    p = dict(zip(places, np.round(1000 * np.exp([row["logp"], row["fitted_logp"]])).astype(int).T.tolist(), strict=True))
    start = max(0, places[0] - CONTEXT)
    worst = places[int(np.argmin(row["fitted_logp"]))]
    if worst >= start + WINDOW:
        start = min(worst - WINDOW // 2, len(ids) - WINDOW)
    stop = min(len(ids), start + WINDOW)
    pieces: list[str] = []
    values: list[Any] = []
    for place, text in enumerate(token_texts(tokenizer, ids[start:stop]), start):
        if place not in p and values and values[-1] is None:
            pieces[-1] += text
        else:
            pieces.append(text)
            values.append(p.get(place))
    figures = {name: row[name] for name in ("row", "targets")}
    means = {"score": round(row["noise_score"], 4), "before": round(row["mean_p"], 4)}
    after = round(float(np.exp(row["fitted_logp"]).mean()), 4)
    return {**figures, **means, "after": after, "cut": [start, len(ids) - stop], "pieces": pieces, "p": values}
