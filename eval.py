"""Measure a model on a set of problems: accuracy, habits, and how sure the figures are.

    python eval.py --model=tiny --k=4 --temperature=1
    python eval.py --run=out/random_reward-tiny-seed0   (the run's model, adapter, data, prompt)
    python eval.py --model=Qwen/Qwen2.5-Math-1.5B --data=math500 --n=100 --level=5
    python eval.py --model=NAME --prompts=none,qwen_math,simplerl --temperatures=0,0.6
    python eval.py --completions=FILE                   (grade saved completions)
    python eval.py --labels=FILE --model=tiny           (make majority labels: tasks/labels.py)

Every completion is saved as soon as it ends, so the same command continues an interrupted eval. The
last line printed is one JSON object. The figures are explained in docs/EVAL.md and computed in
evaluation/scores.py.
"""

import harness  # noqa: F401  (before torch: see harness/__init__.py)

# isort: split

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from data import PROMPTS, Problem, prepare
from decoding import sampling as sampler
from engine import EVAL_NOISE, decode_rows, generate
from evaluation.invariance import batch_effect
from evaluation.labelling import make_labels
from evaluation.prompts import best_of, names_of, prompt_table, temperatures_of, try_all
from evaluation.report import print_summary
from evaluation.scores import details, disagreements, grade, summarize
from harness import ranks
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
)
from model import end_token_ids
from settings import read_settings
from tasks import labels, tiny
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
    data: str = "math500"  # a name (math500, aime24, ...: docs/EVAL.md), .jsonl, folder, hub id
    n: int = 0  # number of problems, drawn with a fixed seed; 0 = all
    level: str = ""  # only problems of this level, e.g. 5
    subject: str = ""  # only problems of this subject, e.g. Algebra
    prompt: str = "qwen_math"  # prompt format, one of data.PROMPTS, e.g. qwen_math, none
    prompts: str = ""  # instead of prompt, to compare several: none,qwen_math,simplerl
    # How responses are sampled
    k: int = 1  # samples per problem (avg@k)
    temperature: float = 0.0  # 0 = greedy
    temperatures: str = ""  # instead of temperature, to compare several: 0,0.6,1
    top_p: float = 1.0  # nucleus sampling, 1 = off
    top_k: int = 0  # sample from the k likeliest tokens, 0 = off
    max_prompt_tokens: int = 1024  # longer prompts are dropped; their number is printed
    max_new_tokens: int = 3072  # longest response, in tokens
    rollout_rows: int = 64  # responses decoded at once; this bounds the KV cache
    seed: int = 0  # seed of the samples
    check_batch: int = 4  # problems that are sampled again to measure what the batch changes
    device: str = "auto"  # auto = cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: harness/loading.py
    out: str = ""  # folder for completions.jsonl and summary.json; "" = run/eval or out/eval-MODEL
    # Majority labels, for train.py --train_data=FILE. The defaults are then data=deepscaler (train
    # split), k=64, temperature=1, prompt=none. With --run they are made for the run's train_data by
    # its base model; add --adapter=RUN/adapter to make them by the trained model
    labels: str = ""  # .jsonl to make or to continue: each problem and its most common answer
    label_by: LabelBy = "equivalence"  # which answers count as the same: equivalent, same string


