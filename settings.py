"""The settings of a training run, checks for mistakes in them, and what is derived from them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import rewards
from grpo import AdvNorm, Clip, KLType, Loss, LossAgg
from harness.configurator import as_type
from harness.errors import UserError
from harness.runfiles import SavedConfig, read_config
from harness.trackers import Log, library
from lora import RolloutWeights


@dataclass
class Config:
    """The settings of a training run. The defaults are the papers', except the learning rate."""

    # Model
    model: str = "Qwen/Qwen2.5-Math-1.5B"  # hub id, local folder, FILE.gguf, tiny or tiny_bad
    quant: Literal["none", "nf4"] = "nf4"  # nf4: 4-bit weights (bitsandbytes)
    lora_r: int = 32  # rank of the adapter; 0 trains all weights (needs quant=none, float32)
    lora_alpha: int = 64  # the adapter is scaled by alpha / r
    gradient_checkpointing: bool = True  # recompute activations in backward; saves memory, slower
    # Data
    train_data: str = "deepscaler"  # deepscaler, math_train, gsm8k, tiny, a file, folder or hub id
    eval_data: str = "math500"  # as train_data; its problems are dropped from train_data
    keep_duplicates: bool = False  # True: every row of train_data; False: each problem once
    one_shot: str = ""  # train on one problem: its id, part of its text, or pi_1 (2504.20571)
    prompt: str = "qwen_math"  # prompt format, one of data.PROMPTS, e.g. qwen_math, none
    max_prompt_tokens: int = 1024  # longer prompts are dropped; their number is printed
    max_new_tokens: int = 3072  # longest response, in tokens
    # Reward
    reward: str = "ground_truth"  # expression, e.g. random(0.5), format & ~python; see rewards.py
    truncated: Literal["keep", "mask", "zero"] = "keep"  # cut-off response: kept, no loss, reward 0
    watch: str = ""  # more rewards to log, separated by semicolons, e.g. contains("break")
    # Step
    steps: int = 300  # steps of the run
    prompts_per_step: int = 64  # prompts per step
    group_size: int = 16  # responses per prompt
    updates_per_step: int = 8  # optimiser updates per step, on disjoint shuffled mini-batches
    temperature: float = 1.0  # for both sampling and scoring
    # Loss
    adv_norm: AdvNorm = "group"  # (r - mean) / std; group_mean, leave_one_out: no std; raw: r
    whiten: bool = False  # then scale to mean 0, std 1 over all tokens (code of Spurious Rewards)
    loss: Loss = "grpo"  # grpo, cispo: ratio per token; gspo, hoelder: per response; see grpo.py
    cispo_cap: float = 5.0  # cispo: ratios are capped at this value, not clipped; above 1
    hoelder_p: float = 2.0  # hoelder: exponent of the mean of ratios at the run's first update
    hoelder_p_end: float = -2.0  # hoelder: exponent at the last update, linear between; 0 = gspo
    clip: Clip = "both"  # which side of the ratio is clipped: both, high, low, off
    clip_low: float = 0.2  # ratios below 1 - clip_low are clipped
    clip_high: float = 0.2  # ratios above 1 + clip_high are clipped
    loss_agg: LossAgg = "token_mean"  # DAPO; seq_mean: GRPO; constant: Dr. GRPO (max_new_tokens)
    kl_coef: float = 0.0  # weight in the loss of the KL to the base model
    kl_type: KLType = "k3"  # KL estimator; the gradients differ, see grpo.kl
    # Optimiser
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: no momentum; needs a far higher lr
    lr: float = 1e-5  # full training: 5e-7; LoRA needs more: aim at a clip fraction near 1e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # others fall to 0 at the end
    warmup: float = 0.0  # share of all updates in which lr rises linearly
    adam_betas: tuple[float, float] = (0.9, 0.95)  # momentum can carry updates past the clip
    max_grad_norm: float = 1.0  # a gradient with a larger norm is scaled down to this norm
    # Memory and machine
    micro_batch_tokens: int = 8192  # padded prompt + response tokens per forward and backward
    rollout_rows: int = 128  # most responses decoded at once; this bounds the KV cache
    rollout_weights: RolloutWeights = "auto"  # merged: a copy of W + BA; auto: by memory and speed
    device: str = "auto"  # auto = cuda if available, else cpu
    threads: int = 0  # torch threads on the CPU; 0 = 1 below 2 M parameters, else all cores
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: harness/loading.py
    # Eval, logs, checkpoints
    eval_every: int = 50  # steps between evals; the first eval is before step 1; 0 = never
    eval_n: int = 0  # number of eval problems, the same for every seed; 0 = all
    eval_k: int = 1  # samples per problem (avg@k)
    eval_temperature: float = 0.0  # 0 = greedy
    eval_new_tokens: int = 0  # longest response in evals, in tokens; 0 = max_new_tokens
    base_every: int = 1  # steps between scorings by the base model, if only the log needs them
    save_every: int = 25  # steps between checkpoints; the last step is always saved; 0 = only last
    log: Log = "none"  # send the metrics of each step to wandb or tensorboard too
    log_tokens: bool = False  # also log entropy and log-ratio of the logged responses' tokens
    seed: int = 0  # seed of data order, sampling, partition, adapter and random rewards
    out_dir: str = ""  # run folder; "" = out/EXPERIMENT-SCALE-seedSEED
    resume: bool = False  # continue from the newest intact checkpoint in out_dir
    resume_step: int = 0  # with resume: from the checkpoint of this step, one of the last two


