"""Completions in the sample logs of lm-evaluation-harness, read and written.

`lm_eval --log_samples` writes samples_TASK_DATE.jsonl, one line for a problem and a filter:

    doc_id, doc     number of the problem, its row in the data set
    target          the gold answer, as text
    arguments       {"gen_args_0": {"arg_0": prompt, "arg_1": settings of the sampler}}
    resps           [[text, ...]]: one list of samples for each request, one request a problem
    filter          name of a filter, such as one that extracts the answer
    filtered_resps  what the filter made of resps
    metrics         names of the scores, each of which is a key of the line too
    doc_hash, prompt_hash, target_hash    SHA-256 of what they are named after

The format is that of lm-evaluation-harness 0.4 (lm_eval/evaluator.py).
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from grading import last_boxed
from harness.errors import UserError

PROBLEM_COLUMNS = ("problem", "question", "prompt", "input")
SCORES = ("exact_match", "math_verify", "acc")  # verdicts of 0 or 1, the first that is there


def is_lm_eval(line: str) -> bool:
    """Whether the first line of a file is one of a sample log."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"doc_id", "resps", "target"} <= row.keys()


def read_lm_eval(path: Path | str) -> list[dict]:
    """A sample log as rows of completions: problem, answer, completions, and correct if scored.

    Each problem is one row, from the line of its first filter; the completions are resps, the texts
    before any filter. correct is the log's own score of a problem with one completion. Other
    columns of a problem, such as level, are kept. Raises UserError naming the line that is no such
    row, or that scores given choices instead of generating text.
    """
    rows: dict[object, dict] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            doc_id = row["doc_id"]
            if doc_id not in rows:
                rows[doc_id] = _completions(row, where)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise UserError(f"{where}: not a line of a sample log ({error!r})") from error
    return [rows[doc_id] for doc_id in sorted(rows)]


def _completions(row: dict, where: str) -> dict:
    doc = row["doc"] if isinstance(row.get("doc"), dict) else {}
    if len(row["resps"]) != 1 or not all(isinstance(text, str) for text in row["resps"][0]):
        raise UserError(f"{where}: scores of given choices: only tasks that generate text are read")
    texts = row["resps"][0]
    if not texts:
        raise UserError(f"{where}: resps holds no completion")
    problem = next((doc[key] for key in PROBLEM_COLUMNS if isinstance(doc.get(key), str)), None)
    kept = {key: doc[key] for key in ("level", "subject", "unique_id", "kind") if key in doc}
    found = {
        "problem": _prompt(row) if problem is None else problem,
        "answer": _answer(doc, str(row["target"])),
        "completions": texts,
        **kept,
    }
    score = next((row[key] for key in SCORES if row.get(key) in (0, 1)), None)
    if isinstance(row.get("correct"), list):  # a log that was written here
        found["correct"] = row["correct"]
    elif score is not None and len(texts) == 1:
        found["correct"] = [bool(score)]
    if isinstance(row.get("finish_reason"), list):
        found["finish_reason"] = row["finish_reason"]
    return found


def _prompt(row: dict) -> str:
    """The whole prompt, where the problem has no column of a known name."""
    arguments = row.get("arguments")
    try:
        return str(arguments["gen_args_0"]["arg_0"])
    except (KeyError, TypeError):
        return ""


def _answer(doc: dict, target: str) -> str:
    """The gold answer alone. Some tasks have the whole solution as their target."""
    text = str(doc["answer"]) if doc.get("answer") not in (None, "") else target
    if "####" in text:  # GSM8K: the working, then the answer
        return text.rpartition("####")[2].strip().replace(",", "")
    return (last_boxed(text) if "\\boxed" in text else None) or text.strip()


def write_lm_eval(path: Path | str, rows: Iterable[dict]) -> None:
    """Write rows of completions as a sample log, whole or not at all.

    exact_match of a problem is the mean of its column correct, and is left out where there is none.
    correct and finish_reason, which such logs lack, are written beside it. Raises UserError where
    the file cannot be written.
    """
    lines = [json.dumps(_line(i, row), ensure_ascii=False) + "\n" for i, row in enumerate(rows)]
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _line(i: int, row: dict) -> dict:
    own = ("completions", "correct", "finish_reason")
    doc = {key: value for key, value in row.items() if key not in own}
    problem, target = row["problem"], str(row["answer"])
    line = {
        "doc_id": i,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": problem, "arg_1": {}}},
        "resps": [row["completions"]],
        "filtered_resps": row["completions"][:1],
        "filter": "take_first",
        "metrics": ["exact_match"] if row.get("correct") else [],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(problem),
        "target_hash": _hash(target),
    }
    if row.get("correct"):
        line["exact_match"] = sum(row["correct"]) / len(row["correct"])
    return line | {key: row[key] for key in own[1:] if key in row}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
