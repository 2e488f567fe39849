"""Measure the bias of the clip on a table of logits, with grpo.advantages and grpo.policy_loss.

    python -m tools.clip_bias                  (tables and a figure: a minute on two cores)
    python -m tools.clip_bias --vocab=10 --top=0.88

A thousand independent contexts, each a row of logits [V], are trained on coin-flip rewards. Such
rewards teach nothing: E[A] = 0 for every token, so the algorithm causes whatever moves on average.
A step draws 128 actions per context in groups of 16, and makes 8 updates of plain SGD on
mini-batches of 16; old_logp stays that of the start of the step. With R = pi / pi_old, a clip e on
both sides and mu = P(A > 0) E[A | A > 0], the mean gradient of the objective is

    mu E[ +grad R where R < 1 - e;  0 inside;  -grad R where R > 1 + e ]      (2506.10947, app. B)

A likely token cannot reach the upper bound (never, if pi_old > 1 / (1 + e)). A rare one soon does,
and is pushed back. The formula has limits: at the first update R = 1 and the bias is 0, and later R
and A are not independent as the formula assumes, because the advantages of a group sum to 0 over
mini-batches.

Without the clip the mean gradient is 0, yet probabilities drift: a random walk of the logits lowers
a likely token's probability. The null is therefore one update per step. A null with 8 times the
step size is a random walk of about the same length in which no clip can act.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from grpo import advantages
from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.clip_tables import mean_se, write_clip_bias
from tools.parts.logit_walk import (
    MEASURES,
    UpdateRule,
    context_gradients,
    draw_advantages,
    start_logits,
    update_rules,
    walk,
)


@dataclass
class ClipBiasConfig:
    """Measure the bias of the clip on logits: python -m tools.clip_bias [--key=value]"""

    # Table: every context starts from the same probabilities
    contexts: int = 1000  # independent rows of logits
    vocab: int = 20  # tokens per context
    top: float = 0.65  # probability of the first token; the others share the rest equally
    steps: int = 60  # steps, each with fresh samples
    step_sizes: tuple[float, ...] = (0.15, 0.4, 0.8, 1.6)  # of SGD on the logits
    # Two habits: a context of two tokens
    habit_contexts: int = 500
    habit_top: float = 0.65  # probability of the first habit
    habit_steps: int = 100
    habit_step_size: float = 1.0
    # Batch
    samples: int = 128  # actions per context and step
    group: int = 16  # actions whose rewards are normalised together
    updates: int = 8  # mini-batches, and so updates, per step
    rate: float = 0.5  # chance that the reward is 1
    clip_low: float = 0.2  # ratios below 1 - clip_low are clipped, where A < 0
    clip_high: float = 0.2  # ratios above 1 + clip_high are clipped, where A > 0
    # Appendix B: the mean gradient at a policy that differs from the sampling one
    shift: float = 0.4  # standard deviation of the noise by which the logits differ
    rounds: int = 10  # batches of contexts x samples fresh actions
    # Run
    seed: int = 0
    threads: int = 0  # chunks of contexts worked on at once; 0 = one per core
    out: str = "out/clip_bias"  # folder for table.md and clip_bias.png


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

    Actions (from softmax(old)) and rewards are the same for every loss. A context is one sample.
    """
    g = torch.Generator().manual_seed(cfg.seed + 1)
    C, S = cfg.contexts, cfg.samples
    grads, cuts = [], []
    for _ in range(cfg.rounds):
        y = torch.multinomial(old.softmax(-1), C * S, replacement=True, generator=g).view(C, S)
        A = draw_advantages(cfg, C, g)
        grad, cut = context_gradients(logits.expand(C, -1), y, old.log_softmax(-1)[y], A, loss)
        grads.append(-grad.double())
        cuts.append(cut.float().mean().item())
    return *mean_se(torch.cat(grads).T), sum(cuts) / cfg.rounds


