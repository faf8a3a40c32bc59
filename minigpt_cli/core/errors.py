"""Errors that a user can cause or meet, each with its exit code.

Each message is one line: what is wrong, where, and how to mend it. The command line prints that
line and exits with ``exit_code``. Every other exception is a bug.
"""

import signal
from dataclasses import dataclass

from minigpt_cli.core.memory import describe_out_of_memory, is_out_of_memory

EXIT_STOPPED = 75  # a signal stopped the run with everything saved: EX_TEMPFAIL, "run me again"
EXIT_INTERRUPTED = 130  # the same after Ctrl-C
STOP_CODES = (EXIT_STOPPED, EXIT_INTERRUPTED)
_LONGEST = 300  # characters of another program's message
EXPLAINED_CODES = (1, 2, 3, 4, *STOP_CODES)  # a process that exits with these printed its own line


def signal_exit_code(signum: int) -> int:
    """Return the exit code of a command that this signal stopped."""
    return EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_STOPPED


class UserError(Exception):
    """The user's input is wrong."""

    exit_code = 2


class Diverged(UserError):
    """The loss, a gradient or a logit is not finite, or rollbacks did not end loss spikes."""

    exit_code = 3


class Damaged(UserError):
    """A dataset or a checkpoint on disk differs from what was written."""

    exit_code = 4


class RankLost(UserError):
    """Another rank of the run does not answer any more."""

    exit_code = 1


class Stopped(BaseException):
    """A signal stopped the work at a point from which it can go on.

    Like KeyboardInterrupt it is no Exception: code that catches Exception to try something else
    must not swallow it.

    Attributes:
        signum: the signal.
        exit_code: see ``signal_exit_code``.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
        self.exit_code = signal_exit_code(signum)


@dataclass(frozen=True)
class Outcome:
    """How a failed command ends.

    Attributes:
        code: the exit code.
        message: one line for the user.
        is_shown_here: whether this process prints the message; else another rank does.
    """

    code: int
    message: str
    is_shown_here: bool = True


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error. A full disk or GPU memory is for the user to mend: 2."""
    if isinstance(error, UserError | Stopped):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) or is_out_of_memory(error):
        return UserError.exit_code
    return 1


def describe(error: BaseException) -> str:
    """Return the line that tells a user about an error."""
    if isinstance(error, UserError | Stopped):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'reading or writing'}: {error.strerror or error}"
    if exit_code_of(error) == UserError.exit_code:
        return describe_out_of_memory(error)
    return f"internal error: {type(error).__name__}: {error} (--debug shows where)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the error's type if it has no message.

    A long line, as of a library that quotes a file, is cut.
    """
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
