"""Errors that a user can cause and correct, and how a command ends."""

import errno
import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """An error that the user can correct. The message is one line: where, what, and what to do."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in an orderly way. The exit status is 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(sys.argv[1:]). An error that is not a fault of the code ends with one line.

    The exit status is 2 for a UserError or a full disk, 130 for Ctrl-C, 141 for a closed pipe, and
    143 for TERM and 129 for HUP if they are caught.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a full disk or a closed pipe may fail only here
        return
    except UserError as error:
        line, status = f"error: {error}", 2
    except KeyboardInterrupt as error:
        line, status = "interrupted", 128 + getattr(error, "number", signal.SIGINT)
    except OSError as error:
        if error.errno == errno.EPIPE:
            line, status = "", 141
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" (writing {error.filename})" if error.filename else ""
            line, status = f"error: the disk is full{where}: free some space and start again", 2
        else:
            raise
        # The buffered output cannot be written. Python would complain about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(status)
