"""The suite's own exception for mistakes of its users, and other people's exceptions in one line."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what was given, what is allowed, and how to fix it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
