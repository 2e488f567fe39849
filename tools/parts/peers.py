"""The same work done by transformers' generate and TRL's GRPOTrainer, for tools.bench.

Imported only if `--peer` asks for one. Both peers get our weights, prompts and lengths, and sample
from the same distribution (temperature 1, no filter).
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as hf_logging

from harness.errors import UserError
from lora import lora_layers
from tools.parts.machine import PeakMemory, synchronize
from tools.parts.workload import Step, even

if TYPE_CHECKING:
    from tools.bench import BenchConfig

END = 0  # the token that ends a peer's response, and pads it


class EndAt(LogitsProcessor):
    """Makes row i end with its budgets[i]-th token, neither earlier nor later.

    ends: the model's own end tokens. They are never sampled, because a real model would stop there.
    """

    def __init__(
        self, budgets: list[int], prompt_tokens: int, ends: list[int], device: torch.device
    ):
        self.budgets = torch.tensor(budgets, device=device)
        self.never = torch.tensor([END, *ends], device=device)
        self.ending = set(budgets)
        self.prompt_tokens = prompt_tokens

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """tokens int64 [n, T]; changes scores [n, V] in place, because generate passes a copy."""
        position = tokens.shape[1] - self.prompt_tokens + 1  # of the next token, counted from 1
        scores[:, self.never] = -torch.inf
        if position in self.ending:
            rows = (self.budgets == position).nonzero()[:, 0]
            scores[rows] = -torch.inf
            scores[rows, END] = 0.0
        return scores


def own_ends(model: nn.Module) -> list[int]:
    """The end tokens in a model's own configuration."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
    return sorted(ids)


# ------------------------------------------------------------------------- transformers' generate


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context, the model is a plain Hugging Face model without our layers.

    Gradient checkpointing is off too, because it turns the cache off. An untrained adapter is the
    identity, so the numbers are the same.
    """
    layers = lora_layers(model)

    def put(name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

    for name, layer in layers.items():
        put(name, layer.base)
    try:
        with activations_kept(model):
            yield model
    finally:
        for name, layer in layers.items():
            put(name, layer)


@contextmanager
def activations_kept(model: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing off, because with it `generate` has no KV cache."""
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@torch.no_grad()
def hf_generate(
    model: nn.Module, prompts: list[list[int]], group: int, budgets: list[int], max_rows: int
) -> list[int]:
    """Sample with transformers' generate. Returns the response lengths of all rows.

    prompts: of equal length, `group` rows each. budgets: tokens of each row. At most max_rows run
    at a time, and a wave ends with its longest row.
    """
    device = next(model.parameters()).device
    rows = torch.tensor(prompts, device=device).repeat_interleave(group, 0)  # [B, P]
    lengths = []
    for start in range(0, len(rows), max_rows):
        part, ends = rows[start : start + max_rows], budgets[start : start + max_rows]
        config = GenerationConfig(
            max_new_tokens=max(ends),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=END,
            pad_token_id=END,
            use_cache=True,
        )
        end_at = EndAt(ends, rows.shape[1], own_ends(model), device)
        out = model.generate(
            part,
            attention_mask=torch.ones_like(part),
            generation_config=config,
            logits_processor=LogitsProcessorList([end_at]),
        )
        lengths += _lengths(out[:, rows.shape[1] :])
    return lengths


def _lengths(responses: torch.Tensor) -> list[int]:
    """Length of each response [n, R] in tokens, up to and including the first END."""
    is_end = responses == END
    return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, responses.shape[1]).tolist()


# ------------------------------------------------------------------------------- TRL's GRPOTrainer


def micro_batch_rows(rows_an_update: int, longest: int, micro_batch_tokens: int) -> int:
    """Rows of a micro-batch of TRL: the most that fit the tokens and divide the mini-batch."""
    most = max(1, micro_batch_tokens // longest)
    return max(n for n in range(1, rows_an_update + 1) if n <= most and rows_an_update % n == 0)


@dataclass
class TrlSteps:
    """What each step of TRL took. Times are in seconds, memory in GB (see PeakMemory)."""

    version: str
    seconds: list[float] = field(default_factory=list)  # from our step's end to its last update's
    sample: list[float] = field(default_factory=list)  # generate
    score: list[float] = field(default_factory=list)  # from there to the advantages, with rewards
    growth: list[float] = field(default_factory=list)  # largest of its forwards and backwards
    peak: list[float] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)  # of all its responses, in tokens


