"""When a run collapsed, by a rule on its logged accuracy."""

import math
from collections.abc import Sequence

WINDOW = 5  # steps in a mean
KEPT = 0.5  # a run has collapsed when less than this share of its best mean is left
LEAST = 0.1  # a best mean below this says nothing, since a few responses decide it


def collapse_step(rows: Sequence[dict]) -> int | None:
    """The step at which a run collapsed, or None if it did not.

    rows: a run's metrics.jsonl, with step and accuracy (of the step's own responses). The rule:
    take the mean accuracy of each WINDOW consecutive steps. The run has collapsed at the first step
    from which on every mean, to the end of the run, is below KEPT of the best mean before it. A run
    that recovers has not collapsed. The result is the last step of the first such window.
    """
    points = [(row["step"], row["accuracy"]) for row in rows if _known(row)]
    means = [
        (points[end - 1][0], sum(value for _, value in points[end - WINDOW : end]) / WINDOW)
        for end in range(WINDOW, len(points) + 1)
    ]
    found, best = None, 0.0
    for step, mean in means:
        if best < LEAST or mean >= KEPT * best:
            found = None
        elif found is None:
            found = step
        best = max(best, mean)
    return found


def _known(row: dict) -> bool:
    value = row.get("accuracy")
    return isinstance(value, int | float) and math.isfinite(value)
