"""The loss is divided by the target tokens of the whole batch, whatever the model's own loss would do."""

import io
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, TrainerCallback

from bl_trainer.errors import RecipeError
from bl_trainer.losses.metrics import own_targets
from bl_trainer.measurement.forward import Lockstep
from bl_trainer.tokens.collators import CheckedCollator
from bl_trainer.tokens.names import EXAMPLE_LENGTHS
from conftest import make_llama
from ways import Ordered, relative_difference, train


class Uncounted(LlamaForCausalLM):
    accepts_loss_kwargs = False


class WithoutKeywords(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=use_cache)


def make_gpt2(tokenizer):
    """A class whose name doesn't tell transformers that its loss shifts labels."""
    torch.manual_seed(0)
    kinds = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, **dict.fromkeys(kinds, 0.0), eos_token_id=1)
    )


def of_class(kind):
    def make(tokenizer):
        torch.manual_seed(0)
        return kind(make_llama(tokenizer).config)

    return make


OWN = {"llama": make_llama, "uncounted": of_class(Uncounted), "without_keywords": of_class(WithoutKeywords), "gpt2": make_gpt2}


class WideGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.first = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(model, tokenizer, data, tmp_path, **options):
    """Train a step in float64; return its gradient and log."""
    seen = WideGradients()
    options = {"objective": {"name": "power", "alpha": 0.5}, **options}
    trainer = train(Ordered, tokenizer, data, tmp_path, model=model.double(), callbacks=[seen], **options)
    assert seen.first.dtype == torch.float64
    return seen.first, trainer.state.log_history[0]


def cuts(make, tokenizer, data, tmp_path):
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        yield step(
            make(tokenizer), tokenizer, data, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )


@pytest.mark.parametrize("kind", OWN)
def test_gradient_does_not_depend_on_how_the_batch_is_cut(kind, tokenizer, text_data, tmp_path):
    (whole, log), *parts = cuts(OWN[kind], tokenizer, text_data, tmp_path)
    for part, other in parts:
        assert relative_difference(part, whole) < 1e-9
        assert other["loss"] == pytest.approx(log["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", OWN)
def test_the_first_token_is_no_target(kind, tokenizer, text_data, tmp_path):
    _, log = step(OWN[kind](tokenizer), tokenizer, text_data, tmp_path, objective="nll")
    assert log["loss"] == pytest.approx(log["nll"], rel=1e-6)


def test_bar_of_a_measurement_ends_full():
    shown = io.StringIO()
    labels = torch.tensor([[-100, 1, 2, 3]])
    with tqdm(total=9, file=shown) as bar:  # 9 was the estimate
        dealt = Lockstep([{"labels": labels}] * 2, SimpleNamespace(num_processes=1), None, bar)
        assert len(list(dealt)) == 2
    assert "100%" in shown.getvalue()
    assert "6/6" in shown.getvalue()


def padded_by_the_user(features):
    """Collate in rows of two examples each."""
    return {"input_ids": (ids := torch.full((2, 8), 5)), "labels": ids}


def test_examples_repeated_for_the_last_batch_do_not_count_where_a_collator_joins_them():
    features = [{"input_ids": [5] * size} for size in (4, 2, 3)]
    state = SimpleNamespace(end_of_dataloader=True, remainder=4)
    accelerator = SimpleNamespace(
        gradient_state=state, parallelism_config=None, num_processes=2, process_index=1, even_batches=True
    )
    batch = CheckedCollator(DataCollatorWithFlattening())(features)
    counted = own_targets(accelerator, torch.ones(1, 8, dtype=torch.bool), batch[EXAMPLE_LENGTHS])
    assert counted.tolist() == [[True] * 4 + [False] * 4]  # one example of three
    unknown = CheckedCollator(padded_by_the_user)([*features, features[0]])[EXAMPLE_LENGTHS]
    with pytest.raises(RecipeError, match=r"Cannot evaluate on 2 processes: .* Let it give one row per example"):
        own_targets(accelerator, torch.ones(2, 7, dtype=torch.bool), unknown)
    state.remainder = 0
    assert own_targets(accelerator, torch.ones(2, 7, dtype=torch.bool), unknown).all()
