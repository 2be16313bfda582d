"""The one exception type a user of the library has to know."""


class SPDError(Exception):
    """A mistake in the input or the set-up.

    The message is one sentence or two: what is wrong, with the value, and what to do instead. The command line
    prints it and exits with code 2; the library raises it before anything is written or changed.
    """


class DamagedFile(SPDError):
    """An artefact that is there and cannot be read; where everything needed is there, it can be made again."""


UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What reading damaged or hostile JSON raises: fields that are missing or something else, numbers out of range, lists
nested thousands deep."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, in one line of so many characters at most; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shortened(text: str, most: int = 60) -> str:
    """A text, cut with three dots behind it where it is longer."""
    return text if len(text) <= most else text[: most - 3] + "..."


class TooLong(SPDError):
    """A text is so much longer than the model's context that it was not even tokenised to its end."""
