"""The package's errors: each message tells the user what failed, why, and what to do."""


class BLError(ValueError):
    """Base of the errors that a user can put right."""


class RecipeError(BLError):
    """A mistake in a recipe, on the command line, or in what they point to."""


class CheckpointError(BLError):
    """A checkpoint that cannot be written or resumed from."""


class MeasurementError(BLError):
    """Data or weights that cannot be measured."""


class LossError(BLError):
    """A loss that cannot be computed, or is NaN or infinite, or whose gradient is; then the message names the step."""


class DependencyError(BLError, ImportError):
    """A package that is missing, or of a version that does not work."""
