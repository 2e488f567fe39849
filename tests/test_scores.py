"""Scores that only rounding tells apart, watched rewards that fail, and published recipes."""

from dataclasses import replace

import pytest
import torch
from conftest import comparable, run_config

import grpo
import rewards
import train as trainer
from data import Problem, Rollouts
from harness import configurator
from harness.loading import load_model
from lora import add_lora
from model import rounding_error
from settings import Config, check
from train import train


@pytest.fixture
def small(tiny_random, tmp_path):
    return run_config(tiny_random, tmp_path / "run", save_every=1)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(rewards, "REGISTRY", dict(rewards.REGISTRY))


def test_a_watched_reward_that_fails_is_null_and_stops_nothing(small, registry, capsys):
    want = train(replace(small, out_dir=small.out_dir + "want"))

    @rewards.reward(formula="", source="")
    def nan(rollouts):
        return torch.full((len(rollouts.text),), torch.nan)

    @rewards.reward(formula="", source="")
    def broken(rollouts):
        raise RuntimeError("first line\nsecond line")

    got = train(small)
    out = capsys.readouterr().out
    for m, before in zip(got, want, strict=True):
        assert m["nan/mean"] is m["broken/auroc"] is None
        assert comparable([{key: m[key] for key in before}]) == comparable([before])
    assert out.count("reward nan is logged as null") == out.count("reward broken is") == 1


# ------------------------------------------------------------------------- scores and advantages

INTRINSIC = (
    "self_certainty",
    "self_certainty(base)",
    "neg_entropy",
    "neg_entropy(sum)",
    "logp",
    "logp(mean)",
    "0.1*self_certainty + 0.5*logp(mean) + format",
)


@pytest.fixture
def scored(tiny_random, monkeypatch):
    """Two groups of eight rows scored in bf16: equal responses, and all different ones.

    Scores depend on the size of the micro-batch, on any processor.
    """
    forward = trainer.forward

    def rounded(model, rollouts, rows, cfg, also=()):
        stats = forward(model, rollouts, rows, cfg, also)
        moved = {k: v + 1e-3 * len(rows) for k, v in vars(stats).items() if v is not None}
        return replace(stats, **moved)

    monkeypatch.setattr(trainer, "forward", rounded)
    model = load_model(tiny_random, dtype=torch.bfloat16)
    add_lora(model, 4, 8)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 30, (16, 20), generator=g)
    tokens[:8] = tokens[0]
    tokens[8:, :6] = tokens[8, :6]
    length = torch.tensor([14] * 8 + [3, 5, 7, 9, 11, 12, 13, 14])
    r = Rollouts(
        tokens=tokens,
        prompt_len=torch.tensor([6] * 16),
        length=length,
        text=["\\boxed{1}"] * 16,
        problem=[Problem("p", "1", "0")] * 16,
        finished=torch.ones(16, dtype=torch.bool),
        group_size=8,
        seed=0,
        step=1,
    )
    # Equal rows stand in micro-batches of several sizes.
    parts = [[[0]], [[1, 2, 8]], [[3, 4, 5, 9, 10]], [[6, 7, 11, 12, 13, 14, 15]]]
    cfg = Config(lora_r=4, updates_per_step=4, kl_coef=0.1)
    trainer.score(model, r, parts, cfg)
    return model, r


def test_rounding_leaves_out_rows_whose_reward_is_0(scored):
    """With truncated=zero, the scores of a cut-off response do not count."""
    model, r = scored
    reward, error = rewards.parse("logp"), rounding_error(model)
    every = rewards.rounding(reward, r, error)
    assert rewards.rounding(reward, r, error, torch.ones(16).bool()).tolist() == every.tolist()
    assert rewards.rounding(reward, r, error, torch.zeros(16).bool()).tolist() == [0, 0]
    kept = torch.arange(16) % 8 < 2  # two of each group were finished
    some = rewards.rounding(reward, r, error, kept)
    assert some[0].item() == pytest.approx(every[0].item() * (2 / 8) ** 0.5, rel=0.5)
    # A spread between the two bounds is real, but the bound of all rows would call it flat.
    spread = torch.zeros(16)
    spread[8] = (some[1] + every[1]) / 2
    assert (grpo.advantages(spread, 8, "group", every)[8:] == 0).all()
    assert (grpo.advantages(spread, 8, "group", some)[8:] != 0).all()


