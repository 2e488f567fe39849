"""Show what a model writes: base and trained side by side, on one question.

    python sample.py --run=out/random_reward-tiny-seed0 --row=7
    python sample.py --run=out/random_reward-tiny-seed0 --question="Start: 7 add 5?" --n=3
    python sample.py --model=Qwen/Qwen2.5-Math-1.5B --question="What is 2^10?"
    python sample.py --html=page.html out/random_reward-tiny-seed0      # a page of what was saved
    python sample.py --html=page.html base.jsonl trained.jsonl

Both columns use the same random numbers, so only training can make them differ. --html samples
nothing: it writes a page of one or two run folders or completion files (docs/PAGE.md).
"""

import harness  # noqa: F401  (before torch: see harness/__init__.py)

# isort: split

import re
import shutil
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data import PROMPTS, Problem, prepare
from decoding import sampling as sampler
from engine import EVAL_NOISE, decode, generate
from eval import load_for_eval
from harness.configurator import configure
from harness.errors import UserError, printable, run
from harness.loading import load_model
from harness.progress import Progress
from harness.runfiles import over_its_base, stale, trained_weights
from lora import adapter_off
from model import end_token_ids
from settings import read_settings
from tasks import answers, tiny
from tasks.datasets import load_problems


@dataclass
class SampleConfig:
    """Show what a model writes, base and trained side by side."""

    # Which models
    run: str = ""  # folder of a training run; shows its base model and its trained model
    model: str = ""  # hub id, folder, or tiny / tiny_bad; shown alone, or the adapter's base
    adapter: str = ""  # folder of an adapter in PEFT's format, put on its base model
    quant: Literal["none", "nf4"] = "none"  # nf4: 4-bit weights; not given: as in the adapter
    # What they are asked
    question: str = ""  # "" = use a row of the data
    data: str = "math500"  # math500, gsm8k, a .jsonl file, a folder, a hub id, tiny
    row: int = 0  # number of the row, from 0
    prompt: str = "qwen_math"  # prompt format, one of data.PROMPTS, e.g. qwen_math, none
    # How they answer
    n: int = 1  # answers per model
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # nucleus sampling, 1 = off
    top_k: int = 0  # sample from the k likeliest tokens, 0 = off
    max_new_tokens: int = 1024  # longest response, in tokens; less if the model's positions end
    seed: int = 0  # seed of the samples
    device: str = "auto"  # auto = cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: harness/loading.py
    # A page of what was saved, instead of new answers
    html: str = ""  # write a page of the named run folders or completion files to this file


def fill(cfg: SampleConfig, given: dict) -> SampleConfig:
    """Fill in the settings that were not given, from the run's config.json or for the tiny task."""
    if cfg.adapter and not cfg.run:
        cfg = over_its_base(cfg, given)
    values = {}
    if cfg.run:
        saved = read_settings(cfg.run)
        names = ("model", "quant", "prompt", "temperature", "max_new_tokens", "dtype")
        values = {name: saved[name] for name in names} | {"data": saved["eval_data"]}
        values |= {k: v for k, v in trained_weights(cfg.run).items() if k == "adapter"}
    elif tiny.is_tiny(cfg.model):
        values = {"data": cfg.model, "prompt": "none"}
    cfg = replace(cfg, **{key: value for key, value in values.items() if key not in given})
    return over_its_base(cfg, given) if cfg.run and cfg.adapter else cfg


def side_by_side(columns: list[str], width: int) -> str:
    """Put columns of text side by side within `width` characters. Lines wrap, newlines stay."""
    each = max(16, (width - 3 * (len(columns) - 1)) // len(columns))
    wrapped = []
    for text in columns:
        lines = [textwrap.wrap(line, each) or [""] for line in printable(text).split("\n")]
        wrapped.append([part for line in lines for part in line])
    height = max(map(len, wrapped))
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in wrapped), strict=True)
    return "\n".join(" | ".join(part.ljust(each) for part in row).rstrip() for row in rows)


