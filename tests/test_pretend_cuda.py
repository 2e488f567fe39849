"""The whole loop on a pretended GPU: no mixed devices, no wait in a decoding step."""

import pytest
import torch
from pretend_cuda import GPU, Capture, Refused, pretended, put

import model
import train as trainer
from decoding import slots
from decoding.slots import DecodeSetup
from engine import TRAIN_NOISE, generate
from harness.loading import load_model
from output_layer import Float32Logits
from settings import Config

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.mark.filterwarnings("error:decoding goes on without")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_training_on_a_pretended_gpu(tiny_random, tmp_path, monkeypatch, quant, dtype):
    """Eval, steps and checkpoints; its captures belong to the first rollout alone."""
    cfg = Config(
        model=tiny_random,
        quant=quant,
        lora_r=4,
        lora_alpha=8,
        train_data=tiny_random,
        eval_data=tiny_random,
        prompt="none",
        max_prompt_tokens=32,
        max_new_tokens=16,
        reward="random(0.5)",
        steps=2,
        prompts_per_step=2,
        group_size=4,
        updates_per_step=2,
        micro_batch_tokens=200,
        rollout_rows=6,
        lr=0.0,
        eval_every=2,
        eval_n=4,
        save_every=1,
        kl_coef=0.1,
        dtype=dtype,
        out_dir=str(tmp_path / "run"),
    )
    captures = []

    with pretended() as gpu:

        def load(name, quant, dtype, device):
            loaded = put(gpu, load_model(name, quant, dtype))
            captures.append(Capture(gpu))
            loaded.decode_setup = DecodeSetup(static=True, capture=captures[-1])
            return loaded

        def logits(head, hidden):
            """model.logits, which asks for the device where autograd hides what is pretended."""
            if head.weight.dtype == torch.float32:
                return head(hidden)
            return Float32Logits.apply(hidden, head.weight, head.bias, gpu.has(hidden))

        monkeypatch.setattr(model, "logits", logits)
        monkeypatch.setattr(trainer, "load_model", load)
        monkeypatch.setattr(trainer, "choose_device", lambda *a: (GPU, getattr(torch, dtype)))
        history = trainer.train(cfg)
    steps = [m for m in history if "ratio_max" in m]
    assert all(m["ratio_max"] == 1 and m["clip_frac_high"] == 0 for m in steps) and len(steps) == 2
    assert captures[0].captured and captures[0].replayed
    in_a_step = ("slots.py:step", "slots.py:_step", "kvcache.py:open", "kvcache.py:update")
    assert not [c for c in (*gpu.waits, *gpu.uploads) if c in in_a_step]


def rollout(gpu, folder, step=None, monkeypatch=None):
    model = put(gpu, load_model(folder))
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
    """Every eight tokens, and when a rollout begins and ends; a second one captures nothing."""
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
        # The engine takes a failed capture for a reason to go on without: here it must not.
        monkeypatch.setattr(slots.warnings, "warn", _raise)
        rollout(gpu, model, PLANTED[fault], monkeypatch)


def _raise(message, *args, **kwargs):
    raise Refused(message)
