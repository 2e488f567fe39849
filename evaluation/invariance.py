"""How far the batch changes what a model says.

The random number behind a token depends only on its problem, sample and position, so the batch can
act only through rounding: a matrix product rounds differently for another number of rows.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from data import Problem
from engine import Generation, decode_rows, generate
from tasks import answers

TOKENS = 256  # of each response that are compared


def batch_effect(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[Problem, list[int]]],
    copies: int,
    max_new_tokens: int,
    end_ids: list[int],
    noise: tuple[int, ...],
    sampling: tuple[float, float, int],
    rollout_rows: int,
    prefix: str = "",
) -> dict:
    """Sample the items in one batch, then in reverse order and one row at a time; compare.

    sampling: temperature, top_p, top_k. Responses are cut after TOKENS tokens. Returns rows (the
    number of responses), same (how many have the same tokens), verdicts_differ (how many are graded
    differently), logprob_gap (the largest difference of a token's log-probability, up to the first
    token that differs) and dtype.
    """
    budget = min(max_new_tokens, TOKENS)

    def sample(order: list[int], rows: int) -> Generation:
        prompts = [items[i][1] for i in order]
        settings = (end_ids, noise, *sampling, rows)
        return generate(model, prompts, copies, budget, *settings, numbers=order)

    forward = list(range(len(items)))
    together = _responses(sample(forward, rollout_rows))
    alone = _responses(sample(forward[::-1], 1))
    # Row r of the reversed order is sample r % copies of the problem r // copies from the end.
    alone = [row for i in forward[::-1] for row in alone[i * copies : (i + 1) * copies]]
    same, gap = 0, 0.0
    for (a, a_logp), (b, b_logp) in zip(together, alone, strict=True):
        same += a == b
        shared = next((t for t in range(min(len(a), len(b))) if a[t] != b[t]), min(len(a), len(b)))
        gaps = (a_logp[:shared] - b_logp[:shared]).abs()
        gap = max(gap, gaps.max().item() if shared else 0.0)
    problems = [problem for problem, _ in items for _ in range(copies)]
    verdicts = [
        answers.correct(decode_rows(tokenizer, [row for row, _ in rows], prefix), problems)
        for rows in (together, alone)
    ]
    return {
        "rows": len(together),
        "same": same,
        "verdicts_differ": sum(a != b for a, b in zip(*verdicts, strict=True)),
        "logprob_gap": gap,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _responses(out: Generation) -> list[tuple[list[int], torch.Tensor]]:
    """The tokens of each response, and their log-probabilities [length]."""
    rows = zip(out.tokens.tolist(), out.prompt_len.tolist(), out.length.tolist(), strict=True)
    return [
        (row[p : p + n], logp[:n]) for (row, p, n), logp in zip(rows, out.sampler_logp, strict=True)
    ]
