"""The loop on the shape of Qwen2.5-Coder-0.5B in bf16: exactness, prompts, end tokens.

The shape has the real widths, vocabulary and tokenizer, two layers and random weights. The tests of
the real model run where its folder is: $NANORLVR_CODER, or cache/models/qwen2.5-coder-0.5b.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import comparable
from test_train import weights
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from data import prepare
from eval import Sampling, evaluate
from harness.loading import load_model, load_tokenizer
from settings import Config
from tasks.datasets import load_problems
from train import train

CODER = Path(os.environ.get("NANORLVR_CODER", "cache/models/qwen2.5-coder-0.5b"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shape(shared, tmp_path_factory):
    """A folder with the real configuration and tokenizer, two layers, random weights, bf16."""
    folder = tmp_path_factory.mktemp("qwen") / "shape"
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_id=151645,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2.5").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def cfg(shape, tmp_path):
    return Config(
        model=shape,
        quant="none",
        lora_r=8,
        gradient_checkpointing=False,
        train_data="arithmetic",
        eval_data="arithmetic",
        prompt="code_habit",
        max_prompt_tokens=200,
        max_new_tokens=6,
        reward="random(0.5)",
        steps=2,
        prompts_per_step=3,
        group_size=4,
        updates_per_step=3,
        micro_batch_tokens=400,
        lr=1e-3,
        eval_every=0,
        eval_n=4,
        base_every=10,
        save_every=0,
        device="cpu",
        dtype="bfloat16",
        out_dir=str(tmp_path / "run"),
    )


def test_with_lr_0_every_ratio_is_exactly_1(cfg):
    """Sampled by adapter and base: the sampler's gap is bf16's, the ratio is exactly 1."""
    for m in train(replace(cfg, lr=0.0, rollout_weights="adapter")):
        assert m["ratio_mean"] == 1 and m["ratio_max"] == 1 and m["clip_frac_low"] == 0
        assert m["clip_frac_high"] == 0 and m["clip_noise"] is not None
        assert m["sampler_gap_max"] < 0.2 and m["grad_norm"] > 0


def test_resumed_equals_uninterrupted(cfg):
    whole = train(cfg)
    part = replace(cfg, out_dir=cfg.out_dir + "2")
    train(replace(part, steps=1))
    resumed = train(replace(part, resume=True))
    assert comparable(resumed) == comparable(whole)
    a, b = weights(cfg.out_dir), weights(part.out_dir)
    assert all(torch.equal(a[k], v) for k, v in b.items())


def test_micro_batches_and_rows_left_out_move_the_update_by_rounding_only(cfg):
    """bf16 rounds differently in another batch shape. The adapters stay close, not equal."""
    moved = []
    for name, tokens in (("a", 250), ("b", 2000)):
        one = replace(cfg, steps=1, micro_batch_tokens=tokens, out_dir=cfg.out_dir + name)
        train(replace(one, optimizer="sgd", max_grad_norm=1e9))
        moved.append(torch.cat([v.flatten() for k, v in weights(one.out_dir).items() if "_B" in k]))
    gap = (moved[0] - moved[1]).norm() / moved[0].norm()
    assert 0 <= gap < 0.05


def check_a_real_run(cfg, folder):
    """Two steps on the real model: answers in boxes, sampler and scores agree."""
    history = train(replace(cfg, model=str(folder), prompt="few_shot", max_new_tokens=24, lr=1e-4))
    for m in history:
        assert m["boxed"] > 0.5 and m["truncated"] < 0.5 and m["sampler_gap"] < 0.05
        assert m["entropy"] < 2


@pytest.mark.skipif(not CODER.is_dir(), reason=f"no model in {CODER}")
def test_the_real_model_trains(cfg):
    check_a_real_run(cfg, CODER)


@pytest.mark.skipif(not CODER.is_dir(), reason=f"no model in {CODER}")
def test_greedy_answers_of_the_real_model_are_generates():
    """Against transformers' own generate, in fp32, with the real chat template and end tokens."""
    model, tokenizer = load_model(str(CODER)), load_tokenizer(str(CODER))
    items, _ = prepare(load_problems("arithmetic", "test")[:3], "few_shot", tokenizer, 256)
    _, rows = evaluate(model, tokenizer, items, Sampling(max_new_tokens=16, prefix="Answer: "))
    model.eval()
    for (_, ids), row in zip(items, rows, strict=True):
        prompt = torch.tensor([ids])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False
        )
        text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert row["completions"] == ["Answer: " + text]
