"""Train a language model with GRPO on verifiable, spurious or intrinsic rewards, on one GPU.

    python train.py config/random_reward.py                     # picks the scale for this machine
    python train.py config/random_reward.py config/model/tiny.py --seed=1
    torchrun --standalone --nproc_per_node=2 train.py config/random_reward.py     # on two GPUs
    python train.py --help                                      # every setting

Read `one_step` first. `setup` prepares what it needs, and `train` calls it once per step.

Departures from the papers ("Spurious Rewards", arXiv 2506.10947, and INTUITOR, 2505.19590):
 - This code trains LoRA adapters on every linear layer except the head, over NF4 weights. The
   papers train all weights. LoRA therefore gets a higher learning rate, which was chosen by the
   clip fraction (docs/TRAINING.md).
 - The loss is a mean over the tokens of the whole mini-batch (DAPO). The released code of "Spurious
   Rewards" takes the mean over each packed micro-batch and then over the micro-batches.
 - Advantages are whitened over the batch only with whiten=True. The released code whitens them
   always; the paper does not mention it.
 - The overnight recipes use smaller batches and shorter responses than the papers.
   config/model/qwen2.5_math_1.5b_paper.py has the papers' sizes.
 - Training problems that also occur in the eval set are dropped.

Everything random in a step is a function of (seed, step). On the CPU a resumed run is therefore bit
for bit identical to an uninterrupted one. On a GPU the backward pass of flash attention sums in no
fixed order, so the two runs are equal up to rounding.
"""

import harness  # noqa: F401  (before torch: see harness/__init__.py)

# isort: split

import copy
import math
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import grpo
import rewards
from data import PROMPTS, Problem, Rollouts, batch_indices, partition, prepare
from engine import TRAIN_NOISE, decode, decode_raw, generate, join
from eval import Sampling, evaluate
from harness import ranks
from harness.checkpoint import RunFolder
from harness.configurator import configure, format_config
from harness.errors import UserError, run
from harness.expressions import Reward
from harness.inputs import of_problems, of_weights, weights_key
from harness.loading import check_positions, choose_device, load_model, load_tokenizer
from harness.memory import decode_with, peak_memory, phase, reserved_memory, settle
from harness.plan import DecodeWeights
from harness.progress import Progress
from harness.scale import choose_scale
from harness.second_model import SecondModel, default_second_model
from harness.stopping import LastStep, StopOnSignal
from harness.token_log import keep_log_ratio, share_log_ratio
from harness.trackers import open_tracker
from lora import adapter_off, add_lora, trainable
from metrics import describe, describe_clip, describe_updates, sample_log, summary_table
from model import TokenStats, checkpoint_activations, end_token_ids, rounding_error, token_stats
from settings import (
    Config,
    can_clip,
    check,
    early_warning,
    hoelder_exponent,
    keep_settled,
    learning_rate,
    needs_base,
)
from tasks import tiny
from tasks.datasets import load_problems, subset
from tasks.problems import training_problems

Tokenizer = PreTrainedTokenizerBase
Items = list[tuple[Problem, list[int]]]  # problems and their prompts' token ids
Parts = list[list[list[int]]]  # [updates][micro-batches][row numbers]


@dataclass
class Run:
    """Everything that a training run keeps between steps."""

    cfg: Config
    model: nn.Module
    frozen: nn.Module | None  # the base model, if full training needs it (see score)
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    items: Items  # training problems
    eval_items: Items
    reward: Reward
    second_models: dict[str, SecondModel]
    decode_weights: DecodeWeights
    folder: RunFolder | ranks.Follower
    watched: list[Reward]  # logged, not trained on
    failed: set[str] = field(default_factory=set)  # watched rewards that were already warned about


# ---------------------------------------------------------------------------------------- the step


