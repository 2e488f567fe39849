"""minimal.py makes the update of train.py, and learns."""

import copy

import pytest
import torch
from conftest import run_config

import grpo
import minimal
import train as trainer
from data import partition
from harness.loading import load_model, load_tokenizer
from tasks.datasets import load_problems


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["both", "off"])
def test_the_page_makes_the_update_of_train(tiny_random, tmp_path, clip):
    """On the same rollouts, in fp32, weight by weight to 1e-6 and in the clip fraction."""
    torch.manual_seed(0)
    model, tokenizer = load_model(tiny_random), load_tokenizer(tiny_random)
    model.requires_grad_(True)
    r = minimal.sample(model, tokenizer, load_problems(tiny_random, "train"), step=2)
    assert len(r.text) == minimal.PROMPTS * minimal.GROUP and 0 < r.finished.sum() < len(r.text)
    advantage = grpo.advantages(torch.tensor([float(len(t) % 3 == 0) for t in r.text]), 8)
    lr = 0.05  # plain SGD: AdamW makes a whole step of a gradient that is rounding alone
    cfg = run_config(
        tiny_random,
        tmp_path,
        lora_r=0,
        lr=lr,
        clip=clip,
        steps=2,
        prompts_per_step=minimal.PROMPTS,
        updates_per_step=minimal.UPDATES,
        seed=minimal.SEED,
        micro_batch_tokens=700,
        optimizer="sgd",
    )
    theirs = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr)
    fraction = minimal.update(model, optimizer, r, advantage, clip)

    total = (r.prompt_len + r.length).tolist()
    parts = partition(total, cfg.updates_per_step, cfg.micro_batch_tokens, cfg.seed, r.step)
    trainer.score(theirs, r, parts, cfg)
    metrics = trainer.update(theirs, trainer.make_optimizer(theirs, cfg), r, advantage, parts, cfg)
    assert fraction == pytest.approx(metrics["clip_frac_low"] + metrics["clip_frac_high"])
    assert (fraction > 0) == (clip == "both")
    for name, weight in model.state_dict().items():
        assert (weight - theirs.state_dict()[name]).abs().max() < 1e-6, name
        assert (weight - before[name]).abs().max() > 1e-5


@pytest.mark.slow
def test_the_page_runs(tiny_random, monkeypatch, capsys):
    monkeypatch.setattr(minimal.tiny, "resolve", lambda name: tiny_random)
    monkeypatch.setattr(minimal, "STEPS", 2)
    for kind in ("ground_truth", "random"):
        minimal.main(kind, clip="off")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 4 and all("clip fraction 0.0e+00" in line for line in lines)
