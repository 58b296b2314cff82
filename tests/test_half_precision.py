"""The head's products in half precision, by the rules of a GPU's; gradients that float16 can't hold; tokens that are masked."""

import pytest
import torch

from bl_trainer.head import blocks
from bl_trainer.head import gradients as gradients_module
from bl_trainer.head.lm_head import Head
from bl_trainer.head.ops import compare, objective_head, score
from bl_trainer.objectives.objective import Objective
from bl_trainer.objectives.pricing import price
from bl_trainer.objectives.threshold import Threshold
from test_head import SIZE, TOKENS, VOCABULARY, apply, gradients, logits_of, make, reference, relative, widened
from test_head import backend as backend
from test_head import small_blocks as small_blocks

MM = torch.mm
HALF = [torch.bfloat16, torch.float16]


def pays_for_surprise(logp, entropy, *, factor=1.0):
    return factor * (-logp * (1 + entropy) - 0.5 * entropy)


def mm(left, right, *, out_dtype=None, out=None):
    """As CUDA has it: half-precision matrices may be summed up in float32."""
    if out_dtype is None:
        return MM(left, right)
    assert left.dtype == right.dtype
    assert (left.dtype in HALF, out_dtype) == (True, torch.float32)
    product = MM(left.float(), right.float())
    return product if out is None else out.copy_(product)


def addmm(total, left, right, *, out_dtype, alpha, out):
    """As CUDA has it since torch 2.10."""
    return out.copy_(total + alpha * mm(left, right, out_dtype=out_dtype))


def older_addmm(total, left, right, **how):
    """As CUDA had it before."""
    if total.dtype != right.dtype:
        raise RuntimeError(f"self and mat2 must have the same dtype, but got {total.dtype} and {right.dtype}")
    return addmm(total, left, right, **how)


@pytest.fixture(params=[("2.8.0+cu128", older_addmm), ("2.9.1", older_addmm), ("2.10.0", addmm), ("2.13.0+cu130", addmm)])
def cuda(request, monkeypatch):
    """CUDA's products on a CPU, as a version of torch has them."""
    version, its_addmm = request.param
    monkeypatch.setattr(gradients_module, "ADDS_TO_WIDE", gradients_module.adds_to_wide(version))
    for module in (blocks, gradients_module):
        monkeypatch.setattr(module, "has_wide_products", lambda tensor: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", its_addmm)


def assert_near(objective, hidden, head, target, bound):
    ours = gradients(apply(objective, Threshold(), hidden, head, target).cost, hidden, head)
    wide_hidden, wide_head = widened(hidden, head)
    exact = reference(objective, Threshold(), wide_hidden, wide_head, target)[0]
    for got, wanted in zip(ours, gradients(exact, wide_hidden, wide_head), strict=True):
        assert relative(got, wanted) < bound


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spec", ["neg_p", f"{__name__}:pays_for_surprise"])
def test_full_fine_tuning_on_cuda_by_version(spec, dtype, cuda):
    assert_near(Objective.parse(spec), *make(dtype, bias=True, scale=0.7), bound=0.01)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 100.0, 1e6])
def test_float16_holds_gradients_through_the_entropy(factor, backend):
    objective = Objective.parse({"name": f"{__name__}:pays_for_surprise", "factor": factor})
    hidden, head, target = make(torch.float16, bias=True)
    cost = apply(objective, Threshold(), hidden, head, target).cost
    wide_hidden, wide_head = widened(hidden, head)
    exact = reference(objective, Threshold(), wide_hidden, wide_head, target)[0]
    # the gradients themselves, which float16 couldn't hold either, are brought into its range
    found = torch.autograd.grad(cost.sum() / (10 * factor), (hidden, head.weight, head.bias))
    wanted = torch.autograd.grad(exact.sum() / (10 * factor), (wide_hidden, wide_head.weight, wide_head.bias))
    for got, expected in zip(found, wanted, strict=True):
        assert relative(got, expected) < 2e-3


