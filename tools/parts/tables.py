"""Tables in markdown, as the commands print and save them."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from harness.errors import UserError

FEW_SEEDS = "fewer than 3 seeds: no conclusion"


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> str:
    """A table whose columns are right-aligned, except those numbered in `left`."""
    alignment = ["---" if i in left else "--:" for i in range(len(head))]
    lines = []
    for cells in (head, alignment, *rows):
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(escaped) + " |")
    return "\n".join(lines)


def few_seeds_warning(counts: Sequence[int]) -> str:
    """The lines above a table in which an arm has fewer than 3 seeds, else "".

    counts: the number of seeds of each arm.
    """
    if min(counts) >= 3:
        return ""
    return f"**{FEW_SEEDS.capitalize()}.**\n\n"


def percent(mean: np.ndarray, error: np.ndarray, i: int) -> str:
    """Entry i of a curve in percent, with its standard error if it has one."""
    if not len(mean):
        return "-"
    text = f"{100 * mean[i]:.1f}"
    if np.isnan(error[i]):
        return text
    return f"{text} ± {100 * error[i]:.1f}"


def save_text(text: str, path: Path) -> None:
    """Write a table and a final newline. Raises UserError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    except OSError as error:
        raise UserError(f"--out: {path}: cannot be written: {error}") from error
