"""Two sets of completions compared on the same problems: A before, B after."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.report import percent, with_error
from evaluation.scores import MEASURES, grade, per_problem
from evaluation.statistics import Difference, mcnemar, paired_difference, standard_error
from evaluation.transitions import CLASSES, Transitions, class_of
from harness.errors import UserError
from tasks.datasets import load_completions


@dataclass
class Side:
    """Graded completions, and where they come from."""

    name: str
    rows: list[dict]


@dataclass
class Pair:
    """Two sides on the same problems in the same order, and how many problems had no partner."""

    a: Side
    b: Side
    only_a: int
    only_b: int


def completions_of(where: str) -> Path:
    """The file of completions that a path names.

    A file is itself. A folder of an eval has completions.jsonl. A folder of a run stands for the
    last eval that the run made of itself, or for that of eval.py --run. Raises UserError if there
    is none.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return path
    steps = sorted((path / "eval").glob("step_*.jsonl"))
    for file in (path / "completions.jsonl", *steps[-1:], path / "eval" / "completions.jsonl"):
        if file.is_file():
            return file
    raise UserError(
        f"{where}: no completions there: name a .jsonl file, a folder with completions.jsonl, or a "
        "run's folder with an eval"
    )


def first_and_last(run: str) -> tuple[Path, Path]:
    """The first and the last eval that a run made of itself. UserError if it has not two."""
    files = sorted((Path(run).expanduser() / "eval").glob("step_*.jsonl"))
    if len(files) < 2:
        raise UserError(
            f"{run}: not a run with two evals: name two things to compare, or one run that made "
            "two evals (--eval_every)"
        )
    return files[0], files[-1]


def load_side(file: Path) -> Side:
    """Completions, graded anew so that both sides are graded by one rule."""
    return Side(str(file), grade(load_completions(str(file))))


def pair_up(a: Side, b: Side) -> Pair:
    """Keep the problems that both sides have, in the order of A.

    A problem is known by its text and gold answer. If it stands in a file several times, its first
    rows are paired, then its second ones, and so on. Raises UserError if no problem is shared.
    """
    keyed_a, keyed_b = _keyed(a.rows), _keyed(b.rows)
    shared = [key for key in keyed_a if key in keyed_b]
    if not shared:
        raise UserError(f"{a.name} and {b.name} share no problem: compare evals of one data set")
    return Pair(
        Side(a.name, [keyed_a[key] for key in shared]),
        Side(b.name, [keyed_b[key] for key in shared]),
        len(keyed_a) - len(shared),
        len(keyed_b) - len(shared),
    )


def _keyed(rows: list[dict]) -> dict[tuple, dict]:
    seen: Counter = Counter()
    keyed = {}
    for row in rows:
        key = (" ".join(row["problem"].split()), row["answer"])
        keyed[(*key, seen[key])] = row
        seen[key] += 1
    return keyed


# ---- figures


def differences(pair: Pair) -> dict[str, tuple[np.ndarray, np.ndarray, Difference]]:
    """measure -> (values of A per problem [n], of B, B less A); without what a side lacks."""
    found = {}
    for name in MEASURES:
        if name == "length" and len({_unit(pair.a), _unit(pair.b)}) > 1:
            continue  # tokens and characters cannot be compared
        a, b = per_problem(pair.a.rows, name), per_problem(pair.b.rows, name)
        if a is not None and b is not None:
            found[name] = (a, b, paired_difference(a, b))
    return found


def _unit(side: Side) -> str:
    return "tokens" if all(row.get("tokens") for row in side.rows) else "characters"


def samples_per_problem(side: Side) -> int | None:
    """k, or None if the problems have different numbers of samples."""
    numbers = {len(row["correct"]) for row in side.rows}
    return numbers.pop() if len(numbers) == 1 else None


def only_one_right(pair: Pair) -> tuple[int, int]:
    """The number of problems on which A is better, and on which B is.

    With one sample per problem these are the two counts of McNemar's test: only A right, only B
    right. With more, better means a larger share of right samples (a sign test).
    """
    a, b = per_problem(pair.a.rows, "accuracy"), per_problem(pair.b.rows, "accuracy")
    return int((a > b).sum()), int((b > a).sum())


def transitions(pair: Pair) -> Transitions | None:
    """The counts by class, paired by sample; None if the sides have other numbers of samples."""
    if any(
        len(a["correct"]) != len(b["correct"])
        for a, b in zip(pair.a.rows, pair.b.rows, strict=True)
    ):
        return None
    counts = Transitions()
    counts.gains = [counts.add(*rows) for rows in zip(pair.a.rows, pair.b.rows, strict=True)]
    return counts


def examples(pair: Pair, name: str, gain: int, n: int) -> list[tuple[dict, str, str]]:
    """The first n pairs of a class with correct after - correct before = gain, one a problem.

    Returns [(row of A, response of A, response of B)].
    """
    found = []
    for a, b in zip(pair.a.rows, pair.b.rows, strict=True):
        for i, (old, new) in enumerate(zip(a["completions"], b["completions"], strict=False)):
            change = int(b["correct"][i]) - int(a["correct"][i])
            if class_of(old, new) == name and change == gain:
                found.append((a, old, new))
                break
        if len(found) == n:
            break
    return found


# ---- text


