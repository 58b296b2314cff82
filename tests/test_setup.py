"""How a trainer starts: its signature; an objective and a threshold that are parsed once, and stay out of checkpoints."""

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
import yaml
from trl import SFTTrainer

from bl_trainer import BLConfig, BLTrainer, Objective, Threshold
from bl_trainer.errors import RecipeError
from conftest import make_llama

calls = []


def counted(logp):
    calls.append(logp.shape)
    return -torch.expm1(logp)


def config(tmp_path, **options):
    return BLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


def test_a_start_parses_a_users_function_once(tokenizer, text_data, tmp_path):
    spec = f"{__name__}:counted"
    Objective.parse(spec)
    once = len(calls)
    calls.clear()
    args = config(tmp_path, objective=spec, threshold=0.1, max_steps=1)
    trainer = BLTrainer(make_llama(tokenizer), args, train_dataset=text_data, processing_class=tokenizer)
    assert len(calls) == once
    assert trainer.parsed_objective is args.parsed_objective
    assert trainer.threshold is args.parsed_threshold


def test_the_signature_is_trls():
    """Under whatever annotations."""
    ours, theirs = (inspect.signature(each.__init__).parameters.values() for each in (BLTrainer, SFTTrainer))
    assert [(each.name, each.kind, each.default) for each in ours] == [(each.name, each.kind, each.default) for each in theirs]


def test_what_is_parsed_follows_its_key_and_is_not_saved(tmp_path):
    args = config(tmp_path, objective='{"name": "power", "alpha": 2}', threshold={"above": 0.2})
    assert args.parsed_objective == Objective.parse({"name": "power", "alpha": 2})
    assert args.parsed_threshold == Threshold(above=0.2)
    assert not [key for key in args.to_dict() if "parsed" in key]
    for copied in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert "_parsed" not in vars(copied)
        assert copied.parsed_objective == args.parsed_objective
    copied = copy.copy(args)
    copied.objective = "nll"
    assert copied.parsed_objective == Objective.parse("nll")
    assert args.parsed_objective == Objective.parse({"name": "power", "alpha": 2})
    args.objective, args.threshold = "neg_p", None
    assert args.parsed_objective == Objective.parse("neg_p")
    assert args.parsed_threshold.keeps_all


def test_mixed_precision_that_only_the_launcher_asks_for_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match=r"mixed precision in bf16, and the recipe for none\. Launch with"):
        BLConfig(str(tmp_path), use_cpu=True, bf16=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    BLConfig(str(tmp_path), use_cpu=True, bf16=False)


def test_the_environment_of_a_recipe_is_set_before_the_libraries_read_it(tmp_path):
    """They read it once, when they are imported."""
    (tmp_path / "m").mkdir()
    (tmp_path / "d.jsonl").touch()
    keys = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "output_dir": "o", "use_cpu": True, "bf16": False}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**keys, "env": {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": 1}}))
    code = (
        "import sys; from bl_trainer import cli\n"
        "def show(argv):\n"
        "    from huggingface_hub import constants\n"
        "    sys.exit(f'{constants.HF_HOME} {constants.HF_HUB_OFFLINE}')\n"
        "cli._made_ready = show; cli.main(['train', '--config', 'r.yaml'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == f"{tmp_path / 'home'} True"
