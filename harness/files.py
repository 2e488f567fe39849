"""Write files as a whole. A crash, a power cut or a full disk leaves the old file or the new one.

No function here writes through a symbolic link, because a link in a run folder that somebody else
made could point at any file of the user.
"""

import contextlib
import os
import shutil
from pathlib import Path

UMASK = os.umask(0)  # there is no other way to read it
os.umask(UMASK)


def temporary_for(path: Path) -> Path:
    """The name of the temporary file for path. Whatever stands under that name is removed."""
    temporary = path.with_name(path.name + ".tmp")
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)
    return temporary


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a complete temporary file to path, and wait until both are on the disk.

    The file gets the permissions that the umask asks for. safetensors would leave it readable by
    its owner alone.
    """
    os.chmod(temporary, 0o666 & ~UMASK)
    sync(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk. Does nothing if there is none."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file as a whole."""
    temporary = temporary_for(path)
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, path)


def no_follow(path: str, flags: int) -> int:
    """An opener for open(): OSError if the file is a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