def verdict(text: str, problem: Problem, finished: bool) -> str:
    """The extracted answer and, if the gold answer is known, whether it is right."""
    (answer,) = answers.found([text], [problem])
    right = ""
    if problem.answer:
        right = ", right" if answers.correct([text], [problem])[0] else ", wrong"
    cut = "" if finished else ", cut off"
    return f"[{'no answer' if answer is None else 'answer: ' + answer}{right}{cut}]"


def answer(
    model, tokenizer, ids: list[int], cfg: SampleConfig, name: str
) -> list[tuple[str, bool]]:
    """Sample cfg.n answers to a prompt's token ids: [(text, whether it ended in time)].

    Raises UserError if the prompt leaves no room for an answer.
    """
    room = getattr(model.config, "max_position_embeddings", None) or len(ids) + cfg.max_new_tokens
    budget = min(cfg.max_new_tokens, room - len(ids))
    if budget < 1:
        raise UserError(f"the prompt has {len(ids)} tokens, the model {room} positions: no room")
    with Progress(cfg.n, name, leave=False) as progress:
        out = generate(
            model,
            [ids],
            cfg.n,
            budget,
            end_token_ids(model, tokenizer),
            (EVAL_NOISE, cfg.seed),
            cfg.temperature,
            cfg.top_p,
            cfg.top_k,
            progress=progress,
        )
    prefix = PROMPTS[cfg.prompt].prefix
    texts = decode(tokenizer, out.tokens, out.prompt_len, out.length, prefix)
    return list(zip(texts, out.finished.tolist(), strict=True))


def write_html(argv: list[str]) -> None:
    """Handle --html=FILE, with the run folders or completion files named without a dash."""
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    named = [arg for arg in argv if arg not in options]
    cfg, sources = configure(SampleConfig, options)
    idle = sources.given.keys() - {"html", "run"}
    if idle:
        raise UserError(f"{min(idle)} has no effect with --html, which samples nothing")
    if not cfg.run and not named:
        raise UserError("--html: name one or two run folders or completion files")
    from pages.write import write_page  # needed only here

    write_page(cfg.html, [cfg.run, *named] if cfg.run else named)


def main(argv: list[str]) -> None:
    if any(re.match(r"(--)?html=.", arg) for arg in argv):
        write_html(argv)
        return
    cfg, sources = configure(SampleConfig, argv)
    cfg = fill(cfg, sources.given)
    if not cfg.model:
        raise UserError("nothing to sample from: name --run=FOLDER or --model=...")
    if cfg.n < 1 or cfg.max_new_tokens < 1:
        raise UserError("n and max_new_tokens must be at least 1")
    sampler.check(cfg.temperature, cfg.top_p, cfg.top_k, cfg.seed)
    if cfg.question:
        problem = Problem(cfg.question, "", id="")
    else:
        problems = load_problems(tiny.resolve(cfg.data), "test", keep_duplicates=True)
        if not 0 <= cfg.row < len(problems):
            raise UserError(f"row={cfg.row}: {cfg.data} has rows 0 to {len(problems) - 1}")
        problem = problems[cfg.row]
    model, tokenizer = load_for_eval(cfg)
    [(_, ids)], _ = prepare([problem], cfg.prompt, tokenizer, 2**31)

    with adapter_off(model):  # has no effect without an adapter
        columns = {"base": answer(model, tokenizer, ids, cfg, "base")}
    if cfg.run and not cfg.adapter:  # full training saves a whole model
        weights = next(model.parameters())
        name = str(Path(cfg.run) / "model")
        if warning := stale(name):
            print(f"warning: {warning}")
        model = load_model(name, "none", weights.dtype, weights.device)
    if cfg.run or cfg.adapter:
        columns["trained"] = answer(model, tokenizer, ids, cfg, "trained")

    width = shutil.get_terminal_size((120, 24)).columns
    print(side_by_side([problem.problem], width))
    if problem.answer:
        print(f"gold answer: {printable(problem.answer)}")
    for i in range(cfg.n):
        print("-" * width + (f"\nanswer {i + 1} of {cfg.n}" if cfg.n > 1 else ""))
        texts = []
        for name in columns:
            text, finished = columns[name][i]
            texts.append(f"{name}:\n\n{text}\n\n{verdict(text, problem, finished)}")
        print(side_by_side(texts, width))


if __name__ == "__main__":
    run(main)