def check(cfg: Config) -> list[str]:
    """Check the settings. Return a warning for each setting that has no effect.

    Only settings that differ from their default are reported. Raises UserError for settings that
    cannot work.
    """
    whole = (
        "steps prompts_per_step group_size updates_per_step max_prompt_tokens max_new_tokens "
        "micro_batch_tokens rollout_rows eval_k base_every"
    ).split()
    for key in whole:
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    no_less = (
        "lora_r lr kl_coef clip_low clip_high warmup seed eval_every eval_n eval_temperature "
        "eval_new_tokens save_every threads resume_step"
    ).split()
    for key in no_less:
        if getattr(cfg, key) < 0:
            raise UserError(f"{key}={getattr(cfg, key)}: must not be negative")
    for key in ("temperature", "max_grad_norm"):
        if getattr(cfg, key) <= 0:
            raise UserError(f"{key}={getattr(cfg, key)}: must be above 0")
    if cfg.resume_step and not cfg.resume:
        raise UserError(f"resume_step={cfg.resume_step}: acts only with --resume=True")
    if cfg.warmup > 1:
        raise UserError(f"warmup={cfg.warmup}: is a share of all updates, must be at most 1")
    if cfg.cispo_cap <= 1:
        raise UserError(f"cispo_cap={cfg.cispo_cap}: is an absolute ratio, must be above 1")
    if cfg.adv_norm == "leave_one_out" and cfg.group_size == 1:
        raise UserError("adv_norm=leave_one_out: needs a group_size of 2 or more")
    B = cfg.prompts_per_step * cfg.group_size
    if B < cfg.updates_per_step:
        raise UserError(f"updates_per_step={cfg.updates_per_step}: a step has only {B} responses")
    if cfg.lora_r == 0 and cfg.quant != "none":
        raise UserError("lora_r=0 trains all weights, but 4-bit weights are fixed: --quant=none")

    library(cfg.log)  # refuses one that is not installed

    warnings = []
    if cfg.group_size == 1 and cfg.adv_norm != "raw":
        warnings.append("group_size=1: every advantage is 0, so the reward teaches nothing")
    rewards.watched(cfg.watch)  # refuses what it cannot read
    same = set(rewards.parse(cfg.reward).names) == {"constant"} and cfg.truncated != "zero"
    if same and cfg.adv_norm != "raw":
        null = " and no weight moves (a null test)" if cfg.kl_coef == 0 else ""
        warnings.append(f"reward={cfg.reward} is equal for all: it teaches nothing{null}")
    if cfg.lr == 0:
        warnings.append("lr=0: nothing is learned (a null test)")
    warnings += [
        f"{key}={getattr(cfg, key)} has no effect {why}"
        for key, why in _idle(cfg).items()
        if getattr(cfg, key) != getattr(Config, key)
    ]
    if cfg.updates_per_step == 1 and cfg.loss != "grpo":
        same = "every ratio is 1, and the gradient is grpo's at the same loss_agg"
        warnings.append(f"loss={cfg.loss} has no effect with updates_per_step=1: {same}")
    elif cfg.updates_per_step == 1 and cfg.clip != "off":
        warnings.append(f"clip={cfg.clip} has no effect with updates_per_step=1: every ratio is 1")
    return warnings


