"""Losses for any trainer: against full logits by autograd in float64, against each other, and against `BLTrainer`."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.modeling_outputs import MaskedLMOutput, Seq2SeqLMOutput

import sharing
from bl_trainer import LossMetrics, Objective, Threshold, as_loss, fused_objective, per_token
from bl_trainer.errors import LossError
from bl_trainer.head import blocks as module
from bl_trainer.head.logits import objective_of_logits
from bl_trainer.losses import functional
from bl_trainer.losses.pricing import _is_count
from bl_trainer.objectives.pricing import METRICS
from conftest import make_double
from forking import SERVER
from test_head import BACKENDS
from ways import Gradients, Ordered, build, relative_difference

BATCH, LENGTH, VOCABULARY, SIZE = 3, 11, 67, 8
POWER = {"name": "power", "alpha": 10}


def with_entropy(logp, entropy, log_sum_sq_probs, is_top1, label):
    return -logp * (1 + 0.1 * entropy) + 0.2 * log_sum_sq_probs.exp() * logp.exp() - 0.1 * is_top1 * logp - 0.001 * label * logp


def above_reference(logp, ref_logp):
    return -(logp - ref_logp).exp()


ENTROPY = f"{__name__}:with_entropy"
COMPOSED = {"name": "power", "alpha": {"from": 0, "to": 2}, "floor": 0.1, "mix": {"nll": 0.2}}
SPECS = ["nll", "neg_p", POWER, "log_one_minus_p", ENTROPY, "anneal", COMPOSED]
# Between all probabilities that occur here, on either side
THRESHOLDS = [None, 0.005, {"below": 0.005}, 1.0, {"above": 0.005, "normalize": "kept"}]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", dict.fromkeys(module.BLOCK_BYTES, 7 * VOCABULARY * 8))
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * VOCABULARY * 8)


def make(dtype=torch.float64):
    """Hidden states, a head, a bias and labels, of which one row has no target."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[0, :4] = labels[1, 8:] = labels[2] = -100
    return new(BATCH, LENGTH, SIZE), new(VOCABULARY, SIZE), new(VOCABULARY), labels


def reference(logits, labels, spec, threshold, num_items=None):
    """The loss and per-token statistics from all logits, by autograd."""
    log_probs, labels = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    is_target = labels != -100
    log_probs, label = log_probs[is_target], labels[is_target]
    logp = log_probs.gather(1, label[:, None])[:, 0]
    given = {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).detach(),
        "is_top1": log_probs.argmax(-1) == label,
        "label": label,
        "progress": 0.75,
    }
    objective, threshold = Objective.parse(spec), Threshold.parse(threshold)
    kept = threshold.keep(logp)
    cost = torch.where(kept, objective(logp, **{name: given[name] for name in objective.statistics}), 0.0)
    count = kept.sum().clamp(min=1) * 2 if threshold.normalize == "kept" else num_items or len(logp)
    return cost.sum() / count, logp, given


def logits_of(hidden, weight, bias, scale=1.3, softcap=5.0):
    return softcap * torch.tanh((hidden @ weight.T + bias) * scale / softcap)


@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equal_full_logits_and_each_other(spec, threshold, num_items):
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias)
    wanted, logp, given = reference(logits, labels, spec, threshold, num_items)
    leaves = hidden, weight, bias
    gradients = torch.autograd.grad(wanted, leaves, retain_graph=True)
    options = {"progress": 0.75, "micro_batches": 2}
    found = as_loss(spec, threshold, **options)({"logits": logits}, labels, num_items)
    fused = fused_objective(
        hidden, weight, labels, spec, threshold, bias=bias, scale=1.3, softcap=5.0, num_items=num_items, **options
    )
    for loss in (found, fused):
        torch.testing.assert_close(loss, wanted)
        for got, expected in zip(torch.autograd.grad(loss, leaves, retain_graph=loss is found), gradients, strict=True):
            torch.testing.assert_close(got, expected)
    if threshold != THRESHOLDS[-1]:
        statistics = {name: given[name] for name in ("entropy", "log_sum_sq_probs", "is_top1")}
        each = per_token(logp, given["label"], spec, threshold, progress=0.75, **statistics)
        total = each.sum() / (num_items or len(logp))
        torch.testing.assert_close(total, wanted)
        for got, expected in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("spec", ["neg_p", ENTROPY])
