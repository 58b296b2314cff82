"""The package's errors: each message is for the user."""


class RecipeError(ValueError):
    """A mistake in a recipe or in what it points to; the message is one sentence for the user."""


class CheckpointError(ValueError):
    """A checkpoint that can't be written or gone on with; the message is one sentence for the user."""


class LossError(ValueError):
    """The loss is NaN or infinite; the message says where."""


class MeasurementError(ValueError):
    """Data or weights that can't be measured; the message is one sentence for the user."""