def one_step(run: Run, step: int) -> tuple[dict, list[dict]]:
    """Train for one step. Return its metrics and some of its responses, both for the log."""
    cfg, model = run.cfg, run.model
    seconds: dict[str, float] = {}
    # 1. Sample group_size responses to each of the step's prompts.
    with phase("sample", seconds), decode_with(model, run.decode_weights):
        rollouts = sample_rollouts(model, run.tokenizer, run.items, cfg, step)
    # 2. Reward each response, and compare it with the others of its group. A reward that reads
    #    scores is computed after step 4.
    judged, idle = None, None
    if not rewards.reads_scores(run.reward):
        with phase("reward", seconds):
            judged = ranks.on_first(judge, run, rollouts)
            idle = no_gradient(rollouts, judged.advantage, cfg).numpy()  # [B]
    # 3. Partition the rows into mini-batches and micro-batches. Scoring and update share them.
    total = (rollouts.prompt_len + rollouts.length).tolist()
    parts = partition(total, cfg.updates_per_step, cfg.micro_batch_tokens, cfg.seed, step, idle)
    # 4. Score every token with the same forward pass that the update uses.
    with phase("score", seconds):
        score(model, rollouts, parts, cfg, run.frozen, run.second_models)
    with phase("reward", seconds):
        judged = judged or ranks.on_first(judge, run, rollouts)
        described = rollouts, judged.reward, judged.rounding, run.watched, run.failed
        metrics = ranks.on_first(describe, *described)
    # 5. Update the policy on each mini-batch in turn.
    with phase("update", seconds):
        if can_clip(cfg) and model.dtype == torch.bfloat16:
            metrics["clip_noise"] = clip_noise(model, rollouts, judged.advantage, parts, cfg)
        metrics |= update(model, run.optimizer, rollouts, judged.advantage, parts, cfg)
    # 6. Log.
    metrics = {"step": step, **metrics, **timings(rollouts, seconds)}
    sampled = rollouts, judged.reward, judged.advantage, run.tokenizer if cfg.log_tokens else None
    return metrics, ranks.on_first(sample_log, *sampled)


@dataclass
class Judged:
    """What the responses of a step are worth."""

    reward: torch.Tensor  # float32 [B]
    rounding: torch.Tensor  # float32 [P], see rewards.rounding
    advantage: torch.Tensor  # float32 [B]


def judge(run: Run, rollouts: Rollouts) -> Judged:
    """Compute the reward of each response, and its advantage over the others of its group."""
    cfg = run.cfg
    rewarded = rollouts.finished | (cfg.truncated != "zero")  # bool [B]
    reward = run.reward(rollouts) * rewarded  # [B]
    rounding = rewards.rounding(run.reward, rollouts, rounding_error(run.model), rewarded)  # [P]
    advantage = grpo.advantages(reward, cfg.group_size, cfg.adv_norm, rounding)  # [B]
    if cfg.whiten:
        advantage = grpo.whiten(advantage, tokens_in_loss(rollouts, cfg).sum(1))
    return Judged(reward, rounding, advantage)


def _bar(parts: list, desc: str) -> tqdm:
    """A temporary progress bar within a step. It is shown only on a terminal."""
    return tqdm(parts, desc=desc, leave=False, disable=not sys.stderr.isatty())


