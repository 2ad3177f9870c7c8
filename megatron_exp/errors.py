"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in the user's input, files or machine: shown as one paragraph, exit code 2, no traceback.

    The message says what was found, why it is refused and what to do. Every other exception is a bug of ours and
    keeps its traceback.
    """
