"""The one exception type of this library; everything else raises Python's own."""


class CheckpointError(ValueError):
    """A checkpoint or config file is missing, malformed, inconsistent or of a kind this library refuses.

    The message names the file, the tensor or config key, what was expected and what was found. Nothing is
    partially loaded when it is raised.
    """
