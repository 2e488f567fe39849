"""Measure a model: accuracy, boxed share and code frequency on a set of problems.

    python eval.py --model=tiny --k=4 --temperature=1
    python eval.py --run=out/random_reward-tiny-seed0   (the run's model, adapter, data, prompt)
    python eval.py --model=Qwen/Qwen2.5-Math-1.5B --data=math500 --n=100 --level=5
    python eval.py --completions=FILE                   (grade saved completions)
    python eval.py --labels=FILE --model=tiny           (make majority labels: tasks/labels.py)

Every completion is saved as soon as it ends, so the same command continues an interrupted eval. The
last line printed is one JSON object.
"""

import harness  # noqa: F401  (before torch: see harness/__init__.py)

# isort: split

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

import grading
from data import PROMPTS, Problem, prepare
from engine import EVAL_NOISE, decode_rows, generate
from harness.adapters import load_adapter
from harness.configurator import configure
from harness.errors import UserError, run
from harness.inputs import of_weights
from harness.loading import check_positions, choose_device, load_model, load_tokenizer
from harness.partial import Kept
from harness.progress import Progress
from harness.runfiles import (
    over_its_base,
    save_rows,
    stale,
    trained_weights,
    write_json,
)
from model import end_token_ids
from settings import read_settings
from tasks import answers, labels, tiny
from tasks.datasets import load_completions, load_problems, subset
from tasks.labels import LabelBy

Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids


@dataclass
class EvalConfig:
    """Measure a model on a set of problems, grade saved completions, or make majority labels."""

    # What is measured: one of run, model, completions
    run: str = ""  # folder of a training run; gives model, adapter, eval data, prompt and lengths
    model: str = ""  # hub id, folder, or tiny / tiny_bad; "" = the base model of the adapter
    adapter: str = ""  # folder of an adapter in PEFT's format, put on its base model
    completions: str = ""  # .jsonl with problem, answer, completions (a list), to be graded
    quant: Literal["none", "nf4"] = "none"  # nf4: 4-bit weights; not given: as in the adapter
    # Which problems
    data: str = "math500"  # math500, gsm8k, a .jsonl file, a folder, a hub id, tiny
    n: int = 0  # number of problems, drawn with a fixed seed; 0 = all
    level: str = ""  # only problems of this level, e.g. 5
    subject: str = ""  # only problems of this subject, e.g. Algebra
    prompt: str = "qwen_math"  # prompt format, one of data.PROMPTS, e.g. qwen_math, none
    # How responses are sampled
    k: int = 1  # samples per problem (avg@k)
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # nucleus sampling, 1 = off
    top_k: int = 0  # sample from the k likeliest tokens, 0 = off
    max_prompt_tokens: int = 1024  # longer prompts are dropped; their number is printed
    max_new_tokens: int = 3072  # longest response, in tokens
    rollout_rows: int = 64  # responses decoded at once; this bounds the KV cache
    seed: int = 0  # seed of the samples
    device: str = "auto"  # auto = cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: harness/loading.py
    out: str = ""  # folder for completions.jsonl and summary.json; "" = run/eval or out/eval-MODEL
    # Majority labels, for train.py --train_data=FILE. The defaults are then data=deepscaler (train
    # split), k=64, temperature=1, prompt=none. With --run they are made for the run's train_data by
    # its base model; add --adapter=RUN/adapter to make them by the trained model
    labels: str = ""  # .jsonl to make or to continue: each problem and its most common answer
    label_by: LabelBy = "equivalence"  # which answers count as the same: equivalent, same string


# ------------------------------------------------------------------------------------ measurement


