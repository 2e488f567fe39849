"""Values of each token of the few responses that a run logs: text, entropy, log-ratio.

`python sample.py --html=FILE RUN` colours the tokens by them.
"""

from functools import reduce

import torch
from transformers import PreTrainedTokenizerBase

from data import Rollouts
from harness import ranks

DIGITS = 4  # decimals of the logged values


def keep_log_ratio(r: Rollouts, rows: list[int], logp: torch.Tensor) -> None:
    """Keep log pi - log pi_old of these rows, as their own update sees it: logp [b, R]."""
    if r.log_ratio is None:
        r.log_ratio = torch.full(r.mask.shape, torch.nan)
    width = logp.shape[1]
    r.log_ratio[rows, :width] = logp.detach().float().cpu() - r.old_logp[rows, :width]


def share_log_ratio(r: Rollouts) -> None:
    """Put together what the ranks have kept, each of its own rows."""
    if kept := [log_ratio for log_ratio in ranks.gather(r.log_ratio) if log_ratio is not None]:
        r.log_ratio = reduce(torch.fmax, kept)  # the value where one of two is nan


def token_log(r: Rollouts, row: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """tokens (text), entropy (nats) and log_ratio of a response, a list each.

    The lists have one value per response token, the end token included. A log-ratio is None where
    no update used the row.
    """
    start, n = int(r.prompt_len[row]), int(r.length[row])
    texts = token_texts(tokenizer, r.tokens[row, start : start + n].tolist())
    entropy = [round(value, DIGITS) for value in r.entropy[row, :n].tolist()]
    ratios = torch.full((n,), torch.nan) if r.log_ratio is None else r.log_ratio[row, :n]
    log_ratio = [None if value != value else round(value, DIGITS) for value in ratios.tolist()]
    return {"tokens": texts, "entropy": entropy, "log_ratio": log_ratio}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to the one before it.

    Many tokenizers drop the space in front of a token that is decoded alone. A character of several
    tokens shows as replacement characters.
    """
    texts = []
    for before, token in zip([None, *ids[:-1]], ids, strict=True):
        alone = tokenizer.decode([token])
        if before is None:
            texts.append(alone)
            continue
        left, both = tokenizer.decode([before]), tokenizer.decode([before, token])
        texts.append(both[len(left) :] if both.startswith(left) else alone)
    return texts
