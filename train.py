"""Train a language model with GRPO on verifiable, spurious or intrinsic rewards, on one GPU.

    python train.py config/random_reward.py                     # the scale that fits this machine
    python train.py config/random_reward.py config/model/tiny.py --seed=1
    python train.py --help                                      # every knob

A step: sample -> score -> reward -> advantage -> update x 8 -> log -> eval -> checkpoint.

Departures from the papers ("Spurious Rewards", arXiv 2506.10947, and INTUITOR, 2505.19590):
 - LoRA on every linear layer but the head, over NF4 weights, where the papers train all weights.
   Its learning rate is higher in return, chosen by the clip fraction (README, "Learning rate").
 - The loss is a mean over the tokens of the whole mini-batch (DAPO); the released code of "Spurious
   Rewards" takes it over a packed micro-batch and then over micro-batches.
 - Advantages are not whitened over the batch unless asked for by whiten=True (the released code
   does, the paper does not say so).
 - The overnight recipes use smaller batches and shorter responses than the papers'
   (config/model/qwen2.5_math_1.5b_paper.py has the papers').
 - Problems of the training set that occur in the eval set are dropped.

What is random in a step is a function of (seed, step): a resumed run equals an uninterrupted one
to the bit on the CPU. On the GPU flash attention's backward adds up in no fixed order, so there
both are equal up to rounding.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import grpo
import rewards
from data import (
    Problem,
    Rollouts,
    batch_indices,
    load_problems,
    partition,
    prepare,
    subset,
)
from engine import TRAIN_NOISE, decode, generate
from eval import evaluate
from harness.checkpoint import RunFolder, StopOnCtrlC, save_rows
from harness.configurator import configure, format_config
from harness.errors import UserError, run
from harness.memory import LastStep, decode_with, peak_memory, phase, settle
from harness.progress import Progress
from harness.second_model import SecondModel
from lora import add_lora, reference, trainable
from metrics import describe, describe_clip, sample_log, summary_table
from model import (
    TokenStats,
    check_positions,
    checkpoint_activations,
    choose_device,
    end_token_ids,
    load_model,
    load_tokenizer,
    token_stats,
)
from settings import (
    Config,
    can_clip,
    check,
    choose_scale,
    early_warning,
    keep_settled,
    learning_rate,
    loss_knobs,
    needs_base,
)
from tasks import tiny
from tasks.problems import training_problems

Tokenizer = PreTrainedTokenizerBase
Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids
Parts = list[list[list[int]]]  # rows of each micro-batch of each mini-batch
Base = Callable[[], AbstractContextManager[nn.Module]]  # inside, the base policy


def _bar(parts: list, desc: str) -> tqdm:
    """A passing progress bar within a step, where somebody can see it."""
    return tqdm(parts, desc=desc, leave=False, disable=not sys.stderr.isatty())


# ---------------------------------------------------------------------------------------- the step


def sample_rollouts(
    model: nn.Module, tokenizer: Tokenizer, items: Items, cfg: Config, step: int
) -> Rollouts:
    """Sample the step's prompts, group_size responses each, under the policy as it stands."""
    chosen = [items[i] for i in batch_indices(len(items), cfg.prompts_per_step, cfg.seed, step)]
    B = len(chosen) * cfg.group_size
    with Progress(B, "  sample", leave=False, disable=not sys.stderr.isatty()) as progress:
        out = generate(
            model,
            [ids for _, ids in chosen],
            cfg.group_size,
            cfg.max_new_tokens,
            end_token_ids(model, tokenizer),
            (TRAIN_NOISE, cfg.seed, step),
            cfg.temperature,
            max_rows=cfg.rollout_rows,
            progress=progress,
        )
    return Rollouts(
        tokens=out.tokens,
        prompt_len=out.prompt_len,
        length=out.length,
        text=decode(tokenizer, out.tokens, out.prompt_len, out.length),
        problem=[problem for problem, _ in chosen for _ in range(cfg.group_size)],
        finished=out.finished,
        group_size=cfg.group_size,
        seed=cfg.seed,
        step=step,
        sampler_logp=out.sampler_logp,
    )


