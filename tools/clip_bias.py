"""The clipping bias on a softmax table, through grpo.advantages and grpo.policy_loss themselves.

    python -m tools.clip_bias                  (tables and a figure: a minute on two cores)
    python -m tools.clip_bias --vocab=10 --top=0.88

A thousand independent contexts, each a row of logits [V], are trained on rewards that are coin
flips. These teach nothing: E[A] = 0 whatever the token, so what moves on average is the algorithm's
doing. A step draws 128 actions a context in groups of 16 and makes 8 updates of plain SGD on
mini-batches of 16; old_logp stays that of the step's start. With R = pi / pi_old, a clip e on both
sides and mu = P(A > 0) E[A | A > 0], the mean gradient of the objective is

    mu E[ +grad R where R < 1 - e;  0 inside;  -grad R where R > 1 + e ]      (2506.10947, app. B)

A likely token cannot reach the upper bound (never, where pi_old > 1 / (1 + e)); a rare one soon
does and is pushed back. Limits: at the first update R = 1 and the bias is 0; later R and A are not
independent, as the formula takes them (a group's advantages sum to 0 over mini-batches). Without
the clip the mean gradient is 0, yet probabilities drift: a random walk of the logits takes a likely
token down. So the null is one update a step, and one with 8 times the step size is a random walk of
about the same length in which no clip can act.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from grpo import advantages, policy_loss
from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.clip_tables import mean_se, write

CHUNK = 32_768  # rows of a mini-batch worked on at once: what they need stays in the cache
MEASURES = ("Top token's probability", "Entropy (nats)", "Clip fraction")


@dataclass
class ClipBiasConfig:
    """The clipping bias on a softmax table: python -m tools.clip_bias [--key=value]"""

    # Table: every context starts from the same probabilities
    contexts: int = 1000  # independent rows of logits
    vocab: int = 20  # tokens of a context
    top: float = 0.65  # probability of the first token; the others share the rest equally
    steps: int = 60  # steps, each with fresh samples
    step_sizes: tuple[float, ...] = (0.15, 0.4, 0.8, 1.6)  # of SGD on the logits
    # Two habits: a context of two tokens
    habit_contexts: int = 500
    habit_top: float = 0.65  # probability of the first habit
    habit_steps: int = 100
    habit_step_size: float = 1.0
    # Batch
    samples: int = 128  # actions a context and step
    group: int = 16  # actions whose rewards are normalised together
    updates: int = 8  # mini-batches, and so updates, a step
    rate: float = 0.5  # chance that the reward is 1
    clip_low: float = 0.2  # ratios below 1 - clip_low are clipped, where A < 0
    clip_high: float = 0.2  # ratios above 1 + clip_high are clipped, where A > 0
    # Appendix B: the mean gradient at a policy that differs from the sampling one
    shift: float = 0.4  # standard deviation of the noise by which the logits differ
    rounds: int = 10  # times contexts x samples fresh actions
    # Run
    seed: int = 0
    threads: int = 0  # chunks of contexts worked on at once; 0 = one a core
    out: str = "out/clip_bias"  # folder for table.md and clip_bias.png


@dataclass(frozen=True)
class Arm:
    """One way to use a step's samples. Every arm is fed the same noise."""

    label: str
    loss: dict  # arguments of policy_loss
    published: str = ""  # what a paper says happens
    one_update: int = 0  # samples of a single update, whole groups; 0: cfg.updates mini-batches
    scale: float = 1.0  # times the step size


