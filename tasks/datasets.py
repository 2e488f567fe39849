"""Data sets: problems from files, from the hub or made on the spot, and saved completions."""

import json
import math
import re
import sys
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from data import Problem, rng
from grading import last_boxed
from harness.errors import UserError, printable
from harness.strict_json import parse_json
from tasks import arithmetic

SUBSET = 101  # first key of the generator of subset

# Short names of data sets on the Hugging Face hub, as owner/name or owner/name:config.
HUB = {
    "math500": "HuggingFaceH4/MATH-500",
    "math_train": "DigitalLearningGmbH/MATH-lighteval",  # train is Hendrycks' 7,500 rows
    "deepscaler": "agentica-org/DeepScaleR-Preview-Dataset",
    "gsm8k": "openai/gsm8k:main",
    "svamp": "ChilleD/SVAMP",
}

# Columns that hold a problem as plain text, in the order in which they are looked up.
PROBLEM_COLUMNS = ("problem", "question", "prompt")


def load_problems(
    source: str, split: Literal["train", "test"], keep_duplicates: bool = False
) -> list[Problem]:
    """The problems of a .jsonl or .json file, of a folder with {split}.jsonl, of a name in HUB,
    of a hub id (owner/name or owner/name:config; cached copies serve without a network), or of
    generated `arithmetic` (tasks/arithmetic.py).

    A problem that stands in several rows is taken once, from the first of them, unless
    keep_duplicates; a line says how many are distinct. A hub data set with a single split is read
    whatever `split` says. UserError where there is nothing to read, or where a row has no problem
    or no answer (on the hub: left out, counted).
    """
    if (operations := arithmetic.operations_of(source)) is not None:
        return [Problem(**row) for row in arithmetic.make_rows(operations, split)]
    path = Path(source).expanduser()
    local = source not in HUB and path.exists()
    problems, faults, chats = [], [], 0
    for i, (where, row) in enumerate(
        _file_rows(path, split) if local else _hub_rows(source, split)
    ):
        try:
            problems.append(_problem(row, f"{path.stem}/{i}"))
            chats += not _first(row, *PROBLEM_COLUMNS, "Body")
        except ValueError as error:
            faults.append(f"{where}: {error}")
            if local:  # a user can mend a file of theirs
                raise UserError(faults[0]) from None
    if not problems:
        raise UserError(
            faults[0] if faults else f"{source}: empty: it needs one JSON object a line"
        )
    if faults:
        example = printable(faults[0])
        print(f"{source}: {len(faults)} rows left out, such as {example}", file=sys.stderr)
    if chats:
        print(
            f"{source}: {chats} prompts are chat messages: the user turn is the problem, with any "
            "instructions in it; a system turn is left out, as the prompt format has its own",
            file=sys.stderr,
        )
    return _distinct(problems, source, keep_duplicates)


def _distinct(problems: list[Problem], source: str, keep_duplicates: bool) -> list[Problem]:
    """The first of each distinct problem, or all if asked; a line says how many are distinct."""
    keys = [_key(problem) for problem in problems]
    first: dict[str, Problem] = {}
    for key, problem in zip(keys, problems, strict=True):
        first.setdefault(key, problem)
    if len(first) < len(problems):
        differ = sum(p.answer != first[key].answer for key, p in zip(keys, problems, strict=True))
        print(
            f"{source}: {len(problems)} rows hold {len(first)} distinct problems: "
            + ("all rows are used" if keep_duplicates else "each is used once, by its first row")
            + (f"; {differ} rows give a repeated problem another answer" if differ else ""),
            file=sys.stderr,
        )
    return problems if keep_duplicates else list(first.values())


def _key(problem: Problem) -> str:
    """What two rows with the same problem share: its text, but for case and white space."""
    return " ".join(problem.problem.split()).casefold()


