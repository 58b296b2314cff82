"""The study of the presets: what it runs of each, and the page that shows what it found."""

import json
import random
from pathlib import Path

import pytest

import continuum
import sweep_presets
from miniature import BATCH, STEPS

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "sweep-presets.md"


@pytest.fixture
def plans(tmp_path):
    """Returns a function that reads the plan of a preset, of a model and data that are not there."""
    keys = {"model_name_or_path": "org/model", "dataset_name": "org/data", "output_dir": str(tmp_path / "out")}
    keys |= {"max_steps": STEPS, "warmup_steps": 5, "use_cpu": True, "bf16": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
    return lambda preset, repetition: sweep_presets.plan_of(tmp_path, preset, repetition)


def test_presets_share_no_seed_with_another_repetition(plans):
    for preset in sweep_presets.SEEDS:
        seeds = [plans(preset, repetition).seeds for repetition in range(3)]
        assert len({seed for each in seeds for seed in each}) == 3 * sweep_presets.SEEDS[preset]


def test_what_a_short_sweep_costs(plans):
    plan, rng = plans("short", 0), random.Random(0)
    assert continuum.length_of(plan, plan.points()[0]) == {"max_steps": 25, "warmup_steps": 2}
    settings = [{**point, "seed": 0} for point in plan.points()]
    settings += [{**plan.points()[place], "seed": seed} for seed in (1, 2, 3) for place in (0, 3)]
    items = {"targets": [9] * 4, "cpu_seconds": [1.5], **{key: [1.0] * 4 for key in ("nll", "prob", "top1", "greedy")}}
    arms = {}
    for i, setting in enumerate(settings):
        own = {**items, "sampled": [float(rng.random() < 0.5) for _ in range(4)]}
        arms[i] = continuum.Scored(i, setting, continuum.means(own), items=own)
    found = sweep_presets.found_by(plan, arms, "mid-fact", 0)
    assert (found["runs"], found["target_tokens"], found["cpu_seconds"]) == (15, 15 * 25 * BATCH * 9, 22.5)
    assert len(found["values"]) == 2
    assert f"| mid-fact | 0 | short | 15 | {found['target_tokens']:,} | 22 |" in sweep_presets.report([found])


def test_the_page_shows_what_was_found():
    found = json.loads((PAGE.parent / "sweep-presets.json").read_text())
    assert sweep_presets.report(found).strip() in PAGE.read_text()
