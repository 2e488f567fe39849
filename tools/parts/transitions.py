"""Where an accuracy gain comes from: responses grouped by their habit before and after training."""

from collections.abc import Sequence
from pathlib import Path

from evaluation.transitions import CLASSES, Transitions
from harness.errors import UserError
from harness.runfiles import read_jsonl
from tools.parts.arms import Arm
from tools.parts.intervals import t_interval
from tools.parts.published import PARTS_OF_GAIN, PUBLISHED
from tools.parts.tables import few_seeds_warning, markdown_table


def count_transitions(folders: Sequence[Path]) -> Transitions:
    """Compare the first and the last eval of each run, and sum over the runs of an arm.

    The part of class d is C_d = sum over d of (correct after - correct before), divided by the same
    sum over all classes (arXiv 2506.10947). Responses are paired by problem and sample.
    Raises UserError for a folder without two evals of the same problems and samples.
    """
    counts = Transitions()
    by_run = []
    for folder in folders:
        before, after = _first_and_last_eval(folder)
        gains = [counts.add(*pair) for pair in zip(before, after, strict=True)]
        by_run.append(gains)
    if len(by_run) == 1:
        counts.gains = by_run[0]
    else:
        counts.gains = [sum(gains) for gains in by_run]
    return counts


def _first_and_last_eval(folder: Path) -> tuple[list[dict], list[dict]]:
    files = sorted((folder / "eval").glob("step_*.jsonl"))
    if len(files) < 2 or int(files[0].stem.removeprefix("step_")) != 0:
        raise UserError(f"{folder}: has no eval/step_00000.jsonl with a later one beside it")
    before, after = read_jsonl(files[0]), read_jsonl(files[-1])
    if _shape(before) != _shape(after):
        raise UserError(f"{files[-1]}: not the problems and samples of {files[0].name}")
    return before, after


def _shape(rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["problem"], len(row["correct"])) for row in rows]


def transition_table(arms: list[Arm]) -> str:
    """A markdown table of the transitions of each arm, and the published parts of the gain."""
    head = ["arm", "seeds", "habit", "responses", "now right", "now wrong", "part of the gain"]
    rows, warnings = [], []
    for arm in arms:
        counts = count_transitions(arm.folders)
        rows += _arm_rows(arm, counts)
        low, high = t_interval(counts.gains)
        told_from_0 = low > 0 or high < 0  # False if there is no interval (nan)
        if not told_from_0:
            n, total = sum(counts.n.values()), sum(counts.gains)
            warnings.append(
                f"warning: {arm.label}: the total gain, {total:+d} of {n}, cannot be told from 0 "
                "(95 % Student t interval): its parts mean nothing"
            )
    for name, part in PARTS_OF_GAIN.items():
        rows.append([f"*{PUBLISHED}*", "", name, "", "", "", f"{part} %"])
    note = (
        "Now right: wrong at the first eval and right at the last; now wrong: the reverse. "
        "Responses are paired by problem and sample, and summed over seeds. Part of the gain: "
        "now right less now wrong in the class, divided by the same in all classes."
    )
    table = few_seeds_warning([len(arm.runs) for arm in arms]) + markdown_table(head, rows, (0, 2))
    parts = [table, note]
    if warnings:
        parts.append("\n".join(warnings))
    return "\n\n".join(parts)


def _arm_rows(arm: Arm, counts: Transitions) -> list[list[str]]:
    """One row per class, and one for all."""
    rows = []
    for name in CLASSES:
        part = counts.share(name)
        shown = "undefined" if part is None else f"{100 * part:.1f} %"
        numbers = (counts.n[name], counts.gained[name], counts.lost[name])
        rows.append([arm.label, str(len(arm.runs)), name, *map(str, numbers), shown])
    n, gained, lost = (sum(x.values()) for x in (counts.n, counts.gained, counts.lost))
    points = f"{100 * (gained - lost) / n:+.1f} points"
    rows.append([arm.label, str(len(arm.runs)), "all", str(n), str(gained), str(lost), points])
    return rows
