"""The suite's own exception for mistakes of its users."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what was given, what is allowed, and how to fix it."""
