"""Time the phases of a training step, alone or in turn with another library on the same work.

    python -m tools.bench --model=tiny
    python -m tools.bench --arch=qwen2.5-1.5b --quant=nf4 --lora_r=32 --new_tokens=1024
    python -m tools.bench --peer=hf         (our sampler and transformers' generate, in turn)
    python -m tools.bench --peer=trl        (our whole step and that of TRL's GRPOTrainer, in turn)
    python -m tools.bench --scaling=both    (cost of sampling against rows and length)
    python -m tools.bench --data=tiny --prompts=64 --group=16 --prompt_tokens=32 --new_tokens=56

The phases are the functions of train.py: sample (decoding and text), score (partition, old and
reference log-probabilities), reward (rewards, advantages, and with --data the logged metrics) and
update. Without --data, prompts are random tokens, and the length of every response is drawn
beforehand. So two machines, versions or programs do the same work. --arch takes random weights of a
known shape instead of a model. The last line printed is one JSON object. docs/SPEED.md explains how
each figure is measured.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
import transformers
from tqdm import tqdm

from decoding.slots import DecodeSetup
from harness import memory
from harness.configurator import configure
from harness.errors import UserError, run
from harness.loading import choose_device, load_model
from tools.parts.machine import Cost, PeakMemory, ceilings, device_name, exponent, seconds
from tools.parts.workload import SHAPES, Step, weights

PHASES = ("sample", "score", "reward", "update")
POINTS = 5  # sizes of a scaling: the full one, half of it, a quarter, ...


@dataclass
class BenchConfig:
    """Time the phases of a training step: python -m tools.bench [--key=value]"""

    # Model
    model: str = "tiny"  # hub id, local folder, or tiny / tiny_bad
    arch: Literal["none", *SHAPES] = "none"  # random weights of this shape instead
    quant: Literal["none", "nf4"] = "none"  # 4-bit weights through bitsandbytes
    lora_r: int = 8  # rank of the adapter; 0 trains all weights
    gradient_checkpointing: bool = False  # recompute activations in backward
    reference: bool = True  # also score under the base policy; False: a step that base_every skips
    rollout_weights: memory.DecodeWeights = "kept"  # merged weights, kept or freed, or adapter
    cuda_graph: bool = True  # capture decoding steps on CUDA; False shows what that saves
    # Work
    prompts: int = 8  # prompts per step
    group: int = 8  # responses per prompt
    prompt_tokens: int = 64  # length of every prompt; with --data, of the longest one used
    new_tokens: int = 128  # length of the longest response
    min_new: int = 1  # length of the shortest response
    lengths: Literal["ragged", "equal"] = "ragged"  # log-normal, or all new_tokens
    data: str = ""  # problems to sample and grade, with responses of any length, e.g. tiny
    updates: int = 1  # optimiser updates per step
    micro_batch_tokens: int = 8192  # padded prompt + response tokens per forward and backward
    rollout_rows: int = 128  # rows decoded at once
    seed: int = 0  # for prompts, lengths and samples
    # Measurement
    repeats: int = 3  # timed steps, after one that is not timed; medians are shown
    peer: Literal["none", "hf", "trl"] = "none"  # transformers' generate, or TRL's whole step
    scaling: Literal["none", "rows", "length", "both"] = "none"  # cost of sampling against size
    extrapolate: str = ""  # PROMPTSxGROUP: estimate the time of a step of this size
    # Machine
    device: str = "auto"  # auto = cuda where there is one, else cpu
    threads: int = 0  # torch's on the CPU; 0 = as train.py sets them
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 on cuda, else float32
    memory_fraction: float = 1.0  # share of the GPU's memory this process may have


# ---------------------------------------------------------------------------------- the measurement


class Meter:
    """Times phases and measures their memory. Keeps phase -> one value per step.

    The figures leave the first step out.
    """

    def __init__(self, device: torch.device, total: int):
        self.memory, self.device = PeakMemory(device), device
        self.seconds: dict[str, list[float]] = {}
        self.growth: dict[str, list[float]] = {}
        self.peak: dict[str, list[float]] = {}
        self.bar = tqdm(total=total, desc="bench", unit="phase", leave=False)

    def __call__(self, phase: str, function: Callable[[], object]) -> None:
        self.bar.set_postfix_str(phase)
        self.memory.start()
        self.seconds.setdefault(phase, []).append(seconds(function, self.device))
        growth, peak = self.memory.stop()
        self.growth.setdefault(phase, []).append(growth)
        self.peak.setdefault(phase, []).append(peak)
        self.bar.update()

    def figures(self, phase: str) -> dict[str, float]:
        return {
            f"{phase}_s": median(self.seconds[phase][1:]),
            f"{phase}_growth_gb": max(self.growth[phase]),
            f"{phase}_peak_gb": max(self.peak[phase]),
        }


def bench(cfg: BenchConfig) -> dict:
    """Measure. Returns the settings and the figures (docs/SPEED.md explains their names)."""
    device, dtype = choose_device(cfg.device, cfg.dtype)
    if cfg.memory_fraction < 1:
        if device.type != "cuda":
            raise UserError(f"memory_fraction={cfg.memory_fraction}: only CUDA can be capped")
        torch.cuda.set_per_process_memory_fraction(cfg.memory_fraction, device)
    if not cfg.cuda_graph:
        if device.type != "cuda":
            raise UserError("cuda_graph=False: only CUDA has graphs to leave out")
    with weights(cfg, device, dtype) as name:
        step = Step(cfg, device, dtype, name)
        if not cfg.cuda_graph:
            step.model.decode_setup = DecodeSetup(static=True)
        trl_model = load_model(name, cfg.quant, dtype, device) if cfg.peer == "trl" else None
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    ceiling = ceilings(device, dtype)
    result = described(cfg, device, dtype, ceiling)
    if cfg.scaling != "none":
        return result | scaling(cfg, step, device)
    meter, work, peer = time_steps(cfg, step, trl_model, device, dtype)
    result |= peer | our_figures(step, meter, work, ceiling)
    if cfg.extrapolate:
        result |= extrapolate(cfg, result)
    return result


def described(
    cfg: BenchConfig, device: torch.device, dtype: torch.dtype, ceiling: tuple[float, float]
) -> dict:
    """What was measured and on what: settings, device, versions and ceilings."""
    bandwidth, flops = ceiling
    result = {
        **asdict(cfg),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ceiling_gb_per_s": bandwidth / 1e9,
        "ceiling_gflop_per_s": flops / 1e9,
    }
    if cfg.arch != "none":
        result["model"] = cfg.arch
    return result


def time_steps(
    cfg: BenchConfig,
    step: Step,
    trl_model: torch.nn.Module | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Meter, list[dict], dict]:
    """Run repeats + 1 steps, in turn with the peer's if there is one.

    Returns the meter, the amount of work in each of our steps, and the figures of the peer.
    """
    phases = ("rollout",) if cfg.peer == "hf" else PHASES
    calls = 2 if cfg.peer == "hf" else len(phases)
    meter = Meter(device, (cfg.repeats + 1) * calls)
    cost = Cost(step.model, dtype)
    work: list[dict] = []

    def ours() -> None:
        step.number += 1
        for phase in phases:
            meter(phase, getattr(step, phase))
        work.append(amount(cfg, cost, step, phases))

    peer = {}
    if cfg.peer == "trl":
        peer = beside_trl(cfg, step, trl_model, meter, ours)
    elif cfg.peer == "hf":
        peer = beside_hf(cfg, step, meter, ours)
    else:
        for _ in range(cfg.repeats + 1):
            ours()
    meter.bar.close()
    return meter, work, peer


def our_figures(step: Step, meter: Meter, work: list[dict], ceiling: tuple[float, float]) -> dict:
    """Times, rates, shares of the ceilings, and memory of our phases, and of the whole step."""
    phases = [phase for phase in ("rollout", *PHASES) if phase in meter.seconds]
    result: dict = {}
    for phase in phases:
        result |= meter.figures(phase)
    timed = list(phases)
    if "update" in phases:
        steps = zip(*(meter.seconds[phase][1:] for phase in phases), strict=True)
        result["step_s"] = median(map(sum, steps))
        result["micro_batch_rows"] = max(len(rows) for mini in step.parts for rows in mini)
        timed.append("step")
    result["response_tokens"] = median(w["tokens"] for w in work[1:])
    bandwidth, flops = ceiling
    for phase in timed:
        took = result[f"{phase}_s"]
        result[f"{phase}_tokens_per_s"] = result["response_tokens"] / took
        if phase in work[-1]:
            flop, read = (median(w[phase][i] for w in work[1:]) for i in range(2))
            result[f"{phase}_flop_share"] = flop / took / flops
            result[f"{phase}_bandwidth_share"] = read / took / bandwidth
    peak = max(result[f"{phase}_peak_gb"] for phase in phases)
    result["peak_memory_gb"] = memory.peak_memory() if math.isnan(peak) else peak
    return result


def amount(cfg: BenchConfig, cost: Cost, step: Step, phases: tuple[str, ...]) -> dict:
    """The work of a step: response tokens, and (FLOP, bytes) of each phase that runs the model."""
    r = step.rollouts if "update" in phases else step.out
    sampling = cost.sampling(r.prompt_len, r.length, cfg.group, cfg.rollout_rows)
    work = {"tokens": int(r.length.sum()), phases[0]: sampling}
    if "update" in phases:
        forward = cost.forward_flop(r.prompt_len, r.length)
        read = cost.weight_bytes * sum(map(len, step.parts))
        forwards = 1 if r.ref_logp is None else 2
        # forward, gradients of activations, and gradients of the weights if they are trained
        passes = 2 if cfg.lora_r else 3
        work |= {
            "score": (forwards * forward, forwards * read),
            "update": (passes * forward, 2 * read),
        }
    return work


def beside_hf(cfg: BenchConfig, step: Step, meter: Meter, ours: Callable[[], None]) -> dict:
    """Run our sampler and transformers' generate in turn. Returns the peer's figures and ratio."""
    from tools.parts import peers

    lengths: list[int] = []
    equal = True

    def peer() -> None:
        torch.manual_seed(cfg.seed + step.number)
        lengths[:] = peers.hf_generate(
            model, step.prompts, cfg.group, step.budgets, cfg.rollout_rows
        )

    for _ in range(cfg.repeats + 1):
        ours()
        with peers.without_adapter(step.model) as model:
            meter("peer", peer)
        equal = equal and lengths == step.out.length.tolist() == step.budgets
    return meter.figures("peer") | {
        "peer_lengths_equal": equal,
        "peer_version": transformers.__version__,
        "peer_response_tokens": sum(lengths),
        **ratio(meter.seconds["rollout"], meter.seconds["peer"]),
    }


def beside_trl(
    cfg: BenchConfig,
    step: Step,
    model: torch.nn.Module,
    meter: Meter,
    ours: Callable[[], None],
) -> dict:
    """Run our step and that of TRL's GRPOTrainer in turn. Returns the peer's figures and ratios."""
    from tools.parts import peers

    steps = peers.trl_steps(cfg, step, model, ours)
    lengths = [*steps.lengths, step.rollouts.length.tolist()]
    longest = cfg.prompt_tokens + max(step.budgets)
    B = cfg.prompts * cfg.group
    our_steps = list(map(sum, zip(*(meter.seconds[phase] for phase in PHASES), strict=True)))
    growth = max(steps.growth)
    parts = list(zip(steps.seconds, steps.sample, steps.score, strict=True))[1:]
    return {
        "peer_version": steps.version,
        "peer_lengths_equal": all(one == step.budgets for one in lengths),
        "peer_s": median(steps.seconds[1:]),
        "peer_sample_s": median(steps.sample[1:]),
        "peer_score_s": median(steps.score[1:]),
        "peer_update_s": median(whole - sample - score for whole, sample, score in parts),
        "peer_response_tokens": sum(steps.lengths[-1]),
        "peer_micro_batch_rows": peers.micro_batch_rows(
            B // cfg.updates, longest, cfg.micro_batch_tokens
        ),
        "peer_update_growth_gb": growth,
        "peer_update_peak_gb": max(steps.peak),
        "update_growth_ratio": max(meter.growth["update"]) / growth if growth else math.nan,
        **ratio(our_steps, steps.seconds),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict:
    """The peer's time divided by ours: of each pair of steps but the first, and the median."""
    ratios = [b / a for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {"ratio": median(ratios), "ratios": ratios}


def scaling(cfg: BenchConfig, step: Step, device: torch.device) -> dict:
    """Seconds of sampling at several sizes with equal lengths, and the exponent of each fit."""
    halves = [2**i for i in range(POINTS)]
    sizes = {}
    if cfg.scaling in ("rows", "both"):
        sizes["rows"] = sorted({cfg.prompts // h for h in halves if cfg.prompts // h})
    if cfg.scaling in ("length", "both"):
        sizes["length"] = sorted({cfg.new_tokens // h for h in halves if cfg.new_tokens // h})
    result: dict = {}
    bar = tqdm(total=sum(map(len, sizes.values())) * (cfg.repeats + 1), desc="bench", leave=False)
    for kind, values in sizes.items():
        points = []
        for size in values:
            prompts = step.prompts[:size] if kind == "rows" else step.prompts
            length = size if kind == "length" else cfg.new_tokens
            budgets = [length] * (len(prompts) * cfg.group)
            took = []
            for _ in range(cfg.repeats + 1):
                took.append(seconds(partial(step.generate, prompts, budgets), device))
                bar.set_postfix_str(f"{kind} {size}")
                bar.update()
            points.append([len(budgets) if kind == "rows" else length, median(took[1:])])
        result[f"{kind}_points"] = points  # [rows or tokens, seconds]
        result[f"{kind}_exponent"] = exponent(*map(list, zip(*points, strict=True)))
    bar.close()
    return result


def extrapolate(cfg: BenchConfig, result: dict) -> dict:
    """Estimate the seconds of a larger step.

    Each phase takes time in proportion to its rows, because waves and mini-batches keep their size.
    """
    prompts, group = map(int, cfg.extrapolate.split("x"))
    factor = prompts * group / (cfg.prompts * cfg.group)
    larger = {f"extrapolated_{phase}_s": result[f"{phase}_s"] * factor for phase in PHASES}
    return larger | {"extrapolated_step_s": sum(larger.values())}


# --------------------------------------------------------------------------------------- the report


def check(cfg: BenchConfig) -> None:
    """Raise UserError for a setting that cannot be measured."""
    for key in (
        "prompts",
        "group",
        "prompt_tokens",
        "new_tokens",
        "min_new",
        "updates",
        "repeats",
        "micro_batch_tokens",
        "rollout_rows",
    ):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    B = cfg.prompts * cfg.group
    if cfg.updates > B:
        raise UserError(f"updates={cfg.updates}: a step has {B} responses")
    if cfg.min_new > cfg.new_tokens:
        raise UserError(f"min_new={cfg.min_new}: must not be above new_tokens={cfg.new_tokens}")
    if min(cfg.seed, cfg.lora_r, cfg.threads) < 0:
        raise UserError("seed, lora_r and threads must not be negative")
    if not 0 < cfg.memory_fraction <= 1:
        raise UserError(f"memory_fraction={cfg.memory_fraction}: must be above 0, at most 1")
    if cfg.lora_r == 0 and cfg.quant != "none":
        raise UserError("lora_r=0 trains all weights, not possible in 4 bits: add --quant=none")
    if cfg.data and (cfg.peer != "none" or cfg.scaling != "none" or cfg.arch != "none"):
        raise UserError(f"data={cfg.data}: cannot be combined with peer, scaling or arch")
    if cfg.scaling != "none" and cfg.peer != "none":
        raise UserError(f"scaling={cfg.scaling}: cannot be combined with peer")
    if cfg.scaling in ("rows", "both") and cfg.prompts < 2:
        raise UserError(f"scaling={cfg.scaling}: needs --prompts of at least 2")
    if cfg.scaling in ("length", "both") and cfg.new_tokens < 2:
        raise UserError(f"scaling={cfg.scaling}: needs --new_tokens of at least 2")
    if cfg.extrapolate and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", cfg.extrapolate):
        raise UserError(f"extrapolate={cfg.extrapolate}: write PROMPTSxGROUP, e.g. 64x16")
    if cfg.extrapolate and (cfg.peer != "none" or cfg.scaling != "none"):
        raise UserError("extrapolate: cannot be combined with peer or scaling")
    if cfg.peer == "trl" and B % cfg.updates:
        raise UserError(f"peer=trl: {B} responses do not make {cfg.updates} equal mini-batches")
    if cfg.peer == "trl" and cfg.group < 2:
        raise UserError("peer=trl: needs --group of at least 2")


def print_report(cfg: BenchConfig, result: dict) -> None:
    print_setting(cfg, result)
    if cfg.scaling != "none":
        print_scaling(result)
        return
    print_phases(result)
    if cfg.peer != "none":
        print_peer(cfg, result)
    if cfg.extrapolate:
        print(
            f"\na step of {cfg.extrapolate}, extrapolated from this one (not run): "
            f"{result['extrapolated_step_s']:,.1f} s"
        )


def print_setting(cfg: BenchConfig, result: dict) -> None:
    """What was measured, and on what."""
    print(
        f"{result['device']}, threads: {result['threads']}; {result['model']}, "
        f"{result['dtype']}, quant={cfg.quant}, lora_r={cfg.lora_r}"
    )
    print(
        f"ceilings: {result['ceiling_gb_per_s']:.1f} GB/s, "
        f"{result['ceiling_gflop_per_s']:,.0f} GFLOP/s"
    )
    if cfg.lengths == "equal" or cfg.scaling != "none":
        lengths = "equal lengths"
    elif cfg.data:
        lengths = "lengths as sampled"
    else:
        lengths = f"ragged lengths from {cfg.min_new}"
    print(
        f"{cfg.prompts} x {cfg.group} responses of at most {cfg.new_tokens} tokens, {lengths}; "
        f"prompts of {cfg.prompt_tokens}; median of {cfg.repeats}\n"
    )


def print_scaling(result: dict) -> None:
    """Seconds of sampling by number of rows and by length."""
    for kind in ("rows", "length"):
        if f"{kind}_points" not in result:
            continue
        print(f"{kind:>8}{'seconds':>10}")
        for size, took in result[f"{kind}_points"]:
            print(f"{size:>8}{took:>10.3f}")
        print(f"seconds ~ {kind}^{result[f'{kind}_exponent']:.2f}\n")


def print_phases(result: dict) -> None:
    """One row per phase: time, rate, shares of the two ceilings, memory."""
    print(
        f"{'':<8}{'seconds':>10}{'response tokens/s':>20}{'bandwidth':>11}{'arithmetic':>12}"
        f"{'new GB':>9}{'peak GB':>9}"
    )
    for phase in ("rollout", *PHASES, "step"):
        if f"{phase}_s" not in result:
            continue
        line = f"{phase:<8}{result[f'{phase}_s']:>10.3f}{result[f'{phase}_tokens_per_s']:>20,.0f}"
        if f"{phase}_flop_share" in result:
            line += f"{result[f'{phase}_bandwidth_share']:>11.1%}"
            line += f"{result[f'{phase}_flop_share']:>12.1%}"
        elif phase == "reward":
            line += " " * 23
        if phase != "step":
            line += f"{result[f'{phase}_growth_gb']:>9.3f}{result[f'{phase}_peak_gb']:>9.3f}"
        print(line)
    print(f"peak memory {result['peak_memory_gb']:.2f} GB")


def print_peer(cfg: BenchConfig, result: dict) -> None:
    """The peer's times and memory beside ours."""
    name, what = ("transformers generate", "rollout") if cfg.peer == "hf" else ("TRL", "step")
    print(
        f"\n{name} {result['peer_version']}: {result['peer_s']:.3f} s, ours "
        f"{result[f'{what}_s']:.3f} s; ratio (median of {cfg.repeats} pairs): {result['ratio']:.2f}"
    )
    if not result["peer_lengths_equal"]:
        print("warning: the peer's responses have other lengths than ours: the ratio is not fair")
    if cfg.peer == "trl":
        print(
            f"TRL's generate takes {result['peer_sample_s']:.3f} s, scoring and reward "
            f"{result['peer_score_s']:.3f} s, update and the rest {result['peer_update_s']:.3f} s"
        )
        print(
            f"TRL's update takes {result['peer_update_growth_gb']:.3f} new GB with micro-batches "
            f"of {result['peer_micro_batch_rows']} rows; ours, with at most "
            f"{result['micro_batch_rows']} rows, takes {result['update_growth_ratio']:.2f} of that"
        )


def main(argv: list[str]) -> None:
    cfg, _ = configure(BenchConfig, argv)
    check(cfg)
    result = bench(cfg)
    print_report(cfg, result)
    # unknown values are null, because JSON has no NaN
    print(json.dumps({key: None if value != value else value for key, value in result.items()}))


if __name__ == "__main__":
    run(main)
