"""The objectives that a new one is compared with, and their stored results."""

import gzip
import json
from pathlib import Path
from typing import Any

from .._util.files import write_bytes
from .engine import Entry, study_design
from .results import Results

STORED = Path(__file__).with_name("stored.json.gz")  # written by studies/cells_study.py
# `alpha c e^-H` is `power` with that alpha for each token, H its entropy: `anneal` without a schedule
FIELD: dict[str, Any] = {
    "nll": "nll",
    "anneal": "anneal",
    "alpha 0.5 e^-H": {"name": "anneal", "start": 0.5, "end": 0.5},
    "neg_p": "neg_p",
    "alpha e^-H": {"name": "anneal", "start": 1, "end": 1},
    "alpha 0.25 e^-H": {"name": "anneal", "start": 0.25, "end": 0.25},
    "power 0.5": {"name": "power", "alpha": 0.5},
    "neg_p + 0.1 nll": {"name": "neg_p", "mix": {"nll": 0.1}},
    "neg_p floor 0.1": {"name": "neg_p", "floor": 0.1},
    "nll p >= 0.2": {"name": "nll", "threshold": 0.2},
    "deft": "deft",
    "eaft": "eaft",
    "infosft": "infosft",
    "power 10": {"name": "power", "alpha": 10},
    "label smoothing 0.1": {"name": "nll", "smoothing": 0.1},
}
# Those that might be a default; the others of the field are known to fail where the model lacks knowledge, and are shown beside
CANDIDATES = (
    "nll",
    "anneal",
    "alpha 0.25 e^-H",
    "alpha 0.5 e^-H",
    "alpha e^-H",
    "power 0.5",
    "neg_p + 0.1 nll",
    "neg_p floor 0.1",
    "deft",
    "eaft",
    "infosft",
)


def entries(names: list[str] | None = None) -> list[Entry]:
    """Return objectives of the field by name, by default all."""
    return [Entry.parse(name, FIELD[name]) for name in names or FIELD]


def stored(path: Path = STORED) -> Results:
    """Return the results of the field on the public seeds; an objective that has not been run is missing."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return Results.from_json(json.load(file))


def store(results: Results, path: Path = STORED) -> None:
    """Write results as `stored` reads them; the same bytes for the same results."""
    text = json.dumps({"design": study_design(), **results.to_json()}, separators=(",", ":"))
    write_bytes(path, gzip.compress(text.encode(), mtime=0))
