"""The one error that a bad file gives."""


class CheckpointError(ValueError):
    """A file that is not a sound checkpoint; the message names the file and what is wrong."""
