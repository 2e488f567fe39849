"""The same work done by others, for tools.bench: transformers' generate, TRL's GRPOTrainer.

Imported only where `--peer` asks for one. Both peers get our weights, prompts and lengths, and
sample from the same distribution (temperature 1, nothing filtered).
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as hf_logging

from harness.errors import UserError
from lora import lora_layers
from tools.parts.machine import PeakMemory, synchronize

END = 0  # the token that ends a peer's response, and pads what is behind it


class EndAt(LogitsProcessor):
    """Let row i end with its budgets[i]-th token, neither earlier nor later.

    No token in ends, a model's own end tokens, is ever sampled: a real model would stop at them.
    """

    def __init__(
        self, budgets: list[int], prompt_tokens: int, ends: list[int], device: torch.device
    ):
        self.budgets = torch.tensor(budgets, device=device)
        self.never = torch.tensor([END, *ends], device=device)
        self.ending = set(budgets)
        self.prompt_tokens = prompt_tokens

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """tokens int64 [n, T], scores [n, V]: in place, since generate hands over a copy."""
        position = tokens.shape[1] - self.prompt_tokens + 1  # of the token to come, from 1
        scores[:, self.never] = -torch.inf
        if position in self.ending:
            rows = (self.budgets == position).nonzero()[:, 0]
            scores[rows] = -torch.inf
            scores[rows, END] = 0.0
        return scores


def own_ends(model: nn.Module) -> list[int]:
    """The tokens at which a model stops by its own configuration."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
    return sorted(ids)


# ------------------------------------------------------------------------- transformers' generate


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The same weights as a plain Hugging Face model: inside, no layer of ours is in it.

    No gradient checkpointing either, since it turns the cache off. An adapter that has not been
    trained is the identity, so the numbers are the same.
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
    """Inside, no gradient checkpointing, which would turn the KV cache of `generate` off."""
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
    """Sample with transformers' generate; returns the response lengths of all rows.

    prompts of equal length, `group` rows each; budgets: tokens of each row. At most max_rows at a
    time, and a wave ends with its longest row.
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
    """Tokens of each response [n, R], the first END included."""
    is_end = responses == END
    return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, responses.shape[1]).tolist()


# ------------------------------------------------------------------------------- TRL's GRPOTrainer


def micro_batch_rows(rows_an_update: int, longest: int, micro_batch_tokens: int) -> int:
    """TRL counts micro-batches in rows: the most that fit the tokens and divide the mini-batch."""
    most = max(1, micro_batch_tokens // longest)
    return max(n for n in range(1, rows_an_update + 1) if n <= most and rows_an_update % n == 0)


def trl_steps(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    group: int,
    budgets: list[int],
    reward: Callable[[str], float],
    updates: int,
    micro_batch_tokens: int,
    lora_r: int,
    lr: float,
    gradient_checkpointing: bool,
    repeats: int,
    ours: Callable[[], None],
) -> dict:
    """Whole steps of TRL's GRPOTrainer, one of ours before each: repeats + 1 of both.

    model: a plain one, of which TRL makes its own PEFT model; tokenizer: one word a token, so that
    TRL reads the very prompts; reward of one text. Returns, for each step, "seconds": from the end
    of our step to the end of TRL's last update (its data loader, tokenizing, generate, scoring,
    decoding, rewards, advantages, updates, its metrics; no log line and no checkpoint), of it
    "sample" (generate) and "score" (from there to the advantages, rewards among it), "growth" and
    "peak": GB, see PeakMemory, the largest of the step's micro-batches (forward, backward), and
    "lengths": of all its responses, in tokens.
    """
    try:
        import datasets
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer
        from trl import __version__ as version
    except ImportError as error:
        raise UserError(
            f"peer=trl: {error.name} is not installed: pip install -r requirements-test.txt"
        ) from error
    device = next(model.parameters()).device
    B = len(prompts) * group
    longest = len(prompts[0]) + max(budgets)
    rows = micro_batch_rows(B // updates, longest, micro_batch_tokens)
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    keys = ("seconds", "sample", "score", "growth", "peak", "lengths")
    steps: dict = {key: [] for key in keys} | {"version": version}
    memory = PeakMemory(device)

    class Trainer(GRPOTrainer):
        """TRL's own, with a watch on its parts and a meter before each forward."""

        def _generate_and_score_completions(self, batch):
            start = time.perf_counter()
            inputs = super()._generate_and_score_completions(batch)
            synchronize(device)
            steps["score"].append(time.perf_counter() - start - steps["sample"][-1])
            return inputs

        def _prepare_inputs(self, batch):
            inputs = super()._prepare_inputs(batch)
            start = time.perf_counter()
            memory.start()
            meter[0] += time.perf_counter() - start  # not TRL's time
            return inputs

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            for values, value in zip((growths, peaks), memory.stop(), strict=True):
                values.append(value)
            return loss

    class InTurn(TrainerCallback):
        def begin(self):
            ours()
            growths.clear()
            peaks.clear()
            meter[0] = 0.0
            synchronize(device)
            self.start = time.perf_counter()

        def on_train_begin(self, args, state, control, **kwargs):
            self.begin()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % updates:
                return
            synchronize(device)
            steps["seconds"].append(time.perf_counter() - self.start - meter[0])
            steps["growth"].append(max(growths))
            steps["peak"].append(max(peaks))
            if state.global_step < state.max_steps:
                self.begin()

    growths: list[float] = []
    peaks: list[float] = []
    meter = [0.0]

    def reward_func(completions: list[str], completion_ids: list[list[int]], **kwargs):
        steps["lengths"].append([len(ids) for ids in completion_ids])
        return [reward(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder, _quiet(datasets):
        args = GRPOConfig(
            output_dir=folder,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=model.dtype == torch.bfloat16,
            max_steps=(repeats + 1) * updates,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=B // updates // rows,
            steps_per_generation=B // rows,
            num_iterations=1,
            num_generations=group,
            max_completion_length=max(budgets),
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            loss_type="dapo",
            learning_rate=lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            gradient_checkpointing=gradient_checkpointing,
            shuffle_dataset=False,
        )
        peft_config = None
        if lora_r:
            peft_config = LoraConfig(
                r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        else:
            model.requires_grad_(True)
        trainer = Trainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            peft_config=peft_config,
            reward_funcs=reward_func,
            callbacks=[InTurn()],
            # as many rows as are read: a new epoch would cost TRL a new data loader
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * (repeats + 1)}),
        )
        trainer.remove_callback(PrinterCallback)  # standard output is the report's
        plain = trainer.model.get_base_model() if lora_r else trainer.model
        generate = plain.generate
        at = EndAt(budgets, len(prompts[0]), own_ends(plain), device)
        end_at = LogitsProcessorList([at])
        plain.generation_config.eos_token_id = END

        def timed(*args, **kwargs):
            start = time.perf_counter()
            with activations_kept(plain):  # else it would take TRL hours
                out = generate(*args, logits_processor=end_at, **{**kwargs, "use_cache": True})
            synchronize(device)
            steps["sample"].append(time.perf_counter() - start)
            return out

        plain.generate = timed  # GRPOTrainer has no argument for a logits processor
        trainer.train()
    return steps


@contextmanager
def _quiet(datasets) -> Iterator[None]:
    """No warnings and bars of the libraries: the report is what one looks for."""
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
