"""The study of the presets on the quickstart's task: what it asks for, and the page that shows what it found."""

import json
from pathlib import Path

import pytest
import yaml

import quickstart_presets
from bl_trainer.recipe.reading import read_keys

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "sweep-presets.md"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Returns a function that writes the files of a preset, and reads the sweep file."""
    test = tmp_path / "test.jsonl"
    test.write_text("".join(f'{{"row": {i}}}\n' for i in range(64)))
    monkeypatch.setattr(quickstart_presets, "TEST", test)

    def written(preset, repetition):
        options = dict(option[2:].split("=", 1) for option in quickstart_presets.write_files(tmp_path, preset, repetition))
        return options, yaml.safe_load(Path(options["sweep"]).read_text())

    return written


def test_presets_share_no_seed_with_another_repetition(written):
    for preset, count in quickstart_presets.SEEDS.items():
        seeds = [written(preset, repetition)[1]["seed"] for repetition in range(3)]
        assert len({seed for each in seeds for seed in each}) == 3 * count


def test_the_recipe_is_the_quickstarts_without_what_a_sweep_refuses(written):
    options, sweep = written("short", 0)
    assert read_keys(["--config", options["config"]], "sweep").faults == []
    assert len(Path(sweep["held_out"]).read_text().splitlines()) == quickstart_presets.HELD_OUT
    recipe, own = yaml.safe_load(Path(options["config"]).read_text()), yaml.safe_load(quickstart_presets.RECIPE.read_text())
    assert {key for key in recipe if recipe[key] != own.get(key)} == {"output_dir", *quickstart_presets.LENGTH}


def test_the_page_shows_what_was_found():
    found = json.loads((PAGE.parent / "quickstart-presets.json").read_text())
    assert quickstart_presets.report(found).strip() in PAGE.read_text()
    assert [(each["repetition"], each["preset"]) for each in found] == [
        (i, preset) for i in range(3) for preset in ("short", "full")
    ]