def forward(
    model: nn.Module, rollouts: Rollouts, rows: list[int], cfg: Config, also: Iterable[str] = ()
) -> TokenStats:
    """logp of one micro-batch, and statistics also: the forward that scoring and update share."""
    device = next(model.parameters()).device
    part = (t[rows].to(device) for t in (rollouts.tokens, rollouts.prompt_len, rollouts.length))
    return token_stats(model, *part, temperature=cfg.temperature, also=tuple(also))


@torch.no_grad()
def score(
    model: nn.Module,
    base: Base | None,
    rollouts: Rollouts,
    parts: Parts,
    cfg: Config,
    verifiers: dict[str, SecondModel] | None = None,
) -> None:
    """Fill old_logp, entropy, self_certainty; ref_logp and base_self_certainty where there is a
    base policy; cross_logp of each second model.

    On the same micro-batches and by the same forward as the update: in bf16 another batch shape
    moves ratios by several percent, and the first ratio of a step must be exactly 1.
    """
    ours = {"old_logp": "logp", "entropy": "entropy", "self_certainty": "self_certainty"}
    theirs = {"ref_logp": "logp", "base_self_certainty": "self_certainty"} if base else {}
    for name in (*ours, *theirs):
        setattr(rollouts, name, torch.zeros(rollouts.mask.shape))

    def store(stats: TokenStats, names: dict[str, str], rows: list[int]) -> None:
        for name, statistic in names.items():
            values = getattr(stats, statistic)  # [b, R of these rows]
            getattr(rollouts, name)[rows, : values.shape[1]] = values.cpu()

    for rows in _bar([rows for mini in parts for rows in mini], "  score"):
        store(forward(model, rollouts, rows, cfg, ours.values()), ours, rows)
        if base:
            with base() as base_model:
                store(forward(base_model, rollouts, rows, cfg, theirs.values()), theirs, rows)
    for name, verifier in (verifiers or {}).items():
        rollouts.cross_logp[name] = verifier.mean_logp(rollouts, cfg.micro_batch_tokens)


def tokens_in_loss(rollouts: Rollouts, cfg: Config) -> torch.Tensor:
    """bool [B, R]: the response tokens that are trained on."""
    if cfg.truncated == "mask":
        return rollouts.mask & rollouts.finished[:, None]
    return rollouts.mask


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    parts: Parts,
    cfg: Config,
    lrs: list[float],
) -> dict:
    """One pass over the step's mini-batches, an optimiser update each at its rate in lrs.

    advantage float32 [B]. Returns what happened: the clip's doing, ratios, gradient norm, rate.
    """
    in_loss = tokens_in_loss(rollouts, cfg)
    device = next(model.parameters()).device
    parameters = list(trainable(model).values())
    also = ("alignment",) if can_clip(cfg) else ()
    first = (rollouts.step - 1) * cfg.updates_per_step  # updates done before this step
    seen, norms = [], []
    for i, (mini, lr) in enumerate(_bar(list(zip(parts, lrs, strict=True)), "  update")):
        rows_in_mini = [row for rows in mini for row in rows]
        normalizer = grpo.normalizer(in_loss[rows_in_mini], cfg.loss_agg, cfg.max_new_tokens)
        for rows in mini:
            scored = forward(model, rollouts, rows, cfg, also)
            logp = scored.logp  # [b, R]
            R = logp.shape[1]
            mask = in_loss[rows, :R].to(device)
            loss, stats = grpo.policy_loss(
                logp,
                rollouts.old_logp[rows, :R].to(device),
                advantage[rows].to(device),
                mask,
                normalizer,
                **loss_knobs(cfg, first + i),
                alignment=scored.alignment,
            )
            if cfg.kl_coef > 0:
                kl = grpo.kl(logp, rollouts.ref_logp[rows, :R].to(device), cfg.kl_type)
                loss = loss + cfg.kl_coef * grpo.aggregate(kl, mask, cfg.loss_agg, normalizer)
            loss.backward()
            seen.append(stats)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm))
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient is {norm} at step {rollouts.step}: lower --lr or --dtype=float32; "
                "--resume=True goes on from the last checkpoint"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
    return {**describe_clip(seen), "grad_norm": float(np.mean(norms)), "lr": lrs[-1]}