def sample_rollouts(
    model: nn.Module, tokenizer: Tokenizer, items: Items, cfg: Config, step: int
) -> Rollouts:
    """Sample group_size responses to each of the step's prompts under the current policy."""
    # Steps count from 1 here, but batch_indices counts them from 0.
    order = batch_indices(len(items), cfg.prompts_per_step, cfg.seed, step - 1)
    chosen = [items[i] for i in order]
    mine = ranks.share(range(len(chosen)))
    B = len(mine) * cfg.group_size
    prefix = PROMPTS[cfg.prompt].prefix
    with Progress(B, "  sample", leave=False, disable=not sys.stderr.isatty()) as progress:
        out = generate(
            model,
            [chosen[i][1] for i in mine],
            cfg.group_size,
            cfg.max_new_tokens,
            end_token_ids(model, tokenizer),
            (TRAIN_NOISE, cfg.seed, step),
            cfg.temperature,
            max_rows=cfg.rollout_rows,
            progress=progress,
            numbers=mine,
        )
    out = join(ranks.gather(out))
    return Rollouts(
        tokens=out.tokens,
        prompt_len=out.prompt_len,
        length=out.length,
        text=decode(tokenizer, out.tokens, out.prompt_len, out.length, prefix),
        raw_text=decode_raw(
            tokenizer, out.tokens, out.prompt_len, out.length, out.finished, prefix
        ),
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
    """Compute logp of one micro-batch and the statistics named in also.

    Scoring and update both use this forward pass.
    """
    device = next(model.parameters()).device
    part = (t[rows].to(device) for t in (rollouts.tokens, rollouts.prompt_len, rollouts.length))
    return token_stats(model, *part, temperature=cfg.temperature, also=tuple(also))


@torch.no_grad()
def score(
    model: nn.Module,
    rollouts: Rollouts,
    parts: Parts,
    cfg: Config,
    frozen: nn.Module | None = None,
    second_models: dict[str, SecondModel] | None = None,
) -> None:
    """Fill the scores of rollouts.

    The policy gives old_logp, entropy and self_certainty. The base policy gives ref_logp and
    base_self_certainty, if this step needs them. Each second model gives cross_logp.

    Scoring uses the same micro-batches and the same forward pass as the update. In bf16 a different
    batch shape moves ratios by several percent, and the first ratio of a step must be exactly 1.
    The base policy is `frozen`, or else the model with its adapter off.
    """
    ours = {"old_logp": "logp", "entropy": "entropy", "self_certainty": "self_certainty"}
    theirs = {"ref_logp": "logp", "base_self_certainty": "self_certainty"}
    base = frozen or (model if cfg.lora_r else None)
    if not needs_base(cfg) and rollouts.step % cfg.base_every:
        base = None
    names = (*ours, *(theirs if base else ()))
    for name in names:
        setattr(rollouts, name, torch.zeros(rollouts.mask.shape))

    def store(stats: TokenStats, names: dict[str, str], rows: list[int]) -> None:
        for name, statistic in names.items():
            values = getattr(stats, statistic)  # [b, R of these rows]
            getattr(rollouts, name)[rows, : values.shape[1]] = values.cpu()

    for rows in _bar([rows for mini in ranks.deal(parts) for rows in mini], "  score"):
        store(forward(model, rollouts, rows, cfg, ours.values()), ours, rows)
        if base:
            with adapter_off(base):
                store(forward(base, rollouts, rows, cfg, theirs.values()), theirs, rows)
    ranks.add([getattr(rollouts, name) for name in names])  # each rank has filled its rows
    for name, second in (second_models or {}).items():
        rollouts.cross_logp[name] = second.mean_logp(rollouts, cfg.micro_batch_tokens)
    rollouts.share_scores_of_twins()


def tokens_in_loss(rollouts: Rollouts, cfg: Config) -> torch.Tensor:
    """The response tokens that enter the loss: bool [B, R]."""
    if cfg.truncated == "mask":
        return rollouts.mask & rollouts.finished[:, None]
    return rollouts.mask


def no_gradient(rollouts: Rollouts, advantage: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Find the responses whose gradient is exactly 0, whatever the policy is: bool [B].

    Their advantage is 0 and there is no KL in the loss, or none of their tokens is in the loss.
    """
    outside = ~tokens_in_loss(rollouts, cfg).any(1)
    return outside | (advantage == 0) if cfg.kl_coef == 0 else outside


def loss_of(
    scored: TokenStats,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    rows: list[int],
    normalizer: float,
    cfg: Config,
    update_index: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the loss of one micro-batch and the clip statistics (see grpo.policy_loss).

    update_index counts the updates of the whole run from 0.
    """
    logp = scored.logp  # [b, R]
    device, R = logp.device, logp.shape[1]
    mask = tokens_in_loss(rollouts, cfg)[rows, :R].to(device)
    loss, stats = grpo.policy_loss(
        logp,
        rollouts.old_logp[rows, :R].to(device),
        advantage[rows].to(device),
        mask,
        normalizer,
        clip=cfg.clip,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        loss_agg=cfg.loss_agg,
        loss=cfg.loss,
        cispo_cap=cfg.cispo_cap,
        hoelder_p=hoelder_exponent(cfg, update_index),
        alignment=scored.alignment,
    )
    if cfg.kl_coef > 0:
        kl = grpo.kl(logp, rollouts.ref_logp[rows, :R].to(device), cfg.kl_type)
        loss = loss + cfg.kl_coef * grpo.aggregate(kl, mask, cfg.loss_agg, normalizer)
    return loss, stats


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    parts: Parts,
    cfg: Config,
) -> dict:
    """Make one pass over the step's mini-batches, with one optimiser update for each.

    advantage is float32 [B]. A micro-batch without any gradient is left out. Returns the clip
    statistics, the ratios, the share of rows left out, the gradient norms and the learning rate.
    Raises UserError if the gradient is not finite.
    """
    in_loss = tokens_in_loss(rollouts, cfg)
    idle = no_gradient(rollouts, advantage, cfg)
    left_out: list[int] = []
    parameters = list(trainable(model).values())
    also = ("alignment",) if can_clip(cfg) else ()
    first = (rollouts.step - 1) * cfg.updates_per_step  # updates done before this step
    seen, norms, tokens = [], [], []
    dealt = ranks.deal(parts)
    for i, (mini, mine) in enumerate(zip(_bar(parts, "  update"), dealt, strict=True), start=first):
        # The normaliser covers the whole mini-batch, so its split into micro-batches does not
        # change the gradient.
        rows_in_mini = [row for rows in mini for row in rows]
        normalizer = grpo.normalizer(in_loss[rows_in_mini], cfg.loss_agg, cfg.max_new_tokens)
        tokens.append(int(in_loss[rows_in_mini].sum()))
        seen.append([])
        for parameter in parameters:  # an optimiser skips parameters without a gradient
            parameter.grad = torch.zeros_like(parameter)
        left_out += [row for rows in mini if idle[rows].all() for row in rows]
        for rows in mine:
            if idle[rows].all():
                continue
            scored = forward(model, rollouts, rows, cfg, also)
            loss, stats = loss_of(scored, rollouts, advantage, rows, normalizer, cfg, i)
            loss.backward()
            if cfg.log_tokens:
                keep_log_ratio(rollouts, rows, scored.logp)
            seen[-1].append(stats)
        ranks.add([parameter.grad for parameter in parameters])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm))
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient is {norm} at step {rollouts.step}: lower --lr or --dtype=float32"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, i)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
    ranks.check_equal(parameters)
    if cfg.log_tokens:
        share_log_ratio(rollouts)
    seen = [sum(by_rank, []) for by_rank in zip(*ranks.gather(seen), strict=True)]
    all_stats = [stats for update in seen for stats in update]
    return {
        **describe_clip(all_stats, rollouts.old_logp[left_out], in_loss[left_out]),
        "rows_left_out": len(left_out) / len(rollouts.text),
        **describe_updates(seen, tokens),
        "grad_norm": float(np.mean(norms)),
        "grad_norm_max": max(norms),
        "lr": optimizer.param_groups[0]["lr"],
    }


