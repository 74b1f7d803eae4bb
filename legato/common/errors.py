"""Errors a user can act on: one line that says what is wrong and what to do."""


class LegatoError(Exception):
    """A failure that the user can act on; the command line prints it without a traceback and exits with 1."""

    def __str__(self) -> str:
        """Return one line, control characters escaped: a quoted file may hold some, and a terminal obeys them."""
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class UsageError(LegatoError):
    """Bad flags, bad configuration or missing input; the command line exits with 2."""


def one_line(error: Exception) -> str:
    """Shorten the message of a library's error to a part of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


class SaidElsewhereError(LegatoError):
    """The writer has failed and printed the error: the others stop without a message."""
