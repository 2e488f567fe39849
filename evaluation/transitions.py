"""Where an accuracy gain comes from: responses grouped by their habit before and after.

Source of the score: Shao et al., "Spurious Rewards" (arXiv 2506.10947).
"""

from dataclasses import dataclass, field

import numpy as np

from evaluation.scores import uses_code

HABITS = ("code", "language")
CLASSES = tuple(f"{before} to {after}" for before in HABITS for after in HABITS)


@dataclass
class Transitions:
    """Counts of responses, paired before and after, by class."""

    n: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))  # of the class
    gained: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))  # now right
    lost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))  # now wrong
    gains: list[int] = field(default_factory=list)  # gained - lost of each unit (problem or run)

    def share(self, name: str) -> float | None:
        """C_d, the class's part of the total gain; None (undefined) if the total is 0.

        C_d = sum over class d of (correct after - correct before) / the same over all classes.
        """
        total = sum(self.gains)
        if not total:
            return None
        return (self.gained[name] - self.lost[name]) / total + 0.0  # + 0.0 makes -0.0 a 0.0

    def add(self, before: dict, after: dict) -> int:
        """Add the responses to one problem, paired by sample. Returns how many more are right."""
        change = np.subtract(after["correct"], before["correct"], dtype=int)  # [samples]
        pairs = zip(before["completions"], after["completions"], strict=True)
        for (old, new), gain in zip(pairs, change, strict=True):
            name = class_of(old, new)
            self.n[name] += 1
            self.gained[name] += int(gain == 1)
            self.lost[name] += int(gain == -1)
        return int(change.sum())


def class_of(before: str, after: str) -> str:
    """The class of a pair of responses, such as "code to language"."""
    return f"{habit(before)} to {habit(after)}"


def habit(text: str) -> str:
    return "code" if uses_code(text) else "language"
