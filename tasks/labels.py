"""Offline majority labels: what a model itself answers most often to each problem.

    python eval.py --labels=FILE --model=NAME --data=SOURCE
    python train.py config/majority.py --train_data=FILE

Every problem is sampled many times at temperature 1 from its raw text (64 times, no chat template:
Shao et al., "Spurious Rewards", arXiv 2506.10947). A sample's answer is its last box; samples
without one are dropped. Equivalent answers form a cluster, and the label is the largest cluster in
its most frequent spelling. The paper's code counts equal strings instead, which divides 0.5 and
1/2: `string` does so too, and the report says how often the two labels differ.

FILE appears whole, at the end. FILE.progress holds the settings and every problem done, those
without any answer included; the same command goes on from there.
"""

import hashlib
import json
import os
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
from harness.locks import lock
from harness.progress import Progress
from model import end_token_ids
from tasks.answers import found

LabelBy = Literal["equivalence", "string"]
Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids


# --------------------------------------------------------------------------------------- counting


def count(pairs: list[tuple[str, int | str]]) -> list[tuple[str, int]]:
    """[(spelling, size)] of the clusters, largest first, of the (answer, its cluster) pairs.

    A cluster goes by its most frequent spelling. Ties, of sizes and of spellings, go to what came
    first: ("0.5", 0), ("7", 1), ("1/2", 0) gives [("0.5", 2), ("7", 1)].
    """
    spellings: dict[int | str, Counter] = {}
    for answer, cluster in pairs:
        spellings.setdefault(cluster, Counter())[answer] += 1
    counted = [(c.most_common(1)[0][0], c.total()) for c in spellings.values()]
    return sorted(counted, key=lambda pair: -pair[1])  # stable


def label_rows(
    problems: list[Problem], answers: list[list[str | None]], grader: grading.Grader | None = None
) -> list[dict]:
    """One row a problem from the answers of its samples, [problems][samples], None where none.

    Columns: the problem's own; samples, answered (numbers of samples); clusters [[answer, size]],
    largest first; for both ways of counting label ("" where no sample has an answer), size and
    correct (against the gold answer); differ (the two labels are not equivalent).
    """
    groups = [i for i, part in enumerate(answers) for _ in part]
    cluster = iter(grading.clusters([a for part in answers for a in part], groups, grader))
    rows = []
    for problem, part in zip(problems, answers, strict=True):
        pairs = [(answer, c) for answer in part if (c := next(cluster)) >= 0]
        by_cluster, by_string = count(pairs), count([(answer, answer) for answer, _ in pairs])
        row = {key: getattr(problem, key) for key in ("problem", "answer", "id", "subject")}
        row |= {"level": problem.level, "samples": len(part), "answered": len(pairs)}
        row["clusters"] = [list(pair) for pair in by_cluster]
        for by, counted in (("equivalence", by_cluster), ("string", by_string)):
            row[f"{by}_label"], row[f"{by}_size"] = counted[0] if counted else ("", 0)
        cluster_of = dict(pairs)  # equal strings share one
        tops = {cluster_of.get(row[f"{by}_label"]) for by in ("equivalence", "string")}
        row["differ"] = len(tops) > 1
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
    """Which labels are right: by the strict rule of every reward, and by a lenient rule as well.

    The strict rule refuses what it cannot read, so some labels that it calls wrong are right. The
    lenient rule accepts whatever the strict one does. It also accepts a label that equals the gold
    answer but for case and spaces, and one that the strict rule accepts after label, gold answer or
    both were read as prose, if they have words: the last box, what follows "answer is", or the last
    number (spelling.lenient_answer). A label that it refuses is wrong; not every one that it
    accepts is right.
    """
    grader = grader or grading.grader()
    read, read_golds = [_prose(label) for label in labels], [_prose(gold) for gold in golds]
    strict = grader.grade(labels, golds)
    verdicts = [strict, [_squeeze(a) == _squeeze(b) for a, b in zip(labels, golds, strict=True)]]
    for pairs in ((read, golds), (labels, read_golds), (read, read_golds)):
        verdicts.append(grader.grade(*pairs))
    return strict, [any(row) for row in zip(*verdicts, strict=True)]


