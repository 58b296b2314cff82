"""Each objective in each way of training that TRL has, against the full logits of plain transformers; the table of the docs."""

import copy
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trl import SFTTrainer

from bl_trainer import BLTrainer, Threshold
from conftest import gap_near, make_double, make_llama
from test_trainer import uses_everything
from ways import (
    BEYOND_TRL,
    WAYS,
    Gradients,
    Ordered,
    build,
    gradient_of,
    relative_difference,
    resolve,
    train,
    weights,
)

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "compatibility.md"
MARKERS = "<!-- compatibility -->\n", "<!-- end of compatibility -->"
BAND = {"above": 0.02, "below": 0.3}


def mixes(logp, entropy):
    return -torch.expm1(logp - 0.1 * entropy)


def composed(logp, alpha):
    lacking = (0.3 - (alpha * logp).exp() - 0.1).clamp(min=0).detach()
    return (1 - (alpha * logp).exp()) / alpha - (0.1 + lacking) * logp


# Heading in the docs; what the recipe says; f in plain torch
FAMILIES = {
    "pointwise": ("`neg_p`", {"objective": "neg_p"}, lambda logp, **_: 1 - logp.exp()),
    "tokens": ("threshold, `tokens`", {"objective": "nll", "threshold": BAND}, lambda logp, **_: -logp),
    "kept": (
        "threshold, `kept`",
        {"objective": {"name": "power", "alpha": 0.5}, "threshold": {**BAND, "normalize": "kept"}},
        lambda logp, **_: (1 - logp.exp().sqrt()) * 2,
    ),
    "entropy": (
        "with entropy",
        {"objective": f"{__name__}:mixes"},
        lambda logp, entropy, **_: 1 - (logp - 0.1 * entropy).exp(),
    ),
    "composed": (
        "composed",
        {"objective": {"name": "power", "alpha": {"from": 0.5, "to": 2}, "mix": {"nll": 0.1}, "floor": 0.3}},
        lambda logp, progress, **_: composed(logp, 0.5 + 1.5 * progress),
    ),
    "import_path": ("by import path", {"objective": "test_trainer:uses_everything", "threshold": 0.02}, uses_everything),
}
IN_BFLOAT16 = "within 0.02: the logits that it is compared with are rounded to 8 bits"
UNCOUNTED = "`SFTTrainer`'s gradient depends on how the batch is cut"
# Row of the docs, and what there is to say about it
ROWS = {
    "full": ("full fine-tuning, untied head", ""),
    "tied_head": ("tied head", ""),
    "head_with_bias": ("head with a bias (Phi)", ""),
    "softcap": ("logit soft-capping (Gemma 2)", ""),
    "softcap_recurrent_gemma": (
        "logit soft-capping (RecurrentGemma)",
        "TRL's head leaves it out; under `loss_head: trl` refused",
    ),
    "logits_scaling": ("logit scaling (Granite)", ""),
    "logit_scale": ("logit scaling (Cohere)", ""),
    "mixture_of_experts": ("mixture of experts with auxiliary loss (Mixtral)", ""),
    "qwen3_moe": ("mixture of experts with auxiliary loss (Qwen3-MoE)", ""),
    "gpt_oss": ("mixture of experts with auxiliary loss (gpt-oss)", ""),
    "vision_language": ("vision-language (LLaVA), with images", ""),
    "qwen3_vl": ("Qwen3-VL, text alone", UNCOUNTED),
    "qwen3_vl_images": ("Qwen3-VL, with images", UNCOUNTED),
    "qwen3_5": ("Qwen3.5, text alone", UNCOUNTED),
    "qwen3_5_images": ("Qwen3.5, with images", UNCOUNTED),
    "gemma3n": ("Gemma 3n, text alone", UNCOUNTED),
    "gemma3n_images": ("Gemma 3n, with images", f"{UNCOUNTED}; a convolution replaces its vision tower, which needs timm"),
    "gemma4": ("Gemma 4, text alone", UNCOUNTED),
    "gemma4_images": ("Gemma 4, with images", UNCOUNTED),
    "llama4": ("Llama 4, text alone", "under `loss_head: trl` refused"),
    "llama4_images": ("Llama 4, with images", "under `loss_head: trl` refused"),
    "vision_language_packed": ("vision-language, packed or padding-free", "TRL's limit"),
    "lora": ("LoRA", ""),
    "lora_trained_head": ("LoRA, `lora_modules_to_save: [lm_head]`", ""),
    "lora_on_head": ("LoRA on `lm_head`", "TRL's limit too"),
    "trainable_tokens": ("LoRA, `trainable_token_indices`, tied head", "under TRL's head an error"),
    "dora": ("DoRA", ""),
    "qlora": ("QLoRA (4-bit)", "on a CPU; within 2^-9, since TRL keeps the adapter in bfloat16"),
    "qlora_trained_head": ("QLoRA, head trained whole, bf16", f"on a CPU; {IN_BFLOAT16}"),
    "prompt_tuning": ("prompt tuning", ""),
    "prefix_tuning": ("prefix tuning", ""),
    "p_tuning": ("p-tuning", ""),
    "flat_virtual_tokens": ("prompt learning, packed (`bfd`) or padding-free", "PEFT ignores where an example begins"),
    "checkpointed_prefix": ("prefix tuning with gradient checkpointing", "transformers' limit"),
    "packing_bfd": ("packing, `bfd`", ""),
    "packing_bfd_split": ("packing, `bfd_split`", ""),
    "packing_wrapped": ("packing, `wrapped`", ""),
    "padding_free": ("padding-free", ""),
    "completion_only": ("completion-only loss", ""),
    "assistant_only": ("assistant-only loss", ""),
    "streaming": ("streaming", ""),
    "checkpointing": ("gradient checkpointing", ""),
    "checkpointing_reentrant": ("gradient checkpointing, reentrant", ""),
    "checkpointing_selective": ("gradient checkpointing, TRL's selective", ""),
    "activation_offloading": ("activation offloading", "run with the CPU in place of a GPU; TRL has it for accelerators alone"),
    "compiled": ("`torch_compile`", "backend `eager`; with `inductor` `neg_p` was run"),
    "bf16": ("bf16", IN_BFLOAT16),
    "neftune": ("NEFTune", ""),
    "evaluation": ("evaluation during training", "its metrics are exact, and training continues as without it"),
    "compute_metrics": (
        "`compute_metrics`",
        "gets all logits, from a second forward pass; `eval_loss` is the objective's",
    ),
}
# Experts' grouped products, 4-bit weights and autocast have no float64; all else is compared in it
TOLERANCE = {"mixture_of_experts": 1e-4, "bf16": 0.02, "qlora_trained_head": 0.02, "qlora": 2**-9}
# By the scale of the noise; Gemma 4 pools its patches, and Llama 4 weighs its experts, in float32
PARTLY_FLOAT32 = {"neftune": 1e-5, "gemma4_images": 1e-5, "llama4": 1e-5, "llama4_images": 1e-5}
OUTCOMES = {}
ALL_CELLS = bool(os.environ.get("UPDATE_DOCS"))  # `make compatibility`


