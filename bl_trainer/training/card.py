"""The model card of a run: what says that it is ours, and what the run adds to it."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, metadata_load

TAG = "bl-trainer"


def is_ours(card: Path) -> bool:
    """Whether a run of ours wrote `card`."""
    try:
        return TAG in ((metadata_load(card) or {}).get("tags") or ())
    except (OSError, ValueError, yaml.YAMLError):
        return False


def add_objective(card: Path, record: dict[str, Any]) -> None:
    """Append objective, threshold and package versions of a run's record to its card."""
    lines = [f"{key}: {json.dumps(record[key])}" for key in ("objective", "threshold")]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    content = ModelCard.load(card)
    content.text += "\n".join(["", "", "## Objective", "", "```yaml", *lines, "```", "", f"Trained with {versions}.", ""])
    content.save(card)