@torch.no_grad()
def clip_noise(
    model: nn.Module, rollouts: Rollouts, advantage: torch.Tensor, parts: Parts, cfg: Config
) -> float | None:
    """Measure a clip fraction that rounding alone causes.

    It is a lower bound of the noise in clip_frac_low + clip_frac_high. One micro-batch is scored
    again with the same weights, one row at a time, and clipped tokens are counted as in the loss.
    Returns None if no micro-batch with a gradient has two rows. Once an update has moved the
    weights, rounding falls differently in every layer, and log-ratios spread two to six times as
    far as here (python -m tools.noise measures it).
    """
    idle = no_gradient(rollouts, advantage, cfg)
    batches = (rows for mini in parts for rows in reversed(mini))
    rows = next((rows for rows in batches if len(rows) > 1 and not idle[rows].all()), None)
    if rows is None:
        return None
    seen = []
    first = (rollouts.step - 1) * cfg.updates_per_step
    for row in rows:
        scored = forward(model, rollouts, [row], cfg)
        seen.append(loss_of(scored, rollouts, advantage, [row], 1.0, cfg, first)[1])
    clip = describe_clip(seen)
    # As a share of all tokens of the step, like the clip fractions: idle rows are never clipped.
    tokens = tokens_in_loss(rollouts, cfg).sum(1)  # [B]
    busy = torch.tensor([row for row in rows if not idle[row]])
    share = tokens[~idle].sum() / tokens.sum() * tokens[rows].sum() / tokens[busy].sum()
    return (clip["clip_frac_low"] + clip["clip_frac_high"]) * share.item()


