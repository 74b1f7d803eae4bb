"""The error of a figure whose data the run did not save."""


class MissingResult(Exception):
    """The saved results do not hold what a figure needs; the message says what is missing, for the reader."""
