"""What a page shows, read from run folders and completion files.

The result is plain JSON. A column is a set of completions of the same problems, such as those of
the base model; a cell is one of them.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from harness.errors import UserError
from harness.runfiles import read_config, read_jsonl
from tasks import answers
from tasks.datasets import load_completions
from tools.parts.arms import RUN_KEYS, differences, every_setting


@dataclass
class Column:
    """The completions of one model or one eval."""

    name: str
    rows: list[dict]  # problem, answer, completions and, where saved, correct, finish_reason, ...


def collect(sources: Sequence[str]) -> dict:
    """What the page of one or two sources shows. A source is a run folder or a completion file.

    One run gives its first and its last eval, two runs the last eval of each. Raises UserError for
    a source that cannot be read, and for two sources without a common problem.
    """
    if len(sources) > 2:
        raise UserError(f"a page shows one or two sources side by side, not {len(sources)}")
    folders = [Path(source) for source in sources if Path(source).is_dir()]
    columns = []
    for source in sources:
        if Path(source) not in folders:
            columns.append(Column(Path(source).stem, load_completions(source)))
        else:
            columns += _evals(Path(source), last_only=len(sources) == 2)
    _set_names_apart(columns, sources)
    return {
        "title": " and ".join(Path(source).name for source in sources),
        "columns": [column.name for column in columns],
        "problems": _side_by_side(columns) if columns else [],
        "runs": [_run(folder) for folder in folders],
        "differing": _differing(folders),
    }


# ---- completions


def _evals(folder: Path, last_only: bool) -> list[Column]:
    """The first and the last eval of a run, or only the last; [] where it has made none yet."""
    config = read_config(folder)
    files = sorted((folder / "eval").glob("step_*.jsonl"))
    chosen = files[-1:] if last_only or len(files) == 1 else [files[0], files[-1]] if files else []
    columns = []
    for file in chosen:
        step = int(file.stem.removeprefix("step_"))
        name = "base" if step == 0 else f"step {step}"
        if last_only:
            name = f"{folder.name}, {config.get('reward', '')}, {name}"
        columns.append(Column(name, read_jsonl(file)))
    return columns


def _set_names_apart(columns: list[Column], sources: Sequence[str]) -> None:
    """Two files of the same name are told apart by their folders."""
    if len({column.name for column in columns}) < len(columns):
        for column, source in zip(columns, sources, strict=True):
            column.name = f"{Path(source).resolve().parent.name}/{column.name}"


def _side_by_side(columns: list[Column]) -> list[dict]:
    """The problems that all columns have, in the order of the first, with the cells of each.

    A problem that stands in several rows is paired by its place among them.
    """
    by_key = [_by_problem(column.rows) for column in columns]
    common = [key for key in by_key[0] if all(key in rows for rows in by_key)]
    if not common:
        raise UserError(f"{columns[0].name} and {columns[1].name} have no problem in common")
    left_out = max(map(len, by_key)) - len(common)
    if left_out:
        print(f"{left_out} problems stand in one of the two sources only and are left out")
    cells = [_cells([rows[key] for key in common]) for rows in by_key]
    problems = []
    for i, key in enumerate(common):
        row = by_key[0][key]
        k = max(len(column[i]) for column in cells)
        samples = [[_get(column[i], j) for column in cells] for j in range(k)]
        problems.append(
            {
                "problem": key[0],
                "answer": str(row["answer"]),
                "level": str(row.get("level") or ""),
                "subject": str(row.get("subject") or ""),
                "samples": samples,
            }
        )
    return problems


def _by_problem(rows: list[dict]) -> dict[tuple[str, int], dict]:
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        problem = str(row["problem"])
        keyed[problem, seen[problem]] = row
        seen[problem] += 1
    return keyed


def _get(cells: list[dict], j: int) -> dict | None:
    return cells[j] if j < len(cells) else None


def _cells(rows: list[dict]) -> list[list[dict]]:
    """The cells of each row. Verdicts are those that were saved, or else are made here."""
    asked = [
        SimpleNamespace(**{**row, "answer": str(row["answer"])})
        for row in rows
        for _ in row["completions"]
    ]
    texts = [text for row in rows for text in row["completions"]]
    found = iter(answers.found(texts, asked))
    if all(row.get("correct") for row in rows):
        verdicts = iter([right for row in rows for right in row["correct"]])
    else:
        verdicts = iter(answers.correct(texts, asked))
    return [
        [
            {
                "text": text,
                "right": bool(next(verdicts)),
                "code": uses_code(text),
                "answer": next(found),
                "cut": _cut_off(row, j),
            }
            for j, text in enumerate(row["completions"])
        ]
        for row in rows
    ]


def _cut_off(row: dict, j: int) -> bool:
    reasons = row.get("finish_reason")
    return isinstance(reasons, list) and j < len(reasons) and reasons[j] == "length"


def uses_code(text: str) -> bool:
    """Whether a response counts as code (Shao et al., "Spurious Rewards", arXiv 2506.10947)."""
    return "python" in text.lower()


# ---- runs


def _run(folder: Path) -> dict:
    """The settings of a run, where it came from, and the responses that it logged."""
    saved = json.loads((folder / "config.json").read_text())
    config = every_setting(read_config(folder))
    samples = []
    for row in read_jsonl(folder / "samples.jsonl"):
        row = {key: row.get(key) for key in SAMPLE_KEYS} | {"code": uses_code(row["response"])}
        if row["log_ratio"]:
            row["clipped"] = _clipped(row, config)
        samples.append(row)
    return {
        "name": folder.name,
        "config": {key: json.dumps(value) for key, value in config.items()},
        "from": {"git": saved.get("git"), **(saved.get("versions") or {})},
        "samples": samples,
    }


SAMPLE_KEYS = (
    "step row problem answer response reward advantage correct finished tokens entropy log_ratio"
).split()


def _clipped(sample: dict, config: dict) -> list[int]:
    """1 for each token that the clip of the loss took the gradient from (see grpo.policy_loss).

    Only loss=grpo clips single tokens. The ratio was rounded when it was logged.
    """
    outside = config["truncated"] == "mask" and not sample["finished"]
    if config["loss"] != "grpo" or outside:
        return [0] * len(sample["log_ratio"])
    above = config["clip"] in ("both", "high") and sample["advantage"] > 0
    below = config["clip"] in ("both", "low") and sample["advantage"] < 0
    high = math.log1p(config["clip_high"])
    low = math.log1p(-config["clip_low"]) if config["clip_low"] < 1 else -math.inf

    def clipped(ratio: float | None) -> bool:
        return ratio is not None and ((above and ratio > high) or (below and ratio < low))

    return [int(clipped(ratio)) for ratio in sample["log_ratio"]]


def _differing(folders: list[Path]) -> list[str]:
    """The settings in which two runs differ."""
    if len(folders) < 2:
        return []
    return sorted(differences(*map(read_config, folders), but=RUN_KEYS[1:]))