def appendix_b(cfg: ClipBiasConfig) -> list[dict]:
    """Formula against measurement for the first token: four rules, then the two thresholds."""
    mu = positive_part(cfg.group, cfg.rate)
    rows = []
    for case, old, new, rule in tqdm(_cases(cfg), desc="appendix B", leave=False):
        low = 1 - cfg.clip_low if rule.loss["clip"] in ("both", "low") else -math.inf
        high = 1 + cfg.clip_high if rule.loss["clip"] in ("both", "high") else math.inf
        exact = expected_gradient(new, old, mu, low, high)
        mean, se, clipped = mean_gradient(cfg, new, old, rule.loss)
        row = {"formula": exact[0].item(), "measured": mean[0].item(), "se": se[0].item()}
        rows.append({"case": case, "arm": rule.label, **row, "clip_frac": clipped})
    return rows


def _cases(cfg: ClipBiasConfig) -> list[tuple[str, Tensor, Tensor, UpdateRule]]:
    """(name, old logits, new logits, rule) of each comparison."""
    by_label = {rule.label: rule for rule in update_rules(cfg)}
    old = start_logits(cfg.vocab, cfg.top)
    noise = torch.randn(cfg.vocab, generator=torch.Generator().manual_seed(cfg.seed))
    new = old + cfg.shift * noise
    cases = []
    for label in ("both", "high only", "low only", "off"):
        cases.append((f"{cfg.vocab} tokens", old, new, by_label[label]))
    # Two tokens; q, p: the first one's old and new probability, on both sides of each threshold.
    e, edge = cfg.clip_high, 1 / (1 + cfg.clip_high)
    thresholds = [
        (edge + 0.01, 0.999),
        (edge - 0.01, 0.999),
        (0.02, 0.02 * (0.99 + e)),
        (0.02, 0.02 * (1.01 + e)),
    ]
    for q, p in thresholds:
        name = f"{q:.3f} -> {p:.4f}"
        cases.append((name, start_logits(2, q), start_logits(2, p), by_label["high only"]))
    return cases


# ---- the command


def check_settings(cfg: ClipBiasConfig) -> None:
    """Raise UserError for a setting that cannot be measured."""
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


def measure(cfg: ClipBiasConfig) -> dict:
    """All that is measured, and the settings, as one dict for JSON (see clip_tables)."""
    rules = update_rules(cfg)
    table = start_logits(cfg.vocab, cfg.top)
    habit = start_logits(2, cfg.habit_top)
    table_ends = walk(cfg, table, rules, cfg.step_sizes, cfg.steps, cfg.contexts, "table")
    habit_ends = walk(
        cfg,
        habit,
        rules,
        (cfg.habit_step_size,),
        cfg.habit_steps,
        cfg.habit_contexts,
        "habits",
    )
    entropy = torch.distributions.Categorical(logits=table).entropy().item()
    return {
        **asdict(cfg),
        "measures": MEASURES,
        "begin": (cfg.top, entropy, 0.0),  # the measures before the first step
        "arms": [asdict(rule) for rule in rules],
        "mean_and_se": {  # label -> two lists [3, L]
            "table": {label: _as_lists(ends) for label, ends in table_ends.items()},
            "habits": {label: _as_lists(ends) for label, ends in habit_ends.items()},
        },
        "above_half": {label: int((ends[0, 0] > 0.5).sum()) for label, ends in habit_ends.items()},
        "mu": positive_part(cfg.group, cfg.rate),
        "appendix_b": appendix_b(cfg),
    }


def _as_lists(ends: Tensor) -> list[list]:
    return [values.tolist() for values in mean_se(ends)]


def main(argv: list[str]) -> None:
    cfg, _ = configure(ClipBiasConfig, argv)
    check_settings(cfg)
    out = Path(cfg.out)
    try:  # before the minute of work
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be made ({error.strerror}): name a folder") from error
    begun = time.perf_counter()
    torch.set_num_threads(1)  # chunks of contexts run side by side instead
    result = measure(cfg)
    write_clip_bias(result, out)
    print(json.dumps({"seconds": time.perf_counter() - begun, **result}))


if __name__ == "__main__":
    run(main)
