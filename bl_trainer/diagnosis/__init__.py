"""Where a model and a data set stand on the model-capability continuum."""

from .report import Report
from .run import DiagnoseArguments, Diagnosis

__all__ = ["DiagnoseArguments", "Diagnosis", "Report"]