@pytest.fixture
def record(way, family):
    OUTCOMES[way, family] = "✗"
    return partial(OUTCOMES.__setitem__, (way, family))


def passed(trainer):
    return "✓" if trainer.reference_head is None else "✓ (TRL's head)"


class Recording(Ordered):
    """Keeps the model as it was before training, and each micro-batch with the generator's state."""

    def train(self, *args, **kwargs):
        self.before, self.seen = copy.deepcopy(self.model), []
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append((dict(inputs), torch.get_rng_state()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def plain(model, neftune_noise_alpha=None, **_):
    """Take TRL's and our forward off `model`."""
    base = model.get_base_model() if is_peft_model(model) else model
    del base.forward
    base.gradient_checkpointing_disable()

    def add_noise(module, inputs, embedded):
        size = neftune_noise_alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.zeros_like(embedded).uniform_(-size, size)

    if neftune_noise_alpha is not None:
        base.get_input_embeddings().register_forward_hook(add_noise)
    return model


def statistics_of(logits, labels, progress):
    """What the model says about the target tokens, from all logits."""
    labels = torch.nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)[:, 1:]  # virtual tokens
    rows, label = logits[:, :-1][labels != -100].double().log_softmax(-1), labels[labels != -100]
    return {
        "logp": rows.gather(1, label[:, None])[:, 0],
        "entropy": -(rows.exp() * rows).sum(-1),
        "log_sum_sq_probs": (2 * rows).logsumexp(-1).detach(),
        "is_top1": rows.argmax(-1) == label,
        "label": label,
        "progress": progress,
    }


def costs(family, statistics, threshold=None):
    """Return f of each target token, and which of them train."""
    _, recipe, f = FAMILIES[family]
    threshold = Threshold.parse(threshold or recipe.get("threshold"))
    p = statistics["logp"].detach().exp()
    return f(**statistics), (p >= threshold.above) & (p <= threshold.below)


def forward(model, batches, bf16=False, **_):
    """Yield each micro-batch's outputs, and what the model says about its target tokens."""
    for given, state in batches:
        inputs = {key: value for key, value in given.items() if key not in ("labels", "example_lengths")}
        if getattr(model.config, "router_aux_loss_coef", 0):
            inputs["output_router_logits"] = True
        torch.set_rng_state(state)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(**inputs, use_cache=False)
        yield outputs, statistics_of(outputs.logits, given["labels"], progress=0.0)


def full_logits_gradient(model, batches, family, threshold=None, **options):
    num_tokens = sum((inputs["labels"][:, 1:] != -100).sum() for inputs, _ in batches)
    aux_loss_coef = getattr(model.config, "router_aux_loss_coef", 0)
    for outputs, statistics in forward(model, batches, **options):
        cost, kept = costs(family, statistics, threshold)
        loss = cost[kept].sum() / (kept.sum() * len(batches) if family == "kept" else num_tokens)
        if aux_loss_coef:
            loss = loss + aux_loss_coef * outputs.aux_loss / len(batches)
        loss.backward()
    return gradient_of(model)


def assert_gradient(way, family, tokenizer, tmp_path, request, bound=1e-9, **changes):
    """Train a step, and return the trainer if its gradient is the oracle's."""
    processor, data, options = resolve(way, tokenizer, request)
    recipe, make = dict(FAMILIES[family][1]), options.pop("make")
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.0, **changes}

    def step(**recipe):
        seen, model = Gradients(), make(processor)
        model = model if way in TOLERANCE else model.double()
        trainer = train(Recording, processor, data, tmp_path, model=model, callbacks=[seen], **recipe, **options)
        assert len(trainer.seen) == 2
        return trainer, seen.first

    if way in TOLERANCE and "threshold" in recipe:
        recipe["threshold"] = away_from_tokens(Threshold.parse(recipe["threshold"]), step()[0], options)
    trainer, gradient = step(**recipe)
    assert "threshold" not in recipe or 0 < trainer.state.log_history[0]["kept_fraction"] < 1
    oracle = plain(trainer.before, **options).train()
    expected = full_logits_gradient(oracle, trainer.seen, family, recipe.get("threshold"), **options)
    assert relative_difference(gradient, expected) < TOLERANCE.get(way, PARTLY_FLOAT32.get(way, bound))
    return trainer


