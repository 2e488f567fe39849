"""Completions of an eval, kept as they come, so that one that was interrupted goes on.

FILE.progress lies beside FILE until FILE is whole: one line with all that the completions depend
on, then a line a problem, in the order in which they ended.
"""

import hashlib
import json
from pathlib import Path

from torch import float64, nn

from harness.errors import UserError
from harness.locks import lock


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: of the name, type and sum of each."""
    sums = [
        (name, str(p.dtype), p.detach().sum(dtype=float64).item())
        for name, p in model.named_parameters()
    ]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


class Kept:
    """FILE.progress, held by one process: rows[i] is what was kept of problem i.

    settings: what the completions depend on, as JSON; a file of other settings is begun anew. A
    path of None keeps nothing on disk. Raises UserError where another process writes the file.
    """

    def __init__(self, path: Path | None, settings: dict):
        self.rows: dict[int, dict] = {}
        self.file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.with_name(path.name + ".progress")
        self.file = open(self.path, "a+", encoding="ascii", newline="\n")
        try:
            lock(self.file)
        except OSError as error:
            self.file.close()
            raise UserError(f"{self.path}: another process is writing it") from error
        self._read(json.loads(json.dumps(settings)))

    def _read(self, settings: dict) -> None:
        self.file.seek(0)
        text = self.file.read()
        text = text[: text.rfind("\n") + 1]  # a line that a crash cut off is dropped
        try:
            first, *rows = [json.loads(line) for line in text.splitlines()]
            if first == settings:
                self.rows = {row.pop("i"): row for row in rows}
        except (ValueError, KeyError, AttributeError):
            self.rows = {}
        self.file.truncate(len(text) if self.rows else 0)
        if not self.rows:
            self._append(settings)

    def _append(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def add(self, i: int, completions: list[str], finish_reason: list[str]) -> None:
        """Keep what came of problem i."""
        row = {"completions": completions, "finish_reason": finish_reason}
        self.rows[i] = row
        if self.file:
            self._append({"i": i, **row})

    def drop(self) -> None:
        """All of it stands in FILE now."""
        if self.file:
            self.path.unlink()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error) -> None:
        if self.file:
            self.file.close()