def summarize(rows: list[dict]) -> dict:
    """Compute the figures of graded rows.

    A row has completions, correct and maybe finish_reason, each a list of k.

    accuracy is the mean of correct. stderr is the standard error over problems, because k samples
    of one problem are not k problems. boxed is the share with a non-empty last box. code_frequency
    is the share that contains "python". accuracy_code and accuracy_language are over the responses
    with and without code, None if there are none. truncated is the share that ran out of tokens,
    None if unknown.
    """
    per_problem = np.array([np.mean(row["correct"]) for row in rows])
    correct = np.array([c for row in rows for c in row["correct"]], dtype=float)
    texts = [text for row in rows for text in row["completions"]]
    code = np.array(["python" in text.lower() for text in texts])
    boxed = np.array([grading.last_boxed(text) is not None for text in texts])
    reasons = [reason for row in rows for reason in row.get("finish_reason") or []]
    n = len(rows)

    def share(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) else None

    return {
        "accuracy": float(per_problem.mean()),
        "stderr": float(per_problem.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "boxed": float(boxed.mean()),
        "code_frequency": float(code.mean()),
        "accuracy_code": share(correct[code]),
        "accuracy_language": share(correct[~code]),
        "truncated": share(np.array([reason == "length" for reason in reasons])),
        "n": n,
        "k": len(rows[0]["completions"]),
    }


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of an eval."""

    k: int = 1  # samples per problem
    temperature: float = 0.0  # 0 = greedy: one sample per problem, since all would be equal
    max_new_tokens: int = 3072
    seed: int = 0
    rollout_rows: int = 64  # rows decoded at once; in fp32 it does not change the samples
    top_p: float = 1.0
    top_k: int = 0
    prefix: str = ""  # the responses begin with this text (data.Prompt)

    @property
    def copies(self) -> int:
        return self.k if self.temperature > 0 else 1


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Items,
    sampling: Sampling,
    desc: str = "eval",
    path: Path | None = None,
) -> tuple[dict, list[dict]]:
    """Sample responses to each (problem, prompt token ids), grade them and summarize.

    Returns (summary, rows). The rows have the columns problem, answer, completions, correct and
    finish_reason. The samples are a function of the seed and a problem's position in items. path is
    the file for the rows. With it, an interrupted eval continues from the rows that it has kept
    (harness/partial.py).
    """
    settings = {}
    if path is not None:
        settings = {"weights": of_weights(model), "problems": labels.fingerprint(items)}
        settings |= {k: v for k, v in vars(sampling).items() if k != "rollout_rows"}
    with Kept(path, settings) as kept:
        if kept.rows:
            print(f"{desc}: {len(kept.rows)} of {len(items)} problems were done and are kept")
        if len(kept.rows) < len(items):
            _sample(model, tokenizer, items, sampling, desc, kept)
        rows = _graded(items, kept)
        if path is not None:
            save_rows(rows, path)
            kept.drop()
    return summarize(rows), rows


def _sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Items,
    sampling: Sampling,
    desc: str,
    kept: Kept,
) -> None:
    """Sample the problems that are not kept yet. A problem is kept when its last copy has ended."""
    copies = sampling.copies
    left = [i for i in range(len(items)) if i not in kept.rows]
    ended: list[dict[int, tuple[str, str]]] = [{} for _ in left]  # per problem: copy -> result

    def on_end(row: int, response: list[int], finished: bool) -> None:
        (text,) = decode_rows(tokenizer, [response], sampling.prefix)
        one = ended[row // copies]
        one[row % copies] = (text, "stop" if finished else "length")
        if len(one) == copies:
            texts, reasons = zip(*(one[copy] for copy in range(copies)), strict=True)
            kept.add(left[row // copies], list(texts), list(reasons))

    done = (len(items) - len(left)) * copies
    with Progress(len(items) * copies, desc, initial=done, leave=False) as progress:
        generate(
            model,
            [items[i][1] for i in left],
            copies,
            sampling.max_new_tokens,
            end_token_ids(model, tokenizer),
            (EVAL_NOISE, sampling.seed),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.rollout_rows,
            progress,
            numbers=left,
            on_end=on_end,
        )


def _graded(items: Items, kept: Kept) -> list[dict]:
    """The rows of an eval, graded in one batch."""
    done = [kept.rows[i] for i in range(len(items))]
    texts = [text for row in done for text in row["completions"]]
    asked = [p for (p, _), row in zip(items, done, strict=True) for _ in row["completions"]]
    correct = iter(answers.correct(texts, asked))
    return [
        {
            "problem": problem.problem,
            "answer": problem.answer,
            "completions": row["completions"],
            "correct": [bool(next(correct)) for _ in row["completions"]],
            "finish_reason": row["finish_reason"],
        }
        for (problem, _), row in zip(items, done, strict=True)
    ]


# ------------------------------------------------------------------------------------ command line


def grade_completions(rows: list[dict]) -> tuple[dict, list[dict], list[tuple[int, int]]]:
    """Grade saved completions.

    Returns the summary, the graded rows, and the [(row, sample)] whose verdict differs from the
    saved `correct` column. The summary also has lenient_accuracy, which accepts answers in prose
    (never used as a reward), and agreement with the `correct` column if all rows have one.
    """
    texts = [text for row in rows for text in row["completions"]]
    golds = [row["answer"] for row in rows for _ in row["completions"]]
    verdicts = iter(grading.correct(texts, golds))
    graded = [
        {**row, "correct": [bool(next(verdicts)) for _ in row["completions"]]} for row in rows
    ]
    summary = summarize(graded)
    lenient = grading.grader().grade([grading.lenient_answer(t) for t in texts], golds)
    summary["lenient_accuracy"] = float(np.mean(lenient))
    summary["grader_timeouts"] = grading.grader().timeouts
    summary["grader_crashes"] = grading.grader().errors
    odd = []
    if all(isinstance(row.get("correct"), list) for row in rows):
        odd = [
            (i, j)
            for i, (old, new) in enumerate(zip(rows, graded, strict=True))
            for j, (a, b) in enumerate(zip(old["correct"], new["correct"], strict=True))
            if bool(a) != b
        ]
        summary["agreement"] = 1 - len(odd) / len(texts)
    return summary, graded, odd


def fill(cfg: EvalConfig, given: dict) -> EvalConfig:
    """Fill in the settings that were not given, from the run's config.json or for the tiny task."""
    if cfg.adapter and not cfg.run:
        cfg = over_its_base(cfg, given)
    values: dict = {"data": "deepscaler"} if cfg.labels else {}
    if cfg.run:
        saved = read_settings(cfg.run)
        same = ("model", "quant", "prompt", "dtype", "max_prompt_tokens", "max_new_tokens")
        values = {key: saved[key] for key in (*same, "rollout_rows")}
        if cfg.labels:
            values["data"] = saved["train_data"]
        else:
            values |= {key: saved[f"eval_{key}"] for key in ("data", "n", "k", "temperature")}
            values |= trained_weights(cfg.run)
    elif tiny.is_tiny(cfg.model):
        values = {"data": cfg.model, "prompt": "none", "max_prompt_tokens": 32}
        values |= {"max_new_tokens": tiny.RESPONSE_TOKENS, "rollout_rows": 1024}
    if cfg.labels:
        values |= {"k": 64, "temperature": 1.0, "prompt": "none"}
    cfg = replace(cfg, **{key: value for key, value in values.items() if key not in given})
    return over_its_base(cfg, given) if cfg.run and cfg.adapter else cfg


def load_for_eval(cfg: EvalConfig) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Load model (with its adapter) and tokenizer for an EvalConfig or a config with its fields."""
    name = tiny.resolve(cfg.model)
    device, dtype = choose_device(cfg.device, cfg.dtype, name)
    tokenizer = load_tokenizer(name)
    if warning := stale(cfg.adapter or name):
        print(f"warning: {warning}")
    model = load_model(name, cfg.quant, dtype, device)
    if cfg.adapter:
        load_adapter(model, cfg.adapter)
    return model, tokenizer


def print_summary(summary: dict, folder: Path | None) -> None:
    """Print the figures. The last line is the summary as one JSON object."""

    def percent(x: float | None) -> str:
        return "   -  " if x is None else f"{100 * x:5.1f}%"

    stderr = summary["stderr"]
    print(
        f"accuracy        {percent(summary['accuracy'])}"
        + (f" +- {100 * stderr:.1f} (standard error)" if stderr is not None else "")
    )
    print(f"  with code     {percent(summary['accuracy_code'])}")
    print(f"  without       {percent(summary['accuracy_language'])}")
    for key in ("boxed", "code_frequency", "truncated", "lenient_accuracy", "agreement"):
        if key in summary:
            print(f"{key:<16}{percent(summary[key])}")
    print(f"problems x k    {summary['n']} x {summary['k']}")
    if folder:
        print(f"saved           {folder}/completions.jsonl, summary.json")
    print(json.dumps(summary))


def make_labels(cfg: EvalConfig) -> None:
    """Handle --labels=FILE: make the file, continue it, or report again what is in it."""
    if cfg.k < 2 or cfg.temperature <= 0:
        raise UserError("labels: a majority wants k of 2 or more and a temperature above 0")
    name = tiny.resolve(cfg.model)
    tokenizer = load_tokenizer(name)
    problems = subset(load_problems(tiny.resolve(cfg.data), "train"), cfg.n, cfg.level, cfg.subject)
    items, too_long = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    # No label depends on the settings in free. The tiny model's folder is named after its recipe.
    free = ("run", "completions", "out", "labels", "label_by", "rollout_rows", "device")
    settings = {key: value for key, value in vars(cfg).items() if key not in free}
    settings["model"] = Path(name).name if tiny.is_tiny(cfg.model) else cfg.model
    settings["dtype"] = str(choose_device(cfg.device, cfg.dtype, name)[1])
    settings["problems"] = labels.fingerprint(items)
    with labels.LabelFile(cfg.labels, settings, len(items)) as file:
        if len(file.rows) < len(items):
            model, _ = load_for_eval(cfg)
            check_positions(model, cfg.max_prompt_tokens, cfg.max_new_tokens)
            for rows in labels.label(
                model,
                tokenizer,
                items,
                cfg.k,
                cfg.max_new_tokens,
                cfg.seed,
                cfg.temperature,
                cfg.top_p,
                cfg.top_k,
                cfg.rollout_rows,
                first=len(file.rows),
                prefix=PROMPTS[cfg.prompt].prefix,
            ):
                file.add(rows)
        file.finish(cfg.label_by)
    labels.print_labels(labels.summarize(file.rows, cfg.label_by, too_long), file.path)


def main(argv: list[str]) -> None:
    cfg, sources = configure(EvalConfig, argv)
    for key in ("completions", "out") if cfg.labels else ():
        if getattr(cfg, key):
            raise UserError(
                f"{key} has no effect with --labels=FILE, which samples and writes FILE"
            )
    if not cfg.labels and "label_by" in sources.given:
        raise UserError("label_by acts only with --labels=FILE")
    if cfg.completions:
        summary, _, odd = grade_completions(load_completions(cfg.completions))
        for i, j in odd:
            print(f"differs from `correct`: row {i} sample {j}")
        print_summary(summary, None)
        return
    cfg = fill(cfg, sources.given)
    if not cfg.model:
        raise UserError("nothing to measure: name --model=..., --run=FOLDER or --completions=FILE")
    for key in ("k", "rollout_rows", "max_new_tokens"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    if cfg.labels:
        make_labels(cfg)
        return
    if cfg.temperature == 0 and cfg.k > 1:
        print(f"warning: k={cfg.k} acts only with temperature > 0; one greedy sample a problem")
    problems = subset(load_problems(tiny.resolve(cfg.data), "test"), cfg.n, cfg.level, cfg.subject)
    model, tokenizer = load_for_eval(cfg)
    check_positions(model, cfg.max_prompt_tokens, cfg.max_new_tokens)
    items, dropped = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    if dropped:
        print(f"{dropped} problems longer than {cfg.max_prompt_tokens} prompt tokens dropped")
    name = Path(cfg.model).name
    folder = Path(cfg.out or (Path(cfg.run) / "eval" if cfg.run else Path("out") / f"eval-{name}"))
    sampling = Sampling(
        cfg.k,
        cfg.temperature,
        cfg.max_new_tokens,
        cfg.seed,
        cfg.rollout_rows,
        cfg.top_p,
        cfg.top_k,
        PROMPTS[cfg.prompt].prefix,
    )
    path = folder / "completions.jsonl"
    summary, _ = evaluate(model, tokenizer, items, sampling, path=path)
    write_json(folder / "summary.json", {**vars(cfg), **summary})
    print_summary(summary, folder)


if __name__ == "__main__":
    run(main)
