"""Where a model and a data set stand on the model-capability continuum."""

from .options import DiagnoseArguments
from .report import Report
from .run import Diagnosis

__all__ = ["DiagnoseArguments", "Diagnosis", "Report"]
