"""Training on a table of logits with rewards that are coin flips, for tools.clip_bias.

The loss and the advantages are those of grpo.py.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from grpo import advantages, policy_loss

if TYPE_CHECKING:
    from tools.clip_bias import ClipBiasConfig

CHUNK_ROWS = 32_768  # rows of a mini-batch computed at once; their tensors fit in the cache
MEASURES = ("Top token's probability", "Entropy (nats)", "Clip fraction")


@dataclass(frozen=True)
class UpdateRule:
    """One way to update on the samples of a step. The tables call it an arm."""

    label: str
    loss: dict  # arguments of policy_loss
    published: str = ""  # what a paper says happens
    one_update: int = 0  # samples of a single update, whole groups; 0: cfg.updates mini-batches
    scale: float = 1.0  # multiplies the step size


def update_rules(cfg: "ClipBiasConfig") -> list[UpdateRule]:
    """The rules compared. In the nulls no clip can act: one update per step, or step size 0."""
    bounds = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    S, n = cfg.samples, cfg.updates
    cap = 1 + cfg.clip_high  # CISPO's cap is a ratio: the bound at which the others clip
    both = bounds | {"clip": "both"}
    return [
        UpdateRule("both", both, "top token up (2506.10947)"),
        UpdateRule("high only", bounds | {"clip": "high"}, "entropy down (2509.26114)"),
        UpdateRule("low only", bounds | {"clip": "low"}, "entropy up (2509.26114)"),
        UpdateRule("off", bounds | {"clip": "off"}, "no bias (2506.10947)"),
        UpdateRule(
            "clip-higher .28", both | {"clip_high": 0.28}, "entropy above both (2503.14476)"
        ),
        UpdateRule(f"cispo, cap {cap:g}", {"loss": "cispo", "cispo_cap": cap}),
        UpdateRule(f"null: one update of {S}", both, "no bias (2506.10947)", S),
        UpdateRule(f"null: one update of {cfg.group}", both, "no bias (2506.10947)", cfg.group),
        UpdateRule(f"null: one update of {S}, {n} x step", both, "", S, n),
        UpdateRule("null: step size 0", both, "", 0, 0),
    ]


def start_logits(vocab: int, top: float) -> Tensor:
    """Logits [V]: the first token has probability `top`, the others share the rest equally."""
    p = torch.full((vocab,), (1 - top) / (vocab - 1))
    p[0] = top
    return p.log()


def draw_advantages(cfg: "ClipBiasConfig", contexts: int, g: torch.Generator) -> Tensor:
    """Advantages [contexts, S] of coin-flip rewards; a group is a run of consecutive columns."""
    rewards = (torch.rand(contexts * cfg.samples, generator=g) < cfg.rate).float()
    return advantages(rewards, cfg.group).view(contexts, -1)


def context_gradients(
    logits: Tensor, y: Tensor, old_logp: Tensor, A: Tensor, loss: dict
) -> tuple[Tensor, Tensor]:
    """The gradient of each context's loss (the mean over its m tokens), and the clipped tokens.

    logits [..., V]; tokens y, their old_logp and A [..., m] -> [..., V], bool [..., m].
    """
    logits = logits.detach().requires_grad_()
    logp = logits.log_softmax(-1).gather(-1, y)  # [..., m]
    rows = logp.reshape(-1, 1)  # each token is a response of its own: [b, R=1]
    mask = torch.ones_like(rows, dtype=torch.bool)
    # Dividing by m alone makes the loss the sum of the contexts' means, so that the gradient of a
    # context does not depend on the tokens of another.
    total, _ = policy_loss(rows, old_logp.reshape(-1, 1), A.reshape(-1), mask, y.shape[-1], **loss)
    grad, at_token = torch.autograd.grad(total, [logits, logp])
    return grad, (at_token == 0) & (A != 0)


def mini_batches(logits: Tensor, u: Tensor, A: Tensor, m: int) -> Iterator[tuple[Tensor, ...]]:
    """Sample the tokens of a step, in mini-batches of m: (tokens, old_logp, A), each [L, c, m].

    logits [L, c, V]; uniforms u and advantages A [c, n] are the same in all L layers.
    """
    old = logits.log_softmax(-1)
    y = torch.searchsorted(old.exp().cumsum(-1), u.repeat(len(logits), 1, 1))  # [L, c, n]
    y.clamp_(max=logits.shape[-1] - 1)  # rounding may leave the last sum below 1
    parts = [t.split(m, -1) for t in (y, old.gather(-1, y), A.expand_as(y))]
    return zip(*parts, strict=True)


def walk(
    cfg: "ClipBiasConfig",
    logits: Tensor,
    rules: Sequence[UpdateRule],
    step_sizes: Sequence[float],
    steps: int,
    contexts: int,
    name: str = "walk",
    chunk_rows: int = CHUNK_ROWS,
) -> dict[str, Tensor]:
    """Train `contexts` copies of logits [V] with every rule and step size.

    Returns label -> float64 [3, L, contexts] of MEASURES, L the step sizes: each context's end, and
    the fraction of its tokens that lost their gradient to the clip (none with CISPO). All rules and
    step sizes get the same uniforms and rewards, so that rules which do the same agree bit for bit.
    """
    size = max(1, chunk_rows * cfg.updates // (len(step_sizes) * cfg.samples))
    chunks = [min(size, contexts - i) for i in range(0, contexts, size)]
    seeds = torch.randint(2**62, (len(chunks),), generator=torch.Generator().manual_seed(cfg.seed))
    bar = tqdm(total=len(chunks) * steps, desc=name, unit="step", leave=False)

    def train_chunk(c: int, seed: int) -> Tensor:
        start = logits.repeat(len(rules), len(step_sizes), c, 1)  # [rules, L, c, V]
        g = torch.Generator().manual_seed(seed)
        return _train(cfg, start, rules, torch.tensor(step_sizes), steps, g, bar.update)

    # Chunks run side by side: the tensors of one are too small for several threads.
    with bar, ThreadPoolExecutor(cfg.threads or os.cpu_count()) as pool:
        ends = torch.cat(list(pool.map(train_chunk, chunks, seeds.tolist())), -1)
    return {rule.label: end for rule, end in zip(rules, ends, strict=True)}


def _train(
    cfg: "ClipBiasConfig",
    state: Tensor,
    rules: Sequence[UpdateRule],
    step_sizes: Tensor,
    steps: int,
    g: torch.Generator,
    after_step: Callable[[], object],
) -> Tensor:
    """Train the logits `state` [rules, L, c, V] in place; returns MEASURES [rules, 3, L, c]."""
    rates = step_sizes[:, None, None]
    c = state.shape[2]
    clipped = torch.zeros(state.shape[:-1])
    for _ in range(steps):
        u = torch.rand(c, cfg.samples, generator=g)
        A = draw_advantages(cfg, c, g)  # [c, S]
        # Mini-batches mix the groups, in a different order for each context. The uniforms need no
        # shuffling: their columns are exchangeable.
        shuffled = A.gather(1, torch.rand(c, cfg.samples, generator=g).argsort(1))
        for rule, logits, cuts in zip(rules, state, clipped, strict=True):
            n = rule.one_update or cfg.samples
            ordered, m = (A, n) if rule.one_update else (shuffled, n // cfg.updates)
            for batch in mini_batches(logits, u[:, :n], ordered[:, :n], m):
                grad, cut = context_gradients(logits, *batch, rule.loss)
                logits -= rule.scale * rates * grad
                cuts += cut.sum(-1) / (steps * n)
        after_step()
    logp = state.double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.stack([logp[..., 0].exp(), entropy, clipped.double()], 1)
