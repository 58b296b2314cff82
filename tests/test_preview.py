"""`train --show N`: what it prints against plain forward passes, and that it changes nothing of the run."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bl_trainer.cli import main
from bl_trainer.tokens.vocabulary import token_texts
from bl_trainer.training.next_steps import next_steps
from conftest import gap_near, make_double, write_recipe
from test_diagnosis import by_hand, rows_of, save


def blocks(said):
    """The blocks of printed rows: each a head, and the lines of its tokens."""
    return [block.splitlines() for block in re.findall(r"^(Row .*(?:\n  .*)*)", said, re.MULTILINE)]


def log_probs(model, ids):
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return rows[range(len(ids) - 1), ids[1:]]


def test_rows_are_printed_as_they_train(tokenizer, double_checkpoint, tmp_path, capsys):
    rows = [{**row, "objective_weight": 1 + i % 2} for i, row in enumerate(rows_of("pairs", 12))]
    rows[1] = {**rows[1], "prompt": "a" * 30}  # which leaves no target
    sequences = [tuple(values[:20] for values in by_hand(row, tokenizer, False)) for row in rows[:4]]
    model = make_double(tokenizer)
    logps = [log_probs(model, ids) for ids, _ in sequences]
    p = [
        [x.exp().item() for x, trains in zip(logp, own[1:], strict=True) if trains]
        for logp, (_, own) in zip(logps, sequences, strict=True)
    ]
    cut = gap_near([each for own in p for each in own], 0.02)
    keys = {"dtype": "auto", "objective": "neg_p", "threshold": cut, "max_length": 20, "max_steps": 2, "save_strategy": "no"}
    recipe = str(write_recipe(tmp_path, double_checkpoint, save(rows, tmp_path / "data"), **keys, shuffle_dataset=True))
    main(["train", "--config", recipe, "--show", "4"])
    said = capsys.readouterr().out
    found = blocks(said)
    assert len(found) == 4
    for number, (lines, (ids, trains), own) in enumerate(zip(found, sequences, p, strict=True)):
        size, whole = len(ids), len(by_hand(rows[number], tokenizer, False)[0])
        kept, weight = [each >= cut for each in own], rows[number]["objective_weight"]
        head = f"Row {number}: {size} tokens, {len(own)} targets, {sum(kept)} train"
        weights = [each * weight if keeps else 0 for each, keeps in zip(own, kept, strict=True)]
        if own:
            head += f"; mean p {sum(own) / len(own):.3f}, mean weight {sum(weights) / len(own):.3f}"
        head += f"; `max_length` cuts {whole - size} tokens off" if whole > size else ""
        assert lines[0] == head
        texts = [json.dumps(text) for text, is_own in zip(token_texts(tokenizer, ids), trains, strict=True) if is_own]
        wanted = [
            f"  p {each:.3f}  " + (f"weight {w:.3f}" if keeps else "dropped     ") + f"  {text}"
            for each, w, keeps, text in zip(own, weights, kept, texts, strict=True)
        ]
        assert lines[-len(own) :] == wanted if own else len(lines) == 2
        assert lines[1].startswith('  no target              "')
    assert any(own == [] for own in p)
    assert any("dropped" in line for lines in found for line in lines)
    assert "--show" not in said
    trained = load_file(tmp_path / "out" / "model.safetensors")
    main(["train", "--config", recipe, "--output_dir", str(tmp_path / "plain")])
    assert blocks(capsys.readouterr().out) == []
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in trained.items())


def test_parts_of_packed_rows_and_streams_are_printed(double_checkpoint, tmp_path, capsys):
    keys = {"dtype": "auto", "packing": True, "packing_strategy": "wrapped", "max_length": 16, "max_steps": 1}
    data = save([{"text": "a" * 35}, {"text": "b" * 40}], tmp_path / "data")
    recipe = str(write_recipe(tmp_path, double_checkpoint, data, **keys, save_strategy="no"))
    main(["train", "--config", recipe, "--show=1"])
    heads = [lines[0] for lines in blocks(capsys.readouterr().out)]
    assert [head.partition(";")[0] for head in heads] == [
        f"Row 0, part {part} of 3: {size} tokens, {size - 1} targets, {size - 1} train"
        for part, size in ((1, 16), (2, 16), (3, 4))
    ]
    stream = ["--dataset_streaming", "true", "--packing", "false", "--packing_strategy", "bfd", "--threshold"]
    main(["train", "--config", recipe, *stream, '{"above_percentile": 40}', "--show", "9", "--output_dir", str(tmp_path / "b")])
    assert [lines[0][:17] for lines in blocks(capsys.readouterr().out)] == ["Row 0: 16 tokens,", "Row 1: 16 tokens,"]


def test_a_wrong_number_is_refused(double_checkpoint, data_folder, tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, double_checkpoint, data_folder))
    wrong = {"-1": "`--show -1` must not be negative; 0 prints no row.", "x": "`--show x` must be a whole number."}
    for value, message in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", recipe, "--show", value])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_comparison_shows_nothing():
    for show in (["--show", "3"], ["--show=3"]):
        lines = next_steps("out", {"model_name_or_path": "m"}, ["--config", "r.yaml", *show, "--seed", "1"])
        assert any("diagnose --config r.yaml --seed 1 --compare out" in line for line in lines)
