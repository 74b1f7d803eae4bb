"""Errors a user can act on: one line that says what is wrong and what to do."""


class LegatoError(Exception):
    """A failure that the user can act on; the command line prints it without a traceback and exits with 1."""

    def __str__(self) -> str:
        """One line, whatever stood in the file that it quotes: control characters, which a terminal obeys, escaped."""
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class UsageError(LegatoError):
    """Bad flags, bad configuration or missing input; the command line exits with 2."""


def one_line(error: Exception) -> str:
    """What a library's error says, short enough for one line of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