def _prose(text: str) -> str:
    """The answer in a text that has words (letters in a row that are no LaTeX command)."""
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
) -> Iterator[list[dict]]:
    """Sample and count items[first:], yielding the rows of one batch of problems at a time.

    A batch is what is decoded at once, or one problem. The samples are a function of seed and of a
    problem's place in items: neither batches nor where one starts change a label.
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
            texts = decode(tokenizer, out.tokens, out.prompt_len, out.length)
            flat = found(texts, [p for p, _ in part for _ in range(samples)])
            answers = [flat[i : i + samples] for i in range(0, len(flat), samples)]
            yield label_rows([problem for problem, _ in part], answers)


def render(rows: list[dict], by: LabelBy) -> str:
    """The text of a labelled file: rows without an answer left out, one of the labels chosen."""
    lines = []
    for row in rows:
        if row["answered"]:
            chosen = {"label": row[f"{by}_label"], "label_size": row[f"{by}_size"]}
            chosen["label_correct"] = row[f"{by}_correct"]
            lines.append(json.dumps({**row, **chosen}) + "\n")
    return "".join(lines)


# --------------------------------------------------------------------------------------- the file


def fingerprint(items: Items) -> str:
    """Number of the problems, and a hash of all that a label depends on in them."""
    content = json.dumps([(problem.problem, problem.answer, ids) for problem, ids in items])
    return f"{len(items)} problems, {hashlib.sha256(content.encode()).hexdigest()[:12]}"


class LabelFile:
    """FILE and FILE.progress, held by one process; rows are those of the problems done.

    settings: what the labels depend on, as JSON. total: number of problems. Raises UserError where
    FILE cannot be written, is being made by another process, was made with other settings, or was
    not made here.
    """

    def __init__(self, file: str, settings: dict, total: int):
        self.path, self.total = Path(file).expanduser(), total
        self.progress = self.path.with_name(self.path.name + ".progress")
        where, other = f"labels={file}", "name another file, or delete this one"
        if self.path.is_dir():
            raise UserError(f"{where}: a folder: name a file in it, e.g. {file}/labels.jsonl")
        if self.path.exists() and not self.progress.exists():
            raise UserError(f"{where}: exists, and has no {self.progress.name}: {other}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Never replaced, only appended to, so that the lock on it holds.
            self._file = open(self.progress, "a+", encoding="ascii", newline="\n")
        except OSError as error:
            raise UserError(f"{where}: cannot be written: {error.strerror}") from error
        try:
            lock(self._file)
        except OSError as error:
            raise UserError(f"{where}: another process is making it") from error
        try:
            self.rows = self._read(settings)
            if self.path.exists() and len(self.rows) < total:
                raise UserError(f"{where}: exists, but {self.progress.name} is unfinished: {other}")
        except UserError:
            self._file.close()  # and with it the lock
            raise

    def _read(self, settings: dict) -> list[dict]:
        """The rows done, the file cut behind them; the settings are written where there is none."""
        self._file.seek(0)
        try:
            text = self._file.read()
            text = text[: text.rfind("\n") + 1]  # a line that a crash cut off is dropped
            before, *rows = [json.loads(line) for line in text.splitlines()] or [{"settings": {}}]
            before = before["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.progress}: not a list of labels: delete it") from error
        for key, now in settings.items():
            if rows and before.get(key) != now:
                raise UserError(
                    f"labels={self.path}: {key} was {json.dumps(before.get(key))} and is now "
                    f"{json.dumps(now)}: name another file, or delete {self.progress.name}"
                )
        self._file.truncate(len(text) if rows else 0)
        if not rows:  # nothing is lost by other settings yet
            self._append([{"settings": settings}])
        return rows

    def _append(self, lines: list[dict]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def add(self, rows: list[dict]) -> None:
        """Keep the rows of the next problems."""
        self._append(rows)
        self.rows += rows

    def finish(self, by: LabelBy) -> None:
        """Write FILE, whole or not at all; leave one that is there if it is what would be written.

        Raises UserError where it is not (it was edited, or `by` is another now), or where no
        problem has a label.
        """
        text = render(self.rows, by)
        if not text:
            raise UserError(
                f"labels={self.path}: no sample has a boxed answer: nothing is labelled; try "
                "another prompt or a larger max_new_tokens"
            )
        if self.path.exists():
            if self.path.read_text(encoding="utf-8") != text:
                raise UserError(
                    f"labels={self.path}: edited, or made with another label_by: delete it (not "
                    f"{self.progress.name}) and it is written anew without sampling"
                )
            print(f"{self.path} is complete")
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text, encoding="ascii")
        os.replace(temporary, self.path)

    def __enter__(self) -> "LabelFile":
        return self

    def __exit__(self, kind, *error) -> None:
        self._file.close()
        if kind is not None and 0 < len(self.rows) < self.total:
            print(f"{len(self.rows)} of {self.total} problems are kept: the same command goes on")


# ----------------------------------------------------------------------------------------- figures


def summarize(rows: list[dict], by: LabelBy, too_long: int = 0) -> dict:
    """Figures of the rows of label_rows, shares over the problems that have a label.

    accuracy: share of right labels, stderr its standard error; wrong: number of wrong ones, on
    which the incorrect reward trains; doubtful: labels that only a lenient rule accepts, on which
    it does not (label_is_right); majority_share: mean share of a problem's samples that gave the
    label, answered_share: that gave any answer; differ: problems on which the two ways of counting
    disagree, with the accuracy of each.
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
    """Print the figures; the last line is the JSON object."""
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