def _idle(cfg: Config) -> dict[str, str]:
    """The settings that have no effect with these, each with the reason."""
    idle = {}
    if cfg.one_shot:
        idle["keep_duplicates"] = "with one_shot, which trains on one problem"
    if cfg.lora_r == 0:
        idle["lora_alpha"] = "with lora_r=0: there is no adapter"
        idle["rollout_weights"] = "with lora_r=0: there is no adapter to merge"
        idle["base_every"] = "with lora_r=0: no base model is kept for the log"
    if needs_base(cfg):
        idle["base_every"] = "because the loss or the reward needs the base model in every step"
    if cfg.kl_coef == 0:
        idle["kl_type"] = "with kl_coef=0"
    if cfg.optimizer == "sgd":
        idle["adam_betas"] = "with optimizer=sgd"
    if cfg.eval_temperature == 0:
        idle["eval_k"] = "with eval_temperature=0: greedy samples are all equal"
    if cfg.eval_every == 0:
        idle["eval_new_tokens"] = "with eval_every=0"
        evals = ("eval_n", "eval_k", "eval_temperature")
        idle |= dict.fromkeys(evals, "on training with eval_every=0; only eval.py --run reads it")
    if cfg.loss != "cispo":
        idle["cispo_cap"] = f"with loss={cfg.loss}"
    if cfg.loss != "hoelder":
        idle |= dict.fromkeys(("hoelder_p", "hoelder_p_end"), f"with loss={cfg.loss}")
    if cfg.clip_low >= 1:
        idle["clip_low"] = "because no ratio is below 0"
    if cfg.loss == "cispo":
        clips = ("clip", "clip_low", "clip_high")
        idle |= dict.fromkeys(clips, "with loss=cispo, which has cispo_cap instead")
    elif cfg.clip != "both":
        sides = {"high": ["clip_low"], "low": ["clip_high"], "off": ["clip_low", "clip_high"]}
        idle |= dict.fromkeys(sides[cfg.clip], f"with clip={cfg.clip}")
    return idle


def can_clip(cfg: Config) -> bool:
    """Whether any token can be clipped (or capped, for CISPO) with these settings."""
    low = cfg.clip in ("both", "low") and cfg.clip_low < 1  # no ratio is below 0
    high = cfg.clip in ("both", "high")
    return cfg.updates_per_step > 1 and (cfg.loss == "cispo" or low or high)


def needs_base(cfg: Config) -> bool:
    """Whether the loss or the reward needs the base policy's statistics in every step."""
    return cfg.kl_coef > 0 or "base_self_certainty" in rewards.parse(cfg.reward).needs


def early_warning(cfg: Config, steps: list[dict]) -> str:
    """Return a warning if the first steps of this process show that the run does not work, else "".

    steps are the metrics of all steps of this process. Each warning is returned only once.
    """
    if len(steps) == 1:
        return _not_watched(cfg, steps[0])
    if len(steps) == 5:
        return _nothing_to_learn(cfg, steps)
    if len(steps) == 10 and can_clip(cfg) and cfg.lr > 0:
        return _nothing_clipped(cfg, steps)
    return ""


def _not_watched(cfg: Config, metrics: dict) -> str:
    """Return a warning if this run cannot compute a reward that `watch` names, else ""."""
    for expression in filter(str.strip, cfg.watch.split(";")):
        one = rewards.parse(expression)
        if f"{one}/mean" not in metrics:
            needs = ", ".join(one.needs)
            return f"watch: {one} is not logged: it needs {needs}, and this run lacks some of it"
    return ""


