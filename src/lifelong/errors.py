"""Errors that need a name of their own; everything else is a ValueError or a TypeError.

Each message says what was expected, what came, and the call that mends it.
"""


class StaleAnchorError(ValueError):
    """The model's parameters no longer match those that the prior was made for."""


class NonFiniteError(ValueError):
    """A loss, an output or a gradient is NaN or infinite."""


class NotConvergedError(ValueError):
    """A minimisation ended no lower than it began."""


class NotRepeatableError(ValueError):
    """Two passes over the data, or two forwards of the model, disagree."""


class CheckpointError(ValueError):
    """A file is truncated, foreign, or of a version that cannot be read."""
