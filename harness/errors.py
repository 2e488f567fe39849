"""Errors that a user can cause and correct, and how a command ends."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable

DEBUG = "--debug"
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT)  # a closed pipe, a full disk


class UserError(ValueError):
    """An error that the user can correct. The message is one line: where, what, and what to do.

    Names and values in it may come from anywhere, so that line breaks become spaces, and characters
    that could control the terminal are replaced.
    """

    def __str__(self) -> str:
        return " ".join(printable(super().__str__()).split("\n"))


class OnlyStateSaved(UserError):
    """A checkpoint's state was saved, but its adapter/ or model/ was not. Resuming repairs that."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in an orderly way. The exit status is 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def printable(text: str) -> str:
    """Replace characters that could control the terminal. Newlines stay, tabs become spaces."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text.expandtabs(4))


def _ending(error: BaseException) -> tuple[str, int | None]:
    """The last line and the exit status after an error. The status of a fault of the code is None.

    An OSError that names a file is the user's to correct, as its permissions or its length are.
    """
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + getattr(error, "number", signal.SIGINT)
    if error.errno == errno.EPIPE:
        return "", 141
    if error.errno in UNWRITABLE:
        where = f" (writing {error.filename})" if error.filename else ""
        return f"error: the disk is full{where}: free some space and start again", 2
    if error.filename is None:
        return "", None
    name = str(error.filename)
    name = name if len(name) <= 100 else f"{name[:97]}..."
    return f"error: {UserError(name)}: {error.strerror} ({DEBUG} shows where)", 2


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(sys.argv[1:]). An error that is not a fault of the code ends with one line.

    With --debug its traceback is shown as well. The exit status is 2 for a UserError, or a file
    that cannot be read or written (such as on a full disk), 130 for Ctrl-C, 141 for a closed pipe,
    and 143 for TERM and 129 for HUP if they are caught.
    """
    argv = [arg for arg in sys.argv[1:] if arg != DEBUG]
    debug = len(argv) < len(sys.argv) - 1
    try:
        main(argv)
        sys.stdout.flush()  # a full disk or a closed pipe may fail only here
        return
    except (UserError, KeyboardInterrupt, OSError) as error:
        line, status = _ending(error)
        if debug:
            traceback.print_exc()
        elif status is None:
            raise
        if getattr(error, "errno", None) in UNWRITABLE:
            # The buffered output cannot be written. Python would complain about it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(status)
