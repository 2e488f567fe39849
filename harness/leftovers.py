"""Delete what a killed process left in cache/.

The tiny world and converted GGUF files are built in cache/NAME.RANDOM, which is renamed once it is
whole. A killed build leaves that folder behind.
"""

import re
import shutil
import time
from pathlib import Path

A_DAY = 24 * 3600.0  # seconds; no build takes as long


def remove_leftovers(cache: Path) -> None:
    """Delete the unfinished builds in cache whose last change is more than a day ago."""
    for folder in cache.glob("*.*") if cache.is_dir() else ():
        unfinished = re.fullmatch(r"(tiny|tiny_bad|gguf)-[0-9a-f]+\.\w{8}", folder.name)
        if unfinished and not folder.is_symlink() and time.time() - _changed(folder) > A_DAY:
            shutil.rmtree(folder, ignore_errors=True)


def _changed(folder: Path) -> float:
    """When the folder or a file in it was last changed, in seconds since the epoch."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # it is being renamed or deleted
        return time.time()