# ----------------------------------------------------------------------------------------- the run


def train(cfg: Config) -> list[dict]:
    """Run (or go on with) a training run in cfg.out_dir; returns its metrics, one dict a step."""
    for warning in check(cfg):
        print(f"warning: {warning}")
    reward_fn = rewards.parse(cfg.reward)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    if cfg.lora_r == 0 and dtype != torch.float32:
        raise UserError("lora_r=0 in bfloat16 loses small updates to rounding: --dtype=float32")

    # Data before weights: its mistakes show at once.
    name = tiny.resolve(cfg.model)
    tokenizer = load_tokenizer(name)
    held_out = load_problems(tiny.resolve(cfg.eval_data), "test")  # all of it, whatever eval_n
    problems, dropped = training_problems(
        cfg.train_data, held_out, reward_fn, cfg.one_shot, cfg.model
    )
    items, too_long = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    chosen = subset(held_out, cfg.eval_n)
    eval_items, eval_long = prepare(chosen, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    print(f"train: {len(items)} problems (dropped: {dropped}, {too_long} too long)")
    print(f"eval: {len(eval_items)} problems ({eval_long} too long dropped)")

    cfg = keep_settled(cfg)
    recorded = asdict(cfg)
    folder = RunFolder(Path(cfg.out_dir), recorded, cfg.resume)
    model = load_model(name, cfg.quant, dtype, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    eval_tokens = cfg.eval_new_tokens or cfg.max_new_tokens
    check_positions(model, cfg.max_prompt_tokens, max(cfg.max_new_tokens, eval_tokens))
    frozen = None
    if cfg.lora_r:
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.seed)
    else:
        # Full training keeps no copy of the base unless loss or reward need one; else kl is null.
        frozen = copy.deepcopy(model) if needs_base(cfg) else None
        model.requires_grad_(True)
    base = partial(reference, model, frozen) if cfg.lora_r or frozen else None
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    verifiers = {
        key: SecondModel(
            tiny.resolve(cfg.verifier if key == "verifier" else key),
            tokenizer, cfg.prompt, cfg.quant, dtype, device,
        )
        for need, _, key in (need.partition(":") for need in reward_fn.needs)
        if need == "cross_logp"
    }  # fmt: skip
    watched = rewards.watched()
    weights = list(trainable(model).values())
    if cfg.optimizer == "sgd":
        optimizer = torch.optim.SGD(weights, cfg.lr, weight_decay=cfg.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            weights, cfg.lr, cfg.adam_betas, weight_decay=cfg.weight_decay
        )
    per_update = math.ceil(cfg.prompts_per_step * cfg.group_size / cfg.updates_per_step)
    models = [model, *([frozen] if frozen else []), *(v.model for v in verifiers.values())]
    how, cfg.micro_batch_tokens = settle(
        models, cfg.rollout_weights, cfg.micro_batch_tokens, per_update, cfg.max_prompt_tokens,
        cfg.max_new_tokens, cfg.rollout_rows, cfg.gradient_checkpointing, eval_tokens,
    )  # fmt: skip
    if cfg.lora_r:
        cfg.rollout_weights = "adapter" if how == "adapter" else "merged"
    recorded |= asdict(cfg)  # config.json gets what was settled, and a resumed run goes on with it

    save = partial(folder.save_state, model, tokenizer, optimizer)
    with folder, StopOnCtrlC() as stop, LastStep(model, optimizer, save) as last_step:
        first, history = 1, []
        if cfg.resume:
            first = folder.load_state(model, optimizer) + 1
            history = folder.truncate_logs(first - 1)
            print(f"resumed after step {first - 1}")
        last_step.done(first - 1)

        def run_eval(step: int) -> dict:
            with phase("eval"), decode_with(model, how):
                summary, graded = evaluate(
                    model, tokenizer, eval_items, cfg.eval_k, cfg.eval_temperature,
                    eval_tokens, cfg.seed, cfg.rollout_rows, desc=f"eval at step {step}",
                )  # fmt: skip
            save_rows(graded, folder.folder / "eval" / f"step_{step:05d}.jsonl")
            return {f"eval_{key}": value for key, value in summary.items()}

        def log(metrics: dict) -> None:
            history.append(metrics)
            folder.log("metrics.jsonl", [metrics])

        if not history and cfg.eval_every:
            log({"step": 0, **run_eval(0)})
        bar = tqdm(range(first, cfg.steps + 1), desc=cfg.reward, initial=first - 1, total=cfg.steps)
        for step in bar:
            seconds: dict[str, float] = {}
            with phase("sample", seconds), decode_with(model, how):
                rollouts = sample_rollouts(model, tokenizer, items, cfg, step)
            total = (rollouts.prompt_len + rollouts.length).tolist()
            parts = partition(total, cfg.updates_per_step, cfg.micro_batch_tokens, cfg.seed, step)
            asked = needs_base(cfg) or step % cfg.base_every == 0
            with phase("score", seconds):
                score(model, base if asked else None, rollouts, parts, cfg, verifiers)
            with phase("reward", seconds):
                reward = reward_fn(rollouts)  # [B]
                if cfg.truncated == "zero":
                    reward = reward * rollouts.finished
                advantage = grpo.advantages(reward, cfg.group_size, cfg.adv_norm)
                if cfg.whiten:
                    advantage = grpo.whiten(advantage, tokens_in_loss(rollouts, cfg).sum(1))
                metrics = {"step": step, **describe(rollouts, reward, watched)}
            done = (step - 1) * cfg.updates_per_step
            lrs = [learning_rate(cfg, done + i) for i in range(cfg.updates_per_step)]
            with phase("update", seconds):
                metrics |= update(model, optimizer, rollouts, advantage, parts, cfg, lrs)
            metrics |= {
                "tokens_per_s": rollouts.length.sum().item() / seconds["sample"],
                "seconds": sum(seconds.values()),
                **{f"seconds_{name}": value for name, value in seconds.items()},
                "peak_memory_gb": peak_memory(),
            }
            last = step == cfg.steps or stop.asked
            if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
                metrics |= run_eval(step)
            log(metrics)
            if warning := early_warning(cfg, history[first - step - 1 :]):  # of this process
                tqdm.write(f"warning: {warning}")
            folder.log("samples.jsonl", sample_log(rollouts, reward, advantage, cfg.log_samples))
            if last or (cfg.save_every and step % cfg.save_every == 0):
                save(step)
            last_step.done(step)
            clipped = metrics["clip_frac_low"] + metrics["clip_frac_high"]
            bar.set_postfix_str(
                f"reward {metrics['reward']:.3f} acc {metrics['accuracy']:.3f} clip {clipped:.1e} "
                f"code {metrics['code_frequency']:.3f} {metrics['tokens_per_s']:,.0f} tok/s"
            )
            if stop.asked and step < cfg.steps:
                bar.close()
                print(f"stopped after step {step}, saved: --resume=True goes on")
                raise KeyboardInterrupt
    summary_table(history, folder.folder)
    return history


def main(argv: list[str]) -> None:
    cfg, sources = configure(Config, argv, choose_scale)
    print("scale:", sources.scale, f"({sources.reason})" if sources.reason else "")
    if not cfg.out_dir:
        experiment = "-".join(sources.experiments) or "train"
        cfg.out_dir = f"out/{experiment}-{sources.scale}-seed{cfg.seed}"
    print(format_config(cfg, sources))
    try:
        train(cfg)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("out of GPU memory: use --quant=nf4 or a smaller --model") from error


if __name__ == "__main__":
    run(main)