def trl_steps(
    cfg: "BenchConfig", step: Step, model: nn.Module, ours: Callable[[], None]
) -> TrlSteps:
    """Run repeats + 1 whole steps of TRL's GRPOTrainer, each after one of ours.

    model: a plain model, from which TRL makes its own PEFT model. The tokenizer of `step` has one
    word per token, so TRL reads the very same prompts. A step of TRL consists of its data loader,
    tokenizing, generate, scoring, decoding, rewards, advantages, updates and metrics, without a log
    line or a checkpoint. Raises UserError if TRL is not installed.
    """
    try:
        import datasets
        import trl
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            f"peer=trl: {error.name} is not installed: pip install -r requirements-test.txt"
        ) from error
    steps = TrlSteps(trl.__version__)
    texts = [" ".join(map(str, prompt)) for prompt in step.prompts]
    peft_config = None
    if cfg.lora_r:
        peft_config = LoraConfig(
            r=cfg.lora_r,
            lora_alpha=2 * cfg.lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    else:
        model.requires_grad_(True)

    def reward(completions: list[str], completion_ids: list[list[int]], **kwargs) -> list[float]:
        steps.lengths.append([len(ids) for ids in completion_ids])
        return [even(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder, _quiet(datasets):
        trainer_class, in_turn = _timed_trainer(trl.GRPOTrainer, steps, cfg.updates, ours)
        trainer = trainer_class(
            model=model,
            args=trl.GRPOConfig(output_dir=folder, **_trl_settings(cfg, step, model)),
            processing_class=step.tokenizer,
            peft_config=peft_config,
            reward_funcs=reward,
            callbacks=[in_turn],
            # exactly the rows that are read: for a new epoch, TRL would make a new data loader
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * (cfg.repeats + 1)}),
        )
        trainer.remove_callback(PrinterCallback)  # it would print between our lines
        plain = trainer.model.get_base_model() if cfg.lora_r else trainer.model
        _force_lengths(plain, step, steps)
        trainer.train()
    return steps


def _trl_settings(cfg: "BenchConfig", step: Step, model: nn.Module) -> dict:
    """The settings of GRPOConfig that make TRL do the same work as our step."""
    B = cfg.prompts * cfg.group
    longest = cfg.prompt_tokens + max(step.budgets)
    rows = micro_batch_rows(B // cfg.updates, longest, cfg.micro_batch_tokens)
    return dict(
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        bf16=model.dtype == torch.bfloat16,
        max_steps=(cfg.repeats + 1) * cfg.updates,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=B // cfg.updates // rows,
        steps_per_generation=B // rows,
        num_iterations=1,
        num_generations=cfg.group,
        max_completion_length=max(step.budgets),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=step.settings.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=cfg.gradient_checkpointing,
        shuffle_dataset=False,
    )


def _timed_trainer(
    trainer_class: type, steps: TrlSteps, updates: int, ours: Callable[[], None]
) -> tuple[type, TrainerCallback]:
    """A GRPOTrainer that records its times and memory in `steps`.

    Also returns the callback that it needs, which runs `ours` before each step of TRL.
    """

    class InTurn(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.device = args.device
            self.memory = PeakMemory(args.device)
            self.begin()

        def begin(self):
            ours()
            self.growth, self.peak = [], []  # of each forward and backward
            self.metering = 0.0  # seconds, which are not TRL's
            synchronize(self.device)
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % updates:
                return
            synchronize(self.device)
            steps.seconds.append(time.perf_counter() - self.start - self.metering)
            steps.growth.append(max(self.growth))
            steps.peak.append(max(self.peak))
            if state.global_step < state.max_steps:
                self.begin()

    in_turn = InTurn()

    class TimedTrainer(trainer_class):
        def _generate_and_score_completions(self, batch):
            start = time.perf_counter()
            inputs = super()._generate_and_score_completions(batch)
            synchronize(in_turn.device)
            steps.score.append(time.perf_counter() - start - steps.sample[-1])
            return inputs

        def _prepare_inputs(self, batch):
            inputs = super()._prepare_inputs(batch)
            start = time.perf_counter()
            in_turn.memory.start()
            in_turn.metering += time.perf_counter() - start
            return inputs

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            growth, peak = in_turn.memory.stop()
            in_turn.growth.append(growth)
            in_turn.peak.append(peak)
            return loss

    return TimedTrainer, in_turn


def _force_lengths(plain: nn.Module, step: Step, steps: TrlSteps) -> None:
    """Replace the model's `generate` by one with forced lengths that records its time."""
    generate = plain.generate
    end_at = EndAt(step.budgets, len(step.prompts[0]), own_ends(plain), plain.device)
    plain.generation_config.eos_token_id = END

    def timed(*args, **kwargs):
        start = time.perf_counter()
        kwargs |= {"use_cache": True, "logits_processor": LogitsProcessorList([end_at])}
        with activations_kept(plain):  # without a cache it would take hours
            out = generate(*args, **kwargs)
        synchronize(plain.device)
        steps.sample.append(time.perf_counter() - start)
        return out

    plain.generate = timed  # GRPOTrainer has no argument for a logits processor


@contextmanager
def _quiet(datasets) -> Iterator[None]:
    """Silence the warnings and progress bars of the libraries."""
    level = hf_logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