def test_gradient_is_that_of_finite_differences(spec):
    *_, labels = make()
    logits = torch.randn(BATCH, LENGTH, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.where(labels == -100, -100, labels % 5)
    loss = as_loss(spec if spec == "neg_p" else f"{__name__}:only_slopes")
    assert torch.autograd.gradcheck(lambda logits: loss({"logits": logits}, labels), logits)


def only_slopes(logp, entropy):
    return -logp.exp() * entropy


def test_tokens_may_weigh_differently():
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias)
    index = (labels[:, 1:] != -100).nonzero()
    index, target = index[:, 0] * LENGTH + index[:, 1], labels[:, 1:][labels[:, 1:] != -100]
    by_token = torch.linspace(0, 1, len(index), dtype=torch.float64)
    objective, threshold = Objective.parse("neg_p"), Threshold()
    price = as_loss(objective, threshold).pricing.pricer()
    cost = objective_of_logits(logits, index, target, price).cost
    _, logp, _ = reference(logits, labels, "neg_p", None)
    expected = torch.autograd.grad(((1 - logp.exp()) * by_token).sum(), hidden, retain_graph=True)
    for _ in range(2):  # the gradient may be taken again
        torch.testing.assert_close(torch.autograd.grad((cost * by_token).sum(), hidden, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cost.sum(), hidden, create_graph=True)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Both ways of working on a block."""
    if request.param == "triton":
        original = module.RowBlocks.__init__

        def with_triton(self, *args):
            original(self, *args)
            self.uses_triton = self.wide == torch.float32

        monkeypatch.setattr(module.RowBlocks, "__init__", with_triton)
        monkeypatch.setattr(module.kernels, "TILE", 32)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_read_in_float32(dtype, backend):
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias).detach().to(dtype).requires_grad_()
    loss = as_loss("neg_p")(SimpleNamespace(logits=logits), labels)
    scale = 2**14  # of a loss in float16, whose small gradients are none without
    (gradient,) = torch.autograd.grad(scale * loss, logits)
    wide = logits.detach().double().requires_grad_()
    wanted = reference(wide, labels, "neg_p", None)[0]
    (exact,) = torch.autograd.grad(scale * wanted, wide)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-7)
    assert relative_difference(gradient.double(), exact) < max(torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize(
    "view", [lambda x: x[..., :60], lambda x: x[:, 1:-1], lambda x: x.transpose(0, 1), lambda x: x[:1].transpose(1, 2)]
)
def test_logits_may_be_a_view(view):
    whole = torch.randn(BATCH, LENGTH, VOCABULARY, dtype=torch.float64, requires_grad=True)
    logits = view(whole)
    labels = torch.arange(logits.shape[0] * logits.shape[1]).view(logits.shape[:2]) % logits.shape[2]
    found, wanted = as_loss("neg_p")({"logits": logits}, labels), reference(logits, labels, "neg_p", None)[0]
    torch.testing.assert_close(torch.autograd.grad(found, whole), torch.autograd.grad(wanted, whole))


class Largest(TorchDispatchMode):
    """Notes the largest tensor in float32 that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.size = max(self.size, each.untyped_storage().nbytes() // 4)
        return made


@pytest.mark.parametrize("spec", ["neg_p", ENTROPY])
def test_holds_no_float32_copy_of_all_logits(spec):
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    with Largest() as largest:
        as_loss(spec)({"logits": logits}, LABELS).backward()
    assert 0 < largest.size <= 14 * VOCABULARY < BATCH * (LENGTH - 1) * VOCABULARY


def test_counts_may_be_tensors():
    hidden, weight, bias, labels = make()
    outputs, loss = {"logits": logits_of(hidden, weight, bias).detach()}, as_loss("neg_p")
    wanted = loss(outputs, labels, 40)
    for count in (torch.tensor(40), torch.tensor([40]), torch.tensor(40.0)):
        assert torch.equal(loss(outputs, labels, count), wanted)
    assert wanted.shape == ()


def test_labels_may_be_short_integers():
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias).detach()
    for dtype in (torch.int16, torch.int32):
        assert torch.equal(as_loss("nll")({"logits": logits}, labels.to(dtype)), as_loss("nll")({"logits": logits}, labels))
        assert torch.equal(per_token(logits[..., 0] - 9, labels.to(dtype), "nll"), per_token(logits[..., 0] - 9, labels, "nll"))


@pytest.mark.parametrize("num_items", [None, 0, 7])
def test_rows_without_targets_cost_a_connected_zero(num_items):
    hidden, weight, bias, labels = make()
    labels[:] = -100
    logits, loss = logits_of(hidden, weight, bias), as_loss({"name": "power", "alpha": -0.5}, {"above": 0.1})
    for cost in (
        loss({"logits": logits}, labels, num_items),
        fused_objective(hidden, weight, labels, "nll", bias=bias, num_items=num_items),
        per_token(logits[..., 0] * 0 - torch.inf, labels, "nll").sum(),
    ):
        assert cost.item() == 0
        for gradient in torch.autograd.grad(cost, (hidden, weight, bias), retain_graph=True):
            assert not gradient.any()
    assert all(math.isnan(value) for value in loss.metrics().values())


def test_aligned_states_equal_shifted_ones():
    hidden, weight, _, labels = make()
    ref = torch.linspace(-3, -1, labels.numel(), dtype=torch.float64).view(labels.shape)
    spec = f"{__name__}:above_reference"
    shifted = fused_objective(hidden, weight, labels, spec, ref_logp=ref)
    flat = fused_objective(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten(), spec, ref_logp=ref[:, 1:].flatten())
    assert torch.equal(shifted, flat)
    for got, wanted in zip(
        torch.autograd.grad(flat, (hidden, weight)), torch.autograd.grad(shifted, (hidden, weight)), strict=True
    ):
        assert torch.equal(got, wanted)


def test_columns_stand_beside_labels():
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias).detach()
    scale = torch.arange(labels.numel(), dtype=torch.float64).view(labels.shape)
    special = labels % 2 == 0
    spec = {"name": "neg_p", "special_tokens": "nll"}
    found = as_loss(spec, 1.0)({"logits": logits}, labels, is_special=special, objective_weight=scale)
    _, logp, given = reference(logits, labels, "nll", None)
    is_target = labels[:, 1:] != -100
    wanted = torch.where(given["label"] % 2 == 0, -logp, 0.0) * scale[:, 1:][is_target]
    torch.testing.assert_close(found, wanted.mean())
    each = per_token(logp, given["label"], spec, 1.0, is_special=given["label"] % 2 == 0)
    torch.testing.assert_close(each, torch.where(given["label"] % 2 == 0, -logp, 0.0))