def away_from_tokens(threshold, trainer, options):
    """Return a recipe's threshold near the given one, on whose other side rounding brings no token."""
    with torch.no_grad():
        said = forward(plain(trainer.before, **options).train(), trainer.seen, **options)
        p = torch.cat([statistics["logp"] for _, statistics in said]).exp()
    below = {"below": gap_near(p, threshold.below)} if threshold.below < 1 else {}
    return {"above": gap_near(p, threshold.above), "normalize": threshold.normalize, **below}


def cells(ways):
    """Return (way, family): all of them where the table is made, else all families for `full` and `lora`, and one in turn."""
    names, found = list(FAMILIES), []
    for i, way in enumerate(ways):
        in_turn = names[i % len(names)]
        found += [(way, name) for name in names if ALL_CELLS or way in ("full", "lora") or name == in_turn]
    return found


@pytest.mark.parametrize(("way", "family"), cells([*WAYS, *BEYOND_TRL]))
def test_gradient_is_that_of_the_full_logits(way, family, tokenizer, tmp_path, request, record):
    record(passed(assert_gradient(way, family, tokenizer, tmp_path, request)))


@pytest.mark.parametrize("way", ["full", "lora"])
def test_gradient_in_float32_is_near(way, tokenizer, tmp_path, request, monkeypatch):
    monkeypatch.setitem(TOLERANCE, way, 1e-4)
    assert_gradient(way, "kept", tokenizer, tmp_path, request)


