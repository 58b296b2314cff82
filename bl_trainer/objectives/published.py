"""Objectives of other papers, each with its formula as published or as the authors' code has it.

Most are a weight on the NLL gradient: f = -sg(w) log p, sg being stop-gradient. Then f itself is no measure of progress, as it
may rise with p; `nll` and `target_prob` are reported for that.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from .functions import Pointwise, power_per_token, require_number, widen

ANCHOR_REACH = 10.0  # SkyRL's `asft_kl_clamp`


def dft(logp: Tensor, min_weight: float = 0.0) -> Tensor:
    """f(p) = -sg(max(p, min_weight)) log p, weight on the NLL gradient max(p, min_weight).

    Dynamic Fine-Tuning. Use it where the model knows the task; without min_weight its gradient is that of `neg_p`, with it
    improbable tokens keep learning.

    Source: https://arxiv.org/abs/2508.05629; min_weight, 0.1 there, is from the authors' code.
    """
    _require("dft", "min_weight", min_weight, 0, 1)
    return _weighted(logp, widen(logp).exp().clamp(min=min_weight))


def talr(logp: Tensor, tau: float, min_weight: float = 0.01) -> Tensor:
    """f(p) = -sg(max(p^(1/tau), min_weight)) log p, weight on the NLL gradient max(p^(1/tau), min_weight).

    Token-adaptive loss reweighting. Above min_weight it is `power` with alpha = 1/tau. In the paper tau is the median over
    the batch of the mean NLL of each sequence, so a token's weight depends on the rest of the batch; here tau is fixed. The
    `nll` that diagnose reports is a value to begin with.

    Source: https://arxiv.org/abs/2509.20758; formula and min_weight from a third party's code, the rule for tau second-hand.
    """
    _require("talr", "tau", tau, 0, above=True)
    _require("talr", "min_weight", min_weight, 0, 1)
    return _weighted(logp, (widen(logp) / tau).exp().clamp(min=min_weight))


def trsft(logp: Tensor, a: float = 0.1) -> Tensor:
    """f(p) = -log p where p >= a, else 1 - p/a - log a, weight on the NLL gradient min(1, p/a).

    Trust-region SFT. NLL for all but the improbable tokens, which learn in proportion to p.

    Source: https://arxiv.org/abs/2512.17636, second-hand: the paper's code doesn't have it.
    """
    _require("trsft", "a", a, 0, 1, above=True)
    excess = widen(logp) - math.log(a)
    below = excess.clamp(max=0)
    value = -torch.expm1(below) - excess.clamp(min=0) - math.log(a)
    return Pointwise.apply(logp, value.to(logp.dtype), -below.exp().to(logp.dtype))


def profit(logp: Tensor, tau: float) -> Tensor:
    """f(p) = -1[p > tau] log p, weight on the NLL gradient 1[p > tau].

    ProFit's `higher` rule. The sum is divided by all target tokens, also those that weigh nothing, as in the authors' code:
    so it is `nll` with `threshold: tau`, but for p = tau, and the metric `kept_fraction` stays 1.

    Source: https://arxiv.org/abs/2601.09195 and its code.
    """
    _require("profit", "tau", tau, 0, 1, below=True)
    return _weighted(logp, (widen(logp).exp() > tau).to(logp.dtype))


def infosft(logp: Tensor, P: float = 0.93) -> Tensor:
    """f(p) = -sg(w) log p, weight on the NLL gradient w = p max(0, 1 - logit(p) / logit(P)).

    InfoSFT. The weight peaks at p = 0.57 and is zero from P on, so neither the hopeless nor the known is trained.

    Source: https://arxiv.org/abs/2605.14967 and its code.
    """
    _require("infosft", "P", P, 0.5, 1, above=True, below=True)
    wide = widen(logp)
    logit = (wide - torch.log(-torch.expm1(wide))).clamp(min=-1e3)  # at p = 0 too the weight is 0
    return _weighted(logp, wide.exp() * (1 - logit / math.log(P / (1 - P))).clamp(min=0))


def chord_phi(logp: Tensor) -> Tensor:
    """f(p) = -sg(p (1 - p)) log p, weight on the NLL gradient p (1 - p).

    CHORD's token weight phi, without the RL that CHORD mixes it with. Trains what the model is undecided about.

    Source: https://arxiv.org/abs/2508.11408, as in ms-swift and Trinity-RFT.
    """
    wide = widen(logp)
    return _weighted(logp, -wide.exp() * torch.expm1(wide))


def focal(logp: Tensor, gamma: float = 2.0, stop_gradient: bool = True) -> Tensor:
    """f(p) = -(1 - sg(p))^gamma log p, weight on the NLL gradient (1 - p)^gamma.

    Focal loss: trains what the model doesn't know, more prior-averse than NLL. gamma = 0 is `nll`. Lin et al. differentiate
    through the factor as well, by which the weight is (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p: `stop_gradient:
    false`. Codes for language models, such as MiLe's, treat it as a weight.

    Source: https://arxiv.org/abs/1708.02002; with the factor as a weight, the code of https://arxiv.org/abs/2310.19531.
    """
    _require("focal", "gamma", gamma, 0)
    if not isinstance(stop_gradient, bool):
        raise RecipeError(f"`stop_gradient` of objective 'focal' must be true or false, got {stop_gradient!r}.")
    wide = widen(logp)
    q = -torch.expm1(wide)
    weight = q**gamma
    if stop_gradient:
        return _weighted(logp, weight)
    ratio = torch.where(q > 0, -wide.clamp(min=-1e4) / q, 1.0)  # -log p / (1 - p), 1 at p = 1; finite at p = 0
    slope = -weight * (1 + gamma * wide.exp() * ratio)
    return Pointwise.apply(logp, (-weight * wide).to(logp.dtype), slope.to(logp.dtype))


def eaft(logp: Tensor, entropy: Tensor, alpha: float = 1.0) -> Tensor:
    """f(p) = -sg(min(1, H / ln 20)^alpha) log p, weight on the NLL gradient min(1, H / ln 20)^alpha.

    Entropy-adaptive fine-tuning: where the model is sure (of the target, or of something else) nothing is trained. alpha =
    0 is `nll`. In the paper H is the entropy of the 20 most probable tokens, renormalised, which is at most ln 20; here it
    is that of the whole distribution, which the head gives anyway, cut off at ln 20. They differ by at
    most h(m) + (1 - m) max(ln 20, ln(vocabulary - 20)). m is the mass of those 20, h(m) the entropy of a coin of that bias.
    Its code, and LLaMA-Factory, divide by 3.0 in place of ln 20 = 2.996. axolotl divides by nothing, which is three times the
    gradient. We follow the paper.

    Source: https://arxiv.org/abs/2601.02151 and its code.
    """
    _require("eaft", "alpha", alpha, 0)
    return _weighted(logp, (widen(entropy.detach()) / math.log(20)).clamp(0, 1) ** alpha)


def mile(logp: Tensor, entropy: Tensor, gamma: float = 1.0) -> Tensor:
    """f(p) = -sg((1 + H)^gamma) log p, weight on the NLL gradient (1 + H)^gamma.

    MiLe: trains more where the model is undecided. gamma = 0 is `nll`. H is the entropy in nats. The authors divide the
    weights by their mean over the batch; that is left out, since a token's weight would depend on other tokens: the
    gradient is larger by that factor, for which Adam makes up, gradient clipping doesn't.

    Source: https://arxiv.org/abs/2310.19531 and its code; gamma from a third party's.
    """
    _require("mile", "gamma", gamma, 0)
    return _weighted(logp, (1 + widen(entropy.detach()).clamp(min=0)) ** gamma)


def deft(logp: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
    """f(p) = (1 - p^a) / a with a = sg(sum_v p_v^2), weight on the NLL gradient p^a.

    DEFT: `power` with an alpha for each token, near `neg_p` where the model is sure and near `nll` where it is not.

    Source: https://arxiv.org/abs/2602.11424 and its code.
    """
    return power_per_token(logp, widen(log_sum_sq_probs.detach()).clamp(max=0).exp())


def deft_cayley(logp: Tensor, mean_p: float) -> Tensor:
    """f(p) = (1 - p^a) / a with a = sg(c + (1 - c) p / (2 - p)), c = mean_p / 2, weight on the NLL gradient p^a.

    DEFT's form that needs p alone; a is kept within 0.001 and 1. In the authors' code mean_p is the mean of p over the
    batch, by which a token's weight depends on other tokens; here it is fixed. The mean p that diagnose reports is a value
    to begin with.

    Source: https://arxiv.org/abs/2602.11424 and its code.
    """
    _require("deft_cayley", "mean_p", mean_p, 0, 1)
    p, offset = widen(logp.detach()).exp(), mean_p / 2
    return power_per_token(logp, (offset + (1 - offset) * p / (2 - p)).clamp(0.001, 1))


def asft(logp: Tensor, ref_logp: Tensor, kl_weight: float = 0.1) -> Tensor:
    """f(p) = -sg(p) log p + kl_weight (e^r - r - 1), r = log(p_ref / p), weight on the NLL gradient p + kl_weight (e^r - 1).

    Anchored SFT: `dft`, held near the reference model. Negative weights pull tokens back that have become more probable
    than under the reference. Beyond r = 10 the anchor continues linearly in log p. The paper's code and LLaMA-Factory add
    KL(ref || model) over the whole vocabulary, its recipe for verl KL(model || ref); SkyRL and NeMo-RL the expression
    above, at the target alone. We follow these, since it needs one number per token of the reference, which a column of the
    data set can hold. Target tokens are not drawn from the model, so it is a penalty and not an estimate of the KL. SkyRL's
    has no gradient where r is beyond 10 or -10.

    Source: https://arxiv.org/abs/2509.23753; the anchor from SkyRL's code, kl_weight from LLaMA-Factory's.
    """
    _require("asft", "kl_weight", kl_weight, 0)
    wide = widen(logp)
    p, ratio = wide.exp(), widen(ref_logp) - wide
    near = ratio.clamp(max=ANCHOR_REACH)
    pull = torch.expm1(near)
    anchor = pull - near + pull * (ratio - near)
    value = -p * wide.clamp(min=-1e4) + kl_weight * anchor  # at p = 0 the first is 0
    return Pointwise.apply(logp, value.to(logp.dtype), -(p + kl_weight * pull).to(logp.dtype))


def psft(logp: Tensor, ref_logp: Tensor, clip_high: float = 0.28) -> Tensor:
    """f(p) = -min(r, 1 + clip_high), r = p / p_ref, weight on the NLL gradient r 1[r <= 1 + clip_high].

    Proximal SFT: PPO's -min(r A, clip(r, 0.8, 1.28) A) with the advantage A = 1, for which the lower clip never acts. A
    token stops training once it is 1 + clip_high times as probable as under the reference. In the paper the reference is
    the policy at the start of each outer batch; here it is one model throughout, so that training ends near it.

    Source: https://arxiv.org/abs/2508.17784 and its code.
    """
    _require("psft", "clip_high", clip_high, 0)
    most = math.log1p(clip_high)
    excess = widen(logp) - widen(ref_logp)
    ratio = excess.clamp(max=most).exp()
    slope = torch.where(excess <= most, -ratio, 0.0)
    return Pointwise.apply(logp, -ratio.to(logp.dtype), slope.to(logp.dtype))


PUBLISHED = {
    function.__name__: function
    for function in (dft, talr, trsft, profit, infosft, chord_phi, focal, eaft, mile, deft, deft_cayley, asft, psft)
}


def _weighted(logp: Tensor, weight: Tensor) -> Tensor:
    """Return -sg(weight) log p; a token that weighs nothing costs nothing, also at p = 0."""
    weight = weight.detach()
    value = torch.where(weight > 0, -weight * logp.detach(), 0.0)
    return Pointwise.apply(logp, value.to(logp.dtype), -weight.to(logp.dtype))


def _require(
    objective: str, name: str, value: Any, low: float, high: float = math.inf, above: bool = False, below: bool = False
) -> None:
    """Raise RecipeError unless `value` is a number from `low` to `high`, these excluded if `above` and `below`."""
    require_number(objective, name, value)
    if value < low or value > high or (above and value == low) or (below and value == high):
        lower = f"{'above' if above else 'at least'} {low:g}"
        upper = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
        raise RecipeError(f"`{name}` of objective {objective!r} must be {lower}{upper}, got {value}.")