def arms(cfg: ClipBiasConfig) -> list[Arm]:
    """The arms compared; those with one update, or step size 0, are nulls: no clip can act."""
    e = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    S, n = cfg.samples, cfg.updates
    cap = 1 + cfg.clip_high  # CISPO's, an absolute ratio: the bound at which the others clip
    both = e | {"clip": "both"}
    return [
        Arm("both", both, "top token up (2506.10947)"),
        Arm("high only", e | {"clip": "high"}, "entropy down (2509.26114)"),
        Arm("low only", e | {"clip": "low"}, "entropy up (2509.26114)"),
        Arm("off", e | {"clip": "off"}, "no bias (2506.10947)"),
        Arm("clip-higher .28", both | {"clip_high": 0.28}, "entropy above both (2503.14476)"),
        Arm(f"cispo, cap {cap:g}", {"loss": "cispo", "cispo_cap": cap}),
        Arm(f"null: one update of {S}", both, "no bias (2506.10947)", S),
        Arm(f"null: one update of {cfg.group}", both, "no bias (2506.10947)", cfg.group),
        Arm(f"null: one update of {S}, {n} x step", both, "", S, n),
        Arm("null: step size 0", both, "", 0, 0),
    ]


# ---- the walk


def start(vocab: int, top: float) -> Tensor:
    """Logits [V]: the first token has probability `top`, the others the rest in equal parts."""
    p = torch.full((vocab,), (1 - top) / (vocab - 1))
    p[0] = top
    return p.log()


def draw_advantages(cfg: ClipBiasConfig, contexts: int, g: torch.Generator) -> Tensor:
    """Advantages [contexts, S] of coin-flip rewards, groups in consecutive columns."""
    rewards = (torch.rand(contexts * cfg.samples, generator=g) < cfg.rate).float()
    return advantages(rewards, cfg.group).view(contexts, -1)


def gradient(
    logits: Tensor, y: Tensor, old_logp: Tensor, A: Tensor, loss: dict
) -> tuple[Tensor, Tensor]:
    """Gradient of each context's mean loss over its own m tokens, and which of them are clipped.

    logits [..., V]; tokens y, their old_logp and A [..., m] -> [..., V], bool [..., m].
    """
    logits = logits.detach().requires_grad_()
    logp = logits.log_softmax(-1).gather(-1, y)  # [..., m]
    rows = logp.reshape(-1, 1)  # a token is a response of its own: [b, R=1]
    mask = torch.ones_like(rows, dtype=torch.bool)
    # Divided by m alone, the loss is the sum of the contexts' means, and no context's gradient
    # depends on another's tokens.
    total, _ = policy_loss(rows, old_logp.reshape(-1, 1), A.reshape(-1), mask, y.shape[-1], **loss)
    grad, at_token = torch.autograd.grad(total, [logits, logp])
    return grad, (at_token == 0) & (A != 0)


def act(logits: Tensor, u: Tensor, A: Tensor, m: int) -> Iterator[tuple[Tensor, ...]]:
    """A step's mini-batches of m actions: (tokens, old_logp, A), each [L, c, m].

    logits [L, c, V]; uniforms u and advantages A [c, n], the same in every layer.
    """
    old = logits.log_softmax(-1)
    y = torch.searchsorted(old.exp().cumsum(-1), u.repeat(len(logits), 1, 1))  # [L, c, n]
    y.clamp_(max=logits.shape[-1] - 1)  # rounding may leave the last sum below 1
    parts = [t.split(m, -1) for t in (y, old.gather(-1, y), A.expand_as(y))]
    return zip(*parts, strict=True)


