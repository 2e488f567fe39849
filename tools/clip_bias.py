"""The clipping bias on a softmax table, through grpo.advantages and grpo.policy_loss themselves.

    python -m tools.clip_bias                       (tables and a figure, about a minute)
    python -m tools.clip_bias --vocab=10 --top=0.88

Thousands of independent contexts, each a row of logits [V], are trained on rewards that are coin
flips. Such a reward teaches nothing: E[A] = 0 whatever the token, so whatever moves on average is
the algorithm's own doing. A step draws 128 actions a context in groups of 16 and makes 8 updates of
plain SGD on mini-batches of 16; old_logp stays that of the step's start. With R = pi / pi_old, a
clip e on both sides and mu = P(A > 0) E[A | A > 0], the mean gradient of the objective is

    mu E[ +grad R where R < 1 - e;  0 inside;  -grad R where R > 1 + e ]      (2506.10947, app. B)

A likely token cannot reach the upper bound (never, where pi_old > 1 / (1 + e)), a rare one soon
does and is pushed back. Limits: at the first update R = 1 and the bias is 0; after it R and A are
no longer independent, as the formula takes them (a group's advantages sum to 0 over mini-batches).
Without the clip the mean gradient is 0, yet probabilities drift: a random walk of the logits takes
a likely token down. So the null is one update a step; and one update with 8 times the step size is
a random walk of about the same length, in which no clip can act.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from configurator import UserError, configure, run
from grpo import advantages, policy_loss
from tools.plot import COLOURS, MARKERS

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
    habit_steps: int = 200
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
    S, n, cap = cfg.samples, cfg.updates, 1 + cfg.clip_high
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


def start(vocab: int, top: float) -> torch.Tensor:
    """Logits [V]: the first token has probability `top`, the others the rest in equal parts."""
    p = torch.full((vocab,), (1 - top) / (vocab - 1))
    p[0] = top
    return p.log()


def draw_advantages(cfg: ClipBiasConfig, contexts: int, g: torch.Generator) -> torch.Tensor:
    """Advantages [contexts, S] of coin-flip rewards, groups in consecutive columns."""
    rewards = (torch.rand(contexts * cfg.samples, generator=g) < cfg.rate).float()
    return advantages(rewards, cfg.group).view(contexts, -1)


def gradient(
    logits: torch.Tensor, y: torch.Tensor, old_logp: torch.Tensor, A: torch.Tensor, loss: dict
) -> tuple[torch.Tensor, torch.Tensor]:
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


def walk(
    cfg: ClipBiasConfig,
    logits: torch.Tensor,
    arms: Sequence[Arm],
    step_sizes: Sequence[float],
    steps: int,
    contexts: int,
    desc: str = "walk",
) -> dict[str, torch.Tensor]:
    """Train `contexts` copies of logits [V] by every arm and step size.

    Returns label -> float64 [3, L, contexts], L the step sizes: where each context ended. The three
    are MEASURES: the first token's probability, the entropy, and the share of tokens, over all
    updates, that lost their gradient to the clip (CISPO's lose none). All arms and step sizes get
    the same uniforms and rewards, so arms that do the same agree to the bit.
    """
    rates = torch.tensor(step_sizes)[:, None, None]
    size = max(1, CHUNK * cfg.updates // (len(step_sizes) * cfg.samples))
    chunks = [min(size, contexts - i) for i in range(0, contexts, size)]
    seeds = torch.randint(2**62, (len(chunks),), generator=torch.Generator().manual_seed(cfg.seed))
    bar = tqdm(total=len(chunks) * steps, desc=desc, unit="step", leave=False)

    def train(c: int, seed: int) -> dict[str, torch.Tensor]:  # c of the contexts
        g = torch.Generator().manual_seed(seed)
        # [L, c, V]; with step size 0 a single layer does for all
        state = {a.label: logits.expand(len(step_sizes) if a.scale else 1, c, -1) for a in arms}
        clipped = {arm.label: torch.zeros(state[arm.label].shape[:2]) for arm in arms}
        for _ in range(steps):
            u = torch.rand(c, cfg.samples, generator=g)
            A = draw_advantages(cfg, c, g)  # [c, S]
            order = torch.rand(c, cfg.samples, generator=g).argsort(1)  # each context has its own
            shuffled = A.gather(1, order)  # u need not be: all its columns are alike
            for arm in arms:
                here, n = state[arm.label], arm.one_update or cfg.samples
                old = here.log_softmax(-1)
                cdf = old.exp().cumsum(-1)
                y = torch.searchsorted(cdf, u[:, :n].repeat(len(here), 1, 1))  # [L, c, n]
                y.clamp_(max=len(logits) - 1)  # rounding may leave the last sum below 1
                given = (A if arm.one_update else shuffled)[:, :n].expand_as(y)
                m = arm.one_update or n // cfg.updates
                parts = [t.split(m, -1) for t in (y, old.gather(-1, y), given)]
                for part in zip(*parts, strict=True):
                    grad, cut = gradient(here, *part, arm.loss)
                    here = here - arm.scale * rates[: len(here)] * grad
                    clipped[arm.label] += cut.sum(-1) / (steps * n)
                state[arm.label] = here
            bar.update()
        result = {}
        for arm in arms:
            logp = state[arm.label].double().log_softmax(-1)  # [L, c, V]
            entropy = -(logp.exp() * logp).sum(-1)
            three = torch.stack([logp[..., 0].exp(), entropy, clipped[arm.label].double()])
            result[arm.label] = three.expand(-1, len(step_sizes), -1)
        return result

    # Chunks side by side: these tensors are too small for torch to share out one of them.
    with ThreadPoolExecutor(cfg.threads or os.cpu_count()) as pool:
        parts = list(pool.map(train, chunks, seeds.tolist()))
    bar.close()
    return {arm.label: torch.cat([part[arm.label] for part in parts], -1) for arm in arms}


# ---- appendix B


def positive_part(group: int, rate: float) -> float:
    """mu = P(A > 0) E[A | A > 0] of group-normalised Bernoulli(rate) rewards, by the binomial."""
    mu = 0.0
    for k in range(1, group):  # groups all 0 or all 1 have A = 0
        A = advantages((torch.arange(group) < k).float(), group).double()
        chance = math.comb(group, k) * rate**k * (1 - rate) ** (group - k)
        mu += chance * A.clamp_min(0).mean().item()
    return mu


def expected_gradient(
    logits: torch.Tensor, old: torch.Tensor, mu: float, low: float, high: float
) -> torch.Tensor:
    """The formula's mean gradient of the objective on the logits, summed over the vocabulary: [V].

    E over pi_old of grad R where y is in a set = sum over the set of pi(y) (onehot(y) - pi).
    low, high: bounds of the ratio, -inf and inf where a side is not clipped.
    """
    p, q = logits.double().softmax(-1), old.double().softmax(-1)
    sign = (p / q < low).double() - (p / q > high).double()  # [V]
    return mu * (sign * p - (sign * p).sum() * p)


def mean_gradient(
    cfg: ClipBiasConfig, logits: torch.Tensor, old: torch.Tensor, arms: Sequence[Arm]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Measured ascent gradient: label -> (mean [V], its standard error [V], clip fraction).

    Actions from softmax(old), fresh rewards; each context gives one independent gradient.
    """
    g = torch.Generator().manual_seed(cfg.seed + 1)
    C, S = cfg.contexts, cfg.samples
    found: dict[str, list] = {arm.label: [] for arm in arms}
    for _ in range(cfg.rounds):
        y = torch.multinomial(old.softmax(-1), C * S, replacement=True, generator=g).view(C, S)
        A = draw_advantages(cfg, C, g)
        old_logp = old.log_softmax(-1)[y]
        for arm in arms:
            found[arm.label].append(gradient(logits.expand(C, -1), y, old_logp, A, arm.loss))
    result = {}
    for label, pairs in found.items():
        grads = -torch.cat([grad for grad, _ in pairs]).double()  # [C * rounds, V]
        clipped = sum(cut.float().mean().item() for _, cut in pairs) / cfg.rounds
        result[label] = (grads.mean(0), grads.std(0) / math.sqrt(len(grads)), clipped)
    return result


def appendix_b(cfg: ClipBiasConfig) -> list[dict]:
    """Formula against measurement for the first token: four arms, then the two thresholds."""
    mu = positive_part(cfg.group, cfg.rate)
    four = [arm for arm in arms(cfg) if arm.label in ("both", "high only", "low only", "off")]
    old = start(cfg.vocab, cfg.top)
    noise = torch.randn(cfg.vocab, generator=torch.Generator().manual_seed(cfg.seed))
    e = cfg.clip_high
    edge = 1 / (1 + e)
    cases = [(f"{cfg.vocab} tokens", old, old + cfg.shift * noise, four)]
    for q, p in ((edge + 0.01, 0.999), (edge - 0.01, 0.999),
                 (0.02, 0.02 * (0.99 + e)), (0.02, 0.02 * (1.01 + e))):  # fmt: skip
        cases.append((f"{q:.3f} -> {p:.4f}", start(2, q), start(2, p), four[1:2]))
    rows = []
    for case, old, new, which in tqdm(cases, desc="appendix B", leave=False):
        measured = mean_gradient(cfg, new, old, which)
        for arm in which:
            low = 1 - cfg.clip_low if arm.loss["clip"] in ("both", "low") else -math.inf
            high = 1 + cfg.clip_high if arm.loss["clip"] in ("both", "high") else math.inf
            exact = expected_gradient(new, old, mu, low, high)
            mean, error, clipped = measured[arm.label]
            figures = [x[0].item() for x in (exact, mean, error)]
            row = dict(zip(("formula", "measured", "se"), figures, strict=True))
            rows.append({"case": case, "arm": arm.label, **row, "clip_frac": clipped})
    return rows


# ---- the report


def mean_se(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the last dimension, the contexts, and its standard error."""
    return x.mean(-1), x.std(-1) / math.sqrt(x.shape[-1])


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a chance of which k of n were seen (Wilson, 1927)."""
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def markdown(head: Sequence[str], rows: list[list[str]]) -> str:
    lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(cfg: ClipBiasConfig, found: dict, habits: dict, formula: list[dict]) -> str:
    """Three tables in markdown, from what walk (twice) and appendix_b return."""
    text = (f"{cfg.contexts} contexts of {cfg.vocab} tokens, {cfg.steps} steps, rewards "
            f"Bernoulli({cfg.rate:g}); by step size: mean ± standard error\n")  # fmt: skip
    for i, (title, begin) in enumerate(zip(MEASURES, begins(cfg), strict=True)):
        rows = []
        for arm in arms(cfg):
            mean, se = mean_se(found[arm.label][i])
            digits = 4 if i == 2 else 3
            cells = [f"{m:.{digits}f} ± {s:.{digits}f}" for m, s in zip(mean, se, strict=True)]
            rows.append([arm.label, *cells, *[arm.published] * (i == 0)])
        sizes = [f"{size:g}" for size in cfg.step_sizes]
        text += markdown([f"{title}, start {begin:.3f}", *sizes, *["published"] * (i == 0)], rows)

    text += (f"\nTwo habits: {cfg.habit_contexts} contexts, {cfg.habit_steps} steps, step size "
             f"{cfg.habit_step_size:g}; 95 % intervals\n")  # fmt: skip
    rows = []
    for arm in arms(cfg):
        p = habits[arm.label][0, 0]
        (mean, se), won = mean_se(p), int((p > 0.5).sum())
        low, high = wilson(won, len(p))
        rows.append([arm.label, f"{mean:.3f} ± {1.96 * se:.3f}",
                     f"{won / len(p):.3f} ({low:.3f} to {high:.3f})"])  # fmt: skip
    mean = f"mean probability of the first, start {cfg.habit_top:g}"
    text += markdown(["arm", mean, "chance that the first ends above 1/2"], rows)

    text += (f"\nAppendix B: gradient on the first token's logit, "
             f"{cfg.contexts * cfg.rounds * cfg.samples} actions, mu = "
             f"{positive_part(cfg.group, cfg.rate):.6f}; 95 % intervals\n")  # fmt: skip
    rows = []
    for r in formula:
        relative = "-"
        if r["formula"]:
            off, half = r["measured"] / r["formula"] - 1, 1.96 * r["se"] / abs(r["formula"])
            relative = f"{100 * off:+.1f} ± {100 * half:.1f} %"
        measured = f"{r['measured']:+.5f} ± {1.96 * r['se']:.5f}"
        rows.append([r["case"], r["arm"], f"{r['formula']:+.5f}", measured, relative,
                     f"{r['clip_frac']:.4f}"])  # fmt: skip
    head = ["case", "arm", "formula", "measured", "relative error", "clip fraction"]
    text += markdown(head, rows)
    edge = 1 + cfg.clip_high
    return text + (f"\nq -> p: two tokens, the first drawn with q, its probability now p. With q "
                   f"above {1 / edge:.3f} it is never clipped from above; with q = .02 it is "
                   f"pushed down above {0.02 * edge:.3f}.\n")  # fmt: skip


def begins(cfg: ClipBiasConfig) -> tuple[float, float, float]:
    """MEASURES before the first step."""
    H = torch.distributions.Categorical(logits=start(cfg.vocab, cfg.top)).entropy()
    return cfg.top, float(H), 0.0


def draw(cfg: ClipBiasConfig, found: dict[str, torch.Tensor], path: Path) -> None:
    """Every arm against the step size: the top token's probability, and the entropy."""
    shown = [arm for arm in arms(cfg) if arm.scale]
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(32 / 3, 6.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for i, axis in enumerate(axes):
            axis.axhline(begins(cfg)[i], color="grey", linestyle=":", label="start")
            for j, arm in enumerate(shown):
                mean, se = mean_se(found[arm.label][i])
                # side by side, so that intervals can be told apart
                x = [k + 0.07 * (j - (len(shown) - 1) / 2) for k in range(len(mean))]
                look = {"color": COLOURS[j % len(COLOURS)], "marker": MARKERS[j % len(MARKERS)]}
                if arm.one_update:
                    look |= {"color": COLOURS[-1], "linestyle": "--", "markerfacecolor": "white"}
                label = arm.label + (f"; published: {arm.published}" if arm.published else "")
                axis.errorbar(x, mean, 1.96 * se, label=label, capsize=2, markersize=5,
                              linewidth=1.2, **look)  # fmt: skip
            axis.set_title(MEASURES[i], fontsize=12)
            axis.set_xlabel("step size of SGD")
            axis.set_xticks(range(len(cfg.step_sizes)), [f"{s:g}" for s in cfg.step_sizes])
            axis.grid(alpha=0.25, axis="y")
        figure.suptitle(f"Random rewards on a softmax table, after {cfg.steps} steps: mean of "
                        f"{cfg.contexts} contexts, 95 % intervals", fontsize=13)  # fmt: skip
        place = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": 9}
        figure.legend(*axes[0].get_legend_handles_labels(), **place)
        figure.savefig(path, dpi=150)


def check(cfg: ClipBiasConfig) -> None:
    """Refuse what cannot be measured (UserError)."""
    least = {"steps": 1, "habit_steps": 1, "samples": 1, "updates": 1, "rounds": 1, "contexts": 2,
             "habit_contexts": 2, "vocab": 2, "group": 2, "seed": 0, "threads": 0, "shift": 0,
             "habit_step_size": 0}  # fmt: skip
    for key, bound in least.items():
        if getattr(cfg, key) < bound:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {bound}")
    for key in ("top", "habit_top", "clip_low", "clip_high"):
        if not 0 < getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be between 0 and 1")
    for key in ("group", "updates"):
        if cfg.samples % getattr(cfg, key):
            raise UserError(f"samples={cfg.samples}: not a multiple of {key}={getattr(cfg, key)}")
    if not 0 <= cfg.rate <= 1:
        raise UserError(f"rate={cfg.rate}: a chance, from 0 to 1")
    if not cfg.step_sizes or min(cfg.step_sizes) < 0:
        raise UserError(f"step_sizes={cfg.step_sizes}: name one or more, none negative")


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
    formula = appendix_b(cfg)
    text = report(cfg, found, habits, formula)
    (out / "table.md").write_text(text)
    draw(cfg, found, out / "clip_bias.png")
    print(f"{text}\ntable: {out / 'table.md'}\nfigure: {out / 'clip_bias.png'}")
    tables = {what: {label: [mean_se(x)[j].tolist() for j in (0, 1)] for label, x in ends.items()}
              for what, ends in (("table", found), ("habits", habits))}  # fmt: skip
    print(json.dumps({"seconds": time.perf_counter() - begun, **asdict(cfg), "measures": MEASURES,
                      "mean_and_se": tables, "appendix_b": formula}))  # fmt: skip


if __name__ == "__main__":
    run(main)
