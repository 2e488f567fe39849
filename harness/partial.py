"""Store the results of an eval, or labels, as they come, so that an interrupted one can continue.

They are stored in FILE.progress until FILE is written as a whole. Its first line holds all settings
that the results depend on. Each further line holds a result.
"""

import json
from pathlib import Path

from harness.errors import UserError
from harness.files import no_follow
from harness.locks import lock
from harness.strict_json import parse_json


class ProgressFile:
    """FILE.progress, a file of JSON lines, locked by one process.

    It is never replaced, only appended to, because the lock belongs to the open file. Raises
    UserError if the file cannot be written or another process holds it.
    """

    def __init__(self, file: Path):
        self.path = file.with_name(file.name + ".progress")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="ascii", newline="\n", opener=no_follow)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            lock(self._file)
        except OSError as error:
            self.close()
            raise UserError(f"{self.path}: another process is writing it") from error

    def read(self) -> list:
        """All lines. A last line that a crash cut off is deleted. ValueError if one is not JSON."""
        self._file.seek(0)
        text = self._file.read()
        text = text[: text.rfind("\n") + 1]
        lines = [parse_json(line) for line in text.splitlines()]
        self._file.truncate(len(text))
        return lines

    def append(self, lines: list[dict]) -> None:
        """Write lines at the end of the file."""
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def clear(self) -> None:
        """Delete all lines."""
        self._file.truncate(0)

    def close(self) -> None:
        """Close the file, which also releases the lock."""
        self._file.close()


class Kept:
    """The completions of an eval: rows[i] holds those of problem i.

    settings are what the completions depend on, as JSON. If the file has other settings, it is
    started anew. With path=None nothing is stored on disk. Raises UserError if another process
    writes the file.
    """

    def __init__(self, path: Path | None, settings: dict):
        self.rows: dict[int, dict] = {}
        self.file = ProgressFile(path) if path else None
        if not self.file:
            return
        rows = []
        try:
            first, *rows = self.file.read() or [None]
            if first == json.loads(json.dumps(settings)):
                self.rows = {row.pop("i"): row for row in rows}
        except (ValueError, KeyError, AttributeError):  # damaged
            self.rows = {}
        if not self.rows:
            if rows:
                print(f"{self.file.path}: {len(rows)} results of other settings are dropped")
            self.file.clear()
            self.file.append([settings])

    def add(self, i: int, row: dict) -> None:
        """Store what came of problem i."""
        self.rows[i] = row
        if self.file:
            self.file.append([{"i": i, **row}])

    def drop(self) -> None:
        """Delete FILE.progress once FILE holds everything."""
        if self.file:
            self.file.path.unlink()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error) -> None:
        if self.file:
            self.file.close()
