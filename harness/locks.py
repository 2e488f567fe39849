"""Locks on files, so that one process alone writes to a run folder or a progress file."""

import fcntl
from typing import IO


def lock(file: IO) -> None:
    """Lock an open file until it is closed or the process ends.

    Raises OSError at once if another process holds the lock.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