def timings(rollouts: Rollouts, seconds: dict[str, float]) -> dict:
    """The sampling speed, the seconds of each phase, and the most memory used and held so far."""
    return {
        "tokens_per_s": rollouts.length.sum().item() / seconds["sample"],
        "seconds": sum(seconds.values()),
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "peak_memory_gb": peak_memory(),
        "reserved_memory_gb": reserved_memory(),  # None on the CPU
    }


# ----------------------------------------------------------------------------------------- the run


def setup(cfg: Config) -> Run:
    """Load data, model and optimiser, choose the settings that depend on memory, claim the folder.

    Raises UserError for every mistake that can be found before training starts.
    """
    for warning in check(cfg):
        print(f"warning: {warning}")
    reward = rewards.parse(cfg.reward)
    if cfg.prompts_per_step < ranks.size():
        raise UserError(
            f"prompts_per_step={cfg.prompts_per_step}: {ranks.size()} processes cannot share them: "
            "raise it, or lower --nproc_per_node"
        )
    name = ranks.on_first(tiny.resolve, cfg.model)
    device, dtype = choose_device(ranks.device(cfg.device), cfg.dtype, name, full=cfg.lora_r == 0)
    if cfg.lora_r == 0 and dtype != torch.float32:
        raise UserError("lora_r=0 in bfloat16 loses small updates to rounding: --dtype=float32")
    # The data is loaded before the weights, so that mistakes in it show at once.
    tokenizer = load_tokenizer(name)
    items, eval_items = load_data(cfg, tokenizer, reward)

    cfg = ranks.on_first(keep_settled, cfg)
    path = Path(cfg.out_dir)
    first = ranks.rank() == 0
    folder = RunFolder(path, asdict(cfg), cfg.resume) if first else ranks.Follower(path)
    folder.compare_inputs({"eval_data": of_problems(eval_items), "train_data": of_problems(items)})
    model = load_model(name, cfg.quant, dtype, device)
    folder.compare_inputs({weights_key("model", model): of_weights(model)})
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    longest_response = max(cfg.max_new_tokens, cfg.eval_new_tokens)
    check_positions(model, cfg.max_prompt_tokens, longest_response)
    frozen = None
    if cfg.lora_r:
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.seed)
    else:
        # Full training keeps a copy of the base model only if the loss or the reward needs it.
        # Without the copy, kl is logged as null.
        frozen = copy.deepcopy(model) if needs_base(cfg) else None
        model.requires_grad_(True)
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    second_models = {
        key: SecondModel(
            tiny.resolve(default_second_model(cfg.model) if key == "default" else key),
            tokenizer,
            cfg.prompt,
            cfg.quant,
            dtype,
            device,
        )
        for need, _, key in (need.partition(":") for need in reward.needs)
        if need == "cross_logp"
    }
    for second in second_models.values():
        second.check_budget(cfg.max_prompt_tokens, cfg.max_new_tokens)
        folder.compare_inputs(
            {weights_key(f"cross_model {second.name}", second.model): of_weights(second.model)}
        )
    models = [model, *([frozen] if frozen else []), *(m.model for m in second_models.values())]
    # The ranks may have different free memory. The least choice needs the least of it, also of
    # adapter, freed and kept.
    decode_weights = min(ranks.gather(settle(models, cfg)))
    cfg.micro_batch_tokens = min(ranks.gather(cfg.micro_batch_tokens))
    cfg.rollout_weights = min(ranks.gather(cfg.rollout_weights))
    folder.config = asdict(cfg)  # includes the choices of settle, so that a resumed run keeps them
    return Run(
        cfg,
        model,
        frozen,
        tokenizer,
        make_optimizer(model, cfg),
        items,
        eval_items,
        reward,
        second_models,
        decode_weights,
        folder,
        rewards.watched(cfg.watch),
    )