def test_a_mask_tells_targets_too():
    logp = torch.tensor([[-1.0, -2.0, 3.0]], requires_grad=True)
    each = per_token(logp, torch.tensor([[True, True, False]]), "nll", 0.2)
    assert each.tolist() == [[1.0, 0.0, 0.0]]
    assert torch.autograd.grad(each.sum(), logp)[0].tolist() == [[-1.0, 0.0, 0.0]]


def test_ids_0_and_1_are_labels_beside_others():
    for labels in ([0, 1, -100], [0, 1, 2]):
        assert per_token(torch.full((3,), -1.0), torch.tensor(labels), "nll").tolist() == [float(each >= 0) for each in labels]
    assert per_token(torch.zeros(0), torch.zeros(0, dtype=torch.long), "nll").shape == (0,)


def test_metrics_are_exact_means_of_all_tokens():
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias)
    loss, of_states, of_logp = as_loss("neg_p", 0.005), LossMetrics(), LossMetrics()
    for row in range(BATCH):
        part = slice(row, row + 1)
        loss({"logits": logits[part]}, labels[part], 40)
        states = {"bias": bias, "scale": 1.3, "softcap": 5.0, "metrics": of_states}
        fused_objective(hidden[part], weight, labels[part], "neg_p", 0.005, **states)
        log_probs = logits[part, :-1].log_softmax(-1)
        ids = labels[part, 1:]
        per_token(log_probs.gather(2, ids.clamp(min=0)[..., None])[..., 0], ids, "neg_p", 0.005, metrics=of_logp)
    with torch.no_grad():
        loss({"logits": logits}, labels)
    found, (_, logp, given) = loss.metrics(), reference(logits, labels, "nll", None)
    p, kept = logp.exp(), Threshold(0.005).keep(logp)
    wanted = {
        "nll": -logp,
        "target_prob": p,
        "kept_fraction": kept.double(),
        "gradient_weight": torch.where(kept, p, 0),
        "entropy": given["entropy"],
        "mean_token_accuracy": given["is_top1"].double(),
        "objective": torch.where(kept, 1 - p, 0),
    }
    assert found == pytest.approx({name: each.mean().item() for name, each in wanted.items()})
    assert of_states.pop() == pytest.approx(found)
    assert of_logp.pop() == pytest.approx({name: found[name] for name in found if name not in METRICS[-2:]})
    assert loss.metrics("eval", reduce=lambda sums: 2 * sums) == pytest.approx(found)
    assert loss.metrics() == loss.metrics("eval") == {}