# Soft-capped logits tie, of which TRL's head may take another for the most probable
UNDER_TRL = [("full", family) for family in FAMILIES]
UNDER_TRL += [(way, "kept" if way == "softcap" else "import_path") for way in WAYS if way != "full"]


@pytest.mark.parametrize(("way", "family"), UNDER_TRL)
def test_gradient_under_trls_head(way, family, tokenizer, tmp_path, request):
    assert_gradient(way, family, tokenizer, tmp_path, request, bound=1e-6, loss_head="trl")  # it adds some of it in float32


def test_gradient_compiled_by_inductor(tokenizer, tmp_path, request, monkeypatch):
    # a cache of its own: torch takes code of other instructions than ATEN_CPU_CAPABILITY allows from a shared one
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # the same code, which the C++ compiler doesn't optimise
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes that import torch
    assert_gradient("compiled", "pointwise", tokenizer, tmp_path, request, torch_compile_backend="inductor", bound=1e-5)


def expected_metrics(model, data, family, tokenizer, progress):
    """One example at a time."""
    parts = []
    for row in data:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            parts.append(statistics_of(model(ids).logits, ids, progress))
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "progress"}
    tensors["logp"].requires_grad_()
    cost, kept = costs(family, {**tensors, "progress": progress})
    (slope,) = torch.autograd.grad(cost.sum(), tensors["logp"])
    logp = tensors["logp"].detach()
    return {
        "eval_nll": -logp.mean(),
        "eval_perplexity": (-logp.mean()).exp(),
        "eval_target_prob": logp.exp().mean(),
        "eval_kept_fraction": kept.double().mean(),
        "eval_gradient_weight": -(slope * kept).mean(),
        "eval_entropy": tensors["entropy"].mean(),
        "eval_mean_token_accuracy": tensors["is_top1"].double().mean(),
        "eval_loss": (cost * kept).sum() / (kept.sum() if family == "kept" else len(cost)),
    }


