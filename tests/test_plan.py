"""The plan against every allocation of the real shapes, on the meta device."""

import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils

from decoding.kvcache import PrefillCache, Prompt, StaticCache, decode_attention
from decoding.sampling import sample
from engine import PREFILL_TOKENS
from harness.plan import largest_micro_batch
from harness.shapes import meta_model
from lora import trainable
from model import backbone, head, token_stats
from tools import memory_table
from tools.parts.workload import model_config

pytestmark = pytest.mark.slow


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


class Bytes(TorchDispatchMode):
    """Bytes of the meta tensors made inside that are alive, in blocks of 512, and the most."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(
                lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs or {})
            )
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self.hold(x)
        return out

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            size = self.sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.sizes.pop(key, 0)


class Fused(torch.autograd.Function):
    """A fused attention's memory: output and log-sum-exp; in backward a gradient of each input."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, meta(*q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        wide = meta(*q.shape, dtype=torch.float32)  # dq is summed up in fp32
        out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del wide
        return out


class Product4(torch.autograd.Function):
    """A product with a 4-bit weight, which is made bf16 for it, forward and backward."""

    @staticmethod
    def forward(ctx, x, rows, columns):
        ctx.shape = rows, columns
        return x @ meta(rows, columns).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ meta(*ctx.shape), None, None


def linear(self, x):
    if hasattr(self.weight, "quant_state"):
        y = Product4.apply(x, self.out_features, self.in_features)
        return y if self.bias is None else y + self.bias
    return F.linear(x, self.weight, self.bias)


def measure(cfg, config, merged: bool) -> int:
    """Bytes at the peak of one prefill, decoding step, forward and backward, nothing let go that
    the run keeps."""
    model = meta_model(config, cfg.quant, cfg.lora_r, torch.bfloat16, cfg.gradient_checkpointing)
    live = Bytes()
    for t in (*model.parameters(), *model.buffers()):
        live.hold(t)
        state = getattr(t, "quant_state", None)
        while state is not None:
            for x in (state.absmax, state.code, state.offset):
                if x is not None:
                    live.hold(x)
            state = state.state2
    n, P = cfg.rollout_rows, cfg.max_prompt_tokens
    with live:
        moments = [torch.empty_like(p) for p in trainable(model).values() for _ in "12"]
        if merged:
            layers = [m for m in model.modules() if hasattr(m, "merged_weight")]
            for layer in layers:
                layer.merged_weight = meta(layer.base.out_features, layer.base.in_features)
                layer.use_merged = True
        with decode_attention(model):
            cache = PrefillCache()
            tokens = torch.zeros(max(1, PREFILL_TOKENS // P), P, dtype=torch.int64)
            states = backbone(model)(tokens, past_key_values=cache, use_cache=True)[0]
            logits = head(model)(states[:, -1])
            first = Prompt([k[0] for k in cache.keys], [v[0] for v in cache.values], logits[0])
            static = StaticCache(n, P, cfg.max_new_tokens, first)
            del cache, states, logits, first
            position = meta(n, dtype=torch.int64)
            hidden = backbone(model)(
                meta(n, 1, dtype=torch.int64),
                attention_mask=static.open(position),
                position_ids=position[:, None],
                past_key_values=static,
                use_cache=True,
            ).last_hidden_state
            before, peak = live.now, live.peak
            live.peak = before
            sample(head(model)(hidden[:, 0]), meta(n, dtype=torch.float64))
            pool = live.peak - before  # what a graph computes on the way stays
            live.peak = max(peak, live.peak)
            graph = meta(pool, dtype=torch.uint8)
        if merged:
            for layer in layers:
                layer.use_merged = False
        rows, T = largest_micro_batch(cfg)
        length = torch.full((rows,), min(cfg.max_new_tokens, T - 1))
        tokens = torch.zeros(rows, T, dtype=torch.int64)
        token_stats(model, tokens, T - length, length, also=("alignment",)).logp.sum().backward()
        del graph, moments
    return live.peak


RECIPES = [(*recipe, merged) for recipe, merged in zip(memory_table.RECIPES, "11110", strict=True)]


@pytest.mark.parametrize("name,more,shape,merged", RECIPES)
def test_what_is_measured_is_planned_and_little_more(name, more, shape, merged, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", linear)
    monkeypatch.setattr(torch.utils.checkpoint, "_infer_device_type", lambda *a: "cpu")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **more: Fused.apply(q, k, v) if q.is_meta else real(q, k, v, **more),
    )
    cfg, planned = memory_table.recipe(name, more, shape, 24e9)
    need = planned.need("kept" if merged == "1" else "adapter")
    measured = measure(cfg, model_config(shape), merged == "1")
    assert measured <= need <= 1.25 * measured
