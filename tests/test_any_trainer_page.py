"""docs/guide/any_trainer.md is true: its snippets run, and its tables name what there is."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from bl_trainer import LossMetrics, as_loss
from bl_trainer.objectives.pricing import METRICS
from conftest import make_llama

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "any_trainer.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def names(tokenizer, tmp_path):
    """What the snippets take for given."""
    ids = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18, 19]]
    rows = Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])
    collator = DataCollatorForSeq2Seq(tokenizer)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    batches = [collator([*rows.select(part)]) for part in ([0, 1], [2, 3])]
    return {
        "model": make_llama(tokenizer), "args": args, "dataset": rows, "collator": collator, "micro_batches": batches,
        "batch": batches[0],
    }  # fmt: skip


def test_snippet_of_transformers_trains(names, capsys):
    exec(SNIPPETS[0], names)
    assert names["trainer"].state.global_step == 2
    assert "'kept_fraction': " in capsys.readouterr().out
    exec("from transformers import Trainer\nfrom bl_trainer import as_loss\n" + SNIPPETS[1], names)
    assert names["trainer"].evaluate(names["dataset"])["eval_loss"] > 0, "before training"
    names["trainer"].train()
    assert names["loss"].metrics()["nll"] > 0


def test_snippet_of_hidden_states_and_of_log_probabilities(names, capsys):
    model = names["model"]
    before = model.lm_head.weight.detach().clone()
    exec(SNIPPETS[2], names)
    assert "'target_prob': " in capsys.readouterr().out
    assert (model.lm_head.weight != before).any()
    exec(SNIPPETS[3], names)
    outputs = model(names["batch"]["input_ids"], attention_mask=names["batch"]["attention_mask"])
    wanted = as_loss("neg_p", 0.1)(outputs, names["batch"]["labels"])
    assert names["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert len(SNIPPETS) == 4


def test_table_of_metrics():
    table = PAGE[PAGE.index("| metric |") :]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*METRICS, "objective"]
    assert LossMetrics().pop() == {}
