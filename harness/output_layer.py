"""The output layer in fp32: logits, and how the log-probability of a token depends on its state.

In bf16 both are products of bf16 numbers with fp32 sums.
"""

import torch
from torch import nn

# Rows of a bf16 head that the CPU converts to fp32 at once: 4 to 14 MB.
HEAD_ROWS = 1024


def logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, V] of hidden states [n, H], summed in fp32 and never rounded to bf16.

    A bf16 logit between 16 and 32 is a multiple of 0.125. One step of that grid would move a ratio
    by 13 %, which is large next to the clip range. Scoring, update and sampler all use this
    function. The gradient flows to hidden and, if they are trained, to weight and bias.
    """
    weight = head.weight
    if weight.dtype == torch.float32 or type(head) is not nn.Linear:
        return head(hidden).float()
    return Float32Logits.apply(hidden, weight, head.bias, hidden.is_cuda)


def weighted_rows(share: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum over v of share[n, v] weight[v]: float32 [n, H] of share float32 [n, V].

    A bf16 weight is multiplied by shares that are rounded to bf16, as in any gradient of a bf16
    layer. The sum is in fp32. On the CPU, it is rounded to bf16 at the end.
    """
    share = share.to(weight.dtype)
    if share.is_cuda and weight.dtype != torch.float32:
        return torch.mm(share, weight, out_dtype=torch.float32)
    return torch.mm(share, weight).float()


class Float32Logits(torch.autograd.Function):
    """Compute h W^T + b in fp32 from bf16 or fp16 h [n, H], W [V, H] and b [V] or None.

    CUDA can multiply such inputs with fp32 output. Elsewhere HEAD_ROWS rows of W at a time are
    converted to fp32. This is exact and needs no fp32 copy of the head. From about eight rows of h
    on, it is as fast as a multiplication by such a copy.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, on_cuda):
        ctx.save_for_backward(h, weight)
        ctx.has_bias, ctx.on_cuda = bias is not None, on_cuda
        if on_cuda:
            z = torch.mm(h, weight.t(), out_dtype=torch.float32)
        else:
            wide, z = h.float(), torch.empty(len(h), len(weight), device=h.device)
            # One buffer for all blocks, since the system clears new memory page by page.
            buffer = torch.empty(HEAD_ROWS, weight.shape[1], device=h.device)
            for part, rows in zip(z.split(HEAD_ROWS, 1), weight.split(HEAD_ROWS), strict=True):
                torch.mm(wide, buffer[: len(rows)].copy_(rows).t(), out=part)
        return z if bias is None else z.add_(bias)

    @staticmethod
    def backward(ctx, grad):  # [n, V] fp32
        h, weight = ctx.saved_tensors
        to_h = to_weight = to_bias = None
        narrow = grad.to(h.dtype) if ctx.on_cuda else None  # rounded once, like any bf16 gradient
        if ctx.needs_input_grad[0]:
            if ctx.on_cuda:
                to_h = torch.mm(narrow, weight, out_dtype=torch.float32)
            else:
                to_h = torch.zeros(h.shape, device=h.device)
                parts = zip(grad.split(HEAD_ROWS, 1), weight.split(HEAD_ROWS), strict=True)
                for part, rows in parts:
                    to_h.addmm_(part, rows.float())
            to_h = to_h.to(h.dtype)
        if ctx.needs_input_grad[1]:
            if ctx.on_cuda:
                to_weight = torch.mm(narrow.t(), h)
            else:
                to_weight = (grad.t() @ h.float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_bias = grad.sum(0).to(weight.dtype)
        return to_h, to_weight, to_bias, None
