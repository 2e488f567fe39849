"""tools.clip_bias: the nulls bit for bit, the signs of the bias, appendix B against measurement."""

import json
import math
import re

import pytest
import torch

from harness.errors import run
from tools import clip_bias
from tools.clip_bias import ClipBiasConfig
from tools.parts.clip_tables import mean_se
from tools.parts.logit_walk import (
    context_gradients,
    draw_advantages,
    start_logits,
    update_rules,
    walk,
)

CLIPS = ["both", "high only", "low only", "off"]


def ends(cfg, labels=None, steps=20, contexts=64, step_sizes=(0.8,), **more):
    """walk on 20 tokens, the first at .65: label -> [3, L, C]."""
    chosen = [rule for rule in update_rules(cfg) if labels is None or rule.label in labels]
    return walk(cfg, start_logits(20, 0.65), chosen, step_sizes, steps, contexts, **more)


def first() -> float:
    return start_logits(20, 0.65).double().log_softmax(-1)[0].exp()


def test_start():
    p = start_logits(20, 0.65).exp()
    assert p[0] == pytest.approx(0.65) and p.sum() == pytest.approx(1)
    assert -(p * p.log()).sum() == pytest.approx(1.678, abs=5e-4)


# ---- nulls


def test_step_size_0_moves_nothing():
    (end,) = ends(ClipBiasConfig(), ["null: step size 0"], steps=3).values()
    assert (end[0] == first()).all() and (end[2] == 0).all()


def test_constant_rewards_move_nothing():
    for end in ends(ClipBiasConfig(rate=1.0), steps=2).values():
        assert (end[0] == first()).all()


def test_one_update_a_step_clip_arms_agree_to_the_bit():
    found = ends(ClipBiasConfig(updates=1), CLIPS, steps=5)
    both = found.pop("both")
    assert both[0].std() > 0 and all(torch.equal(both, end) for end in found.values())


def test_small_steps_clip_nothing_and_arms_agree_to_the_bit():
    found = ends(ClipBiasConfig(), CLIPS, 5, 64, (0.05,))
    both = found.pop("both")
    assert both[0].std() > 0 and all(torch.equal(both, end) for end in found.values())


def test_the_seed_fixes_everything_and_threads_change_nothing():
    four_chunks = {"chunk_rows": 16 * 16}
    one, two = (ends(ClipBiasConfig(threads=n), ["both"], 3, **four_chunks)["both"] for n in (1, 2))
    assert torch.equal(one, two)
    other = ends(ClipBiasConfig(seed=1), ["both"], 3, **four_chunks)["both"]
    assert not torch.equal(one, other)
    assert len(one[0, 0].unique()) == 64  # no two chunks had the same noise


# ---- the bias


def test_signs():
    """Both above the start, off below it, each arm in its place (here .71 .76 .56 .61)."""
    found = ends(ClipBiasConfig(), CLIPS, 25, 250)
    top = {label: end[0, 0] for label, end in found.items()}
    for more, less in (("both", "off"), ("high only", "both"), ("off", "low only")):
        mean, se = mean_se(top[more] - top[less])  # paired: the same noise
        assert mean > 4 * se
    assert top["both"].mean() > 0.65 + 3 * mean_se(top["both"])[1]
    assert top["off"].mean() < 0.65 - 1.5 * mean_se(top["off"])[1]
    clip = {label: end[2].mean() for label, end in found.items()}
    assert clip["off"] == 0 and 0.005 < clip["both"] < 0.02


def test_gradient_is_each_contexts_own_mean():
    """Against -mean(A (onehot - p)) by hand at ratio 1; another context changes nothing."""
    g = torch.Generator().manual_seed(0)
    logits, A = torch.randn(3, 5, generator=g), torch.randn(3, 8, generator=g)
    y = torch.randint(5, (3, 8), generator=g)
    logp = logits.log_softmax(-1)
    grad, cut = context_gradients(logits, y, logp.gather(-1, y), A, {"clip": "both"})
    onehot = torch.nn.functional.one_hot(y, 5)
    by_hand = -(A[..., None] * (onehot - logp.exp()[:, None])).mean(1)
    assert torch.allclose(grad, by_hand, atol=1e-6) and not cut.any()
    old_logp = logp.gather(-1, y)
    alone, _ = context_gradients(logits[:1], y[:1], old_logp[:1], A[:1], {"clip": "both"})
    assert torch.allclose(alone, grad[:1], atol=1e-7)


