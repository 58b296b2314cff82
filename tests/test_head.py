"""The objective head against full logits in float64: values, gradients, blocks, and what it skips."""

import copy
import inspect
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, GraniteConfig

from bl_trainer.head import blocks as module
from bl_trainer.head import gradients as gradients_module
from bl_trainer.head.lm_head import Head
from bl_trainer.head.ops import compare, objective_head, score
from bl_trainer.head.patch import add_scoring
from bl_trainer.head.targets import IGNORED, Targets, shifted
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold
from conftest import gap_near, make_llama

VOCABULARY, SIZE, TOKENS = 301, 16, 53


def tilted(logp, entropy, *, gamma=0.5):
    return -logp * (1 + gamma * entropy)


def only_entropy(logp, entropy):
    return entropy + 0 * logp.detach()


def uses_everything(logp, entropy, log_sum_sq_probs, is_top1, label, progress):
    return (
        -logp * (1 + 0.1 * entropy) + 0.2 * log_sum_sq_probs.exp() * logp.exp() + 0.1 * is_top1 * -logp + 0.001 * label * -logp
    )


def apply(objective, threshold, hidden, head, target):
    extras = ("log_sum_sq_probs",) if "log_sum_sq_probs" in objective.statistics else ()

    def priced(statistics):
        return price(objective, threshold, {**statistics, "progress": 0.5})

    return objective_head(hidden, head, target, priced, extras)


def logits_of(hidden, head):
    logits = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def reference(objective, threshold, hidden, head, target):
    """Cost of each token from full logits, by autograd; log p; other statistics."""
    log_probs = logits_of(hidden, head).log_softmax(-1)
    logp = log_probs.gather(1, target[:, None])[:, 0]
    available = {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).detach(),
        "is_top1": log_probs.argmax(-1) == target,
        "label": target,
        "progress": 0.5,
    }
    return torch.where(threshold.keep(logp), objective(logp, **available), 0.0), logp, available


