"""The errors a user can cause or meet, each with the exit code that scripts rely on.

The message of every error here is one line for a person: what is wrong, where, and how to mend it.
The command line prints that line and exits with ``exit_code``; anything else raised is a bug.
"""

import contextlib
import signal
import sys
from dataclasses import dataclass

EXIT_STOPPED = 75  # a signal stopped the run with everything saved: EX_TEMPFAIL, "run me again"
EXIT_INTERRUPTED = 130  # the same after Ctrl-C
STOP_CODES = (EXIT_STOPPED, EXIT_INTERRUPTED)
EXPLAINED_CODES = (1, 2, 3, 4, *STOP_CODES)  # a process that exits with these printed its own line


def signal_exit_code(signum: int) -> int:
    """Return the exit code of a command that this signal stopped."""
    return EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_STOPPED


class UserError(Exception):
    """The user's input is wrong."""

    exit_code = 2


class Diverged(UserError):
    """Training produced what is not finite, or spikes that no rollback helps against."""

    exit_code = 3


class Damaged(UserError):
    """A dataset or a checkpoint on disk is not what was written."""

    exit_code = 4


class RankLost(UserError):
    """Another process of the run doesn't answer any more."""

    exit_code = 1


def exit_code_of(error: BaseException) -> int:
    """What the command ends with: a full disk or too little GPU memory are the user's to mend."""
    if isinstance(error, UserError | Stopped):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError":
        return UserError.exit_code
    return 1


def describe(error: BaseException) -> str:
    """The one line in which a person is told of this error."""
    if isinstance(error, UserError | Stopped):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'reading or writing'}: {error.strerror or error}"
    if exit_code_of(error) == UserError.exit_code:
        return (
            "out of GPU memory: try a smaller train.micro_batch_size (the result stays the same) "
            "or --set train.activation_checkpointing=true"
        )
    return f"internal error: {type(error).__name__}: {error} (--debug shows where)"


def first_line(error: BaseException) -> str:
    """What an error of some library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def tell(message: str) -> None:
    """Print one line on standard error, in one piece: several processes may write there."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"minigpt: {message}\n")
        sys.stderr.flush()


@dataclass(frozen=True)
class Outcome:
    """How a command ends that an error has ended."""

    code: int
    message: str  # one line
    is_shown_here: bool = True  # and not by another process of the same run


class Stopped(BaseException):
    """A signal ended the work at a point from which it can go on.

    No Exception, as KeyboardInterrupt is none: what catches those to try something else would take
    the signal for a problem.

    The exit code is that of ``signal_exit_code``.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
        self.exit_code = signal_exit_code(signum)

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str, int]]:
        return Stopped, (str(self), self.signum)  # torch's engine sends errors from rank to rank
