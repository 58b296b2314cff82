"""Objectives f(p), their composition, thresholds and prices."""

from .composition import Schedule, spell
from .contract import STATISTICS
from .functions import anneal, log_one_minus_p, neg_p, nll, power
from .objective import OBJECTIVES, Objective
from .pricing import Price, masked_cost, price
from .temperature import Temperature, effective_temperature
from .threshold import Threshold, trains

__all__ = [
    "OBJECTIVES",
    "STATISTICS",
    "Objective",
    "Price",
    "Schedule",
    "Temperature",
    "Threshold",
    "anneal",
    "effective_temperature",
    "log_one_minus_p",
    "masked_cost",
    "neg_p",
    "nll",
    "power",
    "price",
    "spell",
    "trains",
]
