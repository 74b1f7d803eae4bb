"""What a figure raises when the run did not save what it shows."""


class MissingResult(Exception):
    """The saved results do not hold what a figure needs; the message says what is missing, for the reader."""
