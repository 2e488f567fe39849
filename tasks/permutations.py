"""Lists to permute, from 20 to 2000 permutations, and a tiny base model that permutes short ones.

Problems have the kind `permutations` (tasks/answers.py): a response is a search trace, judged by
the rules of evaluation/exploration.py, and right if it finds every permutation by allowed moves.

The tiny base model writes traces of a depth-first search with the faults that the paper
"Wandering Solution Explorers" (arXiv 2505.20296) finds in large ones: it ends early, leaves out
branches and repeats states. `python -m tools.exploration --build=FOLDER` makes it and its problems;
training with the reward `coverage` then has something to mend.
"""

import json
import re
import shutil
import tempfile
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Problem, rng
from evaluation.exploration import permutation_count, reference
from harness.errors import UserError
from tasks import tiny

KIND = "permutations"
STREAM = 302  # first key of the generators here; no other use of randomness shares it
LETTERS = "abcdefghijkl"
SIZES = (20, 60, 200, 600, 2000)  # wanted numbers of permutations
INSTRUCTIONS = """\
List every distinct ordering of the list [{items}], by a search over prefixes. One move a line:
CHECK(prefix)==continue goes one item further, and CHECK(prefix)==done does so when the ordering \
is complete. BACKTRACK(prefix) goes back to a shorter prefix of the present one. END() stands at \
the end, when all distinct orderings are found. Write nothing else.

For the list [a, a, b] this is
{example}

Now the same for the list [{items}]:
"""


def problem_text(items: str) -> str:
    """The task in words, with a worked example, for models that read English."""
    return INSTRUCTIONS.format(items=", ".join(items), example=reference("aab"))


def counts_near(size: int) -> tuple[int, ...]:
    """How often each item occurs, such that a list has about `size` distinct permutations.

    The shortest list within 5 % of the size is taken, or the closest one of 3 to 12 items.
    """

    def distance(counts: tuple[int, ...]) -> tuple[float, int]:
        items = "".join(c * count for c, count in zip(LETTERS, counts, strict=False))
        return max(0.0501, abs(permutation_count(items) / size - 1)), sum(counts)

    lists = (counts for n in range(3, 13) for counts in _partitions(n, n))
    return min((counts for counts in lists if len(counts) > 1), key=distance)


def _partitions(n: int, most: int) -> list[tuple[int, ...]]:
    """The ways to write n as a sum of descending numbers, none above `most`."""
    if n == 0:
        return [()]
    tops = range(min(n, most), 0, -1)
    return [(top, *rest) for top in tops for rest in _partitions(n - top, top)]


def make_problems(sizes: tuple[int, ...], per_size: int, seed: int = 0) -> list[Problem]:
    """per_size lists of about each size. `level` is the exact number of permutations."""
    problems = []
    for size in sizes:
        counts = counts_near(size)
        for i in range(per_size):
            draw = rng(STREAM, seed, size, i)
            letters = draw.permutation(list(LETTERS))
            items = [c for c, count in zip(letters, counts, strict=False) for _ in range(count)]
            items = "".join(draw.permutation(items))
            id_ = f"permutations_{size}/{i}"
            level = str(permutation_count(items))
            problems.append(Problem(problem_text(items), items, id_, level=level, kind=KIND))
    return problems


# ------------------------------------------------------------------------------- the tiny world

TINY_COUNTS = ((2, 1), (1, 1, 1), (3, 1), (2, 2))  # 3, 6, 4 and 6 permutations
TINY_LETTERS = "abcde"
END_EARLY, LEAVE_OUT, REPEAT = 0.12, 0.08, 0.08  # a fault's chance: at a goal, a branch, a move
TRAIN_STEPS, TRAIN_BATCH, TRAIN_LR = 700, 64, 3e-3
RESPONSE_TOKENS = 176  # the longest reference trace has about 120
PIECES = (
    *TINY_LETTERS,
    *("List: ", "?\n", "CHECK(", ")==continue\n", ")==done\n", "BACKTRACK(", ")\n", "END()"),
)


