"""Confidence intervals."""

import math

from scipy.special import stdtrit


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


def within(interval: tuple[float, float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Return what of an interval lies within the bounds of its metric, if it has any."""
    low, high = bounds or (-math.inf, math.inf)
    return max(low, interval[0]), min(high, interval[1])
