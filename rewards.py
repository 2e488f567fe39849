"""Every reward, one short function each.

`python -m tools.rewards` lists them and scores saved completions with them.

A new reward is one function of a `Rollouts` (data.py) that returns float32 [B]:

    @reward(formula="1 if the response holds a question mark", source="ours")
    def asks(rollouts) -> Tensor:
        return _float("?" in text for text in rollouts.text)

It may take parameters, written `asks(3)` or `asks(n=3)` in an expression. Some rollouts lack some
fields (`label`, `self_certainty`, ...). A reward that reads such a field names it in `needs`. Then
training fills the field or reports that it is missing. No reward sees the model.

`text` never contains special tokens. `raw_text` keeps them, for example a <think> that is a special
token. Name `raw_text` in `needs`, because saved completions do not have it.

SR = "Spurious Rewards", arXiv 2506.10947; INT = INTUITOR, arXiv 2505.19590. The statistics of a
token come from softmax(z / T) over all rows of the head, where T is the sampling temperature and z
are the logits one position earlier. The end token counts as a token (see model.token_stats).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import grading
from evaluation import exploration
from harness import expressions
from harness.expressions import Entry, Reward
from tasks import answers

RANDOM = 201  # first key of the random reward's stream; nothing else uses this key
REGISTRY: dict[str, Entry] = {}
# Variants that are logged but not trained on, besides every reward with its default parameters. A
# variant is logged only if its inputs exist.
VARIANTS = ("majority(online)", "self_certainty(base)", "neg_entropy(sum)", "logp(mean)")


def reward(
    formula: str,
    source: str,
    needs: tuple[str, ...] | Callable[..., tuple[str, ...]] = (),
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function under its own name (see Entry in harness/expressions.py).

    Raises ValueError if two rewards have the same name.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__.rstrip("_")  # `format_` and `random_` leave Python's own alone
        if name in REGISTRY:
            raise ValueError(f"two rewards are called {name}")
        REGISTRY[name] = Entry(function, formula, source, needs, bounds or {})
        return function

    return register


def parse(expression: str) -> Reward:
    """Parse an expression into a reward. Raises UserError that names the mistake."""
    return expressions.parse(expression, REGISTRY)


def watched(more: str = "") -> list[Reward]:
    """The rewards that are logged besides the trained one.

    These are every reward with its default parameters, VARIANTS, and the expressions in `more`,
    which are separated by semicolons.
    """
    plain = [n for n, e in REGISTRY.items() if all(p.default is not p.empty for p in e.parameters)]
    own = [part for part in more.split(";") if part.strip()]
    return [parse(expression) for expression in (*plain, *VARIANTS, *own)]


def _float(values: Iterable[float]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


# ---- rewards that compare answers


@reward(formula="1 if the last box is equivalent to the gold answer", source="SR")
def ground_truth(rollouts) -> Tensor:
    return _float(answers.correct(rollouts.text, rollouts.problem))


@reward(
    formula="1 if the last box is equivalent to the majority answer: of many samples of the base "
    "model, made before training (eval.py --labels), or online of the response's own group",
    source="SR; online: TTRL 2504.16084",
    needs=lambda label="offline": ("label",) if label == "offline" else (),
)
def majority(rollouts, label: Literal["offline", "online"] = "offline") -> Tensor:
    if label == "offline":
        return _float(answers.correct(rollouts.text, rollouts.problem, rollouts.label))
    cluster, prompt = _clusters(rollouts), rollouts.prompt_index
    # Rank clusters by size. Among clusters of equal size the first one wins: its number is lower.
    rank = _sizes(cluster) * (len(cluster) + 1) - cluster  # [B]
    best = torch.zeros(int(prompt.max()) + 1).long().scatter_reduce(0, prompt, rank, "amax")
    return ((rank == best[prompt]) & (cluster >= 0)).float()


@reward(
    formula="1 if the last box is equivalent to the majority label and that label is wrong; "
    "training keeps only the problems whose label is wrong, also by a lenient rule",
    source="SR",
    needs=("label",),
)
def incorrect(rollouts) -> Tensor:
    golds = [problem.answer for problem in rollouts.problem]
    right = _float(grading.grader().grade(rollouts.label, golds))
    return majority(rollouts) * (1 - right)


@reward(
    formula="share of the group with the same spelling of the answer; 0 without one",
    source="SRT 2505.21444",
)
def soft_majority(rollouts) -> Tensor:
    found = answers.found(rollouts.text, rollouts.problem)
    keys = [
        None if answer is None else (prompt, grading.normalize(answer))
        for answer, prompt in zip(found, rollouts.prompt_index.tolist(), strict=True)
    ]
    first = {key: row for row, key in reversed(list(enumerate(keys)))} | {None: -1}
    return _sizes(torch.tensor([first[key] for key in keys])) / _group_size(rollouts)


@reward(
    formula="share of the group whose answer is equivalent (its cluster / G); 0 without one",
    source="EMPO 2504.05812",
)
def semantic_entropy(rollouts) -> Tensor:
    return _sizes(_clusters(rollouts)) / _group_size(rollouts)


def _clusters(rollouts) -> Tensor:
    """int64 [B]: the first row of the group with an equivalent answer; -1 for no answer."""
    if rollouts.cluster is None:  # computed once, since several rewards use it
        groups = rollouts.prompt_index.tolist()
        clusters = answers.clusters(rollouts.text, rollouts.problem, groups)
        rollouts.cluster = torch.tensor(clusters)
    return rollouts.cluster


def _sizes(cluster: Tensor) -> Tensor:
    """int64 [B]: the size of each row's cluster; 0 for a row without a cluster (-1)."""
    counts = torch.bincount(cluster.clamp(min=0), weights=(cluster >= 0).double())  # by cluster
    return counts[cluster.clamp(min=0)].long() * (cluster >= 0)


