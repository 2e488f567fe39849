"""The metrics of a step: rewards, habits of the responses, clip, sampler and base policy."""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import grading
import grpo
import rewards
from data import Rollouts
from evaluation.collapse import collapse_step
from harness.errors import printable
from harness.expressions import Reward
from harness.token_log import token_log
from tasks import answers


def describe(
    r: Rollouts,
    reward: torch.Tensor,
    rounding: torch.Tensor,
    watched: list[Reward],
    failed: set[str],
) -> dict:
    """Compute the metrics of a step that depend only on its rollouts, before any update.

    reward float32 [B] is the trained reward, and rounding float32 [P] is its rounding error
    (rewards.rounding). The metrics have, for this reward and for each watched reward whose inputs
    exist: the mean, the group std (unbiased, averaged over groups), the share of flat groups, and
    the AUROC against correctness (None if all or no responses are right). The keys of a watched
    reward start with its own name. A watched reward that fails is logged as None, with one warning;
    failed holds the names that were already warned about. pass_at_group is the share of prompts
    with a right response in their group (pass@k, k = group size). Entropy and self-certainty are
    means over tokens. Metrics that need the base policy are None if it did not score this step.
    """
    tokens = r.length.sum().item()
    correct = torch.tensor(answers.correct(r.text, r.problem))
    length = r.length.float()
    gap = (r.sampler_logp - r.old_logp).abs()
    trained = summarize_reward(reward, correct, r.group_size)
    near_flat = grpo.flat_groups(reward, r.group_size, rounding).float().mean().item()
    kl = None if r.ref_logp is None else grpo.kl(r.old_logp, r.ref_logp)[r.mask].mean().item()
    solved = correct.view(-1, r.group_size).any(1)  # [P]
    metrics = {
        "reward": trained["mean"],
        "reward_std": trained["std"],
        "flat_groups": near_flat,
        "flat_by_rounding": near_flat - trained["flat"],
        "reward_auroc": trained["auroc"],
        "accuracy": correct.float().mean().item(),
        "pass_at_group": solved.float().mean().item(),
        "code_frequency": rewards.parse("python")(r).mean().item(),
        "boxed": rewards.parse("format")(r).mean().item(),
        "length": length.mean().item(),
        "length_correct": length[correct].mean().item() if correct.any() else None,
        "length_wrong": None if correct.all() else length[~correct].mean().item(),
        "truncated": 1 - r.finished.float().mean().item(),
        "entropy": r.entropy.sum().item() / tokens,
        **by_correctness(r.entropy, r, correct, "entropy"),
        "token_prob": r.old_logp[r.mask].exp().mean().item(),
        "kl": kl,
        "sampler_gap": gap.sum().item() / tokens,
        "sampler_gap_max": gap.max().item(),
    }
    if r.self_certainty is not None:
        metrics |= by_correctness(r.self_certainty, r, correct, "self_certainty")
    for one in watched:
        if one.missing(r) in ([], ["base_self_certainty"]):  # base_every may skip the base
            summary = watch(one, r, correct, failed)
            metrics |= {f"{one}/{name}": value for name, value in summary.items()}
    grader = grading.grader()
    return metrics | {
        "grader_timeouts": grader.timeouts,
        "grader_repeats": grader.repeats,
        "grader_crashes": grader.errors,
    }


def watch(one: Reward, r: Rollouts, correct: torch.Tensor, failed: set[str]) -> dict:
    """summarize_reward of a watched reward, with None for each figure if it cannot be computed."""
    nothing = dict.fromkeys(("mean", "std", "flat", "auroc"))
    if one.missing(r):
        return nothing
    try:
        return summarize_reward(one(r), correct, r.group_size)
    except Exception as error:  # a failing watched reward must not stop the run
        if str(one) not in failed:
            failed.add(str(one))
            reason = printable(f"{type(error).__name__}: {error}".splitlines()[0])
            tqdm.write(f"warning: reward {one} is logged as null, since it failed: {reason}")
        return nothing


def describe_clip(
    stats: list[dict[str, torch.Tensor]],
    skipped_logp: torch.Tensor | None = None,
    skipped_mask: torch.Tensor | None = None,
) -> dict:
    """Average the statistics of grpo.policy_loss over the tokens of a step's micro-batches.

    skipped_logp [b, R] and skipped_mask [b, R] are old_logp and the tokens in the loss of rows that
    the update left out. No token of theirs is clipped, and they count in every share. Their ratio
    is unknown, so ratio_mean and ratio_max are over the other tokens, None if there are none. The
    three *_bins are lists by old probability from 0 to 1. prob_bins is the share of all tokens
    in each bin. The other two are the share of a bin's tokens that were clipped (None if the bin is
    empty).
    """
    sums = {key: sum(s[key].double() for s in stats).tolist() for key in stats[0]} if stats else {}
    measured = sums.get("tokens", 0)
    per_bin = np.array(sums.get("prob_bins", [0.0] * grpo.BINS))
    if skipped_logp is not None:
        kind = torch.zeros_like(skipped_mask, dtype=torch.int64)  # not clipped
        per_bin += grpo.bins(skipped_logp, skipped_mask, kind)[0].numpy()
    n = max(per_bin.sum(), 1.0)

    def by_bin(key: str) -> list[float | None]:
        clipped = sums.get(key, [0.0] * grpo.BINS)
        return [k / m if m else None for k, m in zip(clipped, per_bin.tolist(), strict=True)]

    return {
        "clip_frac_low": sums.get("clip_low", 0.0) / n,
        "clip_frac_high": sums.get("clip_high", 0.0) / n,
        "clip_pull_low": sums.get("clip_pull_low", 0.0) / n,
        "clip_pull_high": sums.get("clip_pull_high", 0.0) / n,
        "prob_bins": (per_bin / n).tolist(),
        "clip_low_bins": by_bin("clip_low_bins"),
        "clip_high_bins": by_bin("clip_high_bins"),
        "ratio_mean": sums["ratio"] / measured if measured else None,
        "ratio_max": max(float(s["ratio_max"]) for s in stats) if measured else None,
    }


