"""The loss heads are right for a model, or refused: every causal family of transformers, and models of one's own."""

import json
import random
import re
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from trl.trainer.utils import add_fused_lm_head

from bl_trainer import BLTrainer, Objective, Threshold
from bl_trainer._util.trl import DataCollatorForLanguageModeling
from bl_trainer.errors import CheckpointError, RecipeError
from bl_trainer.head.ops import objective_head, score
from bl_trainer.head.patch import add_scoring
from bl_trainer.head.verification import HEADS, verify_head, verify_separation
from bl_trainer.objectives.pricing import price
from bl_trainer.tokens.collators import CheckedCollator
from bl_trainer.tokens.names import JOINED
from bl_trainer.training.checkpoints import RECORD_FILE
from bl_trainer.training.refusals import refuse_no_causal_lm
from conftest import make_llama, make_mixtral, sizes
from families import UNBUILT, families, tiny_model
from ways import build, make_mixture, make_phi, make_recurrent_gemma, make_tied, relative_difference, weights

IDS = torch.tensor([[31, 12, 44, 25, 9, 38, 17], [52, 28, 14, 40, 33, 21, 10]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}


BOUND = 3e-5  # in float32, whose rounding is a tenth of it


def with_heads(model):
    add_fused_lm_head(model)
    add_scoring(model)
    return model


def loss_of(model, kind):
    """Return the sum of negative log-probabilities by a loss head."""
    if kind == "trl":
        return -model(**INPUTS, labels=IDS, fused_lm_head=True).log_probs.sum()
    nll = Objective.parse("nll")

    def use(hidden, head, target):
        return objective_head(hidden, head, target, lambda statistics: price(nll, Threshold(), statistics))

    return model(**INPUTS, labels=IDS, use=use).found.cost.sum()


def loss_and_gradient(model, loss):
    """Return the loss, and its gradient in all parameters, zero where there is none."""
    model.zero_grad()
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.item(), torch.cat([part.flatten().double() for part in parts])


def full_logits_loss(model):
    return -model(**INPUTS).logits[:, :-1].float().log_softmax(-1).gather(2, IDS[:, 1:, None]).sum()


def error_of(model, kind):
    """Return how far a head's loss and gradient are from those of the full logits; infinite where it can't compute them."""
    loss, gradient = loss_and_gradient(model, full_logits_loss(model))
    try:
        found, own = loss_and_gradient(model, loss_of(model, kind))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return float("inf")
    return max(abs(found - loss) / loss, relative_difference(own, gradient))


def sees_later_tokens(model):
    """Whether logits of the first half have a gradient in the embeddings of the second."""
    kept, half = [], IDS.shape[1] // 2
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        logits = model(**INPUTS).logits[:, :half]
    finally:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    (gradient,) = torch.autograd.grad((logits * torch.randn(logits.shape, generator=generator)).sum(), kept[0])
    gradient = gradient if len(gradient) == len(IDS) else gradient.transpose(0, 1)  # XLNet's are length first
    return gradient[:, half:].abs().max().item() > 1e-6 * gradient.abs().max().item()


def mixes_examples(model):
    """Whether an example's logits in a row of two are others than alone; also where the model can't compute such rows."""
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": row} for row in IDS.tolist()])
    with torch.no_grad():
        alone = model(**INPUTS).logits[1]
        try:
            packed = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits[0]
        except (IndexError, ValueError):
            return True
    return not ((packed[-len(alone) :] - alone).abs().max() <= BOUND * alone.abs().max()).item()


def mixing(model):
    try:
        verify_separation(model)
    except ValueError as error:
        return str(error)
    return None


def refusal(model, kind):
    try:
        refuse_no_causal_lm(model, None)
        verify_head(model, kind)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", sorted(families().keys() - UNBUILT.keys()))
def test_every_causal_family_is_right_or_refused(family):
    model = with_heads(tiny_model(family))
    full_logits_loss(model)  # which the tiny model must be able to compute
    leaks = sees_later_tokens(model)
    for kind in HEADS:
        said, error = refusal(model, kind), error_of(model, kind)
        if said is None:
            assert error < BOUND, (kind, error)
            assert not leaks
        else:
            assert error > BOUND or (leaks and "earlier positions see later tokens" in said), (kind, error, said)
            assert said.startswith(f"Cannot train {type(model).__name__}"), said
    said = mixing(model)
    assert leaks or mixes_examples(model) is (said is not None), said
    assert said is None or said.startswith(f"Cannot train {type(model).__name__} on packed rows: "), said


def test_unbuilt_families_are_few():
    assert len(families().keys() & UNBUILT.keys()) < 0.1 * len(families())


class ScaledLogits(LlamaForCausalLM):
    """As remote code may do it."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs


class ScaledFrom(LlamaForCausalLM):
    """From a position on."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = torch.cat([outputs.logits[:, :40], 3 * outputs.logits[:, 40:]], 1)
        return outputs


class ScaledInTraining(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * (3 if self.training else 1)
        return outputs


class Drops(LlamaForCausalLM):
    """Drops out, by module and function, jitters by three generators, and counts its passes."""

    def __init__(self, config):
        super().__init__(config)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(config.hidden_size)
        self.register_buffer("passes", torch.zeros(()))
        self.model.register_forward_hook(self.jitter)

    def jitter(self, module, args, outputs):
        hidden = outputs.last_hidden_state
        if self.training:
            hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2) + torch.rand(hidden.shape)
            hidden = hidden * (random.random() + np.random.random())
            self.passes += 1
        return type(outputs)(last_hidden_state=hidden)

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        hidden = nn.functional.dropout(self.drop(hidden), 0.5, self.training)
        return type("Outputs", (), {"logits": self.lm_head(hidden)})()


class NeedsMoreInTraining(LlamaForCausalLM):
    def forward(self, *args, token_type_ids=None, **kwargs):
        if self.training and token_type_ids is None:
            raise ValueError("token_type_ids are required in training")
        return super().forward(*args, **kwargs)


class NewNoiseEachTime(LlamaForCausalLM):
    calls = 0

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if self.training:
            type(self).calls += 1
            outputs.logits = outputs.logits * self.calls
        return outputs


class OwnConfig(PretrainedConfig):
    """With another name for the size of the vocabulary."""

    model_type = "own"

    def __init__(self, padded_vocab_size=44, hidden_size=16, **kwargs):
        super().__init__(**kwargs)
        self.padded_vocab_size, self.hidden_size = padded_vocab_size, hidden_size


class OwnBody(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=self.embed_tokens(input_ids).cumsum(1))


class OwnModel(PreTrainedModel):
    """Which can't generate."""

    config_class, base_model_prefix = OwnConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = OwnBody(config), nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids).last_hidden_state))


class CutLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[..., :-3]
        return outputs


class ShiftedLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.linspace(0, 1, outputs.logits.shape[-1])
        return outputs


class WithModuleBeforeTheHead(LlamaForCausalLM):
    """A subclass gives the module."""

    def __init__(self, config):
        super().__init__(config)
        self.between = self.make(config.hidden_size)

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return type("Outputs", (), {"logits": self.lm_head(self.between(hidden))})()


class Scaled(nn.Module):
    def __init__(self, factor, learnt):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=learnt)

    def forward(self, hidden):
        return hidden * self.factor


class ScaledStates(WithModuleBeforeTheHead):
    def make(self, size):
        return Scaled(0.3, False)


class DenseHead(WithModuleBeforeTheHead):
    def make(self, size):
        return nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))


class LearntScale(WithModuleBeforeTheHead):
    """Which the first step's logits don't show."""

    def make(self, size):
        return Scaled(1.0, True)


class LooksAhead(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(self.mix)

    def mix(self, module, args, output):
        return output + output.mean(1, keepdim=True)


class LooksAheadInEvaluation(LooksAhead):
    def mix(self, module, args, output):
        return output if self.training else super().mix(module, args, output)


def make(kind, tokenizer, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return kind(LlamaConfig(**sizes(tokenizer, **changes))).to(dtype)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"loss_head": "trl"}, {"peft_config": True}], ids=str)
@pytest.mark.parametrize(
    "kind", [ScaledLogits, ShiftedLogits, ScaledStates, DenseHead, ScaledFrom, ScaledInTraining], ids=lambda kind: kind.__name__
)
def test_other_logits_are_refused(kind, options, tokenizer, text_data, tmp_path):
    if "peft_config" in options:
        options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    whose = "TRL's loss head" if "loss_head" in options else "bl_trainer's loss head"
    message = (
        rf"Cannot train {kind.__name__} with {whose}: its log-probabilities differ from the model's own by up to [\d.]+ nats"
    )
    with pytest.raises(RecipeError, match=message):
        build(BLTrainer, tokenizer, text_data, tmp_path, model=make(kind, tokenizer), **options)
    assert not (tmp_path / "out" / RECORD_FILE).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_a_model_that_sees_later_tokens_is_refused(head, dtype, tokenizer):
    with pytest.raises(RecipeError, match="Cannot train LooksAhead: its earlier positions see later tokens"):
        verify_head(with_heads(make(LooksAhead, tokenizer, dtype)), head)
    with pytest.raises(ValueError, match="Cannot train LooksAheadInEvaluation"):
        verify_head(with_heads(make(LooksAheadInEvaluation, tokenizer, dtype)), head, trains=False)


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 64}], ids=str)
def test_a_model_in_which_packed_examples_see_each_other_is_refused(options, tokenizer, text_data, tmp_path):
    """gpt-oss makes its masks without positions."""
    model = make_mixture("GptOss", tokenizer)
    with pytest.raises(
        RecipeError, match="Cannot train GptOssForCausalLM on packed rows: an example would see those before it"
    ):
        build(BLTrainer, tokenizer, text_data, tmp_path, model=model, **options)
    build(BLTrainer, tokenizer, text_data, tmp_path, model=model, packing=True, packing_strategy="wrapped", max_length=64)