def load_data(cfg: Config, tokenizer: Tokenizer, reward: Reward) -> tuple[Items, Items]:
    """Load training and eval problems with their prompts' token ids. Print what was left out."""
    held_out = load_problems(tiny.resolve(cfg.eval_data), "test")  # all rows, whatever eval_n is
    problems, dropped = training_problems(
        cfg.train_data, held_out, reward, cfg.one_shot, cfg.model, cfg.keep_duplicates
    )
    items, too_long = prepare(problems, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    chosen = subset(held_out, cfg.eval_n)
    eval_items, eval_long = prepare(chosen, cfg.prompt, tokenizer, cfg.max_prompt_tokens)
    print(f"train: {len(items)} problems (dropped: {dropped}, {too_long} too long)")
    print(f"eval: {len(eval_items)} problems ({eval_long} too long dropped)")
    return items, eval_items


def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """Make AdamW without weight decay, as in the papers, or plain SGD."""
    weights = list(trainable(model).values())
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(weights, cfg.lr)
    return torch.optim.AdamW(weights, cfg.lr, cfg.adam_betas, weight_decay=0.0)


def run_eval(run: Run, step: int) -> None:
    """Evaluate the model and add the figures to the step's row of metrics.jsonl."""
    cfg = run.cfg
    tokens = cfg.eval_new_tokens or cfg.max_new_tokens
    prefix = PROMPTS[cfg.prompt].prefix
    sampling = Sampling(
        cfg.eval_k, cfg.eval_temperature, tokens, cfg.seed, cfg.rollout_rows, prefix=prefix
    )
    path = run.folder.folder / "eval" / f"step_{step:05d}.jsonl"
    desc = f"eval at step {step}"
    with phase("eval"), decode_with(run.model, run.decode_weights):
        summary, _ = evaluate(run.model, run.tokenizer, run.eval_items, sampling, desc, path)
    run.folder.log_eval(step, {f"eval_{key}": value for key, value in summary.items()})


def train(cfg: Config) -> list[dict]:
    """Start or resume a training run in cfg.out_dir. Return its metrics, one dict per step.

    Each step is logged, saved if a checkpoint is due, and then evaluated if an eval is due. An
    interrupted eval therefore loses no training.
    """
    run = setup(cfg)
    cfg, folder, history = run.cfg, run.folder, run.folder.history
    save = partial(folder.save_state, run.model, run.tokenizer, run.optimizer)
    with folder, StopOnSignal() as stop, LastStep(run.model, run.optimizer, save) as last_step:
        done = 0
        if cfg.resume:
            done = ranks.on_first(folder.load_state, run.model, run.optimizer)
            ranks.copy_state(run.model, run.optimizer)
            folder.repair_weights(run.model, run.tokenizer, done)
            last_step.saved = done
            print(f"resumed after step {done}")
        last_step.done(done)
        log = cfg.log if ranks.rank() == 0 else "none"
        track = open_tracker(log, asdict(cfg), cfg.out_dir, history)

        def eval_is_due(step: int) -> bool:
            due = cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps)
            return bool(due) and not (history and "eval_accuracy" in history[-1])

        # Before training, or if the last process ended before this eval.
        if ranks.on_first(eval_is_due, done):
            with stop.at_once():
                run_eval(run, done)
        steps = range(done + 1, cfg.steps + 1)
        bar = tqdm(steps, desc=cfg.reward, initial=done, total=cfg.steps)
        for step in bar:
            # torchrun kills processes 30 s after a signal, and a step can be longer
            with stop.at_once() if ranks.size() > 1 else nullcontext():
                metrics, samples = one_step(run, step)
            folder.log(metrics, samples)
            if warning := early_warning(cfg, history[done - step :]):  # steps of this process
                tqdm.write(f"warning: {warning}")
            last_step.done(step)
            last = step == cfg.steps or stop.asked or eval_is_due(step)
            if last or (cfg.save_every and step % cfg.save_every == 0):
                last_step.save(step)
            if eval_is_due(step):
                with stop.at_once():
                    run_eval(run, step)
            track(history)
            bar.set_postfix_str(progress_line(metrics))
            if step < cfg.steps:
                stop.check()
    summary_table(history, folder.folder)
    return history


def progress_line(metrics: dict) -> str:
    """The text that the progress bar shows for a step."""
    clipped = metrics["clip_frac_low"] + metrics["clip_frac_high"]
    return (
        f"reward {metrics['reward']:.3f} acc {metrics['accuracy']:.3f} clip {clipped:.1e} "
        f"code {metrics['code_frequency']:.3f} {metrics['tokens_per_s']:,.0f} tok/s"
    )


@ranks.together()
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