def test_the_gradient_of_a_bias_widens_a_slice_of_the_vocabulary(monkeypatch):
    """The whole block would be as large again."""
    widest, inner = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        made = inner(tensor, *args, **kwargs)
        if tensor.dtype == torch.bfloat16 and made.dtype == torch.float32:
            widest.append(made.numel())
        return made

    hidden, head, target = make(torch.bfloat16, bias=True)
    head.weight.requires_grad_(False)
    monkeypatch.setattr(torch.Tensor, "to", to)
    apply(Objective.parse("nll"), Threshold(), hidden, head, target)
    assert 0 < max(widest) <= max(TOKENS, SIZE) * blocks.SLICE < TOKENS * VOCABULARY


def masked(tokens):
    """A head that gives these tokens no probability, as some models do to tokens that are not in use."""
    hidden, head, _ = make(torch.float64, bias=True)
    bias = head.bias.detach().clone()
    bias[tokens] = -torch.inf
    return hidden.detach(), Head(head.weight.detach(), bias, 1.0, None)


def kl(p, q):
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


@pytest.mark.parametrize(("base_masks", "tuned_masks"), [([3, 7], [3, 7]), ([3, 7], [3]), ([3], [3, 7]), ([3], [7])], ids=str)
def test_divergences_of_models_that_mask_tokens(base_masks, tuned_masks):
    (hidden, base), (_, tuned) = masked(base_masks), masked(tuned_masks)
    got = compare(hidden + 0.1, tuned, hidden, base)
    p, q = logits_of(hidden, base).softmax(-1), logits_of(hidden + 0.1, tuned).softmax(-1)
    middle = (p + q) / 2
    torch.testing.assert_close(got.forward, kl(p, q))
    torch.testing.assert_close(got.reverse, kl(q, p))
    torch.testing.assert_close(got.js, (kl(p, middle) + kl(q, middle)) / 2)
    assert got.js.isfinite().all()
    assert got.forward.isinf().all() == bool({*tuned_masks} - {*base_masks})


def test_a_divergence_is_infinite_where_the_base_probability_underflows():
    logits = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -torch.inf]])
    base, tuned = (Head(x.T.contiguous(), None, 1.0, None) for x in logits)
    got = compare(torch.ones(1, 1), tuned, torch.ones(1, 1), base)
    assert (got.forward.item(), got.reverse.item()) == (torch.inf, 0)


def test_a_diverged_model_shows_in_the_divergences():
    hidden, head = masked([3])
    broken = head._replace(bias=torch.full_like(head.bias, torch.nan))
    for pair in ((head, broken), (broken, head)):
        got = compare(hidden, pair[0], hidden, pair[1])
        assert all(value.isnan().all() for value in vars(got).values())


SPECS = [
    "neg_p", "anneal", {"name": "power", "alpha": 10, "floor": 0.1, "mix": {"nll": 0.1}}, f"{__name__}:pays_for_surprise",
]  # fmt: skip


def weighed(spec, weights):
    """Costs of tokens, with `objective_weight` if there are weights, from a head and a target made where this is called."""
    hidden, head, target = make(bias=True)

    def priced(statistics):
        return price(Objective.parse(spec), Threshold(above=1e-3), {**statistics, "progress": 0.5})

    columns = {} if weights is None else {"objective_weight": weights.clone()}
    return objective_head(hidden, head, target, priced, columns=columns), score(hidden, head, target)


@pytest.mark.parametrize("is_weighed", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_head_works_in_inference_mode(spec, is_weighed):
    weights = torch.linspace(0, 2, TOKENS, dtype=torch.float64) if is_weighed else None
    with torch.inference_mode():
        ours, scores = weighed(spec, weights)
    expected, expected_scores = weighed(spec, weights)
    for name in ("cost", "weight", "kept"):
        assert torch.equal(getattr(ours, name), getattr(expected, name).detach()), name
    assert torch.equal(scores.logp, expected_scores.logp)
    assert 0 < ours.kept.sum() < TOKENS


def test_a_floor_is_the_same_in_inference_mode():
    objective = Objective.parse({"name": "power", "alpha": 10, "floor": 0.1})
    logp = torch.linspace(-5, 0, 11, dtype=torch.float64)
    with torch.inference_mode():
        inside = objective(logp.clone())
    assert torch.equal(inside, objective(logp))