@pytest.mark.slow
def test_a_step_leaves_cut_off_rewards_out_of_the_rounding(small, monkeypatch):
    seen = []
    rounding = rewards.rounding

    def spy(reward, rollouts, error, rewarded=None):
        seen.append((rewarded, rollouts.finished, rounding(reward, rollouts, error, rewarded)))
        return seen[-1][2]

    monkeypatch.setattr(rewards, "rounding", spy)
    cfg = replace(small, steps=1, reward="logp", dtype="bfloat16")
    train(cfg)
    train(replace(cfg, truncated="zero", out_dir=small.out_dir + "z"))
    (all_rows, finished, kept), (rewarded, finished_z, zeroed) = seen
    assert all_rows.all() and (rewarded == finished_z).all() and not finished.all()
    assert (zeroed < kept).all()


@pytest.mark.parametrize("expression", INTRINSIC)
def test_equal_responses_have_advantage_exactly_0(scored, expression):
    model, r = scored
    reward = rewards.parse(expression)
    advantage = grpo.advantages(reward(r), 8)
    assert (advantage[:8] == 0).all()
    # The responses of the other group differ by much more than rounding.
    rounding = rewards.rounding(reward, r, rounding_error(model))
    assert (grpo.advantages(reward(r), 8, "group", rounding)[8:] != 0).all()


def test_without_sharing_equal_responses_differ_by_rounding(scored):
    """What the test above would not see if bf16 gave equal scores by itself."""
    _, r = scored
    assert len(r.old_logp[:8].sum(1).unique()) > 1
    assert len(r.logp[:8].sum(1).unique()) == 1
    assert r.twin.tolist() == [0] * 8 + list(range(8, 16))


def test_a_spread_within_rounding_is_flat(scored):
    model, r = scored
    reward = rewards.parse("self_certainty")
    error = rounding_error(model)
    rounding = rewards.rounding(reward, r, error)
    n = r.length[:8].float()
    # Three errors of a mean over n tokens, each known to `error`, and of fp32 itself.
    assert rounding[0].item() == pytest.approx(3 * error / n[0].sqrt().item(), rel=0.5)
    spread = torch.linspace(0, 1, 8)
    near, far = reward(r).clone(), reward(r).clone()
    near[:8] += spread * rounding[0] * 0.9
    far[:8] += spread * rounding[0] * 1.1
    assert (grpo.advantages(near, 8, "group", rounding)[:8] == 0).all()
    assert (grpo.advantages(far, 8, "group", rounding)[:8] != 0).sum() >= 7
    assert (grpo.advantages(near, 8)[:8] != 0).any()  # what the rule is for
    assert rewards.rounding(rewards.parse("format + random"), r, error).tolist() == [0, 0]


def test_intuitors_recipe(small):
    cfg, _ = configurator.configure(Config, ["config/intuitor.py", "config/model/tiny.py"])
    assert check(cfg) == []
    published = dict(kl_coef=0.005, kl_type="k3", updates_per_step=1, temperature=0.9)
    published |= dict(lr_schedule="cosine", warmup=0.1, reward="self_certainty")
    assert {key: getattr(cfg, key) for key in published} == published
    (first, _) = train(replace(small, **published))
    assert first["ratio_max"] == 1 and first["kl"] == 0


def test_clip_noise_is_what_rounding_alone_clips(scored):
    """Scores that depend on the micro-batch by 1e-3 a row are clipped by a band of 1e-4."""
    model, r = scored
    advantage = torch.tensor([1.0, -1.0] * 8)
    parts = [[[0]], [[1, 2, 8]]]
    cfg = Config(lora_r=4, updates_per_step=2, clip_low=1e-4, clip_high=1e-4)
    assert trainer.clip_noise(model, r, advantage, parts, cfg) > 0.2
    assert trainer.clip_noise(model, r, advantage, parts, replace(cfg, clip="off")) == 0
    assert trainer.clip_noise(model, r, advantage, [[[0]], [[1]]], cfg) is None


def test_clip_noise_is_logged_in_bf16_alone(small):
    (narrow,) = train(replace(small, steps=1, dtype="bfloat16"))
    (wide,) = train(replace(small, steps=1, out_dir=small.out_dir + "32"))
    assert "clip_noise" in narrow and "clip_noise" not in wide