# ---- appendix B


@pytest.mark.parametrize("group, rate", [(16, 0.5), (5, 0.2)])
def test_mu_is_the_closed_form(group, rate):
    """k of G rewards are 1: the G advantages' positive parts sum to sqrt(k (G - k) (G - 1) / G)."""
    mu = 0.0
    for k in range(group + 1):
        chance = math.comb(group, k) * rate**k * (1 - rate) ** (group - k)
        mu += chance * math.sqrt(k * (group - k) * (group - 1) / group) / group
    assert clip_bias.positive_part(group, rate) == pytest.approx(mu, rel=1e-6)
    cfg = ClipBiasConfig(group=group, rate=rate, samples=group * 8, updates=1)
    A = draw_advantages(cfg, 20_000, torch.Generator().manual_seed(0))
    mean, se = mean_se(A.clamp_min(0).mean(1).double())
    assert abs(mean - mu) < 4 * se


def test_formula_by_autograd():
    """The sum over the set, and mu E[sign grad R] with E and grad written out."""
    g = torch.Generator().manual_seed(1)
    old = torch.randn(7, generator=g, dtype=torch.float64)
    new = (old + 0.5 * torch.randn(7, generator=g, dtype=torch.float64)).requires_grad_()
    q, R = old.softmax(0), new.softmax(0) / old.softmax(0)
    sign = (R < 0.8).double() - (R > 1.2).double()
    (by_autograd,) = torch.autograd.grad(0.4 * (q * sign.detach() * R).sum(), new)
    ours = clip_bias.expected_gradient(new.detach(), old, 0.4, 0.8, 1.2)
    assert torch.allclose(ours, by_autograd, atol=1e-12) and by_autograd.abs().max() > 0.01


def test_formula_against_measurement():
    rows = clip_bias.appendix_b(ClipBiasConfig(contexts=500, rounds=2, vocab=6))
    for r in rows:
        assert abs(r["measured"] - r["formula"]) < 4 * r["se"]
    both, high, low, off, never, soon, below, above = rows
    assert both["formula"] == pytest.approx(high["formula"] + low["formula"], abs=1e-12)
    assert high["formula"] != 0 and low["formula"] != 0 and both["clip_frac"] > 0.01
    for r in (off, never, below):
        assert r["formula"] == 0 and r["clip_frac"] == 0
    for r in (soon, above):
        assert r["formula"] < -4 * r["se"] < 0 and r["clip_frac"] > 0


# ---- the command


def test_command(tmp_path, capsys):
    small = ["--contexts=20", "--steps=2", "--habit_contexts=20", "--habit_steps=2", "--rounds=1"]
    clip_bias.main([*small, f"--out={tmp_path / 'new'}", "--step_sizes=0.4,0.8"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (tmp_path / "new" / "clip_bias.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "new" / "table.md").read_text()
    assert table in out and len(re.findall(r"^\| off ", table, re.M)) == 4
    mean, se = result["mean_and_se"]["table"]["null: step size 0"]
    assert mean[0] == pytest.approx([0.65, 0.65]) and se[0] == [0, 0]
    p = re.search(r"^\| null: step size 0 .* (\d\.\d+) \((\S+) to (\S+)\) \|$", table, re.M)
    # all of 20 are still above 1/2: Wilson's lower end is 1 / (1 + z^2 / n)
    assert [float(x) for x in p.groups()] == pytest.approx([1, 1 / (1 + 1.96**2 / 20), 1], abs=6e-4)


@pytest.mark.parametrize(
    "option, key",
    [
        ("--samples=100", "group"),
        ("--top=1.5", "top"),
        ("--contexts=1", "contexts"),
        ("--stepsizes=1", "step_sizes"),
        ("--rate=2", "rate"),
        ("--step_sizes=-1", "step_sizes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(option, key, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clip_bias", option])
    with pytest.raises(SystemExit) as stop:
        run(clip_bias.main)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and key in error and len(error.splitlines()) == 1


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["clip_bias", f"--out={tmp_path / 'file' / 'x'}"])
    with pytest.raises(SystemExit) as stop:
        run(clip_bias.main)
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