@pytest.mark.parametrize("way", ["evaluation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_during_training(way, family, tokenizer, text_data, tmp_path, record):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, **FAMILIES[family][1]}
    part = text_data.select(range(7))
    alone = train(Ordered, tokenizer, text_data, tmp_path, make_double(tokenizer), **options)
    trainer = train(
        Ordered, tokenizer, text_data, tmp_path, make_double(tokenizer), eval_data=part, eval_strategy="steps", eval_steps=1,
        **options,
    )  # fmt: skip
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logs) == 2
    for name, value in expected_metrics(plain(trainer.model).eval(), part, family, tokenizer, progress=1.0).items():
        assert logs[-1][name] == pytest.approx(value.item(), rel=1e-9), name
    for name, p in weights(alone).items():
        assert torch.equal(weights(trainer)[name], p), name
    record(passed(trainer))


@pytest.mark.parametrize("way", ["compute_metrics"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compute_metrics(way, family, tokenizer, text_data, tmp_path, record):
    part = text_data.select(range(7))
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"seen": len(prediction.predictions)}

    trainer = build(
        Ordered, tokenizer, text_data, tmp_path, make_double(tokenizer), eval_data=part, compute_metrics=compute_metrics,
        per_device_eval_batch_size=4, **FAMILIES[family][1],
    )  # fmt: skip
    metrics, model = trainer.evaluate(), make_double(tokenizer).eval()
    assert metrics["eval_seen"] == 7
    for i, row in enumerate(part):
        ids = torch.tensor([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id])
        torch.testing.assert_close(torch.tensor(seen[0].predictions[i, : len(ids)]), model(ids[None]).logits[0].detach())
        assert seen[0].label_ids[i].tolist() == [*ids.tolist(), *[-100] * (seen[0].label_ids.shape[1] - len(ids))]
    for name, value in expected_metrics(model, part, family, tokenizer, progress=0.0).items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-9), name
    record(passed(trainer))


PROMPT, PREFIX = (config(task_type="CAUSAL_LM", num_virtual_tokens=3) for config in (PromptTuningConfig, PrefixTuningConfig))
REFUSED = {
    "lora_on_head": [(LoraConfig(target_modules=["lm_head"]), {}, "A PEFT adapter on `lm_head` would not train")],
    "flat_virtual_tokens": [
        (config, options, "Prompt-learning PEFT knows one example per row")
        for config in (PROMPT, PREFIX)
        for options in ({"padding_free": True}, {"packing": True}, {"packing": True, "packing_strategy": "bfd_split"})
    ],
    "checkpointed_prefix": [(PREFIX, {"gradient_checkpointing": True}, "Prefix tuning doesn't go with gradient checkpointing")],
}


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("family", FAMILIES)
def test_refused_before_the_model_loads(way, family, tokenizer, tmp_path, record):
    for peft_config, options, message in REFUSED[way]:
        for model in ("no-such-model", get_peft_model(make_llama(tokenizer), peft_config)):
            given = {"peft_config": peft_config} if isinstance(model, str) else {}
            with pytest.raises(ValueError, match=message):
                build(BLTrainer, tokenizer, None, tmp_path, model=model, **FAMILIES[family][1], **options, **given)
    record("refused")


@pytest.mark.parametrize("way", ["vision_language_packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_images_are_refused_by_trl(way, family, tokenizer, tmp_path, request, record):
    processor, data, options = resolve("vision_language", tokenizer, request)
    model = options.pop("make")(processor)
    for changes in ({"packing": True, "max_length": 64}, {"padding_free": True}):
        for trainer_class, recipe in ((SFTTrainer, {}), (BLTrainer, FAMILIES[family][1])):
            with pytest.raises(ValueError, match="not supported for vision datasets"):
                build(trainer_class, processor, data, tmp_path, model=model, **recipe, **changes)
    record("refused")


def test_activation_offloading_without_an_accelerator_is_trls_limit(tokenizer, text_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'type'"):
        build(SFTTrainer, tokenizer, text_data, tmp_path, activation_offloading=True)


@pytest.mark.parametrize("config", [PROMPT, PREFIX], ids=lambda config: config.peft_type.value)
def test_virtual_tokens_do_not_know_examples_apart(config, tokenizer, text_data, tmp_path):
    """Why they are refused: PEFT and transformers alone. Should this fail, they can be allowed."""
    model = get_peft_model(make_llama(tokenizer), config).eval()
    one, other = (torch.tensor([tokenizer(text_data[i]["text"])["input_ids"]]) for i in (0, 1))
    positions = torch.cat([torch.arange(one.shape[1]), torch.arange(other.shape[1])])[None]
    with torch.no_grad():
        alone = model(other).logits[0, -other.shape[1] :]
        flat = model(torch.cat([one, other], 1), position_ids=positions).logits[0, -other.shape[1] :]
    assert not torch.allclose(flat, alone, rtol=0.1)


def render(written=""):
    """Return the table of what the cells have found; rows of which some were not run are those that are written."""
    header = ["", *(heading for heading, _, _ in FAMILIES.values()), ""]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    before = {line.split(" | ")[0]: line for line in written.splitlines()}
    for way, (label, remark) in ROWS.items():
        found = [OUTCOMES.get((way, family)) for family in FAMILIES]
        lines.append(before[f"| {label}"] if None in found else f"| {' | '.join([label, *found, remark])} |")
    return "".join(f"{line}\n" for line in lines)


def test_every_way_has_a_row():
    assert ROWS.keys() == {*WAYS, *BEYOND_TRL, *REFUSED, "evaluation", "compute_metrics", "vision_language_packed"}


def test_table_in_the_docs():
    before, rest = PAGE.read_text().split(MARKERS[0])
    written, after = rest.split(MARKERS[1])
    is_whole = OUTCOMES.keys() == {(way, family) for way in ROWS for family in FAMILIES}
    if not (is_whole or ALL_CELLS):
        return  # a part of the cells was selected
    found = render(written)
    if ALL_CELLS:
        assert "✗" not in found, found
        PAGE.write_text(before + MARKERS[0] + found + MARKERS[1] + after)
    else:
        assert written == found, f"The cells found another table; `make compatibility` writes it:\n{found}"
