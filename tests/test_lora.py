"""Merged rollout weights: the adapter's logits, buffers that stay, and nothing outside."""

import gc
import weakref

import pytest
import torch
from conftest import batch

from engine import TRAIN_NOISE, generate
from harness.adapters import load_adapter, save_adapter
from harness.loading import load_model
from lora import adapter_off, add_lora, lora_layers, merged, trainable
from model import token_stats

QUANTS = [
    ("none", torch.float32),
    ("none", torch.bfloat16),
    ("nf4", torch.float32),
    ("nf4", torch.bfloat16),
]


def with_adapter(folder, quant="none", dtype=torch.float32):
    """A model whose adapter does something (B is not zero)."""
    model = load_model(folder, quant, dtype)
    add_lora(model, 4, 8, seed=1)
    g = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.3, generator=g)
    return model


@torch.no_grad()
def logits(model, seed=0):
    return model(batch(seed)[0], use_cache=False).logits


def step(model, lr=0.01):
    """One AdamW step on some gradient."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr)
    token_stats(model, *batch(1), also=()).logp.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def copies(model):
    return [layer.merged_weight for layer in lora_layers(model).values()]


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo2"])
def test_merged_logits_are_the_adapters(model_folders, family, quant):
    """To fp32 rounding; qwen2 has biases, olmo2 norms on queries and keys."""
    model = with_adapter(model_folders[family], quant)
    plain = logits(model)
    with adapter_off(model):
        base = logits(model)
    with merged(model):
        ours = logits(model)
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert (base - plain).abs().max() > 0.01 * plain.abs().max()  # the adapter does something


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_merged_weight_is_the_sum_rounded_once(model_folders, quant):
    """In bf16 too: no part of the sum is rounded before it is whole."""
    model = with_adapter(model_folders["qwen2"], quant, torch.bfloat16)
    with merged(model):
        for layer in lora_layers(model).values():
            weight = layer.base.weight
            if quant == "nf4":
                from bitsandbytes.functional import dequantize_4bit

                weight = dequantize_4bit(weight.data, weight.quant_state)
            total = weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
            assert layer.merged_weight.dtype == torch.bfloat16
            differs = layer.merged_weight != total.to(torch.bfloat16)
            assert differs.float().mean() < 1e-3  # near ties, which fp32 rounding tips over


@pytest.mark.parametrize("quant,dtype", QUANTS)
def test_outside_everything_is_as_if_it_had_never_been(model_folders, quant, dtype, tmp_path):
    """Scores, gradients, the base, the stored weights and the saved adapter, to the bit."""

    def everything(name):
        model.zero_grad()
        stats = token_stats(model, *batch(3))
        stats.logp.sum().backward()
        grads = [p.grad.clone() for p in trainable(model).values()]
        with adapter_off(model):
            base = token_stats(model, *batch(3)).logp
        save_adapter(model, tmp_path / name, "base")
        file = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        tensors = [stats.logp.detach(), stats.entropy, base.detach(), *grads]
        return [*tensors, *(p.detach().clone() for p in model.parameters())], file

    model = with_adapter(model_folders["qwen2"], quant, dtype)
    names = set(model.state_dict())
    before, file = everything("before")
    with merged(model):
        generate(model, [[5, 6, 7], [8]], 2, 6, [3], (TRAIN_NOISE, 0, 0))
    after, file_after = everything("after")
    assert file == file_after and set(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad.abs().sum() > 0 for p in trainable(model).values())


def test_adapter_off_inside_is_the_base_and_gradients_are_off(model_folders):
    model = with_adapter(model_folders["llama"])
    base = logits(load_model(model_folders["llama"]))
    with merged(model):
        with adapter_off(model):
            assert torch.equal(logits(model), base)
        # A and B would silently get none
        assert not token_stats(model, *batch(0), also=()).logp.requires_grad
    with adapter_off(model), merged(model):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_copies_keep_their_place_and_follow_the_weights(model_folders, quant):
    """What a captured CUDA graph rests on: the same addresses, new values in them."""
    model = with_adapter(model_folders["qwen2"], quant)
    with merged(model):
        before = logits(model)
    places = [t.data_ptr() for t in copies(model)]
    for _ in range(2):
        step(model)
        plain = logits(model)
        with merged(model):
            after = logits(model)
        assert [t.data_ptr() for t in copies(model)] == places
        assert (after - plain).abs().max() <= 1e-5 * plain.abs().max()
        assert (after - before).abs().max() > 0.01 * plain.abs().max()
        before = after


def test_free_drops_every_copy(model_folders):
    model = with_adapter(model_folders["qwen2"], "nf4")
    with merged(model):
        pass
    assert all(t is not None for t in copies(model))
    with merged(model, free=True):
        alive = [weakref.ref(t) for t in copies(model)]
    gc.collect()
    assert copies(model) == [None] * len(alive) and not any(ref() is not None for ref in alive)


def test_where_memory_runs_out_all_copies_are_dropped(model_folders, monkeypatch):
    model = with_adapter(model_folders["qwen2"])
    *_, last = lora_layers(model).values()

    def full():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(last, "refresh", full)
    with pytest.raises(torch.OutOfMemoryError), merged(model):
        pass
    assert copies(model) == [None] * len(copies(model))
    assert not any(layer.use_merged for layer in lora_layers(model).values())


def test_without_adapters_nothing_happens(model_folders):
    model = load_model(model_folders["qwen2"])
    before = logits(model)
    with merged(model, free=True):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_rollouts_of_merged_weights_are_the_adapters(tiny_random, quant):
    """The same uniforms decide, and cumulative probabilities differ by rounding: a token may flip
    where a uniform falls within 1e-5 of a boundary, which none of these 64 x 20 does."""
    model = load_model(tiny_random, quant)
    add_lora(model, 4, 8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(3))
    prompts = [[5, 6, 7, 8], [9, 10]]
    plain = generate(model, prompts, 32, 20, [0], (TRAIN_NOISE, 0, 1))
    with merged(model):
        ours = generate(model, prompts, 32, 20, [0], (TRAIN_NOISE, 0, 1))
    assert torch.equal(ours.tokens, plain.tokens) and torch.equal(ours.length, plain.length)
    gap = (ours.sampler_logp - plain.sampler_logp).abs().max()
    assert 0 < gap < 1e-4  # rounding, and not the same computation twice


def test_an_adapter_that_was_loaded_merges_too(model_folders, tmp_path):
    """With r and alpha as its file has them."""
    save_adapter(with_adapter(model_folders["llama"]), tmp_path, "base")
    model = load_model(model_folders["llama"])
    load_adapter(model, tmp_path)
    plain = logits(model)
    with merged(model):
        assert (logits(model) - plain).abs().max() <= 1e-5 * plain.abs().max()
