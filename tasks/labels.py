"""Offline majority labels: the answer that a model itself gives most often to each problem.

    python eval.py --labels=FILE --model=NAME --data=SOURCE
    python train.py config/majority.py --train_data=FILE

Each problem is sampled 64 times at temperature 1 from its raw text, without a chat template (Shao
et al., "Spurious Rewards", arXiv 2506.10947). The answer of a sample is its last box. Samples
without one are dropped. Equivalent answers form a cluster, and the label is the most frequent
spelling in the largest cluster. The paper's code counts equal strings instead, which separates 0.5
from 1/2. label_by=string does the same, and the report says how often the two labels differ.

FILE is written as a whole at the end. Until then FILE.progress holds the settings and every problem
done, including those without an answer. The same command continues from there.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

import grading
from data import Problem
from engine import LABEL_NOISE, decode, generate
from grading.spelling import lenient_answer
from harness.errors import UserError
from harness.files import write_whole
from harness.partial import ProgressFile
from harness.progress import Progress
from model import end_token_ids
from tasks.answers import found

LabelBy = Literal["equivalence", "string"]
Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids


# --------------------------------------------------------------------------------------- counting


def count(pairs: list[tuple[str, int | str]]) -> list[tuple[str, int]]:
    """Count (answer, cluster) pairs: [(spelling, size)] of the clusters, largest first.

    The spelling of a cluster is its most frequent answer. Among equal sizes or equally frequent
    answers the first one wins: ("0.5", 0), ("7", 1), ("1/2", 0) gives [("0.5", 2), ("7", 1)].
    """
    spellings: dict[int | str, Counter] = {}
    for answer, cluster in pairs:
        spellings.setdefault(cluster, Counter())[answer] += 1
    counted = [(c.most_common(1)[0][0], c.total()) for c in spellings.values()]
    return sorted(counted, key=lambda pair: -pair[1])  # stable


def label_rows(
    problems: list[Problem], answers: list[list[str | None]], grader: grading.Grader | None = None
) -> list[dict]:
    """Make one row per problem from answers [problems][samples]; None is a sample without one.

    A row has the fields of the problem; `samples` and `answered`, numbers of samples; `clusters`,
    [[answer, size]], largest first; `differ`, whether the two labels are not equivalent; and for
    each way of counting (equivalence_..., string_...) `label` ("" if no sample has an answer),
    `size`, and `correct` (compared with the gold answer).
    """
    groups = [i for i, part in enumerate(answers) for _ in part]
    cluster = iter(grading.clusters([a for part in answers for a in part], groups, grader))
    rows = []
    for problem, part in zip(problems, answers, strict=True):
        pairs = [(answer, c) for answer in part if (c := next(cluster)) >= 0]
        counted = {"equivalence": count(pairs), "string": count([(a, a) for a, _ in pairs])}
        row = {key: getattr(problem, key) for key in ("problem", "answer", "id", "subject")}
        row |= {"level": problem.level, "samples": len(part), "answered": len(pairs)}
        row["clusters"] = [list(pair) for pair in counted["equivalence"]]
        for by, sizes in counted.items():
            row[f"{by}_label"], row[f"{by}_size"] = sizes[0] if sizes else ("", 0)
        cluster_of = dict(pairs)  # equal strings share a cluster
        row["differ"] = len({cluster_of.get(row[f"{by}_label"]) for by in counted}) > 1
        rows.append(row)
    golds = [row["answer"] for row in rows]
    for by in ("equivalence", "string"):
        labels = [row[f"{by}_label"] or None for row in rows]
        for row, right in zip(rows, (grader or grading.grader()).grade(labels, golds), strict=True):
            row[f"{by}_correct"] = bool(right)
    return rows


def label_is_right(
    labels: list[str], golds: list[str], grader: grading.Grader | None = None
) -> tuple[list[bool], list[bool]]:
    """Which labels are right by the strict rule of the rewards, and which by a lenient rule.

    The strict rule refuses what it cannot read, so some labels that it calls wrong are right. The
    lenient rule accepts every label that the strict rule accepts, and two kinds more. The first
    equals the gold answer except for case and spaces. The second is accepted by the strict rule
    after an answer was extracted from label, gold answer or both, if they have words: the last box,
    the text after "answer is", or the last number (grading.spelling.lenient_answer). A label that
    the lenient rule refuses is wrong, but a label that it accepts need not be right.
    """
    grader = grader or grading.grader()
    read, read_golds = [_prose(label) for label in labels], [_prose(gold) for gold in golds]
    strict = grader.grade(labels, golds)
    verdicts = [strict, [_squeeze(a) == _squeeze(b) for a, b in zip(labels, golds, strict=True)]]
    for pairs in ((read, golds), (labels, read_golds), (read, read_golds)):
        verdicts.append(grader.grade(*pairs))
    return strict, [any(row) for row in zip(*verdicts, strict=True)]


def _prose(text: str) -> str:
    """The answer in a text with words (two or more letters that are not a LaTeX command)."""
    has_words = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return (lenient_answer(text) or text) if has_words else text


def _squeeze(text: str) -> str:
    """The text without case, spaces, dollar signs and a full stop at its end."""
    return re.sub(r"\\[ ,;:!]|[\s$]", "", text).rstrip(".").casefold()


def label(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Items,
    samples: int,
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    rollout_rows: int = 64,
    first: int = 0,
    desc: str = "labels",
    prefix: str = "",
) -> Iterator[list[dict]]:
    """Sample items[first:], count their answers, and yield the rows of one batch at a time.

    A batch is decoded at once and has at least one problem. The samples depend only on the seed and
    the problem's place in items, so neither the batch size nor `first` changes a label.
    prefix is the text that every response begins with (data.Prompt).
    """
    batch = max(1, rollout_rows // samples)
    ends = end_token_ids(model, tokenizer)
    with Progress(len(items) * samples, desc, initial=first * samples) as progress:
        for start in range(first, len(items), batch):
            part = items[start : start + batch]
            out = generate(
                model,
                [ids for _, ids in part],
                samples,
                max_new_tokens,
                ends,
                (LABEL_NOISE, seed),
                temperature,
                top_p,
                top_k,
                rollout_rows,
                progress,
                range(start, start + len(part)),
            )
            texts = decode(tokenizer, out.tokens, out.prompt_len, out.length, prefix)
            flat = found(texts, [p for p, _ in part for _ in range(samples)])
            answers = [flat[i : i + samples] for i in range(0, len(flat), samples)]
            yield label_rows([problem for problem, _ in part], answers)


def render(rows: list[dict], by: LabelBy) -> str:
    """The text of FILE: the rows that have an answer, with the label counted in the chosen way."""
    lines = []
    for row in rows:
        if row["answered"]:
            chosen = {"label": row[f"{by}_label"], "label_size": row[f"{by}_size"]}
            chosen["label_correct"] = row[f"{by}_correct"]
            lines.append(json.dumps({**row, **chosen}) + "\n")
    return "".join(lines)


# --------------------------------------------------------------------------------------- the file


def fingerprint(items: Items) -> str:
    """The number of problems, and a hash of everything in them that a label depends on."""
    content = json.dumps([(problem.problem, problem.answer, ids) for problem, ids in items])
    return f"{len(items)} problems, {hashlib.sha256(content.encode()).hexdigest()[:12]}"


class LabelFile:
    """FILE and FILE.progress, held by one process. `rows` are those of the problems done.

    settings are what the labels depend on, as JSON. total is the number of problems. Raises
    UserError if FILE cannot be written, is being made by another process, was made with other
    settings, or was not made by this command.
    """

    def __init__(self, file: str, settings: dict, total: int):
        self.path, self.total = Path(file).expanduser(), total
        where, other = f"labels={file}", "name another file, or delete this one"
        if self.path.is_dir():
            raise UserError(f"{where}: a folder: name a file in it, e.g. {file}/labels.jsonl")
        progress = self.path.name + ".progress"
        if self.path.exists() and not self.path.with_name(progress).exists():
            raise UserError(f"{where}: exists, and has no {progress}: {other}")
        self.progress = ProgressFile(self.path)
        try:
            self.rows = self._read(settings)
            if self.path.exists() and len(self.rows) < total:
                raise UserError(f"{where}: exists, but {progress} is unfinished: {other}")
        except UserError:
            self.progress.close()
            raise

    def _read(self, settings: dict) -> list[dict]:
        """The rows done. A file without rows gets these settings."""
        path = self.progress.path
        try:
            first, *rows = self.progress.read() or [{"settings": {}}]
            before = first["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not a list of labels: delete it") from error
        if not rows:
            self.progress.clear()
            self.progress.append([{"settings": settings}])
            return []
        for key, now in settings.items():
            if before.get(key) != now:
                raise UserError(
                    f"labels={self.path}: {key} was {json.dumps(before.get(key))} and is now "
                    f"{json.dumps(now)}: name another file, or delete {path.name}"
                )
        return rows

    def add(self, rows: list[dict]) -> None:
        """Store the rows of the next problems."""
        self.progress.append(rows)
        self.rows += rows

    def finish(self, by: LabelBy) -> None:
        """Write FILE as a whole, unless it is already there with the same content.

        Raises UserError if it is there with another content (it was edited, or `by` has changed),
        or if no problem has a label.
        """
        text = render(self.rows, by)
        if not text:
            raise UserError(
                f"labels={self.path}: no sample has a boxed answer, so there is no label: try "
                "another prompt or a larger max_new_tokens"
            )
        if self.path.exists():
            if self.path.read_text(encoding="utf-8") != text:
                raise UserError(
                    f"labels={self.path}: edited, or made with another label_by: delete it, but "
                    f"not {self.progress.path.name}, to have it written anew without sampling"
                )
            print(f"{self.path} is complete")
            return
        write_whole(self.path, text)

    def __enter__(self) -> "LabelFile":
        return self

    def __exit__(self, kind, *error) -> None:
        self.progress.close()
        if kind is not None and 0 < len(self.rows) < self.total:
            print(
                f"{len(self.rows)} of {self.total} problems are stored: repeat the command to go on"
            )


# ----------------------------------------------------------------------------------------- figures


def summarize(rows: list[dict], by: LabelBy, too_long: int = 0) -> dict:
    """Summarise the rows of label_rows. Shares are over the problems that have a label.

    accuracy        share of right labels, and stderr, its standard error
    wrong           number of wrong labels; the reward `incorrect` trains on these problems
    doubtful        number of labels that only the lenient rule accepts; it leaves these out
    majority_share  mean share of a problem's samples that gave the label
    answered_share  share of the samples of all problems that gave an answer
    differ          number of problems on which the two ways of counting disagree
    """
    labelled = [row for row in rows if row["answered"]]
    mean = {
        key: float(np.mean([row[key] for row in labelled]))
        for key in (f"{by}_correct", "equivalence_correct", "string_correct")
    }
    accuracy, n = mean[f"{by}_correct"], len(labelled)
    shares = [row[f"{by}_size"] / row["samples"] for row in labelled]
    refused = [row for row in labelled if not row[f"{by}_correct"]]
    by_rule = label_is_right([r[f"{by}_label"] for r in refused], [r["answer"] for r in refused])
    doubtful = sum(by_rule[1])
    return {
        "accuracy": accuracy,
        "stderr": (accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else None,
        "wrong": len(refused) - doubtful,
        "doubtful": doubtful,
        "majority_share": float(np.mean(shares)),
        "answered_share": float(np.mean([row["answered"] / row["samples"] for row in rows])),
        "label_by": by,
        "differ": sum(row["differ"] for row in labelled),
        "equivalence_accuracy": mean["equivalence_correct"],
        "string_accuracy": mean["string_correct"],
        "labelled": n,
        "unanswered": len(rows) - n,
        "too_long": too_long,
        "n": len(rows),
        "k": rows[0]["samples"],
    }


def print_labels(summary: dict, path: Path) -> None:
    """Print the summary. The last line is the summary as a JSON object."""
    s, stderr = summary, summary["stderr"]
    print(
        f"label accuracy  {100 * s['accuracy']:5.1f}%"
        + (f" +- {100 * stderr:.1f} (standard error)" if stderr is not None else "")
    )
    print(
        f"wrong labels    {s['wrong']} (the incorrect reward trains on these; not on "
        f"{s['doubtful']} that a lenient rule accepts)"
    )
    print(f"majority share  {100 * s['majority_share']:5.1f}% of a problem's samples")
    print(f"answered        {100 * s['answered_share']:5.1f}% of all samples")
    print(f"by equivalence  {100 * s['equivalence_accuracy']:5.1f}% right")
    print(
        f"by string       {100 * s['string_accuracy']:5.1f}% right, "
        f"another label on {s['differ']} problems"
    )
    print(
        f"problems x k    {s['n']} x {s['k']}, {s['labelled']} labelled, {s['unanswered']} "
        f"without an answer and {s['too_long']} too long dropped"
    )
    print(f"saved           {path}, {path.name}.progress")
    print(json.dumps(summary))
