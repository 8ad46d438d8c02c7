"""The one error of this room that a caller is meant to catch."""


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none that fits could be read."""