def _group_size(rollouts) -> Tensor:
    return torch.bincount(rollouts.prompt_index)[rollouts.prompt_index]


# ---- rewards of the text alone


@reward(formula=r"1 if the response's last \boxed{} is not empty", source="SR")
def format_(rollouts) -> Tensor:
    found = answers.found(rollouts.text, rollouts.problem)
    return _float(answer is not None for answer in found)


@reward(
    formula="1 with probability p, drawn from (seed, step, prompt, sample) and not from the text",
    source="SR",
    bounds={"p": (0, 1)},
)
def random_(rollouts, p: float = 0.5) -> Tensor:
    key = (RANDOM, rollouts.seed, rollouts.step)
    rows = zip(rollouts.prompt_index.tolist(), rollouts.sample_index.tolist(), strict=True)
    return _float(np.random.default_rng((*key, i, j)).random() < p for i, j in rows)


@reward(formula='1 if "python" is in the lower-cased response', source="SR")
def python(rollouts) -> Tensor:
    return _float("python" in text.lower() for text in rollouts.text)


@reward(formula="1 if the lower-cased response contains the lower-cased word", source="ours")
def contains(rollouts, word: str) -> Tensor:
    return _float(word.lower() in text.lower() for text in rollouts.text)


@reward(
    formula="0 if a pattern of 10 to 256 characters stands 10 times in a row, else 1", source="SR"
)
def no_repetition(rollouts) -> Tensor:
    return _float(not repeats(text) for text in rollouts.text)


@reward(
    formula="share of a list's distinct permutations that a search trace finds; for problems of "
    "the kind `permutations`",
    source="Wandering Solution Explorers 2505.20296",
    needs=("to_permute",),
)
def coverage(rollouts) -> Tensor:
    traces = zip(rollouts.text, rollouts.to_permute, strict=True)
    return _float(exploration.audit(text, items).coverage for text, items in traces)


@reward(formula="response length in tokens, end token included", source="ours", needs=("length",))
def length(rollouts) -> Tensor:
    return rollouts.length.float()


@reward(formula="c for every response: a null, no weight moves", source="ours")
def constant(rollouts, c: float = 1.0) -> Tensor:
    return torch.full((len(rollouts.text),), float(c))


