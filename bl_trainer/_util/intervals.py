"""Confidence intervals."""

import math

from scipy.special import stdtrit

Bounds = tuple[float, float] | None  # of the values of a metric, if it has any
ROUNDING = 1e-12  # of a mean near 1: a standard error below it is none


def unequal(second: float, third: float, fourth: float, fifth: float) -> tuple[float, float]:
    """Return (c, degrees of freedom) for the mean of clusters of unequal weights.

    The arguments are the sums of the 2nd to 5th powers of the weights w_i, which sum to 1. With e_i the deviation of a
    cluster's mean from the mean, c sum (w_i e_i)^2 is the variance of the mean, without bias if all clusters vary alike.
    The degrees of freedom are Satterthwaite's. m equal weights give m/(m - 1) and m - 1.

    Source: Bell and McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples", 2002.
    """
    trace = second - 2 * third + second**2
    square = fourth - 4 * fifth + 4 * second * fourth + 2 * third**2 - 4 * second**2 * third + second**4
    return second / trace, max(1.0, trace**2 / square)


def t_quantile(free: float) -> float:
    """Return the 97.5 % quantile of Student's t with `free` degrees of freedom."""
    return float(stdtrit(free, 0.975))


def within(interval: tuple[float, float], bounds: Bounds) -> tuple[float, float]:
    """Return what of an interval lies within the bounds of its metric, if it has any."""
    low, high = bounds or (-math.inf, math.inf)
    return max(low, interval[0]), min(high, interval[1])


def is_alike(mean: float, error: float) -> bool:
    """Whether a sample with this standard error of its mean has no variation but rounding."""
    return error <= ROUNDING * max(1.0, abs(mean))


def mean_interval(mean: float, error: float, free: float, size: float, bounds: Bounds) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean with standard error `error`, within `bounds`.

    `free`: its degrees of freedom. `size`: how many independent values the mean is of. It is Student's; that of a sample
    without variation is `alike_interval`.
    """
    if is_alike(mean, error):
        return alike_interval(mean, size, bounds)
    reach = t_quantile(free) * error
    return within((mean - reach, mean + reach), bounds)


def alike_interval(mean: float, size: float, bounds: Bounds) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean that `size` equal values leave; None without bounds, where nothing is known.

    With probability 0.95 at most a share 1 - 0.05^(1/size) of the source is other, which can be as far off as the bounds.
    """
    low, high = bounds or (-math.inf, math.inf)
    if math.isinf(low) or math.isinf(high):
        return None
    share = -math.expm1(math.log(0.05) / size)
    return mean - share * (mean - low), mean + share * (high - mean)


def sign_test(mean: float, size: int) -> float:
    """Return the two-sided p-value of no difference that `size` equal differences leave."""
    return 1.0 if abs(mean) <= ROUNDING else 2.0 ** (1 - size)