def _file_rows(path: Path, split: str) -> Iterable[tuple[str, Any]]:
    """(where, row) of a file of JSON lines or of one JSON list, or of a folder's {split} file."""
    if path.is_dir():
        folder, path = path, path / f"{split}.jsonl"
        path = path if path.exists() else folder / f"{split}.json"
        if not path.exists():
            raise UserError(f"{folder}: the folder has no {split}.jsonl: name the file itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    line = 1
    try:
        if text.lstrip().startswith("["):
            for i, row in enumerate(parse_json(text), start=1):
                yield f"{path}: row {i}", row
        else:
            for line, content in enumerate(text.split("\n"), start=1):
                if content.strip():
                    yield f"{path}:{line}", parse_json(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: not JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path}:{line}: not JSON: {error}") from None


def _hub_rows(source: str, split: str) -> Iterable[tuple[str, Any]]:
    """(where, row) of a data set on the Hugging Face hub, or of its cached copy."""
    repo, _, config = HUB.get(source, source).partition(":")
    option = f"--{'train' if split == 'train' else 'eval'}_data=path/to/{split}.jsonl"
    advice = f"name a local .jsonl file or folder instead, as in {option}"
    if not re.fullmatch(r"(?!.*\.jsonl?$)[\w.-]+/[\w.-]+", repo):
        names = ", ".join(HUB)
        raise UserError(f"{source}: no such file or folder, nor a hub name (owner/name, {names})")
    import datasets  # slow to import, and of no use to local files
    import huggingface_hub

    was_offline, reached = datasets.config.HF_HUB_OFFLINE, True
    try:
        # asked here because `datasets` retries for 23 s before it gives up
        huggingface_hub.HfApi().dataset_info(repo, timeout=5)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(f"{source}: no file, folder or public hub data set: {advice}") from None
    except Exception:  # no network, hub down, HF_HUB_OFFLINE=1: a cached copy will do
        datasets.config.HF_HUB_OFFLINE, reached = True, False
    try:
        splits = datasets.load_dataset(repo, config or None)
    except Exception as error:
        reason = str(error).split("\n")[0] if reached else "no hub within reach, no cached copy"
        raise UserError(f"{source} ({repo}): {reason}: {advice}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    if split not in splits and len(splits) > 1:
        raise UserError(f"{source} ({repo}): no split {split!r}, only {', '.join(splits)}")
    rows = splits[split] if split in splits else next(iter(splits.values()))
    for i, row in enumerate(rows):
        yield f"{source}: row {i}", row


def _problem(row: Any, default_id: str) -> Problem:
    """A row of any of the sources. ValueError where it lacks a problem or an answer.

    DAPO-Math-17k has chat messages as its prompt, and the answer in reward_model.ground_truth.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    problem = _first(row, *PROBLEM_COLUMNS) or _user_turn(row.get("prompt"))
    if _first(row, "Body") and _first(row, "Question"):  # SVAMP
        problem = _first(row, "Body").rstrip(". ") + ". " + _first(row, "Question")
    if not problem:
        raise ValueError("the row has no problem (nor question, nor prompt)")
    answer = _first(row, "answer", "final_answer", "Answer").strip()
    if not answer and isinstance(row.get("reward_model"), dict):
        answer = _first(row["reward_model"], "ground_truth").strip()
    # beside an answer, a label is what a model says; alone, it is the answer
    label = _first(row, "label").strip()
    if not answer:
        answer, label = label, ""
    if "####" in answer:  # GSM8K: the working, then the answer
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    if "\\boxed" in answer:  # a sentence with a box: the box; with several, the last one
        answer = solution_box(answer)
    answer = answer or solution_box(_first(row, "solution"))
    if not answer:
        raise ValueError("the row has no answer (nor a solution with a \\boxed one)")
    return Problem(
        problem=problem,
        answer=answer,
        id=_first(row, "unique_id", "id") or default_id,
        subject=_first(row, "subject", "type"),
        level=_level(_first(row, "level")),
        label=label,
    )


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
    return _first(turns[0], "content")


def _first(row: dict[str, Any], *keys: str) -> str:
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


def _level(text: str) -> str:
    return text.lower().removeprefix("level").strip().removesuffix(".0")


def load_completions(file: str) -> list[dict]:
    """Rows of a .jsonl of saved completions: problem, answer (str), completions (list of str) and,
    where there are any, correct (one for each completion) and other columns.

    Raises UserError naming the line that is no such row.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--completions={file}: cannot be read as text: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from error
        texts = row.get("completions") if isinstance(row, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{file}:{number}: wants completions, a list of one or more strings")
        if row.get("answer") is None:
            raise UserError(f"{file}:{number}: wants an answer")
        correct = row.get("correct")
        if correct is not None and (not isinstance(correct, list) or len(correct) != len(texts)):
            raise UserError(f"{file}:{number}: wants as many of correct as of completions")
        rows.append({"problem": "", **row, "answer": str(row["answer"])})
    if not rows:
        raise UserError(f"{file}: holds no completions")
    return rows


def subset(
    problems: list[Problem], n: int = 0, level: str = "", subject: str = "", seed: int = 0
) -> list[Problem]:
    """Those of a level and a subject (any case), then n of them drawn without replacement.

    File order is kept. n = 0, or more than there are, takes all. UserError where none is left.
    """
    for name, wanted in (("level", _level(level)), ("subject", subject.strip().casefold())):
        kept = [p for p in problems if not wanted or getattr(p, name).casefold() == wanted]
        if not kept:
            there = ", ".join(sorted({getattr(p, name) for p in problems} - {""})) or "none at all"
            raise UserError(f"no problem has {name} {wanted!r}: there is {there}")
        problems = kept
    if not 0 < n < len(problems):
        return problems
    chosen = rng(SUBSET, seed).choice(len(problems), size=n, replace=False)
    return [problems[i] for i in sorted(chosen)]


def drop_overlap(train: list[Problem], held_out: list[Problem]) -> tuple[list[Problem], int]:
    """train without the problems of held_out (but for case and white space), how many went.

    Four problems of MATH-500 stand word for word in DeepScaleR (arXiv 2506.10947). UserError where
    none is left.
    """
    seen = {_key(p) for p in held_out}
    kept = [p for p in train if _key(p) not in seen]
    if not kept:
        raise UserError("train_data: every problem is in eval_data too: name another one of them")
    return kept, len(train) - len(kept)
