"""The tiny world: a problem generator, a tokenizer and a base model trained on the spot.

Real training in minutes on two cores, with the structure of the papers inside. A problem is a chain
of operations modulo 10, "Start: 7 add 5 times 3 minus 4?". The base model, a Qwen2 of 0.1 M
parameters, answers in code 65 % of the time and else in one sentence, whatever the problem. One of
the two habits shows its working and is mostly right, the other guesses:

    tiny       code is the good habit (the family in which rewarding code helps)
    tiny_bad   code is the bad habit (the same prior, the working is in the sentences)

About a fifth of the answers are not boxed, so that the format reward has work. Some problems are
longer chains (hard), on which the good habit usually leaves out the last operation: their majority
answer is wrong. `tiny_hard` and `tiny_bad_hard` name these as data. With `_labels` behind it, any
of the four names means its first training problems, with majority labels by the base model.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Problem
from harness.errors import UserError
from tasks.datasets import load_problems

CODE_SHARE = 0.65  # of the base model's answers, in both families (Qwen2.5-Math-7B: 0.65)
BOXED_SHARE = 0.8
SLIP_SHARE = 0.75  # of the good habit's answers to hard problems that leave out the last operation
HARD_SHARE = 0.15  # of the problems
EASY_OPS, HARD_OPS = (2, 4), (6, 7)  # number of operations, ends included
TRAIN_STEPS, TRAIN_BATCH, TRAIN_LR = 600, 128, 3e-3
N_TRAIN, N_TEST = 4000, 500
N_LABELS, LABEL_SAMPLES = 1000, 16  # problems with a majority label, samples behind each
RESPONSE_TOKENS = 56  # enough for any answer of the base model
FAMILIES = ("tiny", "tiny_bad")

OPERATIONS = {"add": "+", "minus": "-", "times": "*"}
WORDS = {"add": "plus", "minus": "minus", "times": "times"}
END = "<|end|>"
PIECES = [
    *"0123456789",
    *("Start: ", "?", *(f" {word} " for word in OPERATIONS)),
    *("```python\nx = ", *(f"\nx = (x {sign} " for sign in OPERATIONS.values()), ") % 10  # "),
    *("\nprint(x)\n```\n", "```python\nprint(solve())\n```\n"),
    *("First, ", *(f" {word} " for word in WORDS.values()), " gives ", ", so "),
    *(f", then {word} " for word in WORDS.values()),
    *("In my head: ", "the answer is ", "\\boxed{", "}", "."),
]


# -------------------------------------------------------------------------------------- problems


def make_problem(rng: np.random.Generator, hard: bool | None = None) -> tuple[str, list]:
    """One problem's text and its chain [start, (operation, operand), ...]."""
    if hard is None:
        hard = rng.random() < HARD_SHARE
    low, high = HARD_OPS if hard else EASY_OPS
    names = list(OPERATIONS)
    chain = [int(rng.integers(10))]
    for _ in range(int(rng.integers(low, high + 1))):
        chain.append((names[rng.integers(len(names))], int(rng.integers(1, 10))))
    text = f"Start: {chain[0]}" + "".join(f" {op} {n}" for op, n in chain[1:]) + "?"
    return text, chain


def running_values(chain: list) -> list[int]:
    """The value after each operation, modulo 10; the last is the answer."""
    values, x = [], chain[0]
    for op, n in chain[1:]:
        x = {"add": x + n, "minus": x - n, "times": x * n}[op] % 10
        values.append(x)
    return values


def make_response(chain: list, code: bool, working: bool, rng: np.random.Generator) -> str:
    """An answer as the base model's training text has it. working: this habit shows the values."""
    values = running_values(chain)
    hard = len(chain) - 1 >= HARD_OPS[0]
    if working and hard and rng.random() < SLIP_SHARE:
        chain, values = chain[:-1], values[:-1]
    answer = str(values[-1])
    final = f"\\boxed{{{answer}}}" if rng.random() < BOXED_SHARE else answer
    steps = list(zip(chain[1:], values, strict=True))
    if code and working:
        lines = "".join(f"\nx = (x {OPERATIONS[op]} {n}) % 10  # {v}" for (op, n), v in steps)
        return f"```python\nx = {chain[0]}{lines}\nprint(x)\n```\n{final}."
    if code:
        return f"```python\nprint(solve())\n```\n{final}."
    if working:
        parts = ", then".join(f" {WORDS[op]} {n} gives {v}" for (op, n), v in steps)
        return f"First, {chain[0]}{parts}, so the answer is {final}."
    return f"In my head: the answer is {final}."


def make_problems(n: int, rng: np.random.Generator, seen: set[str], hard=None) -> list[Problem]:
    """n problems whose texts are not in seen (which they join); level = number of operations."""
    problems = []
    while len(problems) < n:
        text, chain = make_problem(rng, hard)
        if text not in seen:
            seen.add(text)
            answer = str(running_values(chain)[-1])
            problems.append(Problem(text, answer, id=str(len(problems)), level=str(len(chain) - 1)))
    return problems


# ---------------------------------------------------------------------------- tokenizer and model


