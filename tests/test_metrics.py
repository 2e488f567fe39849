"""Metrics of a training step by update and by correctness, and the rule for a collapse."""

from dataclasses import replace

import pytest
import torch
from conftest import run_config

import grpo
import metrics
from data import Problem, Rollouts
from evaluation.collapse import collapse_step
from train import train


def test_the_share_outside_the_band_ignores_advantage_and_clip():
    logp = torch.tensor([[0.0, 0.1, 0.3, 9.0], [-0.3, -0.1, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]] * 2)
    for clip in ("both", "high", "low", "off"):
        for A in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):
            _, stats = grpo.policy_loss(logp, torch.zeros(2, 4), A, mask, 1.0, clip=clip)
            assert stats["outside"] == 2 and stats["tokens"] == 6  # exp(.3) and exp(-.3)
    _, stats = grpo.policy_loss(logp, logp, A, mask, 1.0)
    assert stats["outside"] == 0


def test_statistics_by_update_by_hand():
    def stats(tokens, low, high, outside):
        values = {"tokens": tokens, "clip_low": low, "clip_high": high, "outside": outside}
        return {key: torch.tensor(value) for key, value in values.items()}

    found = metrics.describe_updates(
        [[stats(4, 0, 0, 0)], [stats(4, 1, 0, 2), stats(6, 0, 1, 3)], []], [4, 20, 5]
    )
    assert found["clip_frac_by_update"] == [0, 0.1, 0]  # rows left out have tokens, none clipped
    assert found["outside_by_update"] == [0, 0.5, None]  # their ratio is unknown


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.0, 0.03])
def test_a_run_logs_its_updates_in_order(tiny_random, tmp_path, lr):
    cfg = run_config(tiny_random, tmp_path / "run")
    for m in train(replace(cfg, lr=lr, updates_per_step=4)):
        clipped, outside = m["clip_frac_by_update"], m["outside_by_update"]
        assert len(clipped) == len(outside) == 4
        assert clipped[0] == 0 and outside[0] == 0  # every ratio is 1 at the first update
        assert all(c <= (o or 0) for c, o in zip(clipped, outside, strict=True))
        assert m["grad_norm_max"] >= m["grad_norm"] > 0
        assert m["accuracy"] <= m["pass_at_group"] <= 1
        if lr == 0:
            assert clipped == outside == [0] * 4
        else:
            assert max(clipped) > 0 and m["clip_frac_low"] + m["clip_frac_high"] > 0


def rollouts(texts: list[str], entropy: torch.Tensor, length: list[int], **more) -> Rollouts:
    """Groups of two responses to problems with the answer 1; tensors [B, R]."""
    n, width = len(texts), max(length)
    logp = torch.full((n, width), -1.0)
    return Rollouts(
        tokens=torch.zeros(n, width + 1, dtype=torch.int64),
        prompt_len=torch.ones(n, dtype=torch.int64),
        length=torch.tensor(length),
        text=texts,
        problem=[Problem("p", "1", "0")] * n,
        finished=torch.ones(n, dtype=torch.bool),
        group_size=2,
        seed=0,
        step=1,
        sampler_logp=logp,
        old_logp=logp,
        logp=logp,
        entropy=entropy,
        **more,
    )


def test_entropy_and_self_certainty_by_correctness():
    texts = [r"\boxed{1}", r"\boxed{2}", "no", "no"]
    entropy = torch.tensor([[1.0, 3.0], [5.0, 0.0], [7.0, 0.0], [7.0, 9.0]])
    r = rollouts(texts, entropy, [2, 1, 1, 2], self_certainty=2 * entropy)
    m = metrics.describe(r, torch.zeros(4), torch.zeros(2), [], set())
    assert m["pass_at_group"] == 0.5 and m["accuracy"] == 0.25
    assert m["entropy_correct"] == 2 and m["entropy_wrong"] == 7  # (5 + 7 + 7 + 9) / 4
    assert m["self_certainty_correct"] == 4 and m["self_certainty_wrong"] == 14
    tokens = (2 * m["entropy_correct"] + 4 * m["entropy_wrong"]) / 6
    assert m["entropy"] == pytest.approx(tokens)
    nobody = rollouts(["no"] * 4, entropy, [2, 1, 1, 2])
    m = metrics.describe(nobody, torch.zeros(4), torch.zeros(2), [], set())
    assert m["entropy_correct"] is None and m["entropy_wrong"] is not None
    assert "self_certainty_correct" not in m


def run_of(*accuracy: float) -> list[dict]:
    return [{"step": 0, "eval_accuracy": 0.5}] + [
        {"step": i, "accuracy": value} for i, value in enumerate(accuracy, start=1)
    ]


@pytest.mark.parametrize(
    "accuracy,step",
    [
        ([0.5] * 10 + [0.1] * 10, 14),  # the mean of steps 10 to 14 is .18, that of 9 to 13 .26
        ([0.5] * 10 + [0.1] * 10 + [0.5] * 5, None),  # it recovered
        ([0.5] * 10 + [0.1] + [0.5] * 10, None),  # one bad step
        ([0.5] * 10 + [0.3] * 20, None),  # worse, but more than half is left
        ([0.05] * 10 + [0.0] * 10, None),  # never good enough to tell
        ([0.1] * 5 + [0.9] * 5 + [0.4] * 10, 15),  # half of its best, not of its start
        ([0.5] * 3, None),  # shorter than the window
        ([], None),
    ],
)
def test_collapse_by_hand(accuracy, step):
    assert collapse_step(run_of(*accuracy)) == step


def test_the_summary_names_the_step_of_a_collapse(tmp_path, capsys):
    rows = [row | {"reward": 0.5, "seconds": 1.0} for row in run_of(*[0.5] * 10, *[0.1] * 10)[1:]]
    metrics.summary_table(rows, tmp_path)
    assert "collapsed at step 14" in capsys.readouterr().out
    metrics.summary_table(rows[:10], tmp_path)
    assert "collapsed" not in capsys.readouterr().out