def walk(
    cfg: ClipBiasConfig,
    logits: Tensor,
    arms: Sequence[Arm],
    step_sizes: Sequence[float],
    steps: int,
    contexts: int,
    desc: str = "walk",
) -> dict[str, Tensor]:
    """Train `contexts` copies of logits [V] by every arm and step size.

    Returns label -> float64 [3, L, contexts], L the step sizes, of MEASURES: where each context
    ended, and the share of its tokens that lost their gradient to the clip (CISPO's lose none). All
    arms and step sizes get the same uniforms and rewards: those that do the same agree to the bit.
    """
    rates = torch.tensor(step_sizes)[:, None, None]
    size = max(1, CHUNK * cfg.updates // (len(step_sizes) * cfg.samples))
    chunks = [min(size, contexts - i) for i in range(0, contexts, size)]
    seeds = torch.randint(2**62, (len(chunks),), generator=torch.Generator().manual_seed(cfg.seed))
    bar = tqdm(total=len(chunks) * steps, desc=desc, unit="step", leave=False)

    def train(c: int, seed: int) -> Tensor:  # c contexts -> [arms, 3, L, c]
        g = torch.Generator().manual_seed(seed)
        state = logits.repeat(len(arms), len(step_sizes), c, 1)  # [arms, L, c, V]
        clipped = torch.zeros(state.shape[:-1])
        for _ in range(steps):
            u = torch.rand(c, cfg.samples, generator=g)
            A = draw_advantages(cfg, c, g)  # [c, S]
            order = torch.rand(c, cfg.samples, generator=g).argsort(1)  # each context has its own
            shuffled = A.gather(1, order)  # u need not be: all its columns are alike
            for arm, here, cuts in zip(arms, state, clipped, strict=True):
                n = arm.one_update or cfg.samples
                given, m = (A, n) if arm.one_update else (shuffled, n // cfg.updates)
                for part in act(here, u[:, :n], given[:, :n], m):
                    grad, cut = gradient(here, *part, arm.loss)
                    here -= arm.scale * rates * grad
                    cuts += cut.sum(-1) / (steps * n)
            bar.update()
        logp = state.double().log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return torch.stack([logp[..., 0].exp(), entropy, clipped.double()], 1)

    # Chunks side by side: these tensors are too small for torch to share out one of them.
    with bar, ThreadPoolExecutor(cfg.threads or os.cpu_count()) as pool:
        ends = torch.cat(list(pool.map(train, chunks, seeds.tolist())), -1)
    return {arm.label: end for arm, end in zip(arms, ends, strict=True)}


# ---- appendix B


def positive_part(group: int, rate: float) -> float:
    """mu = P(A > 0) E[A | A > 0] of group-normalised Bernoulli(rate) rewards, by the binomial."""
    mu = 0.0
    for k in range(1, group):  # groups all 0 or all 1 have A = 0
        A = advantages((torch.arange(group) < k).float(), group).double()
        chance = math.comb(group, k) * rate**k * (1 - rate) ** (group - k)
        mu += chance * A.clamp_min(0).mean().item()
    return mu


def expected_gradient(logits: Tensor, old: Tensor, mu: float, low: float, high: float) -> Tensor:
    """The formula's mean gradient of the objective on the logits, summed over the vocabulary: [V].

    E over pi_old of grad R where y is in a set = sum over the set of pi(y) (onehot(y) - pi).
    low, high: bounds of the ratio, -inf and inf where a side is not clipped.
    """
    p, q = logits.double().softmax(-1), old.double().softmax(-1)
    sign = (p / q < low).double() - (p / q > high).double()  # [V]
    return mu * (sign * p - (sign * p).sum() * p)


def mean_gradient(
    cfg: ClipBiasConfig, logits: Tensor, old: Tensor, loss: dict
) -> tuple[Tensor, Tensor, float]:
    """Measured ascent gradient: its mean [V] and standard error [V], and the clip fraction.

    Actions from softmax(old) and rewards are the same for every loss; a context is a sample.
    """
    g = torch.Generator().manual_seed(cfg.seed + 1)
    C, S = cfg.contexts, cfg.samples
    grads, cuts = [], []
    for _ in range(cfg.rounds):
        y = torch.multinomial(old.softmax(-1), C * S, replacement=True, generator=g).view(C, S)
        A = draw_advantages(cfg, C, g)
        grad, cut = gradient(logits.expand(C, -1), y, old.log_softmax(-1)[y], A, loss)
        grads.append(-grad.double())
        cuts.append(cut.float().mean().item())
    return *mean_se(torch.cat(grads).T), sum(cuts) / cfg.rounds


def appendix_b(cfg: ClipBiasConfig) -> list[dict]:
    """Formula against measurement for the first token: four arms, then the two thresholds."""
    mu = positive_part(cfg.group, cfg.rate)
    four = [arm for arm in arms(cfg) if arm.label in ("both", "high only", "low only", "off")]
    old = start(cfg.vocab, cfg.top)
    noise = torch.randn(cfg.vocab, generator=torch.Generator().manual_seed(cfg.seed))
    cases = [(f"{cfg.vocab} tokens", old, old + cfg.shift * noise, arm) for arm in four]
    e, edge = cfg.clip_high, 1 / (1 + cfg.clip_high)
    rare = ((0.02, 0.02 * (0.99 + e)), (0.02, 0.02 * (1.01 + e)))
    for q, p in ((edge + 0.01, 0.999), (edge - 0.01, 0.999), *rare):
        cases.append((f"{q:.3f} -> {p:.4f}", start(2, q), start(2, p), four[1]))
    rows = []
    for case, old, new, arm in tqdm(cases, desc="appendix B", leave=False):
        low = 1 - cfg.clip_low if arm.loss["clip"] in ("both", "low") else -math.inf
        high = 1 + cfg.clip_high if arm.loss["clip"] in ("both", "high") else math.inf
        exact = expected_gradient(new, old, mu, low, high)
        mean, se, clipped = mean_gradient(cfg, new, old, arm.loss)
        row = {"formula": exact[0].item(), "measured": mean[0].item(), "se": se[0].item()}
        rows.append({"case": case, "arm": arm.label, **row, "clip_frac": clipped})
    return rows


# ---- the command


def check(cfg: ClipBiasConfig) -> None:
    """Refuse what cannot be measured (UserError)."""
    for keys, good, need in (
        ("steps habit_steps samples updates rounds", lambda x: x >= 1, "must be at least 1"),
        ("contexts habit_contexts vocab group", lambda x: x >= 2, "must be at least 2"),
        ("seed threads shift habit_step_size", lambda x: x >= 0, "must be at least 0"),
        ("top habit_top clip_low clip_high", lambda x: 0 < x < 1, "must be between 0 and 1"),
        ("rate", lambda x: 0 <= x <= 1, "a chance, from 0 to 1"),
        ("group updates", lambda x: cfg.samples % x == 0, f"must divide samples={cfg.samples}"),
        ("step_sizes", lambda x: x and min(x) >= 0, "name one or more, none negative"),
    ):
        for key in keys.split():
            if not good(getattr(cfg, key)):
                raise UserError(f"{key}={getattr(cfg, key)}: {need}")


def main(argv: list[str]) -> None:
    cfg, _ = configure(ClipBiasConfig, argv)
    check(cfg)
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be made ({error.strerror}): name a folder") from error
    begun = time.perf_counter()
    torch.set_num_threads(1)  # chunks of contexts run side by side instead
    table = start(cfg.vocab, cfg.top)
    found = walk(cfg, table, arms(cfg), cfg.step_sizes, cfg.steps, cfg.contexts, "table")
    habits = walk(cfg, start(2, cfg.habit_top), arms(cfg), (cfg.habit_step_size,),
                  cfg.habit_steps, cfg.habit_contexts, "habits")  # fmt: skip
    tables = {what: {label: [t.tolist() for t in mean_se(x)] for label, x in ends.items()}
              for what, ends in (("table", found), ("habits", habits))}  # fmt: skip
    entropy = torch.distributions.Categorical(logits=table).entropy().item()
    result = {
        **asdict(cfg),
        "measures": MEASURES,
        "begin": (cfg.top, entropy, 0.0),  # the measures before the first step
        "arms": [asdict(arm) for arm in arms(cfg)],
        "mean_and_se": tables,  # label -> two lists [3, L]
        "above_half": {label: int((x[0, 0] > 0.5).sum()) for label, x in habits.items()},
        "mu": positive_part(cfg.group, cfg.rate),
        "appendix_b": appendix_b(cfg),
    }
    write(result, out)
    print(json.dumps({"seconds": time.perf_counter() - begun, **result}))


if __name__ == "__main__":
    run(main)
