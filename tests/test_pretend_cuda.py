"""The whole loop on a pretended GPU: no mixed devices, no wait in a decoding step."""

import os
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import run_config
from pretend_cuda import GPU, Capture, Refused, load, pretended, put

import eval as evaluation
import model
import sample
import train as trainer
from decoding import slots
from decoding.kvcache import EXPANDED_ATTENTION
from decoding.slots import DecodeSetup
from engine import TRAIN_NOISE, generate
from harness import second_model
from harness.errors import UserError
from harness.loading import choose_device, load_model
from harness.output_layer import Float32Logits

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture
def config(tiny_random, tmp_path):
    return run_config(
        tiny_random,
        str(tmp_path / "run"),
        gradient_checkpointing=True,
        max_new_tokens=16,
        prompts_per_step=2,
        group_size=4,
        updates_per_step=2,
        rollout_rows=6,
        lr=1e-3,
        eval_every=2,
        eval_n=4,
        save_every=1,
    )


def on(gpu, monkeypatch, dtype="float32"):
    """Let commands load their models onto the pretended GPU. Returns the captures, one a model."""
    captures = []

    def loads(name, quant="none", dtype=torch.float32, device=None):
        loaded = load(gpu, load_model, name, quant, dtype)
        if quant == "none" and dtype == torch.float32:
            loaded.config._attn_implementation = EXPANDED_ATTENTION  # as load_model does on CUDA
        captures.append(Capture(gpu))
        loaded.decode_setup = DecodeSetup(static=True, capture=captures[-1])
        return loaded

    def logits(head, hidden):
        """model.logits, which asks for the device where autograd hides what is pretended."""
        if head.weight.dtype == torch.float32:
            return head(hidden)
        return Float32Logits.apply(hidden, head.weight, head.bias, gpu.has(hidden))

    monkeypatch.setattr(model, "logits", logits)
    for module in (trainer, evaluation):
        monkeypatch.setattr(module, "load_model", loads)
        monkeypatch.setattr(module, "choose_device", lambda *a, **k: (GPU, getattr(torch, dtype)))
    # Copying a model copies addresses that nobody tagged.
    monkeypatch.setattr(trainer, "copy", SimpleNamespace(deepcopy=lambda m: put(gpu, deepcopy(m))))
    return captures


def quiet_in_a_step(gpu):
    """Whether nothing in a decoding step waits for the GPU or copies to it."""
    in_a_step = ("slots.py:step", "slots.py:_step", "kvcache.py:open", "kvcache.py:update")
    return not [c for c in (*gpu.waits, *gpu.uploads) if c in in_a_step]


no_fallback = pytest.mark.filterwarnings("error:decoding goes on without")


@no_fallback
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_training_on_a_pretended_gpu(config, monkeypatch, quant, dtype):
    """Eval, steps and checkpoints; its captures belong to the first rollout alone."""
    cfg = replace(config, quant=quant, dtype=dtype, lr=0.0, kl_coef=0.1)
    with pretended() as gpu:
        captures = on(gpu, monkeypatch, dtype)
        history = trainer.train(cfg)
    steps = [m for m in history if "ratio_max" in m]
    assert all(m["ratio_max"] == 1 and m["clip_frac_high"] == 0 for m in steps) and len(steps) == 2
    assert captures[0].captured and captures[0].replayed
    assert quiet_in_a_step(gpu)


VARIANTS = {
    "merged": dict(rollout_weights="merged"),
    "adapter": dict(rollout_weights="adapter"),
    "checkpointing off": dict(gradient_checkpointing=False),
    "full training with KL": dict(lora_r=0, kl_coef=0.1),
    "gspo": dict(loss="gspo"),
    "cispo": dict(loss="cispo"),
    "hoelder": dict(loss="hoelder"),
    "seq_mean, k2": dict(loss_agg="seq_mean", kl_coef=0.1, kl_type="k2"),
    "constant, whitened": dict(loss_agg="constant", whiten=True, truncated="mask"),
    "intrinsic reward": dict(reward="self_certainty(base) + 0.1*neg_entropy"),
    "another model's reward": dict(reward="cross_model('MODEL')"),
    "sampled eval": dict(eval_temperature=1.0, eval_k=2),
}


@no_fallback
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_train_on_a_pretended_gpu(config, monkeypatch, variant):
    cfg = replace(config, steps=1, eval_every=1, **VARIANTS[variant])
    cfg = replace(cfg, reward=cfg.reward.replace("MODEL", cfg.model))
    with pretended() as gpu:
        captures = on(gpu, monkeypatch)
        monkeypatch.setattr(second_model, "load_model", trainer.load_model)
        history = trainer.train(cfg)
    assert history[-1]["grad_norm"] is not None and captures[0].replayed
    assert quiet_in_a_step(gpu)