def make(dtype=torch.float64, bias=False, scale=1.0, softcap=None, spread=0.5, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = new(tokens, SIZE).requires_grad_(), (spread * new(VOCABULARY, SIZE)).detach().requires_grad_()
    head = Head(weight, new(VOCABULARY).requires_grad_() if bias else None, scale, softcap)
    return hidden, head, torch.randint(VOCABULARY, (tokens,), generator=generator)


def widened(hidden, head):
    def wide(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return wide(hidden), Head(wide(head.weight), wide(head.bias), head.scale, head.softcap)


def gradients(cost, hidden, head):
    leaves = [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None and tensor.requires_grad]
    return torch.autograd.grad(0.3 * cost.sum(), leaves)


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", dict.fromkeys(module.BLOCK_BYTES, 20 * VOCABULARY * 8))  # 53 is no multiple
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * VOCABULARY * 8)
    monkeypatch.setattr(module, "SLICE", 100)


# `make test-lowest` has Triton's interpreter
BACKENDS = ["eager", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["eager"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Both ways of working on a block."""
    if request.param == "triton":
        original = module.Blocks.__init__

        def with_triton(self, hidden, head, held=0):
            original(self, hidden, head, held)
            self.uses_triton = self.wide == torch.float32

        monkeypatch.setattr(module.Blocks, "__init__", with_triton)
        monkeypatch.setattr(module.kernels, "TILE", 128)
    return request.param


SPECS = ["nll", "neg_p", {"name": "power", "alpha": 10}, {"name": "power", "alpha": -0.2}, "log_one_minus_p"]
WITH_ENTROPY = [f"{__name__}:{name}" for name in ("tilted", "only_entropy", "uses_everything")]
HEADS = {"plain": {}, "bias": {"bias": True}, "scale": {"scale": 0.7}, "softcap": {"softcap": 5.0, "bias": True, "scale": 1.3}}
# All kept, some, some, none
THRESHOLDS = [Threshold(), Threshold(above=0.01), Threshold(below=0.01), Threshold(above=1.0)]
CASES = [(spec, kind) for kind in HEADS for spec in SPECS + WITH_ENTROPY]


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=["all", "above", "below", "none"])
@pytest.mark.parametrize(("spec", "kind"), CASES, ids=str)
def test_equals_full_logits_in_float64(spec, kind, threshold):
    objective = Objective.parse(spec)
    hidden, head, target = make(**HEADS[kind])
    ours = apply(objective, threshold, hidden, head, target)
    expected, logp, available = reference(objective, threshold, hidden, head, target)
    torch.testing.assert_close(ours.cost, expected)
    torch.testing.assert_close(ours.scores.logp, logp)
    torch.testing.assert_close(ours.scores.entropy, available["entropy"])
    assert torch.equal(ours.is_top1, available["is_top1"])
    assert torch.equal(ours.kept, threshold.keep(logp))
    if ours.scores.log_sum_sq_probs is not None:
        torch.testing.assert_close(ours.scores.log_sum_sq_probs, available["log_sum_sq_probs"])
    for got, wanted in zip(gradients(ours.cost, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


FEWER = [(spec, kind) for kind in HEADS for spec in ("neg_p", f"{__name__}:tilted", f"{__name__}:uses_everything")]


@pytest.mark.parametrize("below", [1.0, 0.001])
@pytest.mark.parametrize(("spec", "kind"), FEWER, ids=str)
def test_kernels_equal_full_logits(spec, kind, below, backend):
    objective = Objective.parse(spec)
    hidden, head, target = make(torch.float32, **HEADS[kind])
    p = reference(Objective.parse("nll"), Threshold(), hidden, head, target)[1].exp()
    threshold = Threshold(below=gap_near(p.detach(), below) if below < 1 else 1.0)
    ours = apply(objective, threshold, hidden, head, target)
    expected, _, available = reference(objective, threshold, hidden, head, target)
    torch.testing.assert_close(ours.cost, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.scores.entropy, available["entropy"], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_top1, available["is_top1"])
    for got, wanted in zip(gradients(ours.cost, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts_get_no_gradient(frozen):
    hidden, head, target = make()
    (hidden if frozen == "hidden" else head.weight).requires_grad_(False)
    objective = Objective.parse("neg_p")
    (got,) = gradients(apply(objective, Threshold(), hidden, head, target).cost, hidden, head)
    (wanted,) = gradients(reference(objective, Threshold(), hidden, head, target)[0], hidden, head)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["nll", "neg_p", {"name": "power", "alpha": 10}], ids=str)
def test_narrow_types_are_near_float64(spec, dtype, backend):
    objective = Objective.parse(spec)
    hidden, head, target = make(dtype, spread=1.0)
    target = torch.where(torch.arange(TOKENS) % 2 == 0, (hidden @ head.weight.T).argmax(-1), target)
    ours = apply(objective, Threshold(), hidden, head, target)
    assert ours.cost.dtype == torch.float32
    wide_hidden, wide_head = widened(hidden, head)
    expected, logp, _ = reference(objective, Threshold(), wide_hidden, wide_head, target)
    assert (ours.scores.logp.double() - logp).abs().max() < 3e-5  # also for bfloat16: logits are not rounded to it
    for got, wanted in zip(gradients(ours.cost, hidden, head), gradients(expected, wide_hidden, wide_head), strict=True):
        assert got.dtype == dtype
        # Triton's interpreter cuts bfloat16 off, where GPUs round
        assert relative(got, wanted) < (1e-5 if dtype == torch.float32 else 4e-3 if backend == "eager" else 8e-3)


def test_float32_is_as_accurate_as_full_logits():
    for spec in ("nll", "neg_p", {"name": "power", "alpha": 10}):
        objective = Objective.parse(spec)
        hidden, head, target = make(torch.float32, spread=1.0)
        wide_hidden, wide_head = widened(hidden, head)
        wanted = gradients(reference(objective, Threshold(), wide_hidden, wide_head, target)[0], wide_hidden, wide_head)
        ours = gradients(apply(objective, Threshold(), hidden, head, target).cost, hidden, head)
        naive = gradients(reference(objective, Threshold(), hidden, head, target)[0], hidden, head)
        for got, usual, exact in zip(ours, naive, wanted, strict=True):
            assert relative(got, exact) <= 1.25 * relative(usual, exact)


def test_threshold_decides_by_unrounded_probabilities():
    """Of bfloat16 logits half of these tokens would be on the wrong side."""
    hidden, head, target = make(torch.bfloat16, spread=1.0)
    target = (hidden @ head.weight.T).argmax(-1)
    p = reference(Objective.parse("nll"), Threshold(), *widened(hidden, head), target)[1].exp()
    for above in p.tolist():
        ours = apply(Objective.parse("nll"), Threshold(above=above), hidden, head, target)
        differs = ours.kept != (p >= above)
        assert not (differs & ((p - above).abs() > 1e-5)).any()


def test_confident_tokens_keep_their_gradient():
    weight = torch.tensor([[20.0], [0.0], [-3.0]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    ours = apply(Objective.parse("nll"), Threshold(), hidden, Head(weight, None, 1.0, None), torch.tensor([0]))
    wide = weight.detach().double().requires_grad_()
    (-(torch.ones(1, 1, dtype=torch.float64) @ wide.T).log_softmax(-1)[0, 0]).backward()
    (got,) = torch.autograd.grad(ours.cost.sum(), weight)
    torch.testing.assert_close(got.double(), wide.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens, backend):
    hidden, head, target = make(torch.float32, bias=True, tokens=tokens)
    objective = Objective.parse(f"{__name__}:uses_everything")
    ours = apply(objective, Threshold(), hidden, head, target)
    assert ours.scores.log_sum_sq_probs.shape == (tokens,)
    expected = reference(objective, Threshold(), hidden, head, target)[0]
    for got, wanted in zip(gradients(ours.cost, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("loss_scale", [65536, 1])
@pytest.mark.parametrize("spec", ["nll", "log_one_minus_p"])
def test_float16_neither_overflows_nor_underflows(spec, loss_scale, backend):
    """With the weights of `log_one_minus_p`, up to 1000, outliers among hidden states, a large loss scale, and many tokens."""
    hidden, head, target = make(torch.float16, spread=0.05)
    with torch.no_grad():
        hidden[:, 0] = 100
        head.weight[:, 0] = 0
        head.weight[target[:9], 0] = 0.2  # nearly certain
    wide_hidden, wide_head = widened(hidden, head)
    objective = Objective.parse(spec)
    cost = apply(objective, Threshold(), hidden, head, target).cost
    exact = reference(objective, Threshold(), wide_hidden, wide_head, target)[0]
    scale = loss_scale / 7e6
    found = torch.autograd.grad((cost * scale).sum(), (hidden, head.weight))
    wanted = torch.autograd.grad((exact * scale).sum(), (wide_hidden, wide_head.weight))
    for got, expected in zip(found, wanted, strict=True):
        error = (got.double() - expected).abs().max()
        # as near as float16 can hold the result, whose smallest number is 6e-8
        assert error <= max(2e-3 * expected.abs().max(), 6e-8)


def test_computes_in_the_autocast_type():
    hidden, head, target = make(torch.float32)
    objective = Objective.parse("neg_p")
    with torch.autocast("cpu", torch.bfloat16):
        ours = apply(objective, Threshold(), hidden, head, target)
        scores = score(hidden, head, target)
    rounded = hidden.bfloat16().double(), head._replace(weight=head.weight.bfloat16().double())
    logp = reference(objective, Threshold(), *rounded, target)[1]
    torch.testing.assert_close(ours.scores.logp.double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.logp, ours.scores.logp, rtol=1e-6, atol=1e-6)
    assert [gradient.dtype for gradient in gradients(ours.cost, hidden, head)] == [torch.float32] * 2


def test_rows_of_no_weight_stay_out_of_the_products(monkeypatch, backend):
    hidden, head, target = make(torch.float32)
    logp = reference(Objective.parse("nll"), Threshold(), hidden, head, target)[1]
    threshold = Threshold(above=logp.exp().median().item())
    rows = []
    inner = gradients_module._add_in_weight
    monkeypatch.setattr(
        gradients_module, "_add_in_weight", lambda total, left, *rest: rows.append(len(left)) or inner(total, left, *rest)
    )
    ours = apply(Objective.parse("nll"), threshold, hidden, head, target)
    assert sum(rows) == int(ours.kept.sum()) < TOKENS


class Kernels:
    """The two kernels in torch, and the bytes of logits, or of the gradient in them, that each is there to move."""

    def __init__(self):
        self.moved = 0

    def counting(self, function, argument):
        """Return `function`, which moves its `argument` once."""

        def wrapped(*args):
            self.moved += args[argument].numel() * args[argument].itemsize
            return function(*args)

        return wrapped

    def sums(self, logits, target, at_target=None):
        self.moved += logits.numel() * logits.itemsize
        at_target = logits.gather(1, target[:, None])[:, 0]
        top, top1 = logits.max(1)
        below = logits - top[:, None]
        odds = below.exp().scatter(1, top1[:, None], 0)
        rank = (logits > at_target[:, None]).sum(1)
        return at_target, top, top1, odds.sum(1), (odds * below).sum(1), (odds * odds).sum(1), rank

    def difference(self, logits, place, target, columns, softcap, gain, out):
        kept = (place >= 0).nonzero()[:, 0]
        self.moved += len(kept) * logits.shape[1] * (logits.itemsize + out.itemsize)
        top, top_logp, in_target = (column[kept, None] for column in columns)
        p = (logits[kept] - top + top_logp).exp().scatter(1, target[kept, None], in_target)
        out[place[kept]] = (gain * p).to(out.dtype)


@pytest.mark.parametrize(("dtype", "frozen", "share", "most"), [
    (torch.bfloat16, False, 1, 18), (torch.bfloat16, True, 1, 16), (torch.float32, False, 1, 24), (torch.bfloat16, False, 0, 8),
])  # fmt: skip
def test_bytes_that_a_gpu_moves_per_logit(dtype, frozen, share, most, monkeypatch):
    """As docs/reference/loss-head.md states them."""
    counted, original = Kernels(), module.Blocks.__init__

    def as_on_a_gpu(self, *args):
        original(self, *args)
        self.uses_triton = True

    monkeypatch.setattr(module.Blocks, "__init__", as_on_a_gpu)
    monkeypatch.setattr(module, "kernels", counted, raising=False)
    for place, name, argument in ((module, "_project", 2), (gradients_module, "_in_hidden", 0)):
        monkeypatch.setattr(place, name, counted.counting(getattr(place, name), argument))
    monkeypatch.setattr(gradients_module, "_add_in_weight", counted.counting(gradients_module._add_in_weight, 1))
    hidden, head, target = make(dtype)
    head.weight.requires_grad_(not frozen)
    ours = apply(Objective.parse("nll"), Threshold(above=1.0 - share), hidden, head, target)
    assert counted.moved == most * TOKENS * VOCABULARY
    cost = reference(Objective.parse("nll"), Threshold(above=1.0 - share), *(wide := widened(hidden, head)), target)[0]
    for got, wanted in zip(gradients(ours.cost, hidden, head), gradients(cost, *wide), strict=True):
        assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()


class Operations(TorchDispatchMode):
    """Counts operations that start a kernel on a GPU, and those after which the host waits for it."""

    def __init__(self):
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense)
        self.launches += not func.is_view and func.overloadpacket is not torch.ops.aten.detach
        return func(*args, **kwargs or {})


LAUNCHES = {"nll": 15, "neg_p": 18, "power": 28, "log_one_minus_p": 29, "anneal": 41}


@pytest.mark.parametrize("name", LAUNCHES)
def test_small_operations_of_a_price_do_not_multiply(name):
    """A GPU's host makes them for each block, in less time than the block's products take."""
    objective = Objective.parse({"name": name, "alpha": 10} if name == "power" else name)
    logp = torch.linspace(-3, -0.1, 64)
    statistics = {"logp": logp, "entropy": -logp, "progress": 0.5}
    with Operations() as seen:
        price(objective, Threshold(above=0.1), statistics)
    assert seen.waits == 0
    assert seen.launches <= LAUNCHES[name]


@pytest.mark.skipif("triton" not in BACKENDS, reason="what runs on a GPU; `make test-lowest` has the interpreter")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("threshold", THRESHOLDS[:2], ids=["all", "above"])
def test_a_device_is_waited_for_once_per_flush(threshold, backend, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", dict.fromkeys(module.BLOCK_BYTES, 9 * VOCABULARY * 4))
    hidden, head, target = make(torch.float32)
    flushes = []
    inner = gradients_module.Gradients._empty
    monkeypatch.setattr(gradients_module.Gradients, "_empty", lambda self: flushes.append(1) or inner(self))
    with Operations() as seen:
        apply(Objective.parse("nll"), threshold, hidden, head, target)
    begun = 1
    assert seen.waits == len(flushes) - begun == 3


@pytest.mark.parametrize(("free", "flushes"), [(2**36, 3), (2**30, 7)])
def test_a_gpu_multiplies_many_rows_at_a_time(free, flushes):
    """8192 tokens, a vocabulary of 151936, bfloat16: each flush reads and writes float32 [V, H]."""
    weight = torch.empty(151936, 0, dtype=torch.bfloat16)
    blocks = SimpleNamespace(hidden=torch.empty(8192, 0, device="meta"), weight=weight, dtype=weight.dtype, rows=640, free=free)
    capacity = gradients_module.Gradients._capacity(SimpleNamespace(blocks=blocks), 8192)
    assert math.ceil(8192 / (capacity // 640 * 640)) == flushes


def test_uneven_incoming_gradient_is_not_silently_wrong():
    hidden, head, target = make()
    ours = apply(Objective.parse("nll"), Threshold(), hidden, head, target)
    (got,) = torch.autograd.grad((ours.cost * torch.arange(TOKENS)).sum(), hidden)
    assert got.isnan().all()


def test_second_derivative_is_refused():
    hidden, head, target = make()
    ours = apply(Objective.parse("nll"), Threshold(), hidden, head, target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ours.cost.sum(), hidden, create_graph=True)


def test_gradient_can_be_taken_once_only():
    hidden, head, target = make()
    total = apply(Objective.parse("nll"), Threshold(), hidden, head, target).cost.sum()
    torch.autograd.grad(total, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        torch.autograd.grad(total, hidden)


@pytest.mark.parametrize("spec", ["neg_p", f"{__name__}:tilted"])
def test_gradient_is_that_of_finite_differences(spec):
    """As gradcheck, which takes each gradient several times."""
    hidden, head, target = make(bias=True, scale=0.9, tokens=5)
    leaves = (hidden, head.weight, head.bias)

    def total(hidden, weight, bias):
        return apply(Objective.parse(spec), Threshold(), hidden, Head(weight, bias, 0.9, None), target).cost.sum()

    found = torch.autograd.grad(total(*leaves), leaves)
    torch.manual_seed(1)
    for which, gradient in enumerate(found):
        direction = torch.randn_like(gradient)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [leaf.detach() + step * direction if i == which else leaf.detach() for i, leaf in enumerate(leaves)]
            ends.append(total(*moved).item())
        assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("spread", [0.5, 10.0], ids=["flat", "sure"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_scores_equal_those_of_full_logits(dtype, spread, backend):
    hidden, head, target = make(dtype, bias=True, scale=0.7, spread=spread)
    scores = score(hidden, head, target)
    log_probs = logits_of(*widened(hidden, head)).log_softmax(-1)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    expected = {
        "logp": log_probs.gather(1, target[:, None])[:, 0],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "top1_logp": log_probs.max(-1).values,
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(scores, name).double(), values, **tolerance)
    assert torch.equal(scores.top1, log_probs.argmax(-1))
    assert torch.equal(scores.rank, (log_probs > expected["logp"][:, None]).sum(-1))
    empty = score(hidden[:0], head, target[:0])
    assert all(len(value) == 0 for value in vars(empty).values() if value is not None)


def test_impossible_tokens(backend):
    """A logit of -inf, with which some models mask unused tokens."""
    hidden, head, target = make(torch.float32, bias=True)
    with torch.no_grad():
        head.bias[torch.arange(VOCABULARY) % 3 == 0] = -torch.inf
    target = target // 3 * 3 + 1
    objective = Objective.parse(f"{__name__}:tilted")
    ours = apply(objective, Threshold(), hidden, head, target)
    log_probs = logits_of(*widened(hidden, head)).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).nansum(-1)
    torch.testing.assert_close(ours.scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(ours.cost, hidden, head))


def test_nan_is_not_hidden(backend):
    hidden, head, target = make(torch.float32, bias=True)
    with torch.no_grad():
        head.bias[0] = torch.nan
    ours = apply(Objective.parse("neg_p"), Threshold(above=0.5), hidden, head, target)
    assert ours.scores.logp.isnan().all()
    assert ours.scores.entropy.isnan().all()
    assert gradients(ours.cost, hidden, head)[0].isnan().all()


def test_divergences_equal_those_of_full_logits():
    hidden, head, _ = make()
    tuned, tuned_head = hidden + 0.1, head._replace(scale=1.2)
    got = compare(tuned, tuned_head, hidden, head)
    p, q = logits_of(hidden, head).softmax(-1), logits_of(tuned, tuned_head).softmax(-1)
    middle = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(got.forward, kl(p, q))
    torch.testing.assert_close(got.reverse, kl(q, p))
    torch.testing.assert_close(got.js, (kl(p, middle) + kl(q, middle)) / 2)


def test_nothing_is_stored_without_gradient(monkeypatch):
    hidden, head, target = make()
    monkeypatch.setattr(gradients_module.Gradients, "add", None)
    with torch.no_grad():
        ours = apply(Objective.parse("neg_p"), Threshold(), hidden, head, target)
    assert not ours.cost.requires_grad
    torch.testing.assert_close(ours.cost, 1 - ours.scores.logp.exp())


def test_blocks_shrink_with_memory(monkeypatch):
    hidden, head, target = make()
    wide = apply(Objective.parse("nll"), Threshold(), hidden, head, target)
    monkeypatch.setattr(module, "_free_bytes", lambda device: 0)
    assert module.Blocks(hidden, head).rows == 1
    monkeypatch.setattr(module, "_free_bytes", lambda device: 8 * 20 * VOCABULARY * 8)
    assert module.Blocks(hidden, head).rows == 20 > module.Blocks(hidden, head, held=1).rows  # what gradients will take
    monkeypatch.setattr(module, "_free_bytes", lambda device: 0)
    narrow = apply(Objective.parse("nll"), Threshold(), hidden, head, target)
    for got, wanted in zip(gradients(narrow.cost, hidden, head), gradients(wide.cost, hidden, head), strict=True):
        torch.testing.assert_close(got, wanted)


def test_kernels_compile_for_gpus():
    """To machine code, for which no GPU is needed."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cubin"] * 15


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bl_trainer.head import kernels

POINTERS = {"logits": "*fp32", "place": "*i64", "target": "*i64", "top1_of": "*i64", "rank_of": "*i64"}
SCALARS = {"stride": "i32", "out_stride": "i32", "vocabulary": "i32", "softcap": "fp32", "gain": "fp32"}

def compile(kernel, capability, out="*fp32", **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: out if name == "out" else SCALARS.get(name) or POINTERS.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    print(*(kind for kind in compiled.asm if kind == "cubin"))

for capability in (80, 90, 100):
    compile(kernels._sums, capability, TILE=kernels.TILE)
    for entropy, softcap in ((False, False), (True, False), (False, True)):
        compile(kernels._difference, capability, "*bf16", HAS_ENTROPY=entropy, HAS_SOFTCAP=softcap, TILE=kernels.TILE)
    compile(kernels._difference, capability, HAS_ENTROPY=True, HAS_SOFTCAP=True, TILE=kernels.TILE)
"""


def test_probability_near_one_keeps_its_distance_from_one():
    logits = torch.tensor([[0.0, -20.0, -25.0]])
    scores = score(torch.ones(1, 1), Head(logits.T, None, 1.0, None), torch.tensor([0]))
    expected = -math.log1p(math.exp(-20) + math.exp(-25))
    assert scores.logp.item() == pytest.approx(expected, rel=1e-6)  # float32's log-softmax gives 0


SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SMALL, logit_scale=0.3),
        GraniteConfig(**SMALL, logits_scaling=3.0),
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
        GPTJConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32, initializer_range=0.5),
    ],
    ids=["scale", "divisor", "softcap", "bias"],
)
def test_scoring_agrees_with_the_models_own_logits(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.randint(3, 40, (2, 9))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    with torch.no_grad():
        logits = model(ids).logits
        add_scoring(model)
        scores, is_target, _ = model(input_ids=ids, labels=labels, use=score)
        assert torch.equal(model(ids).logits, logits)  # without `use`, the model is as it was
    mask = labels[:, 1:] != -100
    assert torch.equal(is_target, mask)
    log_probs = logits[:, :-1][mask].double().log_softmax(-1)
    logp = log_probs.gather(1, labels[:, 1:][mask][:, None])[:, 0]
    torch.testing.assert_close(scores.logp.double(), logp, rtol=1e-5, atol=1e-5)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_targets_stand_where_they_are_predicted():
    labels = torch.tensor([[5, IGNORED, 6], [7, 8, IGNORED]])
    column = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    targets = Targets.of(labels)
    assert targets.mask.tolist() == [[False, True], [True, False]]
    assert targets.ids.tolist() == [6, 8]
    assert torch.equal(targets.take(shifted(column, 0.0)), torch.tensor([0.3, 0.5]))
    after_virtual = Targets.of(labels, virtual_tokens=2)
    assert after_virtual.labels.tolist() == [[IGNORED, 5, IGNORED, 6], [IGNORED, 7, 8, IGNORED]]
    assert torch.equal(after_virtual.take(shifted(column, 0.0, 2)), torch.tensor([0.1, 0.3, 0.4, 0.5]))
    assert torch.equal(Targets(targets.labels).ids, targets.ids)  # labels that are shifted already


def test_a_copy_of_a_scored_model_is_its_own(tokenizer):
    model = make_llama(tokenizer).eval()
    signature = inspect.signature(model.forward)
    add_scoring(model)
    assert inspect.signature(model.forward) == signature
    ids = torch.randint(4, 40, (1, 8))
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    with torch.no_grad():
        assert not torch.equal(other(ids).logits, model(ids).logits)
        scores, *_ = other(input_ids=ids, labels=ids, use=score)
        logp = other(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(scores.logp, logp)
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape == (1, 10)


def test_other_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="vocabulary of 9 tokens, the compared one of 8"):
        compare(
            torch.zeros(1, 2), Head(torch.zeros(8, 2), None, 1, None), torch.zeros(1, 2), Head(torch.zeros(9, 2), None, 1, None)
        )


def test_llama_scores_in_half_precision_are_float32(tokenizer):
    model = make_llama(tokenizer).to(torch.bfloat16).eval()
    add_scoring(model)
    ids = torch.randint(4, 40, (1, 8))
    with torch.no_grad():
        scores, *_ = model(input_ids=ids, labels=ids, use=score)
    assert scores.logp.dtype == torch.float32


@pytest.mark.parametrize("label", [40, -1])
def test_label_outside_of_the_vocabulary_is_refused(label):
    model = AutoModelForCausalLM.from_config(CohereConfig(**SMALL))
    add_scoring(model)
    ids = torch.full((1, 5), 3)
    with pytest.raises(ValueError, match=rf"A label is {label}, outside of the model's vocabulary of 40 tokens"):
        model(input_ids=ids, labels=torch.full((1, 5), label), use=score)


def test_quantized_head_is_refused():
    model = AutoModelForCausalLM.from_config(CohereConfig(**SMALL, tie_word_embeddings=False))
    add_scoring(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    ids = torch.full((1, 5), 3)
    message = r"LM head, Linear, has a weight of torch.int8 and shape \(40, 16\), .* Leave the head out of quantization"
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, labels=ids, use=score)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="LM head, Identity, has no weight"):
        model(input_ids=ids, labels=ids, use=score)


def test_models_of_two_types_are_compared():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    wide = hidden.double(), Head(weight.double(), None, 1.0, None)
    narrow = hidden + 0.1, Head(weight, None, 1.0, None)
    expected = compare(*wide, narrow[0].double(), wide[1])
    for name in ("forward", "reverse", "js"):
        found = getattr(compare(*wide, *narrow), name)
        torch.testing.assert_close(found, getattr(expected, name), rtol=1e-4, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(getattr(compare(*narrow, *narrow), name), torch.zeros(5))
