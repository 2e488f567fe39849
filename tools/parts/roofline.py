"""What a decoding step costs on a GPU, counted without one: kernels, and columns of the cache."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from decoding.kvcache import Prompt, StaticCache, decode_attention
from decoding.slots import DecodeSetup, Rows, Slots
from engine import TRAIN_NOISE, generate
from lora import lora_layers
from settings import Config
from tools.parts.workload import draw_lengths

# Operators that launch no kernel, beside those whose result is a view of an argument.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach"}
# bitsandbytes' product with a 4-bit weight: the scales are made fp32 (two kernels), the weight is
# made bf16, and both are multiplied.
KERNELS_4_BIT = 4


class _Kernels(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        views = [r for r in op._schema.returns if r.alias_info and not r.alias_info.is_write]
        self.count += not views and op._schema.name.split("::")[1] not in NO_KERNEL
        return op(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    """Counts attention as one kernel, and a 4-bit product by KERNELS_4_BIT."""

    def __init__(self, kernels: _Kernels):
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.kernels.count += 1
            return torch.empty_like(args[0])
        if function is F.linear and hasattr(args[1], "quant_state"):
            self.kernels.count += KERNELS_4_BIT
            return args[0].new_empty(*args[0].shape[:-1], args[1].quant_state.shape[0])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def kernels_per_step(model: nn.Module, merged: bool, rows: int, columns: int) -> int:
    """Kernels of one decoding step of a model on the meta device (harness/shapes.py).

    A captured step is one launch for the host. The GPU still runs as many kernels.
    """
    c, dtype = model.config, model.dtype
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    for layer in lora_layers(model).values() if merged else ():
        shape = layer.base.out_features, layer.base.in_features
        layer.merged_weight = torch.empty(shape, dtype=dtype, device="meta")
        layer.use_merged = True
    token = torch.empty(c.num_key_value_heads, 1, head_dim, dtype=dtype, device="meta")
    prompt = Prompt([token] * c.num_hidden_layers, [token] * c.num_hidden_layers, token)
    new_rows = Rows(rows, columns - 1, [0], (1.0, 1.0, 0), "meta")
    slots = Slots(model, new_rows, rows, 1, DecodeSetup(static=True))
    slots.cache = StaticCache(rows, 1, columns - 1, prompt)
    with decode_attention(model), _Kernels() as kernels, _Fused(kernels):
        slots._step()
    for layer in lora_layers(model).values():
        layer.merged_weight, layer.use_merged = None, False
    return kernels.count


class _OneColumn(nn.Module):
    """A model without work: one layer that stores keys and values of one number each.

    It counts its steps and the columns of the cache that they read.
    """

    base_model_prefix = "decoder"
    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1))
        self.output = nn.Linear(1, 2, bias=False)
        self.config = SimpleNamespace(_attn_implementation="")
        self.columns = self.steps = 0
        self.decoder = self._run

    def get_output_embeddings(self):
        return self.output

    def _run(self, tokens, past_key_values, attention_mask=None, **kwargs):
        n, T = tokens.shape
        if attention_mask is not None:  # a decoding step
            self.columns += n * attention_mask.shape[-1]
            self.steps += 1
        column = self.one.new_zeros(n, 1, T, 1)
        past_key_values.update(column, column, 0)
        return SimpleNamespace(last_hidden_state=self.one.new_zeros(n, T, 1))


def rollout_traffic(cfg: Config, rows: int) -> dict[str, float]:
    """Decode one step's rollouts with a model without work, so many rows at a time.

    Prompts are half of max_prompt_tokens long, and lengths are drawn as tools.bench draws them. At
    most four times as many responses as rows are decoded, and the counts are scaled up to a step.
    Returns the decoding steps, the response tokens, the captured graphs, the columns of the cache
    that all steps read, and the share of them that are needed: of rows that are not over, up to
    their last token.
    """
    model, shapes = _OneColumn(), set()

    def capture(step, pool):
        shapes.add((step.__self__.n, step.__self__.cache.shape))
        return SimpleNamespace(replay=step)

    model.decode_setup = DecodeSetup(True, capture, longest_prompt=cfg.max_prompt_tokens)
    prompts_taken = min(cfg.prompts_per_step, -(-4 * rows // cfg.group_size))
    scale = cfg.prompts_per_step / prompts_taken
    B = prompts_taken * cfg.group_size
    lengths = draw_lengths(B, 1, cfg.max_new_tokens, "ragged", 0)
    P = cfg.max_prompt_tokens // 2
    prompts = [[0] * P] * prompts_taken
    noise = (TRAIN_NOISE, 0, 0)
    generate(
        model,
        prompts,
        cfg.group_size,
        cfg.max_new_tokens,
        [-1],
        noise,
        max_rows=rows,
        budgets=lengths,
    )
    return {
        "steps": model.steps * scale,
        "tokens": sum(lengths) * scale,
        "graphs": len(shapes),
        "columns": model.columns * scale,
        # The step of response token j reads the prompt and j tokens; the prefill gives token 0.
        "needed": sum((n - 1) * P + n * (n - 1) // 2 for n in lengths) / model.columns,
    }