def flattened(features, *, mask=None, drop=(), **options):
    """Collate as transformers' own collator does; `drop`: keys to leave out, `mask`: kind of attention mask to add."""
    batch = DataCollatorWithFlattening(**options)(features)
    owner = torch.cat([torch.full((len(each["input_ids"]),), i) for i, each in enumerate(features)])
    sees = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    masks = {
        None: {},
        "tokens": {"attention_mask": torch.ones_like(batch["input_ids"])},
        "bool": {"attention_mask": sees[None, None]},
        "float": {"attention_mask": torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]},
    }
    return {key: value for key, value in {**batch, **masks[mask]}.items() if key not in drop}


def packed_by_the_user(features):
    """Collate rows that are packed already, and leave out where their examples end."""
    ids = torch.tensor([each["input_ids"] for each in features])
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


gpt_oss = partial(make_mixture, "GptOss")  # which makes its masks without positions
OWN_COLLATORS = {
    "positions": (make_llama, flattened, True),
    "no_packed_masks": (gpt_oss, flattened, False),
    "one_example_a_row": (gpt_oss, DataCollatorForSeq2Seq, True),
    "ends_as_well": (make_llama, partial(flattened, return_flash_attn_kwargs=True), True),
    "ends_that_eager_attention_ignores": (
        make_llama, partial(flattened, return_flash_attn_kwargs=True, drop=["position_ids"]), False
    ),
    "nothing": (make_llama, partial(flattened, drop=["position_ids"]), False),
    "a_mask_that_makes_one_example_of_them": (make_llama, partial(flattened, mask="tokens"), False),
    "a_mask_of_pairs": (make_llama, partial(flattened, mask="float", drop=["position_ids"]), True),
    "a_mask_of_pairs_that_eager_attention_adds": (make_llama, partial(flattened, mask="bool"), False),
}  # fmt: skip


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("name", OWN_COLLATORS)
def test_examples_that_an_own_collator_joins_do_not_see_each_other(name, evaluates, tokenizer, text_data, tmp_path):
    make, collator, is_apart = OWN_COLLATORS[name]
    model = make(tokenizer)
    model.set_attn_implementation("eager")
    collator = collator(tokenizer) if isinstance(collator, type) else collator
    made = {"data_collator": collator}
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, model, eval_data=text_data, made=made)
    message = f"Cannot train {type(model).__name__} on packed rows: an example would see .* Let the `data_collator` give one"
    with nullcontext() if is_apart else pytest.raises(RecipeError, match=message):
        trainer.evaluate() if evaluates else trainer.train()


def test_an_own_collator_that_leaves_out_where_packed_examples_end_is_refused(tokenizer, tmp_path):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}] * 8)
    trainer = build(BLTrainer, tokenizer, rows, tmp_path, made={"data_collator": packed_by_the_user})
    with pytest.raises(RecipeError, match="an example would see those before it in its row"):
        trainer.train()


def test_trls_collator_that_the_user_makes_is_verified_before_training(tokenizer, text_data, tmp_path):
    made = {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)}
    with pytest.raises(RecipeError, match=r"an example would see those before it in its row\. Remove `packing`"):
        build(BLTrainer, tokenizer, text_data, tmp_path, make_mixture("GptOss", tokenizer), made=made)


