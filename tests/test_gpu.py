"""Tests that need CUDA: `make test-gpu`. They are skipped elsewhere."""

from dataclasses import replace

import pytest
import torch
from conftest import run_config
from transformers import AutoModelForCausalLM, Qwen2Config

from decoding.slots import DecodeSetup
from engine import TRAIN_NOISE, generate
from harness.loading import load_model
from lora import add_lora, merged, trainable
from model import token_stats
from tasks import tiny
from train import train

pytestmark = pytest.mark.gpu


def test_greedy_equals_generate_on_the_gpu(model_folders):
    prompts = [[5, 6, 7, 8, 9], [12, 13], [20]]
    for folder in model_folders.values():
        model = load_model(folder, device="cuda")
        plain = AutoModelForCausalLM.from_pretrained(folder).to("cuda")
        g = generate(model, prompts, 1, 100, [3], (TRAIN_NOISE, 0, 0), temperature=0)
        for i, prompt in enumerate(prompts):
            out = plain.generate(
                torch.tensor([prompt], device="cuda"),
                max_new_tokens=100,
                do_sample=False,
                eos_token_id=3,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            p, n = len(prompt), int(g.length[i])
            assert g.tokens[i, p : p + n].tolist() == out


@pytest.mark.filterwarnings("error:decoding goes on without")
def test_a_captured_step_stays_valid_as_weights_change(model_folders):
    """Graphs captured in the first rollout still sample like eager steps after updates."""
    model = load_model(model_folders["llama"], device="cuda")
    add_lora(model, 4, 8)
    call = ([[5, 6, 7, 8, 9], [12, 13], [20]], 8, 60, [3], (TRAIN_NOISE, 0, 0))
    graphs = set()
    for seed in range(3):
        for i, parameter in enumerate(trainable(model).values()):
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(9 * seed + i)
            )
            parameter.data.add_(noise.cuda(), alpha=0.1)
        with merged(model):
            ours = generate(model, *call, max_rows=7)
            kept = model.decode_setup.kept[1].graphs
            assert kept and graphs <= {id(graph) for graph in kept.values()}
            graphs = {id(graph) for graph in kept.values()}
        with merged(model):
            captured, model.decode_setup = model.decode_setup, DecodeSetup(static=False)
            eager = generate(model, *call, max_rows=7)
            model.decode_setup = captured
        assert torch.equal(ours.tokens, eager.tokens)
        assert torch.allclose(ours.sampler_logp, eager.sampler_logp, atol=1e-3)


def test_sampler_and_scores_agree_on_the_gpu(model_folders):
    model = load_model(model_folders["qwen2"], device="cuda")
    g = generate(model, [[5, 6, 7], [8]], 16, 50, [3], (TRAIN_NOISE, 0, 0))
    parts = (t.cuda() for t in (g.tokens, g.prompt_len, g.length))
    scored = token_stats(model, *parts).logp.cpu()
    assert torch.allclose(scored, g.sampler_logp, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_with_lr_0_every_ratio_is_exactly_1_on_the_gpu(tiny_random, tmp_path, dtype, quant):
    cfg = run_config(
        tiny_random,
        tmp_path / "run",
        quant=quant,
        gradient_checkpointing=True,
        max_new_tokens=40,
        prompts_per_step=8,
        micro_batch_tokens=400,
        lr=0.0,
        device="cuda",
        dtype=dtype,
    )
    for m in train(cfg):
        assert m["ratio_mean"] == 1 and m["ratio_max"] == 1
        assert m["clip_frac_low"] == 0 and m["clip_frac_high"] == 0
    moved = train(replace(cfg, lr=1e-3, out_dir=str(tmp_path / "moved")))
    assert moved[-1]["ratio_max"] > 1 and moved[-1]["kl"] > 0


def test_a_step_of_the_1_5b_shape_in_nf4(tiny_random, tmp_path):
    """Random weights of Qwen2.5-1.5B's shape; prints the peak memory and the phases' seconds."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path / "shape"
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cfg = run_config(
        tiny_random,
        tmp_path / "run",
        model=str(folder),
        quant="nf4",
        lora_r=32,
        lora_alpha=64,
        gradient_checkpointing=True,
        max_prompt_tokens=512,
        max_new_tokens=1024,
        steps=1,
        micro_batch_tokens=8192,
        rollout_rows=32,
        lr=1e-5,
        device="cuda",
        dtype="bfloat16",
    )
    (m,) = train(cfg)
    print(
        {
            k: round(v, 3)
            for k, v in m.items()
            if k.startswith(("seconds", "tokens", "peak", "sampler"))
        }
    )
    assert m["grad_norm"] > 0 and m["peak_memory_gb"] < 24
