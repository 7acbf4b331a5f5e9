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


class ClippedWarning(UserWarning):
    """A curvature was clipped to its positive part, so that less was taken out than was asked.

    fraction: of the curvature to be removed, what stays.
    """

    def __init__(self, message: str, fraction: float = 0.0) -> None:
        super().__init__(message)
        self.fraction = fraction


class NotHeldWarning(UserWarning):
    """Examples were to be forgotten of which no part of the prior held anything.

    count: how many.
    """

    def __init__(self, message: str, count: int = 0) -> None:
        super().__init__(message)
        self.count = count


class StoreError(ValueError):
    """Something about a memory on disk; the subclasses say what."""


class StoreBusyError(StoreError):
    """Another process holds the store; nothing was changed, or what remains to do is said."""


class StoreDamagedError(StoreError):
    """Bytes on disk are not those that were written, or not a store's."""


class StoreFullError(StoreError):
    """There was no room to write; nothing was changed."""


class StoreReadOnlyError(StoreError):
    """The store was opened for reading, or its folder cannot be written."""


class StoreVersionError(StoreError):
    """A newer lifelong wrote the store, or a version that was asked for is not kept."""


class ForgottenError(StoreError):
    """Items that were forgotten were about to be written again."""