def describe_updates(stats: list[list[dict[str, torch.Tensor]]], tokens: list[int]) -> dict:
    """Describe each optimiser update of a step, in order: lists of one number per update.

    stats[i] has the statistics of grpo.policy_loss of the micro-batches of update i, and tokens[i]
    is the number of tokens in the loss of its whole mini-batch. clip_frac_by_update is the share of
    these tokens that was clipped. outside_by_update is the share outside the band, over the tokens
    of rows that the update did not leave out, None if there are none. Both are 0 at the first
    update, where every ratio is 1.
    """

    def total(part: list[dict[str, torch.Tensor]], *keys: str) -> float:
        return sum(float(s[key]) for s in part for key in keys)

    clipped = [total(part, "clip_low", "clip_high") for part in stats]
    measured = [(total(part, "outside"), total(part, "tokens")) for part in stats]
    return {
        "clip_frac_by_update": [c / max(n, 1) for c, n in zip(clipped, tokens, strict=True)],
        "outside_by_update": [k / n if n else None for k, n in measured],
    }


def by_correctness(values: torch.Tensor, r: Rollouts, correct: torch.Tensor, name: str) -> dict:
    """The mean of token values [B, R] over the tokens of right and of wrong responses.

    correct is bool [B]. The keys are {name}_correct and {name}_wrong, None if there are none.
    """
    found = {}
    for key, rows in (("correct", correct), ("wrong", ~correct)):
        tokens = r.mask & rows[:, None]
        found[f"{name}_{key}"] = values[tokens].mean().item() if rows.any() else None
    return found


def summarize_reward(value: torch.Tensor, correct: torch.Tensor, group_size: int) -> dict:
    """mean, std, flat and auroc (see describe) of a reward float32 [B]; correct is bool [B]."""
    auroc = rewards.auroc(value.numpy(), correct.numpy())
    groups = value.view(-1, group_size)
    return {
        "mean": value.mean().item(),
        "std": groups.std(1).mean().item() if group_size > 1 else 0.0,
        "flat": grpo.flat_groups(value, group_size).float().mean().item(),
        "auroc": None if math.isnan(auroc) else auroc,
    }


def sample_log(
    r: Rollouts,
    reward: torch.Tensor,
    advantage: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n: int = 4,
) -> list[dict]:
    """Choose n responses of the step for the log, evenly spread over its rows.

    With a tokenizer, each has the values of its tokens too (see harness/token_log.py).
    """
    rows = np.linspace(0, len(r.text) - 1, min(n, len(r.text))).round().astype(int).tolist()
    return [
        {
            "step": r.step,
            "row": i,
            "problem": r.problem[i].problem,
            "answer": r.problem[i].answer,
            "response": r.text[i],
            "reward": reward[i].item(),
            "advantage": advantage[i].item(),
            "correct": answers.correct([r.text[i]], [r.problem[i]])[0],
            "finished": bool(r.finished[i]),
            **(token_log(r, i, tokenizer) if tokenizer else {}),
        }
        for i in rows
    ]


def summary_table(history: list[dict], folder: Path) -> None:
    """Print the first and the last value of the main metrics."""
    steps = [m for m in history if "reward" in m]
    evals = [m for m in history if "eval_accuracy" in m]
    print(f"\n{'':<24}{'first':>10}{'last':>10}")
    columns = [("eval_accuracy", evals), ("eval_stderr", evals), ("eval_code_frequency", evals)]
    keys = "reward reward_auroc accuracy code_frequency boxed length entropy clip_frac_low "
    keys += "clip_frac_high kl"
    columns += [(key, steps) for key in keys.split()]
    for key, rows in columns:
        values = [m[key] for m in rows if isinstance(m.get(key), int | float)]
        if values:
            print(f"{key:<24}{values[0]:>10.4f}{values[-1]:>10.4f}")
    if (step := collapse_step(steps)) is not None:
        print(f"collapsed at step {step}: accuracy stays below half of its best (docs/EVAL.md)")
    seconds = sum(m["seconds"] for m in steps if isinstance(m.get("seconds"), int | float))
    print(f"{len(steps)} steps, {seconds / 60:.1f} min; run folder {folder}")
    print(f"look at it: python -m tools.plot {folder}   python sample.py --run={folder}")