def repeats(text: str, shortest: int = 10, longest: int = 256, times: int = 10) -> bool:
    """Whether some pattern of shortest to longest characters occurs `times` times in a row.

    A pattern of d characters means that text[i] == text[i + d] for (times - 1) d consecutive i. For
    speed, only every d-th comparison is made first. The full check follows only if times - 1 of
    these in a row hold.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for d in range(shortest, min(longest, len(codes) // times) + 1):
        every = codes[::d]
        if b"\1" * (times - 1) in (every[1:] == every[:-1]).tobytes():
            if b"\1" * ((times - 1) * d) in (codes[d:] == codes[:-d]).tobytes():
                return True
    return False


# ---- rewards of what a model thinks of the response


@reward(
    formula="mean over response tokens of KL(U || p_t) = logsumexp(z_t) - mean(z_t) - log V, "
    "p_t of the policy that sampled, or of the frozen base model (adapter off)",
    source="INT",
    needs=lambda by="policy": ("self_certainty" if by == "policy" else "base_self_certainty",),
)
def self_certainty(rollouts, by: Literal["policy", "base"] = "policy") -> Tensor:
    values = rollouts.self_certainty if by == "policy" else rollouts.base_self_certainty
    return _over_tokens(rollouts, values, "mean")


@reward(
    formula="mean (or sum) over response tokens of -H(p_t); no_answer, if given, is the reward of "
    "a response without a box (RENT: -7)",
    source="RENT 2505.22660, EM-RL-token 2505.15134",
    needs=("entropy",),
)
def neg_entropy(
    rollouts, over: Literal["mean", "sum"] = "mean", no_answer: float | None = None
) -> Tensor:
    value = -_over_tokens(rollouts, rollouts.entropy, over)
    return value if no_answer is None else torch.where(format_(rollouts) == 1, value, no_answer)


@reward(
    formula="sum (or mean) over response tokens of log p(y_t), p of the policy that sampled",
    source="EM-RL-sequence 2505.15134",
    needs=("logp",),
)
def logp(rollouts, over: Literal["sum", "mean"] = "sum") -> Tensor:
    return _over_tokens(rollouts, rollouts.logp, over)


@reward(
    formula="mean over response tokens of log q(y_t), q a frozen second model named by path, with "
    "any tokenizer (by default the one of harness/second_model.py)",
    source="CME 2605.29009",
    needs=lambda path="default": (f"cross_logp:{path}",),
)
def cross_model(rollouts, path: str = "default") -> Tensor:
    return rollouts.cross_logp[path]


def _over_tokens(rollouts, values: Tensor, over: str) -> Tensor:
    """Sum or mean of values [B, R] over each response's tokens: float32 [B]; 0 for no tokens."""
    total = (values * rollouts.mask).sum(1)
    return total if over == "sum" else total / rollouts.mask.sum(1).clamp(min=1)


# ---- rounding error of a reward, and how well it separates right from wrong responses


SCORES = ("logp", "entropy", "self_certainty", "base_self_certainty")  # [B, R], from a forward pass


def reads_scores(reward: Reward) -> bool:
    """Whether the reward can be computed only after a model has scored the responses."""
    return any(need.partition(":")[0] in (*SCORES, "cross_logp") for need in reward.needs)


def rounding(reward: Reward, rollouts, error: float, rewarded: Tensor | None = None) -> Tensor:
    """How far apart the rewards of a group can lie because of rounding alone: float32 [P].

    error is the rounding error of a token's score, in nats (model.rounding_error). The reward is
    computed four more times, each time from scores that are moved up or down by the error at
    random. The bound is three times the root mean square of the changes in the group. The error of
    a mean over n tokens is therefore about error / sqrt(n), the error of a sum about
    error x sqrt(n), and an expression combines these errors as it combines its terms. The result is
    0 for a reward that reads no scores. rewarded is bool [B], or None for all rows. The trained
    reward of the other rows is exactly 0 (truncated=zero), so rounding does not change it.
    """
    groups = len(rollouts.text) // rollouts.group_size
    if not reads_scores(reward):
        return torch.zeros(groups)
    scored = [n for n in SCORES if n in reward.needs]
    second = [n.partition(":")[2] for n in reward.needs if n.startswith("cross_logp:")]
    generator = torch.Generator().manual_seed(0)

    def moved(values: Tensor, size: Tensor | float) -> Tensor:
        signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
        return values + signs * (size + 2**-24 * values.abs())  # plus fp32 rounding

    value, changes = reward(rollouts), []
    for _ in range(4):
        other = copy.copy(rollouts)
        for name in scored:
            setattr(other, name, moved(getattr(rollouts, name), error))
        mean_error = error / rollouts.length.clamp(min=1).sqrt()  # [B], error of a mean over tokens
        means = {name: moved(rollouts.cross_logp[name], mean_error) for name in second}
        other.cross_logp = rollouts.cross_logp | means
        change = reward(other) - value  # [B]
        changes.append(change if rewarded is None else change * rewarded)
    squares = torch.stack(changes).square().view(4, groups, -1)  # [4, P, G]
    return 3 * squares.mean((0, 2)).sqrt()


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """P(score of a positive > score of a negative), where a tie counts half.

    Returns nan if there are no positives or no negatives. `score` is [n], `label` bool [n]. It is
    computed from ranks, with ties averaged, as the Mann-Whitney U over n+ n-:
    (sum of the positives' ranks - n+ (n+ + 1) / 2) / (n+ n-).
    """
    label = np.asarray(label, dtype=bool)
    _, which, counts = np.unique(np.asarray(score), return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[which]
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return math.nan
    return float((rank[label].sum() - positive * (positive + 1) / 2) / (positive * negative))