def tiny_lists() -> list[str]:
    """Every list of the tiny world, in a fixed random order."""
    lists = set()
    for counts in TINY_COUNTS:
        for letters in combinations(TINY_LETTERS, len(counts)):
            for order in permutations(letters):
                items = "".join(c * n for c, n in zip(order, counts, strict=True))
                lists |= {"".join(one) for one in permutations(items)}
    ordered = sorted(lists)
    return [ordered[i] for i in rng(STREAM, 0, 0).permutation(len(ordered))]


def wandering(items: str, draw: np.random.Generator) -> str:
    """A depth-first trace with the faults of the tiny base model."""
    lines: list[str] = []
    n, stopped, checked = len(items), False, []

    def go(prefix: str, at: str) -> str:
        """Explore below prefix from the state `at`; return the state where it ends."""
        nonlocal stopped
        left = Counter(items) - Counter(prefix)
        for letter in sorted(left):
            if stopped or (prefix and draw.random() < LEAVE_OUT):
                continue
            if at != prefix:
                lines.append(f"BACKTRACK({prefix})")
            at = prefix + letter
            lines.append(f"CHECK({at})=={'done' if len(at) == n else 'continue'}")
            checked.append(at)
            if draw.random() < REPEAT:
                lines.append(f"BACKTRACK({prefix})")
                lines.append(f"CHECK({at})=={'done' if len(at) == n else 'continue'}")
            if len(at) == n:
                stopped = stopped or draw.random() < END_EARLY
            else:
                at = go(at, at)
        return at

    go("", "")
    return "\n".join([*lines, "END()"])


def make_tokenizer():
    """A fast tokenizer of a few pieces; decoding is plain concatenation; pad = end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate((tiny.END, "<|unk|>", *PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    escaped = "|".join(re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(escaped), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tiny.END,
        pad_token=tiny.END,
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
    )


def train_base(tokenizer, lists: list[str], seed: int, steps: int) -> torch.nn.Module:
    """Train the base model on fresh wandering traces; loss on the response, end included."""
    model = tiny.make_model(tokenizer, seed)
    draw = rng(STREAM, seed, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAIN_LR, steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="building the tiny permutations base model, once", unit="step")
    for _ in bar:
        chosen = [lists[i] for i in draw.integers(len(lists), size=TRAIN_BATCH)]
        prompts = tokenizer([tiny_text(items) for items in chosen])["input_ids"]
        traces = [wandering(items, draw) + tiny.END for items in chosen]
        responses = tokenizer(traces)["input_ids"]
        T = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        tokens = torch.zeros(TRAIN_BATCH, T, dtype=torch.long)
        labels = torch.full((TRAIN_BATCH, T), -100)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            tokens[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        logits = model(tokens, use_cache=False).logits[:, :-1]  # [B, T-1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def tiny_text(items: str) -> str:
    """The tiny world's problem text."""
    return f"List: {items}?\n"


def build(folder: Path, seed: int = 0, steps: int = TRAIN_STEPS) -> None:
    """Write the tiny base model, its tokenizer, train.jsonl and test.jsonl to a new folder.

    Every sixth list is a test problem; the base model is trained on the others. Raises UserError
    if the folder exists or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already: name a new folder")
    lists = tiny_lists()
    splits = {"test": lists[::6], "train": [s for i, s in enumerate(lists) if i % 6]}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written: {error}") from error
    try:
        for split, items in splits.items():
            rows = [
                {"id": s, "problem": tiny_text(s), "answer": s, "kind": KIND}
                | {"level": str(permutation_count(s))}
                for s in items
            ]
            (work / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = make_tokenizer()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # at this size a second thread costs more than it brings
        model = train_base(tokenizer, splits["train"], seed, steps)
        torch.set_num_threads(threads)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