def joined(batch):
    return JOINED in CheckedCollator(lambda features: dict(batch))([{}] * len(batch["labels"]))


@pytest.mark.parametrize("left", [False, True])
def test_positions_of_padding_are_no_other_example(left):
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]) if left else torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]])
    mask, labels = (ids != 0).long(), ids.masked_fill(ids == 0, -100)
    for padding in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padding)
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
        assert not joined(batch)
    batch["position_ids"] = torch.tensor([[0, 1, 0, 1]] * 2)
    assert joined(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_rows_in_narrow_types(dtype, tokenizer):
    verify_separation(with_heads(make_mixtral(tokenizer).to(dtype)))
    with pytest.raises(ValueError, match="an example would see those before it in its row"):
        verify_separation(with_heads(make_mixture("GptOss", tokenizer).to(dtype)))


@pytest.mark.parametrize("family", ["jamba", "lfm3", "opt", "recurrent_gemma", "xglm", "qwen3", "olmoe"])
def test_a_small_leak_shows_in_narrow_types_too(family):
    """A recurrence or a convolution changes an example's first tokens alone, an old mask all of them by little."""
    if family not in families():
        pytest.skip("not in this transformers")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        said = nullcontext()
        if family not in ("qwen3", "olmoe"):
            said = pytest.raises(RecipeError, match="on packed rows: ")
        with said:
            verify_separation(tiny_model(family).to(dtype))


def scaled_by_the_row(module, args, output):
    """Round as kernels do whose scale is one for all tokens."""
    scale = output.float().abs().max() * 1.1
    return ((output.float() / scale).to(torch.bfloat16).float() * scale).to(output.dtype)


@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_that_depends_on_the_row_is_no_leak(head, tokenizer):
    model = with_heads(make_llama(tokenizer).to(torch.bfloat16))
    model.lm_head.to(head).register_forward_pre_hook(lambda module, args: (args[0].to(head),))
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(scaled_by_the_row)
    verify_separation(model)


def test_tokens_that_a_model_masks_out_are_no_leak(tokenizer):
    model = with_heads(make_llama(tokenizer))
    model.lm_head.register_forward_hook(
        lambda module, args, logits: torch.cat([logits[..., :-2], logits[..., -2:] - torch.inf], -1)
    )
    verify_separation(model)


def make_paligemma():
    """Make a prefix-LM: without token types, which come with images, all tokens see each other."""
    sight = {"image_size": 16, "patch_size": 8, "projection_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    size = {"hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", **size, **sight},
            text_config={"model_type": "gemma", "vocab_size": 64, **size, **text},
            projection_dim=32,
            image_token_index=63,
        )
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_prefix_lm_trains_on_images_and_not_on_text(head):
    model = with_heads(make_paligemma())
    with pytest.raises(ValueError, match="Cannot train PaliGemmaForConditionalGeneration: its earlier positions see later"):
        verify_head(model, head)
    verify_head(model, head, text=False)


def test_a_model_that_is_causal_in_training_is_trained(tokenizer):
    for head in HEADS:
        verify_head(with_heads(make(LooksAheadInEvaluation, tokenizer)), head)


@pytest.mark.parametrize("kind", [Drops, NeedsMoreInTraining, NewNoiseEachTime], ids=lambda kind: kind.__name__)
def test_chance_in_training_is_no_difference(kind, tokenizer):
    model = with_heads(make(kind, tokenizer, attention_dropout=0.3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for head in HEADS if kind is not Drops else ["own"]:
        verify_head(model, head)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_model_of_ones_own_that_cannot_generate(tokenizer, text_data, tmp_path):
    model = OwnModel(OwnConfig())
    assert not hasattr(model.config, "vocab_size")
    assert not model.can_generate()
    model.generation_config = GenerationConfig()  # in which TRL sets the pad token
    build(BLTrainer, tokenizer, text_data, tmp_path, model=model, max_steps=1).train()


def test_a_model_with_few_positions(tokenizer):
    config = GPT2Config(vocab_size=44, n_positions=10, n_embd=16, n_layer=1, n_head=2)
    verify_head(with_heads(GPT2LMHeadModel(config)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_small_differences_show_in_every_type(factor, dtype, tokenizer):
    """And of weights of usual size, by which logits are near zero."""

    class SlightlyScaled(WithModuleBeforeTheHead):
        def make(self, size):
            return Scaled(factor, False)

    for spread in (0.02, 0.5):
        plain = with_heads(make(LlamaForCausalLM, tokenizer, dtype, initializer_range=spread))
        for kind in HEADS:
            verify_head(plain, kind)
            with pytest.raises(ValueError, match="Cannot train SlightlyScaled"):
                verify_head(with_heads(make(SlightlyScaled, tokenizer, dtype, initializer_range=spread)), kind)


def test_a_difference_within_the_rounding_of_products_is_none(tokenizer, monkeypatch):
    """`tf32: true` rounds a GPU's float32 products to 11 bits, by which the two computations differ."""

    class Rounded(WithModuleBeforeTheHead):
        def make(self, size):
            return Scaled(1.0005, False)

    model = with_heads(make(Rounded, tokenizer, torch.float32, initializer_range=0.5))
    with pytest.raises(ValueError, match="Cannot train Rounded"):
        verify_head(model)
    if hasattr(torch.backends, "fp32_precision"):
        monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    else:  # before torch 2.9
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    verify_head(model)


def test_fewer_logits_than_rows_of_the_head(tokenizer):
    with pytest.raises(RecipeError, match=r"Cannot train CutLogits with .* its LM head takes 32 features for 44"):
        verify_head(with_heads(make(CutLogits, tokenizer)))


@pytest.mark.parametrize("kind", HEADS)
def test_parameters_that_would_not_train_are_refused(kind, tokenizer):
    with pytest.raises(RecipeError, match=r"1 trainable parameter.* would get no gradient, among them `between.factor`"):
        verify_head(with_heads(make(LearntScale, tokenizer)), kind)
    adapted = get_peft_model(with_heads(make_llama(tokenizer)), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="Cannot train LlamaForCausalLM"):
        verify_head(adapted, kind)


def test_trls_head_without_the_models_softcap(tokenizer, text_data, tmp_path):
    model = make_recurrent_gemma(tokenizer)
    with pytest.raises(ValueError, match=r"Cannot train RecurrentGemmaForCausalLM with TRL.* Remove `loss_head: trl`"):
        build(BLTrainer, tokenizer, text_data, tmp_path, model=model, loss_head="trl")
    build(BLTrainer, tokenizer, text_data, tmp_path, model=model)


@pytest.mark.parametrize("make_model", [make_llama, make_mixtral, make_recurrent_gemma])
def test_verification_leaves_no_trace(make_model, tokenizer):
    model = with_heads(make_model(tokenizer)).train()
    model.base_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = [{key: value for key, value in vars(module).items() if key != "_parameters"} for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    verify_head(model)
    mixing(model)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == numbers
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for module, state in zip(model.modules(), states, strict=True):
        assert {key: id(value) for key, value in vars(module).items() if key != "_parameters"} == {
            key: id(value) for key, value in state.items()
        }


class TestNoCausalModel:
    """Refused with a sentence, before the model loads where it is a path."""

    CASES = {
        "encoder_decoder": (
            lambda tokenizer: T5ForConditionalGeneration(
                T5Config(vocab_size=44, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
            ),
            "Cannot train T5ForConditionalGeneration: it is an encoder-decoder",
        ),
        "classifier": (
            lambda tokenizer: LlamaForSequenceClassification(LlamaConfig(**sizes(tokenizer))),
            "Cannot train LlamaForSequenceClassification: it has no LM head",
        ),
        "backbone": (lambda tokenizer: make_llama(tokenizer).model, "Cannot train LlamaModel: it has no LM head"),
    }

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("as_path", [False, True])
    def test_is_refused(self, case, as_path, tokenizer, text_data, tmp_path, monkeypatch):
        make_model, message = self.CASES[case]
        model = make_model(tokenizer)
        if as_path:
            model.save_pretrained(tmp_path / "model")
            (tmp_path / "model" / "model.safetensors").unlink()
            model = str(tmp_path / "model")
        with pytest.raises(ValueError, match=message):
            build(BLTrainer, tokenizer, text_data, tmp_path, model=model)
        assert not (tmp_path / "out").exists()

    def test_bert_like_decoder(self, tokenizer, text_data, tmp_path):
        config = BertConfig(
            vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
        )
        with pytest.raises(ValueError, match=r"Cannot train BertLMHeadModel with bl_trainer's loss head: .* nats"):
            build(BLTrainer, tokenizer, text_data, tmp_path, model=BertLMHeadModel(config))


def clone_source(tokenizer, folder):
    """Save a tokenizer with a template and tokens that `tokenizer` lacks; returns its path."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    source = type(tokenizer).from_pretrained(folder)
    source.add_special_tokens({"additional_special_tokens": ["<user>", "<new>"]})
    source.chat_template = tokenizer.chat_template
    source.save_pretrained(folder)
    assert path.exists()
    return str(folder)


def copy_of(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return type(tokenizer).from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_with_tokens_that_a_template_adds(tied, tokenizer, text_data, tmp_path):
    """A tied head can't be saved so that PEFT loads it again; an untied one can."""
    source = clone_source(tokenizer, tmp_path / "source")
    make_model = make_tied if tied else make_llama
    options = {"chat_template_path": source, "peft_config": LoraConfig(r=2, target_modules=["q_proj"]), "max_steps": 2}
    own = copy_of(tokenizer, tmp_path / "own")
    if tied:
        with pytest.raises(ValueError, match=r"`chat_template_path: .*source` adds tokens, .* wrap its tied LM head"):
            build(BLTrainer, own, text_data, tmp_path, model=make_model(tokenizer), **options)
        return
    trainer = build(BLTrainer, own, text_data, tmp_path, model=make_model(tokenizer), **options)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    base = make_model(tokenizer)
    base.resize_token_embeddings(trainer.model.get_base_model().vocab_size)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loaded(ids).logits[..., :44], trainer.model.eval()(ids).logits[..., :44], rtol=0, atol=1e-5)


def test_trained_tokens_beside_a_head_with_a_bias(tokenizer, text_data, tmp_path):
    """PEFT computes such logits without the bias."""
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [5]})
    with pytest.raises(ValueError, match="Cannot train tokens of the LM head of PhiForCausalLM: PEFT leaves out"):
        build(BLTrainer, tokenizer, text_data, tmp_path, model=make_phi(tokenizer), peft_config=config)


def test_another_loss_head_is_refused_on_resume(tokenizer, text_data, tmp_path):
    options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    first = build(BLTrainer, tokenizer, text_data, tmp_path, loss_head="trl", **options)
    first.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert json.loads((checkpoint / RECORD_FILE).read_text())["loss_head"] == "trl"
    before = re.escape(f"Cannot resume from {checkpoint}: the loss head changed from `trl` to `own`")
    with pytest.raises(CheckpointError, match=rf"{before}.* Add `loss_head: trl`"):
        build(BLTrainer, tokenizer, text_data, tmp_path, **options).train(str(checkpoint))
    again = build(BLTrainer, tokenizer, text_data, tmp_path, loss_head="trl", **options)
    again.train(str(checkpoint))
    assert all(torch.equal(weights(again)[name], p) for name, p in weights(first).items())


def test_a_sharded_model_is_verified_before_its_first_step(tokenizer, text_data, tmp_path, monkeypatch):
    monkeypatch.setattr(BLTrainer, "_is_sharded", lambda self: True)
    trainer = build(BLTrainer, tokenizer, text_data, tmp_path, model=make(ScaledLogits, tokenizer))
    for verb in (trainer.train, lambda: trainer.evaluate(trainer.train_dataset)):
        trainer._is_verified = False
        with pytest.raises(ValueError, match="Cannot train ScaledLogits"):
            verb()
    assert trainer.state.global_step == 0
    build(BLTrainer, tokenizer, text_data, tmp_path).train()


def test_scores_of_llama_4_are_the_models_own():
    """Whose prefix names no module."""
    model = with_heads(tiny_model("llama4_text"))
    with torch.no_grad():
        logp = model(**INPUTS, labels=IDS, use=score).found.logp
    assert -logp.sum().item() == pytest.approx(full_logits_loss(model).item(), rel=1e-5)


def test_a_model_that_has_run_before_is_verified(tokenizer):
    """transformers notes on such a model that it has registered hooks."""
    model = with_heads(make_mixtral(tokenizer))
    ids = torch.tensor([[5, 6, 7]])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    expected = model(ids, output_router_logits=True).router_logits
    verify_head(model)
    assert len(model(ids, output_router_logits=True).router_logits) == len(expected)
    fresh = with_heads(make_mixtral(tokenizer))
    verify_head(fresh)
    assert [len(module._forward_hooks) for module in fresh.modules()] == hooks
    assert len(fresh(ids, output_router_logits=True).router_logits) == len(expected)
