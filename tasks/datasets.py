"""Data sets: problems from files, from the hub or made on the spot, and saved completions."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from data import Problem, rng
from evaluation import interop
from harness.errors import UserError, printable
from harness.strict_json import parse_json
from tasks import arithmetic
from tasks.rows import is_chat, normal_level, problem_of

SUBSET = 101  # first key of the generator of subset

# Short names of data sets on the Hugging Face hub, as owner/name or owner/name:config.
HUB = {
    "math500": "HuggingFaceH4/MATH-500",
    "math_train": "DigitalLearningGmbH/MATH-lighteval",  # train is Hendrycks' 7,500 rows
    "deepscaler": "agentica-org/DeepScaleR-Preview-Dataset",
    "gsm8k": "openai/gsm8k:main",
    "svamp": "ChilleD/SVAMP",
    "aime24": "math-ai/aime24",
    "aime25": "math-ai/aime25",
    "amc23": "math-ai/amc23",
    "minerva": "math-ai/minervamath",
    "olympiadbench": "Hothan/OlympiadBench:OE_TO_maths_en_COMP",  # text only, English, 674 rows
    "cruxeval": "cruxeval-org/cruxeval",  # CRUXEval-O: the output of a function
}


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
    kind = _kind_of_answers(source)
    problems, faults, chats = [], [], 0
    for i, (where, row) in enumerate(
        _file_rows(path, split) if local else _hub_rows(source, split)
    ):
        try:
            problems.append(problem_of(row, f"{path.stem}/{i}", kind))
            chats += is_chat(row)
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


def _kind_of_answers(source: str) -> str:
    """The kind of a source whose rows do not show it, "" where they do.

    Minerva's answers are measured quantities. It is known by the name of its file, of the folder of
    a train or test file, or of its hub repository.
    """
    path = Path(source.partition(":")[0])
    name = path.parent.name if path.stem in ("train", "test") else path.name
    return "rounded" if "minerva" in name.casefold() else ""


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


def load_completions(file: str) -> list[dict]:
    """Rows of a .jsonl of saved completions: problem, answer (str), completions (list of str) and,
    where there are any, correct, finish_reason and tokens (one of each for each completion), kind
    (tasks/answers.py) and other columns. The file may also be a sample log of
    lm-evaluation-harness (evaluation/interop.py).

    Raises UserError naming the line that is no such row.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text: {error}") from error
    if interop.is_lm_eval(lines[0]):
        rows = interop.read_lm_eval(file)
        for row in rows:
            _check_completions(row, f"{file}: problem {row['problem']!r}"[:200])
        return rows
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from error
        if isinstance(row, dict):  # a null is no value
            row = {"problem": ""} | {key: value for key, value in row.items() if value is not None}
            if isinstance(row["problem"], int | float):
                row["problem"] = str(row["problem"])
        _check_completions(row, f"{file}:{number}")
        rows.append({**row, "answer": str(row["answer"])})
    if not rows:
        raise UserError(f"{file}: holds no completions")
    return rows


def _check_completions(row: Any, where: str) -> None:
    """Raise UserError, beginning with where, if row is no row of load_completions."""
    texts = row.get("completions") if isinstance(row, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{where}: wants completions, a list of one or more strings")
    if row.get("answer") is None:
        raise UserError(f"{where}: wants an answer")
    for key in ("problem", "kind"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: wants {key} to be a text")
    for key in ("correct", "finish_reason", "tokens"):
        values = row.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != len(texts)):
            raise UserError(f"{where}: wants as many of {key} as of completions")
    if not all(isinstance(value, bool | int | float) for value in row.get("correct") or []):
        raise UserError(f"{where}: wants correct, a list of true and false")
    if not all(isinstance(ids, list) for ids in row.get("tokens") or []):
        raise UserError(f"{where}: wants tokens, a list of token ids per completion")
    try:
        "".join([row.get("problem", ""), str(row["answer"]), *texts]).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair, which is no character") from None


def subset(
    problems: list[Problem], n: int = 0, level: str = "", subject: str = "", seed: int = 0
) -> list[Problem]:
    """Those of a level and a subject (any case), then n of them drawn without replacement.

    File order is kept. n = 0, or more than there are, takes all. UserError where none is left.
    """
    for name, wanted in (("level", normal_level(level)), ("subject", subject.strip().casefold())):
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