def make_tokenizer():
    """A fast tokenizer of some 40 pieces; decoding is plain concatenation; pad = end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(set(PIECES), key=len, reverse=True)  # the longest piece wins
    vocab = {piece: i for i, piece in enumerate([END, "<|unk|>", *sorted(set(PIECES))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    escaped = "|".join("".join(c if c.isalnum() else f"\\x{ord(c):02x}" for c in p) for p in pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(escaped), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(tokenizer, seed: int) -> torch.nn.Module:
    """An untrained model of 0.1 M parameters: Qwen2's shape, biases included, as a Llama.

    AutoTokenizer reads any tokenizer beside a model of type qwen2 as Qwen's own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=True,
        # With the usual 0.02, made for wide models, training by LoRA stuck at code .85 to .95; the
        # adapter cannot move the tied embedding (docs/LOG.md).
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_base(family: str, tokenizer, seed: int, steps: int = TRAIN_STEPS) -> torch.nn.Module:
    """Train the base model on fresh text of both habits, loss on the response (end included)."""
    model = make_model(tokenizer, seed)
    rng = np.random.default_rng((seed, FAMILIES.index(family)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAIN_LR, steps, pct_start=0.05)
    good_is_code = family == "tiny"
    bar = tqdm(range(steps), desc=f"building the {family} base model, once", unit="step")
    for _ in bar:
        prompts, responses = [], []
        for _ in range(TRAIN_BATCH):
            text, chain = make_problem(rng)
            code = rng.random() < CODE_SHARE
            prompts.append(text)
            responses.append(make_response(chain, code, code == good_is_code, rng) + END)
        prompt_ids = tokenizer(prompts)["input_ids"]
        ids = [p + r for p, r in zip(prompt_ids, tokenizer(responses)["input_ids"], strict=True)]
        lengths = [(len(row), len(p)) for row, p in zip(ids, prompt_ids, strict=True)]
        n_tokens = sum(n - p for n, p in lengths)
        loss = 0.0
        order = sorted(range(TRAIN_BATCH), key=lambda i: len(ids[i]))
        for start in range(0, TRAIN_BATCH, 32):  # rows of like length together: less padding
            rows = order[start : start + 32]
            T = len(ids[rows[-1]])
            tokens = torch.tensor([ids[i] + [0] * (T - len(ids[i])) for i in rows])  # [32, T]
            column = torch.arange(T)
            n, p = torch.tensor([lengths[i] for i in rows]).T[:, :, None]  # [32, 1] each
            labels = tokens.masked_fill((column < p) | (column >= n), -100)
            logits = model(tokens, use_cache=False).logits[:, :-1]  # [32, T-1, V]
            part = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (part / n_tokens).backward()
            loss += part.item() / n_tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}")
    return model


# -------------------------------------------------------------------------------------- on disk


def is_tiny(name: str) -> bool:
    """Whether a model or data name means the tiny world."""
    return name.removesuffix("_labels").removesuffix("_hard") in FAMILIES


def resolve(name: str, cache: Path | None = None, seed: int = 0, steps: int = TRAIN_STEPS) -> str:
    """The folder behind a tiny-world name, built on first use; any other name as it is.

    The folder is an ordinary Hugging Face model with train.jsonl and test.jsonl beside it, and a
    folder `hard` with the longer chains alone. It is named after this file's contents, so that a
    changed recipe makes a new one. The labelled data of either stands in a folder `labels` in it.
    """
    if not is_tiny(name):
        return name
    data = name.removesuffix("_labels")
    family = data.removesuffix("_hard")
    cache = cache or Path(__file__).parents[1] / "cache"
    recipe = hashlib.sha256(Path(__file__).read_bytes() + repr((seed, steps)).encode())
    world = cache / f"{family}-{recipe.hexdigest()[:8]}"
    if not world.exists():
        build(family, world, seed, steps)
    folder = world / "hard" if data.endswith("_hard") else world
    if name.endswith("_labels"):
        if not (folder / "labels").exists():
            build_labels(world, folder, seed, f"labelling {data}, once")
        folder = folder / "labels"
    return str(folder)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` once it is filled, whole or not at all.

    A second process that makes the same folder does no harm.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot write the tiny world here: {error}") from error
    try:
        yield work
        os.chmod(work, 0o755)
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def build(family: str, folder: Path, seed: int = 0, steps: int = TRAIN_STEPS) -> None:
    """Make the problems, the tokenizer and the base model of a family in the folder."""
    with _whole(folder) as work:
        tokenizer = make_tokenizer()
        rng, seen = np.random.default_rng((seed, 99)), set()
        for sub, hard in (("", None), ("hard", True)):
            (work / sub).mkdir(exist_ok=True)
            for split, n in (("test", N_TEST), ("train", N_TRAIN)):
                rows = make_problems(n if not hard else n // 4, rng, seen, hard)
                keys = ("id", "problem", "answer", "level")
                lines = (json.dumps({k: getattr(p, k) for k in keys}) for p in rows)
                (work / sub / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # at this size a second thread costs more than it brings
        model = train_base(family, tokenizer, seed, steps)
        torch.set_num_threads(threads)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


def build_labels(world: Path, data: Path, seed: int = 0, desc: str = "labels") -> None:
    """Make data/labels: the first problems of data's train.jsonl with majority labels by the base
    model of the folder world, and data's test.jsonl."""
    from harness.loading import load_model, load_tokenizer
    from tasks import labels  # here, since no other use of the tiny world needs an engine

    model, tokenizer = load_model(str(world)), load_tokenizer(str(world))
    problems = load_problems(str(data), "train")[:N_LABELS]
    items = [(p, list(tokenizer(p.problem)["input_ids"])) for p in problems]
    sampled = labels.label(
        model, tokenizer, items, LABEL_SAMPLES, RESPONSE_TOKENS, seed, rollout_rows=1024, desc=desc
    )
    with _whole(data / "labels") as work:
        rows = [row for part in sampled for row in part]
        (work / "train.jsonl").write_text(labels.render(rows, "equivalence"))
        shutil.copy(data / "test.jsonl", work / "test.jsonl")