def test_a_sharded_head_is_gathered(tmp_path):
    hidden, weight, bias, labels = make()
    wanted = torch.autograd.grad(fused_objective(hidden, weight, labels, "neg_p", bias=bias), (weight, bias))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shares = [distribute_tensor(each.detach(), mesh, [Shard(0)]).requires_grad_() for each in (weight, bias)]
        fused_objective(hidden, shares[0], labels, "neg_p", bias=shares[1]).backward()
        for share, gradient in zip(shares, wanted, strict=True):
            assert torch.equal(share.grad.full_tensor(), gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_tensors_are_gathered(tmp_path):
    processes = [SERVER.Process(target=sharing.compare, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_evaluation_divides_by_kept_tokens_alone():
    hidden, weight, bias, labels = make()
    logits = logits_of(hidden, weight, bias)
    kept = {"above": 0.005, "normalize": "kept"}
    with torch.no_grad():
        found = as_loss("neg_p", kept, micro_batches=2)({"logits": logits}, labels, 40)
    torch.testing.assert_close(found, 2 * reference(logits, labels, "neg_p", kept)[0].detach())


def outputs(length=LENGTH, **others):
    return {"logits": torch.zeros(BATCH, length, VOCABULARY), **others}


LABELS = torch.zeros(BATCH, LENGTH, dtype=torch.long)
IDS = torch.tensor([3, 1])
REFUSED = {
    "no logits": (lambda: as_loss("nll")({"loss": 1}, LABELS), "has no logits. Switch off the kernel"),
    "none": (lambda: as_loss("nll")(SimpleNamespace(logits=None), LABELS), "has no logits"),
    "emptied": (lambda: as_loss("nll")(outputs(0), LABELS), r"shape \(3, 0, 67\)"),
    "a function in their place": (lambda: as_loss("nll")({"logits": lambda: None}, LABELS), "has no logits"),
    "a tensor": (lambda: as_loss("nll")(outputs()["logits"], LABELS), "got a tensor.* Give the model's output or `{'logits'"),
    "swapped": (lambda: as_loss("nll")(LABELS, outputs()), r"got a tensor, torch.int64 of shape .*, and then the labels"),
    "a tuple": (lambda: as_loss("nll")((outputs()["logits"],), LABELS), "is a tuple, without names. .* `return_dict=True`"),
    "shifted": (lambda: as_loss("nll")(outputs(), LABELS[:, 1:]), "neither shifted nor truncated"),
    "virtual tokens": (lambda: as_loss("nll")(outputs(LENGTH + 2), LABELS), "neither shifted nor truncated"),
    "float labels": (lambda: as_loss("nll")(outputs(), LABELS.float()), "labels are torch.float32, not token ids"),
    "no labels": (lambda: as_loss("nll")(outputs(), None), "labels are NoneType, not token ids"),
    "another vocabulary": (lambda: as_loss("nll")(outputs(), LABELS + VOCABULARY), "a label is 67, outside of the vocabulary"),
    "negative": (lambda: as_loss("nll")(outputs(), LABELS - 1), "a label is -1, outside of the vocabulary"),
    "percentile": (lambda: as_loss("nll", {"above_percentile": 10}), "`above_percentile: 10` here: .* `bl-trainer diagnose"),
    "progress": (lambda: as_loss("anneal"), "'anneal' without training progress"),
    "scheduled": (lambda: as_loss(COMPOSED), "'power' without training progress"),
    "wrong progress": (
        lambda: as_loss("anneal", progress=lambda: 3)(outputs(), LABELS),
        "training progress 3: it is no number from 0 to 1",
    ),
    "reference": (lambda: as_loss("psft")(outputs(), LABELS), "objective 'psft' needs 'ref_logp'. Pass `ref_logp=`"),
    "special tokens": (
        lambda: as_loss({"name": "neg_p", "special_tokens": "nll"})(outputs(), LABELS),
        "objective 'neg_p' needs 'is_special'",
    ),
    "unknown column": (lambda: as_loss("nll")(outputs(), LABELS, ref_logps=LABELS), "'ref_logps'. Did you mean 'ref_logp'"),
    "short column": (lambda: as_loss("psft")(outputs(), LABELS, ref_logp=LABELS[0]), r"`ref_logp`: it is \(11,\), not of the"),
    "no column": (lambda: as_loss("psft")(outputs(), LABELS, ref_logp=1.0), "`ref_logp`: it is float, not of the"),
    "unknown objective": (lambda: as_loss("negp"), "Did you mean 'neg_p'"),
    "accumulation": (
        lambda: as_loss("nll", {"above": 0.1, "normalize": "kept"})(outputs(), LABELS, 40),
        "Give `micro_batches`, or write `normalize: tokens`",
    ),
    "data parallel": (
        lambda: as_loss("nll")(outputs(), LABELS, torch.tensor([[40], [40]])),
        r"has shape \(2, 1\). DataParallel splits a batch .* `torchrun`",
    ),
    "number below 0": (lambda: as_loss("nll")(outputs(), LABELS, -3), "the number of items is -3. Give the number of targets"),
    "no number": (lambda: as_loss("nll")(outputs(), LABELS, "7"), "the number of items is '7'"),
    "encoder-decoder": (lambda: as_loss("nll")(Seq2SeqLMOutput(**outputs()), LABELS), "predicts each label at its own place"),
    "masked": (lambda: as_loss("nll")(MaskedLMOutput(**outputs()), LABELS), "predicts each label at its own place"),
    "states": (lambda: fused_objective(torch.zeros(2, 3), torch.zeros(5, 4), LABELS[0, :2], "nll"), "do not fit a weight"),
    "no weight": (
        lambda: fused_objective(torch.zeros(2, 4), torch.nn.Linear(4, 5), LABELS[0, :2], "nll"),
        "got Linear for the weight. Give `lm_head.weight`",
    ),
    "no states": (
        lambda: fused_objective(SimpleNamespace(), torch.zeros(5, 4), LABELS[0, :2], "nll"),
        "got SimpleNamespace for the hidden states. Give `last_hidden_state`",
    ),
    "number of a fused loss": (
        lambda: fused_objective(torch.zeros(2, 4), torch.zeros(5, 4), LABELS[0, :2], "nll", num_items_in_batch=2),
        "'num_items_in_batch'. Did you mean 'num_items'",
    ),
    "number of a loss": (
        lambda: as_loss("nll")(outputs(), LABELS, num_items=2),
        "'num_items'. Did you mean 'num_items_in_batch'",
    ),
    "states of other labels": (
        lambda: fused_objective(torch.zeros(2, 4), torch.zeros(5, 4), LABELS, "nll"),
        "the hidden states",
    ),
    "kept per token": (lambda: per_token(torch.zeros(2), LABELS[0, :2], "nll", {"normalize": "kept"}), "it divides nothing"),
    "losses": (lambda: per_token(torch.ones(2), IDS, "nll"), "log p is 1, above 0"),
    "ids as log p": (lambda: per_token(LABELS, LABELS, "nll"), "log p is torch.int64"),
    "labels of other tokens": (lambda: per_token(torch.zeros(2), LABELS[0], "nll"), "log p has shape"),
    "integer mask": (lambda: per_token(torch.zeros(2), IDS // 2, "nll"), r"0 and 1, as a mask's are. Give `mask.bool\(\)`"),
    "mask of all": (lambda: per_token(torch.zeros(2), IDS // IDS, "nll"), "the labels are 0 and 1"),
    "mask without ids": (
        lambda: per_token(torch.zeros(2), torch.ones(2, dtype=torch.bool), f"{__name__}:by_label"),
        "needs token ids",
    ),
    "entropy": (lambda: per_token(torch.zeros(2), IDS, "anneal", progress=0), "needs 'entropy'. Pass `entropy=`"),
}


def by_label(logp, label):
    return -logp * (1 + label)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrong", ["4", lambda: None, 0, True, 1.5])
def test_micro_batches_are_a_positive_integer(wrong):
    loss = as_loss("nll", {"above": 0.1, "normalize": "kept"}, micro_batches=wrong)
    with pytest.raises(ValueError, match=r"Cannot divide by .* micro-batches. Give an integer of at least 1"):
        loss(outputs(), LABELS, 40)


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


@pytest.fixture(scope="module")
def rows():
    """Rows of unequal lengths, of which one has no target."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (5, 17, 9, 30, 12, 3, 21, 8):
        ids = torch.randint(5, 40, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    made[2]["labels"] = [-100] * 9
    return Dataset.from_list(made)


AS_BLTRAINER = [
    ("nll", None),
    ("neg_p", None),
    (POWER, None),
    ("anneal", None),
    (ENTROPY, None),
    ("neg_p", {"below": 0.5}),
    ("neg_p", {"below": 0.5, "normalize": "kept"}),
]


@pytest.mark.parametrize(("spec", "threshold"), AS_BLTRAINER, ids=str)
def test_plain_transformers_trains_as_bltrainer_does(spec, threshold, tokenizer, rows, tmp_path):
    """Gradients of two steps under accumulation, with the logged means."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    ours, theirs = Gradients(), Gradients()
    model = make_double(tokenizer)
    ordered = build(
        Ordered, tokenizer, rows, tmp_path, model=model, callbacks=[ours], objective=spec, threshold=threshold, **options
    )
    ordered.train()
    loss = as_loss(spec, threshold, progress=lambda: trainer.state.global_step / trainer.state.max_steps, micro_batches=2)
    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", learning_rate=1e-2, max_grad_norm=0.0,
        lr_scheduler_type="constant", disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    trainer = InOrder(
        make_double(tokenizer), args, data_collator=DataCollatorForSeq2Seq(tokenizer), train_dataset=rows,
        compute_loss_func=loss, callbacks=[theirs],
    )  # fmt: skip
    trainer.train()
    assert len(ours.all) == 2
    for got, wanted in zip(theirs.all, ours.all, strict=True):
        assert relative_difference(got, wanted) < 1e-9
    logged = [log for log in ordered.state.log_history if "nll" in log]
    means = loss.metrics()
    tokens = [sum(label != -100 for row in part["labels"] for label in row[1:]) for part in (rows[:4], rows[4:])]
    for name in METRICS:
        whole = sum(log[name] * count for log, count in zip(logged, tokens, strict=True)) / sum(tokens)
        assert means[name] == pytest.approx(whole, rel=1e-6), name


def test_saved_tensors_are_unpacked_once():
    """As offloading them and checkpointing want."""
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels, unpacked = torch.randint(7, (2, 5)), []

    def unpack(kept):
        unpacked.append(id(kept))
        return kept[0]

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: [tensor], unpack):
        loss = as_loss("neg_p")({"logits": logits}, labels)
    loss.backward()
    assert len(unpacked) == len(set(unpacked)) > 0
    checkpointed = logits.detach().requires_grad_()
    checkpoint(lambda x: as_loss("neg_p")({"logits": 1 * x}, labels), checkpointed, use_reentrant=False).backward()
    torch.testing.assert_close(checkpointed.grad, logits.grad)


NO_COUNTS = [-3, True, math.nan, math.inf, torch.tensor(-3), torch.tensor(True), torch.tensor(math.nan), torch.tensor(math.inf)]


@pytest.mark.parametrize("count", NO_COUNTS, ids=str)
def test_what_is_no_number_of_items(count):
    logits, labels = torch.randn(1, 4, 7), torch.randint(7, (1, 4))
    for loss in (
        lambda: as_loss("nll")({"logits": logits}, labels, count),
        lambda: fused_objective(torch.randn(1, 4, 3), torch.randn(7, 3), labels, "nll", num_items=count),
    ):
        with pytest.raises(LossError, match=r"the number of items is .*\. Give the number of targets, or None"):
            loss()
    right = as_loss("nll")({"logits": logits}, labels, 5)
    for same in (5.0, np.int64(5), torch.tensor(5), torch.tensor([5.0])):
        assert as_loss("nll")({"logits": logits}, labels, same) == right


def test_a_number_of_items_on_a_device_is_not_read():
    """A meta tensor has no values and raises when read. The host would wait for such a tensor on a GPU."""
    elsewhere = torch.ones((), device="meta")
    assert _is_count(elsewhere)
    assert not _is_count(elsewhere > 0)


def test_what_is_given_beside_labels_is_checked():
    logits, labels = torch.randn(1, 4, 7, dtype=torch.float64), torch.randint(7, (1, 4))
    hidden, weight = torch.randn(1, 4, 3), torch.randn(7, 3)
    special = {"name": "power", "alpha": 10, "special_tokens": {"name": "nll"}}
    with pytest.raises(ValueError, match=r"`is_special`: it is torch.uint8. Give a bool tensor"):
        as_loss(special)({"logits": logits}, labels, is_special=torch.ones(1, 4, dtype=torch.uint8))
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a weight is below 0, infinite, or no number"):
            as_loss("nll")({"logits": logits}, labels, objective_weight=torch.full((1, 4), value))
    assert as_loss("nll")({"logits": logits}, labels, objective_weight=torch.zeros(1, 4, dtype=torch.long)) == 0
    for options in ({"softcap": 0}, {"softcap": -1.0}, {"scale": torch.ones(())}):
        with pytest.raises(ValueError, match=r"`scale` .* must be a number"):
            fused_objective(hidden, weight, labels, "nll", **options)
    with pytest.raises(ValueError, match=r"hidden states are torch.float32, the weight is torch.float16"):
        fused_objective(hidden, weight.half(), labels, "nll")


def test_micro_batches_divide_also_without_a_number_of_items():
    logits, labels = torch.randn(1, 4, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (1, 4))
    threshold = {"above": 1e-9, "normalize": "kept"}
    whole = as_loss("nll", threshold)({"logits": logits}, labels)
    part = as_loss("nll", threshold, micro_batches=4)({"logits": logits}, labels)
    torch.testing.assert_close(4 * part, whole)


@pytest.mark.parametrize("spec", ["nll", "neg_p", "infosft", {"name": "focal", "gamma": 0.5}, "log_one_minus_p"], ids=str)
def test_log_p_that_is_rounded_to_above_0_is_that_of_p_1(spec):
    found = []
    for value in (1e-7, 0.0):
        logp = torch.full((1, 3), value, dtype=torch.float64, requires_grad=True)
        cost = per_token(
            logp, torch.tensor([[3, 4, 5]]), spec, **({"entropy": torch.ones_like(logp)} if spec == "infosft" else {})
        )
        (gradient,) = torch.autograd.grad(cost.sum(), logp)
        assert gradient.isfinite().all()
        found.append((cost.detach(), gradient))
    torch.testing.assert_close(found[0], found[1])


def gpt2(tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()


def trained(model, tokenizer, folder, steps, first, monkeypatch):
    """Train transformers' trainer a step on rows whose first token has a label, and return its gradient and the warnings."""
    said = []
    monkeypatch.setattr(functional.logger, "warning", said.append)
    rows = Dataset.from_list([{"input_ids": [*range(5, 9 + i)], "labels": [first(5), *range(6, 9 + i)]} for i in range(4)])
    args = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps, use_cpu=True,
        learning_rate=0.0, max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    seen = Gradients()
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, args, collator, rows, callbacks=[seen], compute_loss_func=as_loss("neg_p")).train()
    return seen.first, said


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("make", [make_double, gpt2], ids=["llama", "gpt2"])
def test_a_count_that_may_have_first_labels_is_spoken_of(make, steps, tokenizer, tmp_path, monkeypatch):
    """transformers 5.23 counts them for GPT-2. Without accumulation the loss knows that it does not for others."""
    right, silent = trained(make(tokenizer), tokenizer, tmp_path, steps, lambda token: -100, monkeypatch)
    found, said = trained(make(tokenizer), tokenizer, tmp_path, steps, lambda token: token, monkeypatch)
    is_right = relative_difference(found, right) < 1e-9
    assert silent == []
    assert said == ([] if is_right and steps == 1 else [functional.FIRST_LABEL])


def test_the_loss_speaks_of_first_labels_once(monkeypatch):
    said = []
    monkeypatch.setattr(functional.logger, "warning", said.append)
    loss, labels = as_loss("nll"), torch.tensor([[1, 2, 3, 4]])
    for count in (torch.tensor(4), 8, 8):
        loss({"logits": torch.zeros(1, 4, 7)}, labels, count)
    assert len(said) == 1
    as_loss("nll")({"logits": torch.zeros(1, 4, 7)}, labels)  # it counts itself
    assert len(said) == 1