@no_fallback
@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_is_resumed_measured_and_read_on_a_pretended_gpu(
    config, monkeypatch, tmp_path, capsys, rank
):
    """Resume, eval.py, labels and sample.py. A resumed run equals an uninterrupted one."""
    cfg = replace(config, lora_r=rank, eval_every=0)
    out, file = f"--run={cfg.out_dir}", tmp_path / "labels.jsonl"
    with pretended() as gpu:
        on(gpu, monkeypatch)
        monkeypatch.setattr(sample, "load_model", trainer.load_model)
        whole = trainer.train(replace(cfg, out_dir=cfg.out_dir + "-whole"))
        trainer.train(replace(cfg, steps=1))
        resumed = trainer.train(replace(cfg, resume=True))
        small = ["--n=3", "--max_new_tokens=8"]
        evaluation.main([out, *small])
        labels = ["--k=2", "--prompt=none", "--max_prompt_tokens=32", f"--labels={file}", *small]
        with pytest.raises(UserError, match="no sample has a boxed answer"):  # all are sampled
            evaluation.main([*labels, f"--model={cfg.model}", f"--data={cfg.train_data}"])
        sample.main([out, "--max_new_tokens=8"])
    for key in ("reward", "grad_norm", "entropy"):
        assert resumed[-1][key] == whole[-1][key]
    assert quiet_in_a_step(gpu)
    assert "trained" in capsys.readouterr().out
    assert len((tmp_path / "labels.jsonl.progress").read_text().splitlines()) == 1 + 3


def test_a_prefill_in_fp32_repeats_keys_and_values(model_folders, monkeypatch):
    """As scoring does: no fused kernel takes fp32 with grouped heads. bf16 and the CPU do not."""
    shapes, real = [], F.scaled_dot_product_attention

    def attention(query, key, value, **more):
        shapes.append((query.shape[2], query.shape[1] == key.shape[1]))
        return real(query, key, value, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    prompt = [5, 6, 7, 8]
    call = ([prompt], 2, 3, [-1], (TRAIN_NOISE, 0, 1))

    def sampled(model):
        shapes.clear()
        model.decode_setup = DecodeSetup(static=False)
        tokens = generate(model, *call).tokens
        return tokens, {equal for T, equal in shapes if T == len(prompt)}

    folder = model_folders["llama"]
    want, repeated = sampled(load_model(folder))
    assert repeated == {False}
    with pretended() as gpu:
        got, repeated = sampled(load(gpu, load_model, folder))
        assert repeated == {True} and torch.equal(got, want)
        assert sampled(load(gpu, load_model, folder, dtype=torch.bfloat16))[1] == {False}


@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_segments_of_a_gpu_can_grow_unless_the_user_says_otherwise(monkeypatch, given):
    """Set before the allocator is first used, which reads it then."""
    order = []
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if given:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", given)
    seen = lambda device: order.append(os.environ.get("PYTORCH_ALLOC_CONF"))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", seen)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pretended():
        choose_device("cuda", "auto")
    assert order == [given or "expandable_segments:True"]
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")


def test_reserved_memory_is_logged_on_a_gpu(config, monkeypatch):
    with pretended() as gpu:
        on(gpu, monkeypatch)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 10**9)
        (m,) = trainer.train(replace(config, steps=1, eval_every=0))
    assert (m["peak_memory_gb"], m["reserved_memory_gb"]) == (3, 4)


def rollout(gpu, folder, step=None, monkeypatch=None):
    model = load(gpu, load_model, folder)
    capture = Capture(gpu)
    model.decode_setup = DecodeSetup(static=True, capture=capture, bucket=32)
    if step:
        plain = slots.Slots._step
        monkeypatch.setattr(slots.Slots, "_step", lambda self: (plain(self), step(self)))
    call = (PROMPTS, 4, 40, [-1], (TRAIN_NOISE, 0, 1))
    counts = []
    for _ in range(2):
        generate(model, *call)
        counts.append((capture.captured, sum(gpu.waits.values())))
    return model, counts


def test_the_host_waits_only_where_it_looks(model_folders):
    """It waits every eight tokens and at both ends of a rollout. A second captures nothing."""
    with pretended() as gpu:
        model, counts = rollout(gpu, model_folders["llama"])
    assert gpu.waits["slots.py:look"] == 2 * (1 + 39 // 8 + 1)  # at the start, in steps, at the end
    assert counts[1][0] == counts[0][0] == 2  # by columns read: up to 32, up to 64
    assert {c for c in gpu.waits if c.startswith(("slots", "kvcache"))} == {"slots.py:look"}
    # Slots and rows of a prompt come in one copy.
    assert gpu.uploads["slots.py:place"] == 2 * len(PROMPTS)


PLANTED = {
    "a CPU tensor": lambda s: s.token.add_(torch.ones(len(s.token), dtype=torch.int64)),
    "a wait": lambda s: s.token[0].item(),
    "an upload": lambda s: torch.tensor([1, 2], device=s.token.device),
    "a mask as index": lambda s: s.token[s.over],
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(model_folders, monkeypatch, fault):
    model = model_folders["llama"]
    with pretended() as gpu, pytest.raises(Refused):
        # The engine decodes without graphs after a failed capture. This test must not allow that.
        monkeypatch.setattr(slots.warnings, "warn", _raise)
        rollout(gpu, model, PLANTED[fault], monkeypatch)


def _raise(message, *args, **kwargs):
    raise Refused(message)