def report(pair: Pair, published: dict[str, float], shown: int = 1) -> str:
    """Everything about a pair in markdown.

    published: class -> the published part of the gain in percent. shown: the number of examples of
    each kind of transition.
    """
    parts = [_heading(pair), _table(pair), _test(pair), _transition_table(pair, published)]
    if shown and transitions(pair):
        parts.append(_examples(pair, shown))
    return "\n\n".join(parts)


def _heading(pair: Pair) -> str:
    lines = [f"{letter}: {side.name}" for letter, side in (("A", pair.a), ("B", pair.b))]
    k = [samples_per_problem(side) or "several" for side in (pair.a, pair.b)]
    lines.append(f"{len(pair.a.rows)} problems in both, with {k[0]} and {k[1]} samples each")
    if pair.only_a or pair.only_b:
        lines.append(f"left out: {pair.only_a} problems only in A, {pair.only_b} only in B")
    return "\n".join(lines)


def _table(pair: Pair) -> str:
    lines = ["| | A | B | B - A | 95 % interval | p |", "|---|--:|--:|--:|--:|--:|"]
    for name, (a, b, d) in differences(pair).items():
        if name == "length":
            unit = f"length ({_unit(pair.a)})"
            values = [f"{x.mean():.1f} ± {standard_error(x) or 0:.1f}" for x in (a, b)]
            scale, digits, name = 1, 1, unit
        else:
            values = [with_error(float(x.mean()), standard_error(x)).strip() for x in (a, b)]
            scale, digits = 100, 1
        interval = p = ""
        if d.low is not None:
            interval = f"{scale * d.low:+.{digits}f} to {scale * d.high:+.{digits}f}"
            p = f"{d.p:.2g}"
        lines.append(
            f"| {name} | {' | '.join(values)} | {scale * d.mean:+.{digits}f} | {interval} | {p} |"
        )
    note = (
        "Means over problems ± 1 standard error. Interval: bootstrap over problems of the paired "
        "difference. p: paired t test."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _test(pair: Pair) -> str:
    a, b = only_one_right(pair)
    if samples_per_problem(pair.a) == samples_per_problem(pair.b) == 1:
        test, counts = "McNemar's exact test", f"{a} problems right only in A, {b} only in B"
    else:
        test = "Sign test over problems (McNemar's exact test where k = 1)"
        counts = f"{a} problems with more right samples in A, {b} with more in B"
    return f"{test}: {counts}; p = {mcnemar(a, b):.2g}"


def _transition_table(pair: Pair, published: dict[str, float]) -> str:
    counts = transitions(pair)
    if counts is None:
        return "No transition table: the sides have different numbers of samples."
    lines = [
        "| habit, A to B | responses | now right | now wrong | part of the gain | published |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in CLASSES:
        part = counts.share(name)
        shown = "undefined" if part is None else percent(part).strip()
        numbers = f"{counts.n[name]} | {counts.gained[name]} | {counts.lost[name]}"
        lines.append(f"| {name} | {numbers} | {shown} | {published[name]}% |")
    total, n = sum(counts.gains), sum(counts.n.values())
    numbers = f"{sum(counts.gained.values())} | {sum(counts.lost.values())}"
    lines.append(f"| all | {n} | {numbers} | {100 * total / n:+.1f} points | |")
    notes = [
        'Responses are paired by problem and sample; code: the response contains "python". Part of '
        "the gain: now right less now wrong, divided by the same over all classes. Published: "
        "Qwen2.5-Math-7B before and after training (arXiv 2506.10947), not ours."
    ]
    d = paired_difference(*(per_problem(side.rows, "accuracy") for side in (pair.a, pair.b)))
    if d.low is None or d.low <= 0 <= d.high:
        notes.append(
            f"Warning: the total gain, {total:+d} of {n}, cannot be told from 0: its parts mean "
            "nothing."
        )
    return "\n".join(lines) + "\n\n" + "\n".join(notes)


def _examples(pair: Pair, shown: int) -> str:
    parts = []
    for name in CLASSES:
        for gain, what in ((1, "now right"), (-1, "now wrong")):
            for row, old, new in examples(pair, name, gain, shown):
                parts.append(
                    f"### {name}, {what}\n\nProblem: {_cut(row['problem'])}\n\n"
                    f"Gold answer: {row['answer']}\n\nA: {_cut(old)}\n\nB: {_cut(new)}"
                )
    return "\n\n".join(parts) or "No response changed between right and wrong."


def _cut(text: str, size: int = 500) -> str:
    """The text on one line, its middle left out if it is long."""
    text = " ".join(text.split())
    if len(text) <= size:
        return text
    return f"{text[: size // 2]} [... {len(text) - size} characters ...] {text[-size // 2 :]}"


def as_json(pair: Pair) -> dict:
    """The figures of a comparison."""
    a, b = only_one_right(pair)
    counts = transitions(pair)
    found = {
        "n": len(pair.a.rows),
        "differences": {name: vars(d) for name, (_, _, d) in differences(pair).items()},
        "only_a": a,
        "only_b": b,
        "mcnemar_p": mcnemar(a, b),
        "transitions": None,
    }
    if counts:
        found["transitions"] = {
            name: {
                "n": counts.n[name],
                "gained": counts.gained[name],
                "lost": counts.lost[name],
                "part": counts.share(name),
            }
            for name in CLASSES
        }
    return found
