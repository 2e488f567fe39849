"""GRPO on one page: sample with transformers' own `generate`, reward, advantage, clipped loss.

    python minimal.py                    # the true reward on the tiny world: a minute on one core
    python minimal.py random             # the papers' question: what does a coin teach?
    python minimal.py random --clip=off  # and without the clip?

It trains all weights of a small model in fp32. train.py makes the same update (a test compares the
two) and adds adapters, 4-bit weights, a fast sampler, evals, checkpoints, every reward and loss.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from data import Rollouts, batch_indices, partition
from tasks import tiny
from tasks.datasets import load_problems

STEPS, PROMPTS, GROUP = 30, 16, 8  # 128 responses a step
UPDATES = 8  # optimiser updates a step, on 16 of the responses each
LR, TEMPERATURE, SEED = 1e-4, 1.0, 0


def sample(model, tokenizer, problems, step: int) -> Rollouts:
    """Sample GROUP responses to each of PROMPTS problems from softmax(logits / TEMPERATURE)."""
    order = batch_indices(len(problems), PROMPTS, SEED, step - 1)  # each problem once an epoch
    chosen = [problems[i] for i in order for _ in range(GROUP)]  # a group is GROUP rows in a row
    prompts = tokenizer([problem.problem for problem in chosen])["input_ids"]
    P, end = max(map(len, prompts)), tokenizer.eos_token_id
    out = model.generate(
        torch.tensor([[end] * (P - len(ids)) + ids for ids in prompts]),  # [B, P] left-padded
        attention_mask=torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=tiny.RESPONSE_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,  # nothing may filter the distribution, since the loss scores all of it
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=end,
    )[:, P:]  # [B, R]
    # The first end token belongs to the response. Those behind it are padding.
    is_end = out == end
    finished = is_end.any(1)  # [B]
    length = torch.where(finished, is_end.int().argmax(1) + 1, out.shape[1])  # [B]
    responses = [row[:n].tolist() for row, n in zip(out, length, strict=True)]
    rows = [torch.tensor(ids + more) for ids, more in zip(prompts, responses, strict=True)]
    return Rollouts(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),  # [B, T] right-padded
        prompt_len=torch.tensor([len(ids) for ids in prompts]),
        length=length,
        text=tokenizer.batch_decode(responses, skip_special_tokens=True),
        problem=chosen,
        finished=finished,
        group_size=GROUP,
        seed=SEED,
        step=step,
    )


def rewards(kind: str, r: Rollouts) -> torch.Tensor:
    """float32 [B]: 1 for the right answer in a box, or a coin for each response."""
    if kind == "random":
        coins = np.random.default_rng((SEED, r.step)).integers(0, 2, len(r.text))
        return torch.tensor(coins, dtype=torch.float32)
    boxed = [rf"\boxed{{{problem.answer}}}" for problem in r.problem]
    return torch.tensor([float(box in text) for box, text in zip(boxed, r.text, strict=True)])


def token_logp(model, r: Rollouts, rows: list[int]) -> torch.Tensor:
    """log pi(y_t) of the response tokens of these rows: [b, R], 0 beyond each response's length."""
    tokens, start, length = r.tokens[rows], r.prompt_len[rows], r.length[rows]
    # Padding stands on the right, where a causal model never looks: no attention mask is needed.
    logp = (model(tokens, use_cache=False).logits / TEMPERATURE).log_softmax(-1)  # [b, T, V]
    # The logits at a position predict the token behind it.
    logp = logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]  # [b, T - 1], of tokens 1, 2, ...
    column = torch.arange(int(length.max()))  # [R]
    position = (start[:, None] - 1 + column).clamp(max=logp.shape[1] - 1)  # [b, R]
    return logp.gather(1, position).masked_fill(column >= length[:, None], 0.0)


def update(model, optimizer, r: Rollouts, advantage: torch.Tensor, clip: str = "both") -> float:
    """An optimiser update for each mini-batch, by advantage [B]; returns the clip fraction."""
    total = (r.prompt_len + r.length).tolist()
    minis = [parts[0] for parts in partition(total, UPDATES, 10**9, SEED, r.step)]  # shuffled rows
    with torch.no_grad():  # pi_old is the policy before any of the step's updates
        old = [token_logp(model, r, rows) for rows in minis]
    low, high = (0.0, float("inf")) if clip == "off" else (0.8, 1.2)
    clipped = tokens = 0
    for rows, old_logp in zip(minis, old, strict=True):
        logp = token_logp(model, r, rows)  # [b, R]
        mask = r.mask[rows, : logp.shape[1]]  # [b, R]
        ratio = (logp - old_logp).exp()  # exactly 1 at the first update
        A = advantage[rows][:, None]  # [b, 1]
        surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
        loss = -surrogate[mask].sum() / mask.sum()  # the mean over the mini-batch's tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clipped += int((mask & ((ratio > high) & (A > 0) | (ratio < low) & (A < 0))).sum())
        tokens += int(mask.sum())
    return clipped / tokens


def main(kind: str = "ground_truth", clip: str = "both") -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings
    folder = tiny.resolve("tiny")  # a Hugging Face model and problems, made on first use
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    problems = load_problems(folder, "train")
    for step in range(1, STEPS + 1):
        r = sample(model, tokenizer, problems, step)
        reward = rewards(kind, r)  # [B]
        advantage = grpo.advantages(reward, GROUP)  # (r - mean) / std within each group
        clipped = update(model, optimizer, r, advantage, clip)
        accuracy = rewards("ground_truth", r).mean()
        print(f"step {step:2}  reward {reward.mean():.3f}  accuracy {accuracy:.3f}", end="  ")
        print(f"clip fraction {clipped:.1e}")


if __name__ == "__main__":
    main(
        kind="random" if "random" in sys.argv else "ground_truth",
        clip="off" if "--clip=off" in sys.argv else "both",
    )
