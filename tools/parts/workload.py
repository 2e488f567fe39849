"""The work that tools.bench times: models of known shapes, prompts, lengths, a training step."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

import grpo
import metrics
import rewards
import train
from data import Problem, Rollouts, partition, prepare
from engine import TRAIN_NOISE, Generation, decode, generate
from harness.loading import check_positions, load_model, load_tokenizer
from harness.memory import decode_with
from lora import add_lora, trainable
from model import checkpoint_activations, rounding_error
from settings import Config
from tasks import tiny
from tasks.datasets import load_problems

if TYPE_CHECKING:
    from tools.bench import BenchConfig

# Shapes from the config.json of the released models. The first two are our own.
QWEN = dict(model_type="qwen2", rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=32_768)
SHAPES = {
    "tiny-random": QWEN
    | dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2-12x768": QWEN
    | dict(
        vocab_size=151_936,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": QWEN
    | dict(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": QWEN
    | dict(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "llama3.2-3b": dict(
        model_type="llama",
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        rope_theta=5e5,
        rope_scaling=dict(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
}
SPREAD = 0.6  # sigma of the log-normal lengths; their median is a third of the longest


@contextmanager
def weights(cfg: "BenchConfig", device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """The model's hub id or folder.

    Random weights are saved in a temporary folder, so that they are loaded (and quantised) like
    any other model.
    """
    if cfg.arch == "none":
        yield tiny.resolve(cfg.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(cfg.arch)
        torch.manual_seed(cfg.seed)
        hf_logging.disable_progress_bar()
        with device:  # made on the device in dtype, because 7B in fp32 would be 30 GB
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield folder


def model_config(arch: str) -> transformers.PretrainedConfig:
    """The configuration of a shape.

    Weights near 1 / sqrt(hidden) spread the logits by about 1, so that sampling is neither uniform
    nor always the same token.
    """
    shape = dict(SHAPES[arch])
    return transformers.AutoConfig.for_model(
        shape.pop("model_type"),
        **shape,
        initializer_range=shape["hidden_size"] ** -0.5,
        bos_token_id=None,
        eos_token_id=0,
    )


def draw_lengths(n: int, least: int, most: int, kind: str, seed: int) -> list[int]:
    """Lengths of n responses in tokens: all `most`, or ragged.

    Ragged lengths are log-normal with median most / 3 and sigma SPREAD, clipped to [least, most].
    About 3 % reach `most`.
    """
    if kind == "equal":
        return [most] * n
    draws = np.random.default_rng(seed).lognormal(math.log(most / 3), SPREAD, n)
    return np.clip(np.rint(draws), least, most).astype(int).tolist()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer in which token i is the word `i` and 0 the end, so that text is lossless."""
    vocabulary = {"<end>": 0} | {str(i): i for i in range(1, vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def even(text: str) -> float:
    """A reward for random text: 1 if the number of its last token is even."""
    last = text.rpartition(" ")[2]
    return float(last.isdigit() and int(last) % 2 == 0)


class Step:
    """A training step of ours, phase by phase, with the functions of train.py."""

    def __init__(self, cfg: "BenchConfig", device: torch.device, dtype: torch.dtype, name: str):
        self.cfg, self.number = cfg, 0
        self.model = load_model(name, cfg.quant, dtype, device)
        check_positions(self.model, cfg.prompt_tokens, cfg.new_tokens)
        if cfg.lora_r:
            add_lora(self.model, cfg.lora_r, 2 * cfg.lora_r)
        else:
            self.model.requires_grad_(True)
        if cfg.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.settings = Config(
            lr=1e-6,
            lora_r=cfg.lora_r,
            base_every=1 if cfg.reference else 10**9,  # the KL in the log costs a forward
            updates_per_step=cfg.updates,
            prompts_per_step=cfg.prompts,
            group_size=cfg.group,
            max_new_tokens=cfg.new_tokens,
            rollout_rows=cfg.rollout_rows,
            micro_batch_tokens=cfg.micro_batch_tokens,
            seed=cfg.seed,
        )
        self.optimizer = torch.optim.AdamW(
            trainable(self.model).values(),
            self.settings.lr,
            self.settings.adam_betas,
            weight_decay=0.0,
        )
        self.items = None
        if cfg.data:
            self.tokenizer = load_tokenizer(name)
            prompt = "qwen_math" if self.tokenizer.chat_template else "none"
            problems = load_problems(tiny.resolve(cfg.data), "train")
            self.items, _ = prepare(problems, prompt, self.tokenizer, cfg.prompt_tokens)
            self.watched = rewards.watched()
            self.reward_fn = rewards.parse(self.settings.reward)
        else:
            vocabulary = self.model.config.vocab_size
            self.tokenizer = word_tokenizer(vocabulary)
            rng = np.random.default_rng(cfg.seed)
            # Token 0 ends a peer's responses.
            self.prompts = rng.integers(1, vocabulary, (cfg.prompts, cfg.prompt_tokens)).tolist()
            B = cfg.prompts * cfg.group
            self.budgets = draw_lengths(B, cfg.min_new, cfg.new_tokens, cfg.lengths, cfg.seed)

    def generate(self, prompts: list[list[int]], budgets: list[int]) -> Generation:
        """Run our sampler. budgets: the forced length of each row."""
        group, most = len(budgets) // len(prompts), max(budgets)
        ragged = {} if min(budgets) == most else {"budgets": budgets}
        noise = (TRAIN_NOISE, self.cfg.seed, self.number)
        no_end = [-1]  # a token that cannot be sampled
        with decode_with(self.model, self.cfg.rollout_weights):  # merging is timed too
            return generate(
                self.model,
                prompts,
                group,
                most,
                no_end,
                noise,
                max_rows=self.cfg.rollout_rows,
                **ragged,
            )

    def rollout(self) -> list[int]:
        """Sample without decoding to text, as a peer's generate does. Returns the lengths."""
        self.out = self.generate(self.prompts, self.budgets)
        return self.out.length.tolist()

    def sample(self) -> None:
        if self.items is not None:
            with decode_with(self.model, self.cfg.rollout_weights):
                self.rollouts = train.sample_rollouts(
                    self.model, self.tokenizer, self.items, self.settings, self.number
                )
            return
        self.rollout()
        out = self.out
        text = decode(self.tokenizer, out.tokens, out.prompt_len, out.length)
        B = len(text)
        self.rollouts = Rollouts(
            out.tokens,
            out.prompt_len,
            out.length,
            text,
            [Problem("", "", "")] * B,
            out.finished,
            self.cfg.group,
            self.cfg.seed,
            self.number,
            sampler_logp=out.sampler_logp,
        )

    def score(self) -> None:
        r, cfg = self.rollouts, self.cfg
        total = (r.prompt_len + r.length).tolist()
        self.parts = partition(total, cfg.updates, cfg.micro_batch_tokens, cfg.seed, r.step)
        train.score(self.model, r, self.parts, self.settings)

    def reward(self) -> None:
        r = self.rollouts
        if self.items is None:
            reward = torch.tensor([even(text) for text in r.text])
        else:
            reward = self.reward_fn(r)
            rounding = rewards.rounding(self.reward_fn, r, rounding_error(self.model))
            metrics.describe(r, reward, rounding, self.watched, set())
        self.advantage = grpo.advantages(reward, r.group_size, self.settings.adv_norm)

    def update(self) -> None:
        train.update(
            self.model, self.optimizer, self.rollouts, self.advantage, self.parts, self.settings
        )
