"""What a model makes of target tokens, measured without gradient."""

from .forward import count_targets, measure, score_batch, without_targets
from .histogram import PERCENTILE_ERROR, ProbabilityHistogram
from .means import Means
from .percentiles import resolve_percentile
from .results import Calibration, Comparison, Measurement

__all__ = [
    "PERCENTILE_ERROR",
    "Calibration",
    "Comparison",
    "Means",
    "Measurement",
    "ProbabilityHistogram",
    "count_targets",
    "measure",
    "resolve_percentile",
    "score_batch",
    "without_targets",
]
