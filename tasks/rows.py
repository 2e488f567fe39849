"""What the columns of a row of a data set mean: each source has its own."""

import math
import re
from decimal import Decimal
from typing import Any

from data import Problem
from grading import last_boxed
from tasks.answers import KINDS

# Columns that hold a problem as plain text, in the order in which they are looked up.
PROBLEM_COLUMNS = ("problem", "question", "prompt")


def problem_of(row: Any, default_id: str, kind: str = "") -> Problem:
    """A row of any of the sources. ValueError where it lacks a problem or an answer.

    kind names the kind of its answers (tasks/answers.py), unless a column of the row does; "" is
    what the row looks like: `python` for a row of CRUXEval, `list` where a row of OlympiadBench
    asks for several answers, else `math`. DAPO-Math-17k has chat messages as its prompt, and the
    answer in reward_model.ground_truth.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    label = text_of(row, "label").strip()
    if all(isinstance(row.get(key), str) for key in ("code", "input", "output")):
        text, answer, own_kind = _cruxeval(row), row["output"].strip(), "python"
    else:
        text, own_kind = _question(row), "list" if row.get("is_multiple_answer") else "math"
        answer = _answer(row)
        # beside an answer, a label is what a model says; alone, it is the answer
        if not answer:
            answer, label = label, ""
        answer = _bare(answer) or solution_box(text_of(row, "solution"))
    if not text:
        raise ValueError("the row has no problem (nor question, nor prompt)")
    if not answer:
        raise ValueError("the row has no answer (nor a solution with a \\boxed one)")
    kind = text_of(row, "kind") or kind or own_kind
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    return Problem(
        problem=text,
        answer=answer,
        id=text_of(row, "unique_id", "id", "ID") or default_id,
        subject=text_of(row, "subject", "type", "Type", "subfield"),
        level=normal_level(text_of(row, "level")),
        kind=kind,
        label=label,
    )


def _question(row: dict[str, Any]) -> str:
    """The text of the problem, "" where there is none."""
    if text_of(row, "Body") and text_of(row, "Question"):  # SVAMP
        return text_of(row, "Body").rstrip(". ") + ". " + text_of(row, "Question")
    return text_of(row, *PROBLEM_COLUMNS) or _user_turn(row.get("prompt"))


def _answer(row: dict[str, Any]) -> str:
    """What the row's answer columns hold, "" where they hold nothing."""
    answer = text_of(row, "answer", "final_answer", "Answer").strip()
    listed = row.get("final_answer")
    if not answer and isinstance(listed, list):  # OlympiadBench
        answer = ", ".join(str(one).strip() for one in listed)
        # A bare number is right too: a unit may stand on one side only.
        unit = text_of(row, "unit").strip("$ ")
        if unit and not row.get("is_multiple_answer"):
            answer = answer.strip("$ ") + (unit if unit[0] in "^%" else rf"\text{{ {unit}}}")
    if not answer and isinstance(row.get("reward_model"), dict):
        answer = text_of(row["reward_model"], "ground_truth").strip()
    return answer


def _bare(answer: str) -> str:
    """The answer without the working before it."""
    if "####" in answer:  # GSM8K: the working, then the answer
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    if "\\boxed" in answer:  # a sentence with a box: the box; with several, the last one
        answer = solution_box(answer)
    return answer


def _cruxeval(row: dict[str, str]) -> str:
    """The problem of a row of CRUXEval-O: what does this call return?"""
    return (
        f"What does this call of a Python function return?\n\n```python\n{row['code']}\n```\n\n"
        f"f({row['input']})\n\nWrite the value as a Python literal, such as [1, 2] or 'abc', "
        "within \\boxed{}."
    )


def is_chat(row: dict[str, Any]) -> bool:
    """Whether the problem stands in chat messages."""
    plain = text_of(row, *PROBLEM_COLUMNS)
    return isinstance(row.get("prompt"), list) and not plain


def _user_turn(prompt: Any) -> str:
    """The text of the one user turn in chat messages, "" where it is no such list.

    ValueError where there are several user turns, or turns of the assistant: the problem would
    lose what was said before.
    """
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        return ""
    turns = [turn for turn in prompt if turn.get("role") not in ("system", "developer")]
    if [turn.get("role") for turn in turns] != ["user"]:
        raise ValueError("its prompt is a list of messages with other turns than one of the user")
    return text_of(turns[0], "content")


def text_of(row: dict[str, Any], *keys: str) -> str:
    """The first of the columns that holds something, as text; "" where none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, float) and math.isfinite(value):
            # AMC writes 27.0 for 27, and Python 1e-05 for 0.00001.
            value = int(value) if value.is_integer() else format(Decimal(repr(value)), "f")
        if isinstance(value, str | int | float) and value == value and str(value).strip():
            return str(value)
    return ""


def solution_box(text: str) -> str:
    r"""What stands in the last \boxed{...} of a solution, "" where there is none.

    MATH also writes a few answers without braces, as `\boxed 2$`.
    """
    bare = re.search(r"\\boxed\s+([^{$\s][^$\s]*)[^\\]*$", text)
    return bare[1].rstrip(".") if bare else (last_boxed(text) or "")


def normal_level(text: str) -> str:
    """A level in one form for every source: Level 5 and 5.0 are 5."""
    return text.lower().removeprefix("level").strip().removesuffix(".0")
