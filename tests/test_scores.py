"""`diagnose --scores`: a score for every row, against an independent loop in float64; resuming, processes, refusals."""

import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset

import bl_trainer
from bl_trainer.cli import main
from bl_trainer.diagnosis import row_scores, score_files
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.diagnosis.run import Diagnosis
from bl_trainer.diagnosis.score_files import row_hash
from bl_trainer.errors import MeasurementError, RecipeError
from bl_trainer.recipe.recipe import Recipe
from conftest import make_double, write_recipe
from forking import ranks
from test_diagnosis import by_hand, rows_of, save


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(score_files, "FEWEST", 16)


def scorer(folder, checkpoint, data, *flags, **changes):
    """Return the diagnosis of a recipe with `--scores folder/scores`."""
    unlimited = changes.pop("unlimited", False)
    recipe = write_recipe(folder, checkpoint, data, **{"dtype": "auto", **changes})
    if unlimited:
        recipe.write_text(recipe.read_text() + "max_length: null\n")
    read = Recipe.read(["--config", str(recipe), "--scores", str(folder / "scores"), *flags], "diagnose", DiagnoseArguments)
    read.options.check()
    return Diagnosis(read)


def scored(folder, *args, **changes):
    """Score, and return the columns as `datasets` loads them."""
    folder.mkdir(exist_ok=True)
    scorer(folder, *args, **changes).score()
    return load_dataset("parquet", data_dir=str(folder / "scores"), split="train", cache_dir=str(folder / "cache"))


def expected(model, sequences, end):
    """The scores of a row by plain forward passes of a model, a sequence each: (token ids, which of them train)."""
    logps, entropies, tokens = [], [], []
    for ids, trains in sequences:
        if len(ids) < 2:
            continue
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for i in range(1, len(ids)):
            if trains[i]:
                logps.append(rows[i - 1, ids[i]].item())
                entropies.append(-(rows[i - 1].exp() * rows[i - 1]).sum().item())
                tokens.append(ids[i])
    if not logps:
        return {"targets": 0, **dict.fromkeys(score_files.FIGURES), "logp": []}
    logp, entropy = np.array(logps), np.array(entropies)
    p, ends = np.exp(logp), [i for i, token in enumerate(tokens) if token == end]
    return {
        "targets": len(p), "mean_p": p.mean(), "mean_logp": logp.mean(), "improbable_share": (p < 0.1).mean(),
        "conflict_share": ((p <= 0.05) & (entropy <= 0.5)).mean(), "entropy": entropy.mean(), "first_p": p[0],
        "end_p": p[ends[-1]] if ends else None, "logp": logp,
    }  # fmt: skip


def check(found, rows, sequences, model, tokenizer, tolerance=1e-12):
    assert found["row"] == list(range(len(rows)))
    assert found["row_hash"] == [row_hash({k: v for k, v in row.items() if k != "source"}) for row in rows]
    for i, each in enumerate(sequences):
        for name, value in expected(model, each, tokenizer.eos_token_id).items():
            if name != "logp":
                assert found[name][i] == (None if value is None else pytest.approx(value, abs=tolerance)), (i, name)
            elif name in found.column_names:
                np.testing.assert_allclose(found["logp"][i], value, atol=1e-6 + 1e-7 * np.abs(value).max(initial=0))


WAYS = {
    "chat": ("chat", {}),
    "answers": ("chat", {"assistant_only_loss": True}),
    "completion": ("pairs", {"per_device_train_batch_size": 3}),
    "packed": ("pairs", {"packing": True, "max_length": 20}),
    "keep_end": ("pairs", {"max_length": 20, "truncation_mode": "keep_end"}),
    "keep_start": ("pairs", {"max_length": 20}),
    "split": ("text", {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}),
    "padding_free": ("pairs", {"padding_free": True, "unlimited": True}),
    "lora": ("pairs", {"use_peft": True, "lora_r": 4}),
    "worker": ("text", {"dataloader_num_workers": 1}),
}


def cut(sequence, options):
    """The parts of a row that train, and whether it is cut."""
    length, size = options.get("max_length", 1024), len(sequence[0])
    starts = [0]
    if options.get("packing_strategy"):
        starts = range(0, size, length)
    elif options.get("truncation_mode") == "keep_end":
        starts = [max(0, size - length)]
    parts = [tuple(each[start : start + length] for each in sequence) for start in starts]
    return parts, size > sum(len(ids) for ids, _ in parts)


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_an_independent_loop(way, tokenizer, double_checkpoint, tmp_path):
    kind, options = WAYS[way]
    rows = rows_of(kind)
    found = scored(tmp_path, double_checkpoint, save(rows, tmp_path / "data"), "--tokens", **options)
    made = [cut(by_hand(row, tokenizer, options.get("assistant_only_loss")), options) for row in rows]
    check(found, rows, [parts for parts, _ in made], make_double(tokenizer), tokenizer)
    assert found["truncated"] == [is_cut for _, is_cut in made]
    assert {"packed": True, "split": False, "chat": False}.get(way, any(found["truncated"])) == any(found["truncated"])
    assert found["input_ids"] == [[token for ids, _ in parts for token in ids] for parts, _ in made]
    for labels, targets in zip(found["labels"], found["targets"], strict=True):
        assert sum(label != -100 for label in labels) == targets
