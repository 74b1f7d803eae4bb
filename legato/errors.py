"""Errors a user can act on: one line that says what is wrong and what to do."""


class LegatoError(Exception):
    """A failure that the user can act on; the command line prints it without a traceback and exits with 1."""


class UsageError(LegatoError):
    """Bad flags, bad configuration or missing input; the command line exits with 2."""
