"""Draw tokens. Each uses one uniform number, a function of row and position, through the CDF."""

import numpy as np
import torch

from harness.errors import UserError

BLOCK = 128  # tokens per block of the vocabulary; probabilities are first summed by block


def check(temperature: float, top_p: float, top_k: int, seed: int) -> None:
    """Raise UserError for settings of a sampler that mean nothing."""
    for key, value in (("temperature", temperature), ("top_k", top_k), ("seed", seed)):
        if value < 0:
            raise UserError(f"{key}={value}: must not be negative")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")


def uniforms(noise: tuple[int, ...], prompt: int, sample: int, n: int) -> np.ndarray:
    """The uniform numbers of one row, float64 [n]. Entry j decides response token j.

    They depend on (noise, prompt, sample) alone, and a longer row starts like a shorter one. Batch,
    order and budget therefore do not change a sample, up to the rounding of the logits (which in
    bf16 depends on the rows decoded at once). In training, noise is (TRAIN_NOISE, seed, step).
    """
    return np.random.default_rng((*noise, prompt, sample)).random(n)


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw next tokens int64 [n] and return them with their log-probabilities float32 [n].

    logits is [n, V], uniform is float64 [n]. One uniform number per token is inverted through the
    cumulative distribution. temperature 0 is greedy, with log-probabilities at temperature 1. top_p
    and top_k (0 = off) are for eval.py and sample.py. The log-probability is always the unfiltered
    one.
    """
    z = logits.float()
    if temperature not in (0, 1):
        z = z / temperature
    n, V = z.shape
    size = BLOCK if V > 8 * BLOCK else V
    blocks = -(-V // size)
    # p = exp(z - max), not normalised, in whole blocks. The unused end of the last block stays 0.
    p = z.new_zeros(n, blocks * size) if V % size else torch.empty_like(z)
    top, likeliest = z.max(-1, keepdim=True)  # [n, 1]
    torch.sub(z, top, out=p[:, :V]).exp_()
    mass = p.view(n, blocks, size).sum(-1).double()  # [n, blocks]
    total = mass.sum(-1)  # [n]
    if temperature == 0:
        return likeliest[:, 0], -total.log().float()
    if 0 < top_k < V or top_p < 1.0:
        p = _likeliest(p, top_p, top_k)
        mass = p.view(n, blocks, size).sum(-1).double()
    # Invert in two steps: find the block, then the token in it. A cumulative sum over the whole
    # vocabulary in fp64 costs as much as a forward pass, and fp32 would lose the tail. right=True
    # finds the first token whose cumulative mass exceeds u, which never has probability 0.
    u = uniform[:, None]  # [n, 1]
    block, inside = None, p
    if blocks > 1:
        cdf = mass.cumsum(-1)
        u = u * cdf[:, -1:]
        block = torch.searchsorted(cdf, u, right=True).clamp_max(blocks - 1)  # [n, 1]
        mass = mass.gather(1, block)
        u = ((u - cdf.gather(1, block) + mass) / mass).clamp(0, 1 - 2**-53)  # place in the block
        inside = p.view(n, blocks, size)[torch.arange(n, device=p.device), block[:, 0]]
    inside = inside.cumsum(-1, dtype=torch.float64)  # [n, size]
    token = torch.searchsorted(inside, u * inside[:, -1:], right=True).clamp_max(size - 1)  # [n, 1]
    if block is not None:
        token = (token + block * size).clamp_max(V - 1)
    return token[:, 0], ((z.gather(1, token) - top)[:, 0].double() - total.log()).float()


def _likeliest(p: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Set p [n, V] (not normalised) to 0 for all tokens that top_p or top_k excludes."""
    if 0 < top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1.0:
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return p