def _nothing_to_learn(cfg: Config, steps: list[dict]) -> str:
    """Return a warning if five steps taught nothing, with the cause if it is known, else ""."""
    truncated = sum(m["truncated"] for m in steps) / len(steps)
    flat = all(m["flat_groups"] == 1 for m in steps) and cfg.adv_norm != "raw"
    if truncated > 0.9 and (flat or cfg.truncated != "keep"):
        lost = {"keep": "get no reward", "mask": "are left out of the loss", "zero": "get reward 0"}
        return (
            f"{truncated:.0%} of the responses were cut off at max_new_tokens={cfg.max_new_tokens} "
            f"and {lost[cfg.truncated]}: raise max_new_tokens, or ask for shorter answers by prompt"
        )
    if flat:
        return (
            f"reward={cfg.reward} gave all responses of each group the same value for five steps: "
            "as long as this is so, nothing is learned"
        )
    return ""


def _nothing_clipped(cfg: Config, steps: list[dict]) -> str:
    """Return a warning if ten steps clipped nothing although some group could teach, else ""."""
    clipped = any(m["clip_frac_low"] + m["clip_frac_high"] > 0 for m in steps)
    if clipped or all(m["flat_groups"] == 1 or m["grad_norm"] == 0 for m in steps):
        return ""
    if cfg.loss == "cispo":
        return "no ratio reached cispo_cap in 10 steps, so it is not being tested: raise lr"
    lower = {"both": "clip_low and clip_high", "low": "clip_low", "high": "clip_high"}[cfg.clip]
    return (
        f"nothing was clipped in 10 steps, so clip={cfg.clip} is not being tested: "
        f"raise lr or lower {lower}"
    )


def keep_settled(cfg: Config) -> Config:
    """Return a copy of cfg. A resumed run keeps what rollout_weights=auto chose at its start.

    Other weights or rows differ by rounding. A different choice (for example because other work now
    uses the GPU's memory) would change the samples. Fewer rows may still be asked for.
    """
    there = (Path(cfg.out_dir) / "config.json").is_file()  # otherwise RunFolder reports it
    if cfg.resume and there and cfg.rollout_weights == "auto" and cfg.lora_r:
        saved = read_settings(cfg.out_dir)
        weights = saved.get("rollout_weights", "adapter")  # older runs had only this
        rows = min(cfg.rollout_rows, saved.get("rollout_rows", cfg.rollout_rows))
        if rows < cfg.rollout_rows:
            print(f"resume: rollout_rows stays {rows}, as chosen with rollout_weights=auto")
        return replace(cfg, rollout_weights=weights, rollout_rows=rows)
    return replace(cfg)


def read_settings(folder: Path | str) -> SavedConfig:
    """The configuration of a run, for reading a run of any origin.

    Raises UserError if there is none or if a setting has a value of another type. Choices that an
    older version had are kept.
    """
    saved = read_config(folder)
    for key, kind in get_type_hints(Config).items():
        choice = get_origin(kind) is Literal and isinstance(saved.get(key), str)
        if key in saved and not choice:
            try:
                as_type(saved[key], kind)
            except ValueError as error:
                raise UserError(f"{saved.path}: {key} {error}") from None
    return saved


def learning_rate(cfg: Config, update_index: int) -> float:
    """The learning rate of an update. Updates count from 0 over the whole run."""
    total = cfg.steps * cfg.updates_per_step
    warm = cfg.warmup * total
    if update_index < warm:
        return cfg.lr * (update_index + 1) / math.ceil(warm)
    done = (update_index - warm) / max(total - warm, 1)  # in [0, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return cfg.lr * shape[cfg.lr_schedule]


def hoelder_exponent(cfg: Config, update_index: int) -> float:
    """The exponent p of loss=hoelder at an update. Updates count from 0 over the whole run."""
    last = cfg.steps * cfg.updates_per_step - 1
    return cfg.hoelder_p + (cfg.hoelder_p_end - cfg.hoelder_p) * update_index / max(last, 1)