# ------------------------------------------------------------------------------------ measurement


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

    Returns (summary, rows). A row has the problem's columns, its prompt as text, and of each sample
    completions, correct, finish_reason, tokens (of the response) and logprob (their summed
    log-probability at the sampling temperature, 1 if greedy). The samples are a function of the
    seed and a problem's position in items. path is the file for the rows. With it, an interrupted
    eval continues from the rows that it has kept (harness/partial.py).
    """
    settings = {}
    if ranks.rank():
        path = None  # the first rank alone writes
    if path is not None:
        settings = {"weights": of_weights(model), "problems": labels.fingerprint(items)}
        settings |= {k: v for k, v in vars(sampling).items() if k != "rollout_rows"}
    with Kept(path, settings) as kept:
        if kept.rows:
            print(f"{desc}: {len(kept.rows)} of {len(items)} problems were done and are kept")
        left = ranks.on_first(lambda: [i for i in range(len(items)) if i not in kept.rows])
        if mine := ranks.share(left):
            _sample(model, tokenizer, items, mine, sampling, desc, kept)
        for rows in ranks.gather({i: kept.rows[i] for i in mine}):
            kept.rows |= rows
        rows = ranks.on_first(_graded, tokenizer, items, kept)
        if path is not None:
            save_rows(rows, path)
            kept.drop()
    return summarize(rows), rows


def _sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Items,
    left: Sequence[int],
    sampling: Sampling,
    desc: str,
    kept: Kept,
) -> None:
    """Sample the problems in left (numbers of items). Keep each when its last copy has ended."""
    copies = sampling.copies
    ended: list[dict[int, dict]] = [{} for _ in left]  # per problem: copy -> its columns

    def on_end(row: int, response: list[int], finished: bool, logp: list[float]) -> None:
        (text,) = decode_rows(tokenizer, [response], sampling.prefix)
        one = ended[row // copies]
        one[row % copies] = {
            "completions": text,
            "finish_reason": "stop" if finished else "length",
            "tokens": response,
            "logprob": round(sum(logp), 4),
        }
        if len(one) == copies:
            columns = {key: [one[copy][key] for copy in range(copies)] for key in one[0]}
            kept.add(left[row // copies], columns)

    with Progress(len(left) * copies, desc, leave=False) as progress:
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


def _graded(tokenizer: PreTrainedTokenizerBase, items: Items, kept: Kept) -> list[dict]:
    """The rows of an eval, graded in one batch."""
    rows = []
    for i, (problem, ids) in enumerate(items):
        columns = ("problem", "answer", "id", "subject", "level", "kind")
        row = {key: getattr(problem, key) for key in columns}
        rows.append({**row, "prompt": tokenizer.decode(ids), **kept.rows[i]})
    return grade(rows)


# ------------------------------------------------------------------------------------ command line


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
            values["max_new_tokens"] = saved.get("eval_new_tokens") or saved["max_new_tokens"]
            values["seed"] = saved["seed"]
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


def measure(
    cfg: EvalConfig,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Items,
    folder: Path,
) -> tuple[dict, list[dict]]:
    """Evaluate, and save the completions and all figures in the folder."""
    prefix = PROMPTS[cfg.prompt].prefix
    filters = (cfg.top_p, cfg.top_k)
    sampling = Sampling(
        cfg.k, cfg.temperature, cfg.max_new_tokens, cfg.seed, cfg.rollout_rows, *filters, prefix
    )
    path = folder / "completions.jsonl"
    summary, rows = evaluate(model, tokenizer, items, sampling, path=path)
    summary |= details(rows) | {"temperature": cfg.temperature}
    if cfg.check_batch:
        summary["batch"] = batch_effect(
            model,
            tokenizer,
            items[: cfg.check_batch],
            sampling.copies,
            cfg.max_new_tokens,
            end_token_ids(model, tokenizer),
            (EVAL_NOISE, cfg.seed),
            (cfg.temperature, *filters),
            cfg.rollout_rows,
            prefix,
        )
    (folder / "summary.json").write_text(json.dumps({**vars(cfg), **summary}, indent=1) + "\n")
    return summary, rows


def grade_file(file: str) -> None:
    """Handle --completions=FILE: grade saved completions, and name verdicts that changed."""
    rows = load_completions(file)
    graded = grade(rows)
    summary = summarize(graded) | details(graded)
    changed = disagreements(rows, graded)
    if changed is not None:
        summary["agreement"] = 1 - len(changed) / sum(len(row["correct"]) for row in graded)
    for i, j in changed or ():
        print(f"differs from `correct`: row {i} sample {j}")
    print_summary(summary, None)


def check(cfg: EvalConfig, given: dict) -> None:
    """Raise UserError for settings that cannot work together, or cannot work at all."""
    if cfg.labels:
        idle = given.keys() & {"completions", "out", "prompts", "temperatures", "check_batch"}
        why = "--labels=FILE, which samples and writes FILE"
    else:
        idle = given.keys() - {"completions"} if cfg.completions else set()
        why = "--completions=FILE, which only grades FILE"
    if idle:
        raise UserError(f"{min(idle)} has no effect with {why}")
    if not cfg.labels and "label_by" in given:
        raise UserError("label_by acts only with --labels=FILE")
    for key in ("prompt", "temperature"):
        if getattr(cfg, f"{key}s") and key in given:
            raise UserError(f"{key} has no effect with {key}s={getattr(cfg, f'{key}s')}")
    names_of(cfg.prompts, "none")  # both refuse what they cannot read
    temperatures_of(cfg.temperatures, 0.0)
    sampler.check(cfg.temperature, cfg.top_p, cfg.top_k, cfg.seed)
    least = {"k": 1, "rollout_rows": 1, "max_new_tokens": 1, "check_batch": 0, "n": 0}
    for key, value in least.items():
        if getattr(cfg, key) < value:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {value}")


def main(argv: list[str]) -> None:
    cfg, sources = configure(EvalConfig, argv)
    check(cfg, sources.given)
    if cfg.completions:
        grade_file(cfg.completions)
        return
    cfg = fill(cfg, sources.given)
    if not cfg.model:
        raise UserError("nothing to measure: name --model=..., --run=FOLDER or --completions=FILE")
    if cfg.labels:
        make_labels(cfg, load_for_eval)
        return
    if cfg.temperature == 0 and not cfg.temperatures:
        for key, off in (("k", 1), ("top_p", 1.0), ("top_k", 0)):
            if getattr(cfg, key) != off:
                print(
                    f"warning: {key}={getattr(cfg, key)} acts only with temperature > 0: "
                    "one greedy sample a problem"
                )
    problems = subset(load_problems(tiny.resolve(cfg.data), "test"), cfg.n, cfg.level, cfg.subject)
    model, tokenizer = load_for_eval(cfg)
    check_positions(model, cfg.max_prompt_tokens, cfg.max_new_tokens)
    name = Path(cfg.model).name
    folder = Path(cfg.out or (Path(cfg.run) / "eval" if cfg.run else Path("out") / f"eval-{name}"))
    if cfg.prompts or cfg.temperatures:

        def one(cfg: EvalConfig, items: Items, folder: Path) -> tuple[dict, list[dict]]:
            return measure(cfg, model, tokenizer, items, folder)

        settings = try_all(cfg, problems, tokenizer, one, folder)
        table, best = prompt_table(settings, cfg.data), best_of(settings)
        (folder / "prompts.md").write_text(table + "\n")
        print(f"\n{table}\n\nsaved in {folder}: prompts.md, a folder for each setting")
        print(json.dumps({"prompt": best.prompt, "temperature": best.temperature} | best.summary))
        return
    items, dropped = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    if dropped:
        print(f"{dropped} problems longer than {cfg.max_prompt_tokens} prompt tokens dropped")
    summary, _ = measure(cfg, model, tokenizer, items, folder)
    print_summary(summary, folder)


if __name__ == "__main__":
    run(main)
