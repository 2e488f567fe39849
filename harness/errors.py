"""Mistakes a user can make and mend, and how a command ends."""

import errno
import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can cause and mend. The message is one line: where, what, what to do."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; the exit status is 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(sys.argv[1:]); end with one line, no traceback, where the code is not at fault.

    Exit status: 2 for a UserError or a full disk, 130 for Ctrl-C, 143 for TERM and 129 for HUP
    where they are caught, 141 for a closed pipe.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a full disk or a closed pipe may show only now
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
        # what is still buffered cannot be written: unmuted, Python complains again on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(status)
