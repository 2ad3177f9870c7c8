"""The one exception that means "the user can fix this", and the one that means "the machine failed, start it again"."""


class UserError(ValueError):
    """A mistake in the user's input, files or machine: shown as one paragraph, exit code 2, no traceback.

    The message says what was found, why it is refused and what to do. Every other exception is a bug of ours and
    keeps its traceback.
    """


class InterruptedRunError(RuntimeError):
    """The system refused something in the middle of a run that had begun well: no mistake of the user, whatever the system calls it.

    It keeps its traceback and exit code 1, after which a scheduler starts the run again, perhaps on a better node.
    """
